"""Best-of-n, and PPO, by one reward model, by an ensemble of them and by their average: gold as the push grows.

    python benchmarks/overoptimisation.py --start runs/quickstart --seeds 0 1 2
    python benchmarks/overoptimisation.py --start runs/quickstart --seeds 0 1 2 --ppo 0.1 0

`--start` is a finished `trimtab quickstart`, of which the base, the SFT model and the votes are used. Each seed draws
some of its prompts and trains five reward models on their votes, as they are and with a quarter of the pairs turned
round; the five differ in the order of the data and begin with one score head, so that they can be averaged too. All
ways of judging choose among the same replies of the SFT model, drawn once. With `--ppo` every way also trains a policy
for each KL coefficient. Everything runs on one thread, and what has finished is not repeated.
`docs/evidence/reward-models.md` has the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from algorithms import QUICKSTART, ROOT, run
from pictures import write_picture
from results import mean_over_seeds, write_result
from speed import DATA

from trimtab.core import seeds
from trimtab.core.config import load_run_file
from trimtab.core.files import write_rows
from trimtab.core.types import Message, PreferencePair
from trimtab.data.layouts import load
from trimtab.evals.overoptimisation import best_of_each, best_of_n_kl, hacking_summary, sizes_up_to
from trimtab.evals.reward_card import SIDES, ordering_accuracy
from trimtab.math.ensembles import aggregate
from trimtab.reports.charts import GREY, PALETTE, Axis, Chart
from trimtab.rewards.ensemble import EnsembleScorer
from trimtab.rewards.scorer import TOKEN_BUDGET, RewardModelScorer, rewards_of
from trimtab.stages.average import average
from trimtab.stages.card import texts_of
from trimtab.stats import Floats, bootstrap_mean, moving_mean, paired_difference

OUT = DATA.with_name("overoptimisation.json")
PICTURE = DATA.parents[1] / "ensembles.svg"
NOISE = (0.0, 0.25)
"""Shares of the pairs that are turned round."""
MEMBERS = 5
LARGEST = 512
NUM_FEW = 100
SIZES = sizes_up_to(LARGEST)
ONE, WARM, GOLD = "one model", "WARM average", "gold itself"
AGGREGATES: dict[str, tuple[Any, float | None]] = {
    "mean of five": ("mean", None),
    "lowest of five (WCO)": ("min", None),
    "mean − variance / 2 (UWO)": ("variance", 0.5),
}
WAYS = (ONE, *AGGREGATES, WARM)
WINDOW = 7
"""Steps over which the curves of PPO are averaged."""


class Votes(NamedTuple):
    """The files with a seed's pairs to train on, and the votes to judge by."""

    train: Path
    held_out: Path
    few: Path
    """One vote on each of the first `NUM_FEW` pairs to judge by, for the way to an average."""


# --- votes and reward models ---


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def votes_of(start: Path, out: Path, seed: int, *, num_prompts: int, noise: float = 0.0) -> Votes:
    """The pairs of so many prompts of the quickstart, drawn by the seed; a share of the pairs is turned round."""
    held_out = start / "compare" / "held_out.jsonl"
    votes = Votes(out / "train.jsonl", held_out, out / "few.jsonl")
    if votes.train.exists():
        return votes
    by_pair = {(row["prompt"]["id"], frozenset((row["chosen"], row["rejected"]))): row for row in rows_of(held_out)}
    rows = rows_of(start / "compare" / "train.jsonl")
    ids = sorted({row["prompt"]["id"] for row in rows})
    drawn = set(seeds.generator(seed, "prompts").choice(ids, size=num_prompts, replace=False).tolist())
    turned = seeds.generator(seed, "turned").random(len(rows)) < noise
    out.mkdir(parents=True, exist_ok=True)
    kept = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if turn else row
        for row, turn in zip(rows, turned, strict=True)
        if row["prompt"]["id"] in drawn
    ]
    write_rows(votes.few, [*by_pair.values()][:NUM_FEW])
    write_rows(votes.train, kept)
    return votes


