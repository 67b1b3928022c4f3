"""What the guard is worth: false alarms and power of its test, and the checkpoints it chooses, as JSON and tables.

    python benchmarks/guard.py rates                      # simulated runs; a minute
    python benchmarks/guard.py runs --start runs/quickstart --seeds 0 1 2

`runs` trains on the help desk from the SFT model and the reward model of a quickstart. *Hacked* runs have no KL
penalty; a guard watches them, by gold on 64 prompts, and takes no action. Every checkpoint is then measured by gold on
other prompts (`trimtab choose`), which is taken as the truth: what the checkpoint that the guard names is worth beside
the best of the run, the last step and the step of the highest reward. *Healthy* runs have the quickstart's penalty and
a guard that may stop them: how often it does is its rate of false stops. One thread; runs that have finished are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from algorithms import QUICKSTART, run
from speed import DATA, machine

from trimtab.evals.checkpoint_choice import (
    MeasuredCheckpoint,
    best_checkpoint,
    corrected_level,
    fall_test,
)
from trimtab.stats import wilson

FILES = {"rates": DATA.with_name("guard_rates.json"), "runs": DATA.with_name("guard_runs.json")}
NUM_CHECKS, ALPHA = 11, 0.05
SHAPES = {
    "stays": [0.6] * NUM_CHECKS,
    "rises and stays": [0.3, 0.45, 0.55, *[0.6] * 8],
    "rises all the time": [0.3 + 0.04 * k for k in range(NUM_CHECKS)],
    "falls by 5% of its peak a check, after check 4": [0.3, 0.45, 0.55, 0.6, *[0.6 - 0.03 * k for k in range(7)]],
    "falls by 10%": [0.3, 0.45, 0.55, 0.6, *[0.6 - 0.06 * k for k in range(7)]],
}
"""The true means of simulated runs, check by check; the last two fall from the fifth check on."""
GUARD = {"measure": [{"name": "gold", "world": "helpdesk"}], "prompts": "world:helpdesk?split=test&num=64&seed=3"}
TRUTH = "world:helpdesk?split=test&num=300&seed=7"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": {"advantage": {"name": "grpo"}, "prompts_per_step": 8, "group_size": 8},
}


# --- the test, on simulated runs ---


def simulated(means: list[float], seed: int, num_prompts: int) -> list[MeasuredCheckpoint]:
    """Scores in [0, 1]: prompts differ in difficulty (deviation 0.15), replies have noise of their own (0.2)."""
    generator = np.random.default_rng(seed)
    prompts = generator.normal(0, 0.15, num_prompts)
    return [
        MeasuredCheckpoint(
            step=10 * k,
            values=tuple(np.clip(mean + prompts + generator.normal(0, 0.2, num_prompts), 0, 1).tolist()),
            kl=float(k),
            reward=0.0,
        )
        for k, mean in enumerate(means)
    ]


def alarm(series: list[MeasuredCheckpoint], *, corrected: bool) -> int | None:
    """The first check whose fall from the best before it counts as real."""
    for k in range(1, len(series)):
        level = corrected_level(ALPHA, NUM_CHECKS if corrected else 2)
        if fall_test(best_checkpoint(series[:k]), series[k], level=level).is_real:
            return k
    return None


def rates(num_runs: int, num_prompts: int) -> list[dict[str, Any]]:
    """For each shape, with so many prompts: in how many runs there was an alarm, when, and in how many without the
    correction."""
    found = []
    for name, means in SHAPES.items():
        runs = [simulated(means, seed, num_prompts) for seed in range(num_runs)]
        alarms = [k for series in runs if (k := alarm(series, corrected=True)) is not None]
        plain = sum(alarm(series, corrected=False) is not None for series in runs)
        truths = [means[best_checkpoint(series).step // 10] / max(means) for series in runs]
        found.append(
            {
                "shape": name,
                "num_prompts": num_prompts,
                "num_runs": num_runs,
                "num_alarms": len(alarms),
                **wilson(len(alarms), num_runs).named("alarm_fraction"),
                "num_alarms_uncorrected": plain,
                "true_fall_at_alarm": float(np.median([1 - means[k] / max(means) for k in alarms])) if alarms else None,
                "chosen_share_of_peak": float(np.mean(truths)),
                "chosen_share_of_peak_least": float(np.min(truths)),
            }
        )
    return found


def rates_table(rows: list[dict[str, Any]]) -> str:
    """The rows of the page."""
    titles = ["true course", "prompts", "alarms", "95% interval", "without correction", "true fall at the alarm"]
    titles.append("chosen, of the peak")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        fall = "–" if row["true_fall_at_alarm"] is None else f"{row['true_fall_at_alarm']:.0%}"
        lines.append(
            f"| {row['shape']} | {row['num_prompts']} | {row['num_alarms']} of {row['num_runs']} | "
            f"{row['alarm_fraction_low']:.1%} to {row['alarm_fraction_high']:.1%} | {row['num_alarms_uncorrected']} | "
            f"{fall} | {row['chosen_share_of_peak']:.1%}, at worst {row['chosen_share_of_peak_least']:.1%} |"
        )
    return "\n".join(lines)


# --- runs on the help desk ---


def trained(start: Path, out: Path, *, algorithm: str, seed: int, healthy: bool, options: argparse.Namespace) -> Path:
    """The directory of one run."""
    guard = GUARD | {"every": options.every} | ({"actions": ["stop"]} if healthy else {})
    settings = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))["stages"]["ppo"] | ALGORITHMS[algorithm]
    settings |= {
        "model": str(start / "sft" / "model"),
        "rewards": [{"name": "model", "path": str(start / "reward" / "model")}],
        "kl": {"name": "fixed", "coef": 0.1 if healthy else 0.0},
        "num_steps": options.steps,
        "checkpoint_every": options.every,
        "keep_checkpoints": 2 if healthy else 1 + options.steps // options.every,
        "guard": guard,
    }
    directory = out / f"{algorithm}-{'healthy' if healthy else 'hacked'}-{seed}"
    run({"online": settings}, directory, seed=seed)
    return directory / "online"


def truth(directory: Path) -> dict[str, Any]:
    """The decision on the other prompts, which has the gold of every checkpoint."""
    file = directory.with_name("truth.json")
    if not file.exists():
        command = [sys.executable, "-m", "trimtab", "choose", str(directory), "--prompts", TRUTH, "--out", str(file)]
        subprocess.run([*command, "num_prompts=300"], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def shares(decision: dict[str, Any], gold: dict[int, float]) -> dict[str, Any]:
    """What three ways of choosing are worth, as shares of the best true gold of the run."""
    rewarded = decision["chosen_against"]["best_reward"]["step"]
    chosen = {"guard": decision["chosen_step"], "last": decision["checkpoints"][-1]["step"], "reward": rewarded}
    peak = max(gold.values())
    return {"peak": peak, "peak_step": max(gold, key=lambda step: (gold[step], -step))} | {
        key: value
        for name, step in chosen.items()
        for key, value in ((f"{name}_step", step), (f"{name}_share", gold[step] / peak))
    }


def one_run(start: Path, algorithm: str, seed: int, healthy: bool, options: argparse.Namespace) -> dict[str, Any]:
    """What one run shows."""
    directory = trained(start, options.out, algorithm=algorithm, seed=seed, healthy=healthy, options=options)
    decision = json.loads((directory / "decision.json").read_text(encoding="utf-8"))
    lines = (directory / "guard.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "event", "measure", "measure_low", "kl", "reward", "p_value", "fired")
    found = {"algorithm": algorithm, "seed": seed, "healthy": healthy, "stopped": decision["stopped"]}
    found["checks"] = [{key: row[key] for key in kept if key in row} for row in map(json.loads, lines)]
    if healthy:
        return found
    true = truth(directory)
    gold = {row["step"]: row["measure"] for row in true["checkpoints"]}
    return found | shares(decision, gold) | {"true_gold": gold, "predicted_peak": true["predicted_peak"]}


def runs_table(rows: list[dict[str, Any]]) -> str:
    """The rows of the page."""
    lines = [
        "| run | seed | peak of gold | guard | last step | highest reward | stopped |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["healthy"]:
            lines.append(
                f"| {row['algorithm']}, healthy | {row['seed']} | | | | | {'yes' if row['stopped'] else 'no'} |"
            )
            continue
        cells = [f"{row[f'{way}_share']:.1%} (step {row[f'{way}_step']})" for way in ("guard", "last", "reward")]
        peak = f"{row['peak']:.3f} (step {row['peak_step']})"
        lines.append(f"| {row['algorithm']}, no penalty | {row['seed']} | {peak} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def main() -> None:
    """Runs one part, writes what was found and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["rates", "runs"])
    parser.add_argument("--num-runs", type=int, default=1000, help="Of each simulated shape.")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256], help="Of simulated runs.")
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=["hacked", "healthy"], default=["hacked", "healthy"])
    options = parser.parse_args()
    if options.part == "rates":
        rows = [row for num_prompts in options.prompts for row in rates(options.num_runs, num_prompts)]
        table = rates_table
    else:
        rows = [
            one_run(options.start, algorithm, seed, kind == "healthy", options)
            for kind in options.kinds
            for algorithm in options.algorithms
            for seed in options.seeds
        ]
        table = runs_table
    chosen = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"command": shlex.join(["python", *sys.argv]), "arguments": chosen, "machine": machine(), "runs": rows}
    FILES[options.part].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
