"""GRPO on sums with rollouts that lag by 0, 1 and 2 steps: section 4 of `docs/evidence/engines.md`, as JSON and tables.

    python benchmarks/staleness.py

The base and the SFT model of `examples/arithmetic/grpo.toml` are made once, with seed 0. From there its GRPO is run for
each seed and lag, one run after the other on one thread, with half the prompts of the example in a step and twice its
rate, and always with a correction (which lag 0 does not need, so that nothing but the lag differs). Each policy is then
tested on the example's prompts. Runs that have finished are not repeated. Sampler and policy share their weights here,
so a lag saves no time; what it costs in learning is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from algorithms import ARITHMETIC, run
from speed import DATA, machine

from trimtab.stats import t_interval

OUT = DATA.with_name("staleness.json")
BIN = 25
"""Steps that are averaged to a point of the curve: 25 steps of 128 replies."""
SHORT = {"prompts_per_step": 8, "optimizer": {"learning_rate": 2e-4}, "correction": {"kind": "truncate"}}
FIGURES = {"accuracy": "test accuracy at the end", "reward": "reward, mean of all steps"}


def train_and_test(start: Path, out: Path, *, seed: int, lag: int, num_steps: int) -> dict[str, Any]:
    """The curve and the test of one run."""
    stages = tomllib.loads(ARITHMETIC.read_text(encoding="utf-8"))["stages"]
    directory, sft = out / f"seed-{seed}" / f"lag-{lag}-of-{num_steps}-steps", str(start / "sft" / "model")
    changed = SHORT | {"model": sft, "num_steps": num_steps, "engine": {"max_staleness": lag}}
    used = run({"grpo": stages["grpo"] | changed}, directory / "train", seed=seed)
    tested = stages["evaluate"] | {"model": str(directory / "train" / "grpo" / "model"), "baseline": sft}
    run({"evaluate": tested}, directory / "test", seed=0)
    metrics = (directory / "train" / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in metrics]
    found = json.loads((directory / "test" / "evaluate" / "summary.json").read_text(encoding="utf-8"))
    rewards = [row["reward/mean"] for row in rows]
    after = rows[num_steps // 2 :]
    return {
        "seed": seed,
        "lag": lag,
        "accuracy_sft": found["baseline"]["gold"],
        **{f"accuracy{end}": found["policy"][f"gold{end}"] for end in ("", "_low", "_high")},
        "num_prompts": found["policy"]["num_replies"],
        "reward": statistics.fmean(rewards),
        "curve": [round(statistics.fmean(rewards[i : i + BIN]), 4) for i in range(0, num_steps, BIN)],
        # Of the second half of the run.
        "effective_fraction": statistics.fmean(row["rollout/effective_fraction"] for row in after),
        "sampler_kl": statistics.fmean(row["rollout/sampler_kl"] for row in after),
        "ratio_bounded_fraction": statistics.fmean(row["rollout/ratio_bounded_fraction"] for row in after),
        "cpu_seconds": used["cpu_seconds"],
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each lag, how its figures differ from those of lag 0 with the same seed, with an interval over the seeds."""
    found = []
    for lag in sorted({row["lag"] for row in rows} - {0}):
        entry: dict[str, Any] = {"lag": lag}
        for name in FIGURES:
            of = {(row["seed"], row["lag"]): row[name] for row in rows}
            differences = [of[seed, lag] - of[seed, 0] for seed, other in of if other == lag]
            entry |= t_interval(differences).named(name)
        found.append(entry)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of the page: a row a run."""
    curve = [f"{i + 1}–{min(i + BIN, BIN * len(rows[0]['curve']))}" for i in range(0, BIN * len(rows[0]["curve"]), BIN)]
    titles = ["lag", "seed", *(f"steps {steps}" for steps in curve), "test accuracy", "effective sample size"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in sorted(rows, key=lambda row: (row["lag"], row["seed"])):
        accuracy = f"{row['accuracy']:.1%} [{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}]"
        cells = [row["lag"], row["seed"], *(f"{x:.1%}" for x in row["curve"])]
        cells += [accuracy, f"{row['effective_fraction']:.2%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def table_of_differences(found: list[dict[str, Any]]) -> str:
    """The rows of the page that compare each lag with none."""
    lines = [f"| lag | {' | '.join(FIGURES.values())} |", "|---|---|---|"]
    for entry in found:
        cells = [f"{entry[n]:+.1%} [{entry[f'{n}_low']:+.1%}, {entry[f'{n}_high']:+.1%}]" for n in FIGURES]
        lines.append(f"| {entry['lag']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def listed(numbers: Sequence[int]) -> str:
    """As they stand in a command."""
    return " ".join(map(str, numbers))


def main() -> None:
    """Runs all, writes what was found and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lags", type=int, nargs="+", default=[1, 2], help="beside none")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    stages = tomllib.loads(ARITHMETIC.read_text(encoding="utf-8"))["stages"]
    start = options.out / "seed-0" / "start"
    run({name: stages[name] for name in ("base", "sft")}, start, seed=0)
    rows = [
        train_and_test(start, options.out, seed=seed, lag=lag, num_steps=options.steps)
        for seed in options.seeds
        for lag in sorted({0, *options.lags})
    ]
    result = {
        "command": f"python benchmarks/staleness.py --seeds {listed(options.seeds)} --lags {listed(options.lags)} "
        f"--steps {options.steps}",
        "machine": machine(),
        "num_steps": options.steps,
        "runs": rows,
        "compared_with_lag_0": compared(rows),
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(table_of_differences(result["compared_with_lag_0"]))


if __name__ == "__main__":
    main()
