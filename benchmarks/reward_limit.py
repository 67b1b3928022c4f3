"""What a reward model lacks to the limit of the votes, where it lacks it, and what more or fewer passes over the same
votes bring.

    python benchmarks/reward_limit.py --starts runs/quickstart-0 runs/quickstart-1 --passes 1 1.5

`--starts` are finished quickstarts of different seeds, each with a base and votes of its own. A reward model learns
from the votes of each, as the quickstart's does, in so many passes; the settings are otherwise the same. It is judged
on the pairs held out by its *expected accuracy*: how often a vote agrees with it on average, from the probabilities
with which the simulated annotators prefer a reply. Votes drawn from them add noise of half a point, and nothing else.
The limit is that of a judge who knows the probabilities.

What is missing is split by what the two replies are: one right and one wrong (a wrong decision or a false fact), or
both alike, where only manners tell them apart. One thread; models that are there are not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from algorithms import QUICKSTART, run
from overoptimisation import Votes, reward_stage, rows_of
from results import mean_over_seeds, write_result
from speed import DATA

from trimtab.core.config import load_run_file
from trimtab.core.types import PreferencePair
from trimtab.data.layouts import load
from trimtab.rewards.scorer import TOKEN_BUDGET, RewardModelScorer, rewards_of
from trimtab.stages.card import SIDES, texts_of
from trimtab.stats import Floats
from trimtab.worlds.helpdesk_gold import gold

OUT = DATA.with_name("reward_limit.json")
OWN_PASSES = load_run_file(QUICKSTART)["stages"]["reward"]["num_epochs"]
NAMES = {
    "accuracy": "expected accuracy",
    "missing": "points to the limit",
    "missing_decision": "of these, one reply right",
    "missing_manners": "of these, both alike",
    "train_missing": "points to the limit, on votes that it learned from",
}


def probabilities(file: Path, most: int) -> tuple[list[dict[str, Any]], Floats]:
    """The first rows of a file of the quickstart's votes, and [B] how likely the chosen reply is preferred."""
    rows = rows_of(file)[:most]
    return rows, np.array([row["prompt"]["facts"]["probability_chosen"] for row in rows])


def is_right(row: Mapping[str, Any], side: str) -> bool:
    """Whether the reply decides as the policy says and says nothing false."""
    return gold(row["prompt"]["facts"], row[side]).parts["decision"] > 0


def judged(model: Path, file: Path, most: int) -> dict[str, float]:
    """The expected accuracy of a reward model on the votes of a file, and what it lacks to the limit: in all, and by
    kind of pair."""
    rows, chances = probabilities(file, most)
    scorer = RewardModelScorer.from_directory(str(model), token_budget=TOKEN_BUDGET)
    records = load(PreferencePair, str(file)).records[:most]
    texts = [text for side in SIDES for text in texts_of(records, side)]
    chosen, rejected = rewards_of(scorer, texts).reshape(2, -1)
    agrees = np.where(chosen > rejected, chances, np.where(chosen < rejected, 1 - chances, 0.5))
    missing = np.maximum(chances, 1 - chances) - agrees
    one_right = np.array([is_right(row, "chosen") != is_right(row, "rejected") for row in rows])
    return {
        "accuracy": float(agrees.mean()),
        "limit": float(np.maximum(chances, 1 - chances).mean()),
        "missing": float(missing.mean()),
        "missing_decision": float((missing * one_right).mean()),
        "missing_manners": float((missing * ~one_right).mean()),
    }


def one_model(start: Path, out: Path, seed: int, passes: float) -> dict[str, Any]:
    """What a model of so many passes comes to. The quickstart's own is taken for as many as it makes."""
    compare = start / "compare"
    train, held_out = compare / "train.jsonl", compare / "held_out.jsonl"
    model, cost = start / "reward" / "model", {}
    if passes != OWN_PASSES:
        here = out / f"{start.name}-passes-{passes:g}"
        stage = reward_stage(start, Votes(train, held_out, held_out), num_epochs=passes)
        cost, model = run({"reward": stage}, here, seed=seed), here / "reward" / "model"
    found = judged(model, held_out, most=10**9)
    known = judged(model, train, most=9000)
    return {"start": start.name, "seed": seed, "passes": passes, "train_missing": known["missing"]} | found | dict(cost)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each number of passes: means over the seeds, with their intervals where there are several."""
    lines = [
        "| passes | limit, each seed | expected accuracy, each seed | " + " | ".join(NAMES.values()) + " |",
        "|---" * (3 + len(NAMES)) + "|",
    ]
    for passes in sorted({row["passes"] for row in rows}):
        each = [row for row in rows if row["passes"] == passes]
        cells = [" · ".join(f"{row[name]:.1%}" for row in each) for name in ("limit", "accuracy")]
        cells += [
            _points(mean_over_seeds(each, name), name) if len(each) > 1 else _alone(each[0], name) for name in NAMES
        ]
        lines.append(f"| {passes:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _points(entry: Mapping[str, float], name: str) -> str:
    value, low, high = (100 * entry[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _alone(row: Mapping[str, Any], name: str) -> str:
    return f"{100 * row[name]:.1f}"


def main() -> None:
    """Trains, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=Path, nargs="+", required=True, help="quickstarts of the seeds 0, 1, 2, …")
    parser.add_argument("--out", type=Path, default=Path("runs/reward-limit"))
    parser.add_argument("--passes", type=float, nargs="+", default=[1.0, OWN_PASSES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out.resolve()
    rows = []
    for passes in options.passes:
        for seed, start in enumerate(options.starts):
            rows.append(one_model(start.resolve(), out, seed, passes))
            print({key: round(value, 4) for key, value in rows[-1].items() if isinstance(value, float)}, flush=True)
    write_result(OUT, options, runs=rows)
    print(table(rows))


if __name__ == "__main__":
    main()