def reward_stage(start: Path, votes: Votes, **changes: Any) -> dict[str, Any]:
    """The reward stage of the quickstart on these votes."""
    stage = load_run_file(QUICKSTART)["stages"]["reward"]
    files = {"model": str(start / "base" / "model"), "data": str(votes.train), "held_out_data": str(votes.held_out)}
    return stage | files | changes


def reward_models(start: Path, out: Path, seed: int, *, num_prompts: int, noise: float) -> dict[str, Any]:
    """The directories of the ensemble and of the average, and their shares of held-out votes in order."""
    votes = votes_of(start, out / "votes", seed, num_prompts=num_prompts, noise=noise)
    run({"reward": reward_stage(start, votes, members=MEMBERS, head_seed=0)}, out / "ensemble", seed=seed)
    ensemble, merged = out / "ensemble" / "reward" / "model", out / "average"
    if not (merged / "average.json").exists():
        # An average that is worse than its members is a result here, so it is not refused.
        average(out=merged, models=[str(ensemble)], data=str(votes.few), force=True)
    card = json.loads((out / "ensemble" / "reward" / "summary.json").read_text(encoding="utf-8"))
    return {
        "ensemble": ensemble,
        "average": merged,
        "accuracy": {
            ONE: statistics.fmean(card["ensemble"]["accuracies"]),
            "mean of five": card["accuracy"],
            WARM: accuracy_of(merged, votes.held_out),
        },
        "bayes_accuracy": card["bayes_accuracy"],
        "error_correlation": card["ensemble"]["error_correlation"],
    }


def accuracy_of(model: Path, pairs: Path) -> float:
    """The share of pairs that one reward model orders as they are labelled."""
    scorer = RewardModelScorer.from_directory(str(model), token_budget=TOKEN_BUDGET)
    records = load(PreferencePair, str(pairs)).records
    scores = rewards_of(scorer, [text for side in SIDES for text in texts_of(records, side)])
    return ordering_accuracy(scores[: len(records)], scores[len(records) :]).value


# --- best-of-n ---


def replies_of(start: Path, out: Path, num_prompts: int) -> list[dict[str, Any]]:
    """So many test prompts, each with LARGEST replies of the SFT model and their gold."""
    settings = {
        "stage": "select",
        "model": str(start / "sft" / "model"),
        "prompts": f"world:helpdesk?split=test&num={num_prompts}&seed=7",
        "rewards": [{"name": "gold", "world": "helpdesk"}],
        "world": "helpdesk",
        "replies_per_prompt": LARGEST,
        "prompts_per_step": 4,
        "sampling": {"max_new_tokens": 64, "batch_size": 512},
    }
    run({"test": settings}, out / f"replies-{num_prompts}", seed=0)
    return rows_of(out / f"replies-{num_prompts}" / "test" / "replies.jsonl")


def scores_of(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], kept: Path) -> Floats:
    """[MEMBERS + 1, P, LARGEST] scores of the members, on one scale, and of the average."""
    if kept.exists():
        return np.load(kept)
    ensemble = EnsembleScorer.load(str(found["ensemble"]), token_budget=TOKEN_BUDGET)
    merged = RewardModelScorer.from_directory(str(found["average"]), token_budget=TOKEN_BUDGET)
    table = []
    for row in rows:
        chat = ensemble.chat
        prompt = tuple(chat.encode_prompt([Message(**message) for message in row["prompt"]["messages"]]))
        ids = [(prompt, tuple(chat.encode_response(r["response"], ended=r["finished"]))) for r in row["replies"]]
        table.append(torch.cat([ensemble.member_scores(ids), merged.score_ids(ids)[None]]).numpy())
    scores = np.array(table, dtype=np.float64).transpose(1, 0, 2)
    np.save(kept, scores)
    return scores


def gold_of(scores: Floats, gold: Floats) -> dict[str, dict[str, Any]]:
    """For each way of judging, the mean gold of the best of n for each of SIZES, and with intervals over prompts the
    last of them, and what that is ahead of one model. The figures of one model are the mean of the members' own."""
    members = torch.from_numpy(scores[:MEMBERS]).flatten(1)
    ranked = {name: aggregate(members, *how).view(gold.shape).numpy() for name, how in AGGREGATES.items()}
    tables = {name: best_of_each(gold, by, SIZES) for name, by in ranked.items()}
    tables |= {WARM: best_of_each(gold, scores[MEMBERS], SIZES), GOLD: best_of_each(gold, gold, SIZES)}
    tables[ONE] = np.mean([best_of_each(gold, member, SIZES) for member in scores[:MEMBERS]], axis=0)
    return {
        name: {"curve": tables[name].mean(0).tolist()}
        | bootstrap_mean(tables[name][:, -1]).named("end")
        | paired_difference(tables[name][:, -1], tables[ONE][:, -1]).named("ahead")
        for name in (*WAYS, GOLD)
    }


