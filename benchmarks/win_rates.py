"""Win rates of AlpacaEval's models from its annotations beside its published columns, null models, and agreement of
simple rules with people on MT-Bench, as JSON.

    python benchmarks/win_rates.py [--data FOLDER] [--people FILE]

Writes `docs/evidence/data/win_rates.json` and prints the tables of docs/evidence/guard.md. FOLDER holds
`annotations.jsonl.gz` and `leaderboard.jsonl.gz`, FILE is the human majority of MT-Bench. What is not given is not
computed again; the null models always are.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path

import numpy as np
import scipy

from trimtab.core.types import PreferencePair
from trimtab.data.layouts import load
from trimtab.evals.comparers import LENGTH, ScoreComparer, agreement, agreement_of_words
from trimtab.evals.length_control import OutcomeTable, difficulties, length_controlled
from trimtab.evals.style_control import style_controlled
from trimtab.evals.verdict_files import read_verdicts
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import by_matchup, differences, win_rate_of
from trimtab.votes.table import style_difference, style_of

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "evidence" / "data" / "win_rates.json"
# The weight of tanh(length gap) in AlpacaEval's published regressions (its repository, metrics/weights/
# weighted_alpaca_eval_gpt4_turbo/length_controlled_v1/baseline_gpt4_1106_preview.csv, Apache-2.0), for the models here.
PUBLISHED_PHI = {
    "claude-2": -1.8740,
    "claude": -1.8570,
    "claude-instant-1.2": -1.8745,
    "Mixtral-8x7B-Instruct-v0.1_concise": -1.9900,
    "gpt-3.5-turbo-1106": -2.0421,
    "gpt-3.5-turbo-0301": -1.9406,
    "humpback-llama2-70b": -1.9624,
    "OpenHermes-2.5-Mistral-7B": -1.5323,
    "gpt-3.5-turbo-1106_concise": -2.1447,
    "gemma-7b-it": -1.5081,
    "oasst-sft-llama-33b": -2.0305,
    "oasst-rlhf-llama-33b": -1.3950,
    "alpaca-farm-ppo-sim-gpt4-20k": -2.1393,
    "alpaca-7b_verbose": -1.8937,
    "alpaca-farm-ppo-human": -1.9643,
    "vicuna-7b": -1.7563,
    "alpaca-7b": -2.2068,
    "phi-2-sft": -1.6671,
    "oasst-sft-pythia-12b": -1.8115,
}


def alpaca_eval(folder: Path) -> list[dict]:
    """Each model's rates in points, computed from the annotations and as published."""
    with gzip.open(folder / "leaderboard.jsonl.gz", "rt", encoding="utf-8") as lines:
        board = {row["name"]: row for row in map(json.loads, lines)}
    matchups = by_matchup(read_verdicts([folder / "annotations.jsonl.gz"]).verdicts)
    tables = {model: OutcomeTable.of(rows) for (model, _), rows in matchups.items()}
    rows = []
    for found, verdicts in zip(length_controlled(matchups), matchups.values(), strict=True):
        published = board[found.model]
        if published["leaderboard_win_rate"] is None:
            continue
        raw = win_rate_of(verdicts).rate
        spread = published["leaderboard_standard_error"] * math.sqrt(published["n_total"])
        error = spread * math.sqrt(1 / raw.count - 1 / published["n_total"])
        phi = PUBLISHED_PHI.get(found.model)
        others = [table for model, table in tables.items() if model != found.model]
        rows.append(
            {
                "model": found.model,
                "prompts": raw.count,
                "raw": round(100 * raw.value, 2),
                "raw_published": round(published["leaderboard_win_rate"], 2),
                "error_of_the_part": round(error, 2),
                "controlled": round(100 * found.rate.value, 2),
                "controlled_low": round(100 * found.rate.low, 2),
                "controlled_high": round(100 * found.rate.high, 2),
                "controlled_published": round(published["leaderboard_length_controlled_winrate"], 2),
                "phi": round(found.phi, 2),
                "phi_published": phi,
                "controlled_at_published_phi": None
                if phi is None
                else round(100 * with_phi(tables[found.model], difficulties(others), phi), 2),
            }
        )
    return sorted(rows, key=lambda row: -row["raw_published"])


def with_phi(table: OutcomeTable, difficulty: dict[str, float], phi: float) -> float:
    """The length-controlled rate if the effect of length is given and the rest is fitted without a penalty."""
    design = np.column_stack([np.ones(len(table.prompts)), [difficulty[prompt] for prompt in table.prompts]])

    def loss(beta: np.ndarray) -> float:
        logits = design @ beta + phi * table.gap
        return float((np.logaddexp(0, logits) - table.outcome * logits).sum())

    return float(scipy.special.expit(design @ scipy.optimize.minimize(loss, [0.0, 1.0]).x).mean())


