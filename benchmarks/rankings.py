"""Reward models from rankings and from separate pairs of the same judgements: held-out accuracy beside its limit.

    python benchmarks/rankings.py --start runs/quickstart --seeds 0 1 2

`--start` is a finished `trimtab quickstart`. Each seed draws some of its prompts, each with four replies of which
annotators compared every two, and trains three reward models on these votes with equally many updates: from rankings,
in which the pairs of a prompt stay together and count together as one (InstructGPT, eq. 1), from rankings in which
every pair counts the same, and from pairs shuffled one by one, so that a reply comes again in up to three updates. The
limit is the accuracy of a judge who knows what the annotators like. One thread; runs that have finished are not
repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from algorithms import ROOT, run
from overoptimisation import Votes, reward_stage, rows_of, votes_of
from results import mean_over_seeds, write_result
from speed import DATA

from trimtab.core.files import write_rows

OUT = DATA.with_name("rankings.json")
PROMPTS, PAIRS_OF_PROMPT = 8, 6
"""Prompts of an update, and the pairs of a prompt with four replies."""
APART = "pairs one by one"
WAYS: dict[str, dict[str, Any]] = {
    "rankings, each prompt the same": {
        "batch_size": PROMPTS,
        "loss": {"name": "bradley_terry", "mean_over": "prompts"},
    },
    "rankings, each pair the same": {"batch_size": PROMPTS},
    APART: {"batch_size": PROMPTS * PAIRS_OF_PROMPT},
}


def apart(votes: Votes) -> Votes:
    """The same pairs, each with an id of its own in place of its prompt's: pairs of one id stay together."""
    file = votes.train.with_name("apart.jsonl")
    if not file.exists():
        rows = rows_of(votes.train)
        write_rows(file, [row | {"prompt": row["prompt"] | {"id": f"pair-{i}"}} for i, row in enumerate(rows)])
    return votes._replace(train=file)


def one_seed(start: Path, out: Path, seed: int, num_prompts: int) -> dict[str, Any]:
    """The held-out accuracy of each way, and its limit."""
    here = out / f"seed-{seed}-prompts-{num_prompts}"
    votes = votes_of(start, here / "votes", seed, num_prompts=num_prompts)
    found: dict[str, Any] = {"seed": seed, "num_pairs": len(rows_of(votes.train)), "ways": {}}
    for number, (way, changes) in enumerate(WAYS.items()):
        stage = reward_stage(start, apart(votes) if way == APART else votes, **changes)
        used = run({"reward": stage}, here / f"way-{number}", seed=seed)
        card = json.loads((here / f"way-{number}" / "reward" / "summary.json").read_text(encoding="utf-8"))
        kept = ("accuracy", "accuracy_low", "accuracy_high", "num_steps")
        found["ways"][way] = {name: card[name] for name in kept} | {"cpu_seconds": used["cpu_seconds"]}
        found["bayes_accuracy"] = card["bayes_accuracy"]
    return found


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each way the mean accuracy, what is missing to the limit, and what it is ahead of separate pairs."""
    means = {}
    for way in rows[0]["ways"]:
        each = [
            {
                "accuracy": row["ways"][way]["accuracy"],
                "below_bayes": row["bayes_accuracy"] - row["ways"][way]["accuracy"],
                "ahead": row["ways"][way]["accuracy"] - row["ways"][APART]["accuracy"],
                "cpu_seconds": row["ways"][way]["cpu_seconds"],
            }
            for row in rows
        ]
        means[way] = {key: value for name in each[0] for key, value in mean_over_seeds(each, name).items()}
    return means


def table(rows: Sequence[Mapping[str, Any]], means: Mapping[str, Any]) -> str:
    """The rows of the page."""
    lines = [
        "| learned from | accuracy, each seed | mean | points below the limit | points over pairs one by one | "
        "CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for way, mean in means.items():
        cells = [way, " · ".join(f"{row['ways'][way]['accuracy']:.1%}" for row in rows), f"{mean['accuracy']:.1%}"]
        cells += [_points(mean, "below_bayes", ".1f"), "" if way == APART else _points(mean, "ahead", "+.1f")]
        lines.append("| " + " | ".join([*cells, f"{mean['cpu_seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def _points(entry: Mapping[str, Any], name: str, digits: str) -> str:
    known = [100 * entry[key] for key in (name, f"{name}_low", f"{name}_high") if key in entry]
    value, *bounds = (f"{points:{digits}}" for points in known)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def main() -> None:
    """Trains, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "rankings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-prompts", type=int, default=550, help="whose votes a seed's models learn from")
    options = parser.parse_args()
    start, out = options.start.resolve(), options.out.resolve()
    rows = [one_seed(start, out, seed, options.train_prompts) for seed in options.seeds]
    means = over_seeds(rows)
    write_result(OUT, options, runs=rows, over_seeds=means)
    print(table(rows, means))


if __name__ == "__main__":
    main()