# --- PPO ---


def ppo(start: Path, out: Path, found: Mapping[str, Any], way: str, *, coef: float, seed: int, num_steps: int) -> Path:
    """The directory of the quickstart's PPO against one way of judging."""
    reward: dict[str, Any] = {"name": "model", "path": str(found["ensemble"])}
    if way == WARM:
        reward["path"] = str(found["average"])
    elif way == ONE:
        reward["path"] = str(found["ensemble"] / "members" / "1")
    else:
        how, uncertainty = AGGREGATES[way]
        reward |= {"aggregate": how} | ({} if uncertainty is None else {"aggregate_coef": uncertainty})
    stage = load_run_file(QUICKSTART)["stages"]["ppo"] | {
        "model": str(start / "sft" / "model"),
        "rewards": [reward],
        "kl": {"name": "fixed", "coef": coef},
        "num_steps": num_steps,
    }
    stage["critic"] |= {"init": "policy"}
    directory = out / f"ppo-{WAYS.index(way)}-kl-{coef:g}-{num_steps}-steps"
    run({"ppo": stage}, directory, seed=seed)
    return directory / "ppo"


def course(directory: Path) -> dict[str, list[float]]:
    """KL and gold of every step, as moving means."""
    rows = rows_of(directory / "metrics.jsonl")
    names = {"kl": "policy/kl", "reward": "reward/mean", "gold": "gold/mean"}
    return {name: moving_mean([row[metric] for row in rows], WINDOW).tolist() for name, metric in names.items()}


# --- seeds ---