def null_models(num_evaluations: int = 200, num_prompts: int = 100) -> dict:
    """Models equal to their baseline but for replies that are longer, which the judge likes, in simulated evaluations.

    Two equal models are judged in both orders by a judge with position bias, on prompts with a leaning of their own.
    """
    generator = np.random.default_rng(0)
    held = {"raw": [], "difference": [], "controlled": []}
    values = {name: [] for name in held}
    for seed in range(num_evaluations):
        rows, long = [], []
        for i in range(num_prompts):
            leaning, gap = generator.normal(), generator.normal(loc=-0.5)
            for model in ("a", "b"):
                for side, bias in (("model", 0.5), ("baseline", -0.5)):
                    wins = float(generator.random() < scipy.special.expit(leaning + bias))
                    rows.append(
                        PairVerdict(prompt=str(i), model=model, baseline="base", verdict=wins, shown_first=side)
                    )
            wins = float(generator.random() < scipy.special.expit(-1.5 * np.tanh(gap)))
            lengths = {"length": 5000, "baseline_length": 5000 + round(1000 * gap)}
            long.append(PairVerdict(prompt=str(i), model="long", baseline="base", verdict=wins, **lengths))
        matchups = by_matchup(rows)
        found = {
            "raw": (win_rate_of(matchups["a", "base"], seed=seed).rate, 0.5),
            "difference": (differences(matchups)[0].difference, 0.0),
            "controlled": (length_controlled(by_matchup(long), seed=seed)[0].rate, 0.5),
        }
        for name, (interval, truth) in found.items():
            held[name].append(interval.low <= truth <= interval.high)
            values[name].append(interval.value)
    return {
        name: {
            "mean": round(float(np.mean(values[name])), 4),
            "covered": int(np.sum(held[name])),
            "of": num_evaluations,
        }
        for name in held
    }


def styled_models(num_evaluations: int = 200, num_prompts: int = 100) -> dict:
    """A model that equals its baseline but for longer replies with more bold words, which the judge likes."""
    generator = np.random.default_rng(1)
    held, values, raw = [], [], []
    for _ in range(num_evaluations):
        rows = []
        for i in range(num_prompts):
            replies = [_reply(generator, more=more) for more in (3, 0)]
            gap = style_difference(style_of(replies[0]), style_of(replies[1]))
            wins = float(generator.random() < scipy.special.expit(1.5 * gap[0] + gap[3]))
            rows.append(
                PairVerdict(prompt=str(i), model="styled", baseline="base", verdict=wins).with_replies(*replies)
            )
        rate = style_controlled(by_matchup(rows)).rates[0].rate
        held.append(rate.low <= 0.5 <= rate.high)
        values.append(rate.value)
        raw.append(np.mean([row.verdict for row in rows]))
    return {
        "mean": round(float(np.mean(values)), 4),
        "raw": round(float(np.mean(raw)), 4),
        "covered": int(np.sum(held)),
        "of": num_evaluations,
    }


def _reply(generator: np.random.Generator, *, more: int) -> str:
    num_words, num_bold = generator.integers(60, 140) + 20 * more, generator.integers(0, 3) + more
    return " ".join(["word"] * int(num_words) + ["**word**"] * int(num_bold))


def alpaca_eval_style(folder: Path) -> dict:
    """The rates of AlpacaEval's models at equal style, and the effects of style on its judge."""
    matchups = by_matchup(read_verdicts([folder / "annotations.jsonl.gz"]).verdicts)
    found = style_controlled(matchups)
    raw = {model: win_rate_of(rows).rate for (model, _), rows in matchups.items()}
    rates = [
        {
            "model": row.model,
            "raw": round(100 * raw[row.model].value, 2),
            "styled": [round(100 * x, 2) for x in (row.rate.value, row.rate.low, row.rate.high)],
        }
        for row in found.rates
    ]
    effects = {name: [round(x, 4) for x in (gain.value, gain.low, gain.high)] for name, gain in found.effects}
    return {"rates": sorted(rates, key=lambda row: -row["raw"]), "effects": effects}


def style_table(found: dict) -> str:
    """The effects of style, in log-odds."""
    lines = ["| a typical difference in | gain in log-odds |", "|---|---|"]
    lines += [f"| {name} | {x:+.2f} [{low:+.2f}, {high:+.2f}] |" for name, (x, low, high) in found["effects"].items()]
    return "\n".join(lines)


def style_rates_table(found: dict) -> str:
    """The rates at equal style, in points."""
    lines = ["| model | raw | at equal style |", "|---|---|---|"]
    for row in found["rates"]:
        value, low, high = row["styled"]
        lines.append(f"| {row['model']} | {row['raw']:.1f} | {value:.1f} [{low:.1f}, {high:.1f}] |")
    return "\n".join(lines)


def people(file: Path) -> dict:
    """How often simple rules prefer the reply that people prefer."""
    loaded = load(PreferencePair, file)
    pairs = loaded.records
    constant = ScoreComparer("constant", lambda texts: np.zeros(len(texts)))
    found = [agreement(pairs, constant), agreement(pairs, LENGTH), agreement_of_words(pairs)]
    return {
        "read": loaded.counts["rows"],
        "prompts": len({pair.prompt.id for pair in pairs}),
        "rows": [
            {
                "comparer": row.comparer,
                "rate": [round(100 * x, 2) for x in (row.rate.value, row.rate.low, row.rate.high)],
                "pairs": row.rate.count,
                "ties": row.num_ties,
            }
            for row in found
            if row is not None
        ],
    }


def people_table(found: dict) -> str:
    """Agreement with people, in points."""
    lines = ["| comparer | agrees with people | pairs | ties |", "|---|---|---|---|"]
    for row in found["rows"]:
        value, low, high = row["rate"]
        lines.append(f"| {row['comparer']} | {value:.1f} [{low:.1f}, {high:.1f}] | {row['pairs']} | {row['ties']} |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """The models, computed beside published, in points."""
    lines = [
        "| model | raw | published | apart | error of a part | at equal length | published | apart | phi given |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        published, at_phi = row["controlled_published"], row["controlled_at_published_phi"]
        given = "" if at_phi is None else f"{at_phi - published:+.1f}"
        bounds = f"[{row['controlled_low']:.1f}, {row['controlled_high']:.1f}]"
        lines.append(
            f"| {row['model']} | {row['raw']:.1f} | {row['raw_published']:.1f} "
            f"| {row['raw'] - row['raw_published']:+.1f} | {row['error_of_the_part']:.1f} "
            f"| {row['controlled']:.1f} {bounds} | {published:.1f} | {row['controlled'] - published:+.1f} | {given} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """How many models are within half a point, and the mean distance."""
    known = [row for row in rows if row["phi_published"] is not None]
    lines = ["| | models | within 0.5 points | mean distance | largest |", "|---|---|---|---|---|"]
    for name, some, value, published in (
        ("raw", rows, "raw", "raw_published"),
        ("at equal length", rows, "controlled", "controlled_published"),
        ("the same, where phi is published", known, "controlled", "controlled_published"),
        ("the same, with phi as published", known, "controlled_at_published_phi", "controlled_published"),
    ):
        apart = [abs(row[value] - row[published]) for row in some]
        within = sum(x <= 0.5 for x in apart)
        lines.append(f"| {name} | {len(apart)} | {within} | {np.mean(apart):.1f} | {max(apart):.1f} |")
    return "\n".join(lines)


def null_table(found: dict) -> str:
    """Means and coverage of the null models."""
    names = {"raw": "win rate", "difference": "difference of two models", "controlled": "win rate at equal length",
             "styled": "win rate at equal style"}  # fmt: skip
    lines = ["| | mean | 95% intervals that hold the truth |", "|---|---|---|"]
    for name, title in names.items():
        row = found[name]
        lines.append(f"| {title} | {row['mean']:.3f} | {row['covered']} of {row['of']} |")
    return "\n".join(lines)


def main() -> None:
    """Computes and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of AlpacaEval's annotations and leaderboard")
    parser.add_argument("--people", type=Path, help="MT-Bench's human majority, with input, output_1, output_2, label")
    options = parser.parse_args()
    result = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    command = "python benchmarks/win_rates.py --data FOLDER --people FILE"
    result |= {"command": command, "null": null_models() | {"styled": styled_models()}}
    if options.data is not None:
        result |= {"alpaca_eval": alpaca_eval(options.data), "style": alpaca_eval_style(options.data)}
    if options.people is not None:
        result["people"] = people(options.people)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if "alpaca_eval" in result:
        print(table(result["alpaca_eval"]), summary(result["alpaca_eval"]), sep="\n\n", end="\n\n")
    if "style" in result:
        print(style_table(result["style"]), style_rates_table(result["style"]), sep="\n\n", end="\n\n")
    if "people" in result:
        print(people_table(result["people"]), end="\n\n")
    print(null_table(result["null"]))


if __name__ == "__main__":
    main()