def falls(curve: Sequence[float]) -> dict[str, float]:
    """The peak of a curve, its end, and by what share of the peak it ends lower."""
    found = hacking_summary([(0.0, 0.0, gold) for gold in curve])
    return {"peak": found.peak_gold, "end": found.final_gold, "fall": found.fall_fraction}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each noise and way: peak, end and fall of gold, what the end is ahead of one model, and accuracies."""
    means = []
    for noise in dict.fromkeys(row["noise"] for row in rows):
        mine = [row for row in rows if row["noise"] == noise]
        for way in (*WAYS, GOLD):
            each = [row["gold"][way] | falls(row["gold"][way]["curve"]) for row in mine]
            entry: dict[str, Any] = {"noise": noise, "way": way}
            for name in ("peak", "end", "fall", "ahead"):
                entry |= mean_over_seeds(each, name)
            average_curve = [statistics.fmean(found["curve"][i] for found in each) for i in range(len(SIZES))]
            entry["peak_n"] = SIZES[int(np.argmax(average_curve))]
            if way in mine[0]["accuracy"]:
                entry["accuracy"] = statistics.fmean(row["accuracy"][way] for row in mine)
            means.append(entry)
    return means


def ppo_over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each noise, coefficient and way: peak, end and fall of gold over the steps, and the last KL."""
    means = []
    for noise, coef, way in dict.fromkeys((row["noise"], row["coef"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["noise"], row["coef"], row["way"]) == (noise, coef, way)]
        each = [falls(row["gold"]) | {"kl": row["kl"][-1]} for row in mine]
        entry: dict[str, Any] = {"noise": noise, "coef": coef, "way": way, "num_seeds": len(mine)}
        for name in ("peak", "end", "fall", "kl"):
            entry |= mean_over_seeds(each, name)
        means.append(entry)
    return means


# --- showing ---


def table(means: Sequence[Mapping[str, Any]]) -> str:
    """The rows of the page for best-of-n."""
    lines = [
        "| pairs turned round | judged by | held-out votes in order | peak gold | at n | gold at n = 512 | fall | "
        "gold at 512 over one model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in means:
        cells = [
            f"{entry['noise']:.0%}",
            entry["way"],
            f"{entry['accuracy']:.1%}" if "accuracy" in entry else "",
            f"{entry['peak']:.3f}",
            str(entry["peak_n"]),
            _bounded(entry, "end", ".3f"),
            _bounded(entry, "fall", ".1%"),
            "" if entry["way"] == ONE else _bounded(entry, "ahead", "+.3f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ppo_table(means: Sequence[Mapping[str, Any]]) -> str:
    """The rows of the page for PPO."""
    lines = [
        "| pairs turned round | KL coefficient | judged by | peak gold | gold at the end | fall | KL at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in means:
        cells = [f"{entry['noise']:.0%}", f"{entry['coef']:g}", entry["way"], f"{entry['peak']:.3f}"]
        cells += [_bounded(entry, "end", ".3f"), _bounded(entry, "fall", ".1%"), f"{entry['kl']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bounded(entry: Mapping[str, Any], name: str, digits: str) -> str:
    if f"{name}_low" not in entry:
        return f"{entry[name]:{digits}}"
    return f"{entry[name]:{digits}} [{entry[f'{name}_low']:{digits}}, {entry[f'{name}_high']:{digits}}]"


def picture(rows: Sequence[Mapping[str, Any]]) -> dict[str, Chart]:
    """Gold of the best of n over the square root of KL, the mean over seeds, one chart for each noise."""
    x = [math.sqrt(best_of_n_kl(n)) for n in SIZES]
    charts = {}
    for noise in dict.fromkeys(row["noise"] for row in rows):
        chart = Chart(Axis("√KL of best-of-n (√nats; an upper bound)", low=0.0), Axis("gold"), 330, wide=True)
        for way, colour in zip((*WAYS, GOLD), (*PALETTE[: len(WAYS)], GREY), strict=True):
            curves = [row["gold"][way]["curve"] for row in rows if row["noise"] == noise]
            y = np.mean(curves, axis=0)
            chart.legend.append((way, colour))
            chart.line(x, y, colour, size=1.5)
            texts = [f"{way}, best of {n}: {value:.3f}" for n, value in zip(SIZES, y, strict=True)]
            chart.dots(x, y, [colour], texts, size=2.5)
        charts[f"Gold of the best of n, with {noise:.0%} of the pairs turned round"] = chart
    return charts


def main() -> None:
    """Trains, scores, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "overoptimisation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-prompts", type=int, default=550, help="whose votes a seed's models learn from")
    parser.add_argument("--test-prompts", type=int, default=24, help=f"each with {LARGEST} replies")
    parser.add_argument("--ppo", type=float, nargs="*", default=[], help="KL coefficients")
    parser.add_argument("--steps", type=int, default=32, help="of PPO")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, out = options.start.resolve(), options.out.resolve()
    replies = replies_of(start, out, options.test_prompts)
    gold = np.array([[reply["gold"] for reply in row["replies"]] for row in replies])
    rows, runs = [], []
    for seed in options.seeds:
        for noise in NOISE:
            here = out / f"seed-{seed}-prompts-{options.train_prompts}" / f"noise-{noise:g}"
            found = reward_models(start, here, seed, num_prompts=options.train_prompts, noise=noise)
            scores = scores_of(found, replies, here / f"scores-{options.test_prompts}.npy")
            known = {name: found[name] for name in ("accuracy", "bayes_accuracy", "error_correlation")}
            rows.append({"seed": seed, "noise": noise, **known, "gold": gold_of(scores, gold)})
            for coef in options.ppo:
                for way in WAYS:
                    directory = ppo(start, here, found, way, coef=coef, seed=seed, num_steps=options.steps)
                    runs.append({"seed": seed, "noise": noise, "coef": coef, "way": way, **course(directory)})
    means, ppo_means = over_seeds(rows), ppo_over_seeds(runs)
    write_result(OUT, options, sizes=SIZES, runs=rows, over_seeds=means, ppo=runs, ppo_over_seeds=ppo_means)
    write_picture(picture(rows), PICTURE)
    print(table(means))
    print(ppo_table(ppo_means))


if __name__ == "__main__":
    main()
