"""The same runs in one process and in several: `docs/evidence/data/workers.json`.

    python benchmarks/workers.py --quickstart runs/quickstart

Runs the quickstart's PPO, and GRPO with the same models and prompts, from the models of a finished quickstart: in one
process with all threads, and in two and three with as many threads together. Every reply of every step is kept. Noted
are the first step in which any reply differs, the largest relative difference of a metric until then and at the end of
training, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from speed import DATA, machine

OUT = DATA.with_name("workers.json")
KEEP = ("sample_every=1", "num_samples=1000")
RUNS = {
    "PPO": (),
    "GRPO": ("advantage=grpo", "kl_in=loss", 'kl={name="fixed", coef=0.04}', "num_epochs=1", "num_minibatches=1"),
}


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a file of a run."""
    return [json.loads(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]


def train(settings: Path, out: Path, workers: int, *changed: str) -> None:
    """One run, from its beginning unless it is finished."""
    if (out / "summary.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    stage = [sys.executable, "-m", "trimtab", "online", str(settings), "--out", str(out)]
    subprocess.run([*stage, f"engine.workers={workers}", *KEEP, *changed], check=True, stdout=subprocess.DEVNULL)


def compared(out: Path, alone: Path) -> dict[str, Any]:
    """How a run differs from that of one process."""
    texts, metrics = ([rows(d, name) for d in (out, alone)] for name in ("samples.jsonl", "metrics.jsonl"))
    differ = [
        mine["step"]
        for mine, other in zip(*texts, strict=True)
        if (mine["prompt"], mine["response"]) != (other["prompt"], other["response"])
    ]
    same_until = min(differ, default=len(metrics[1]) + 1) - 1
    worst = {"": 0.0}
    for mine, other in zip(*metrics, strict=True):
        if other["step"] > same_until:
            break
        for name, value in other.items():
            if name.startswith("time/") or name == "rollout/logprob_difference" or value is None:
                continue
            worst[name] = max(worst.get(name, 0.0), abs(mine[name] - value) / max(abs(value), 1e-2))
    name = max(worst, key=lambda n: worst[n])
    last = {n: [round(r[-1][n], 4) for r in metrics] for n in ("gold/mean", "policy/kl")}
    return {
        "steps": len(metrics[1]),
        "replies": len(texts[1]),
        "replies_equal_until_step": same_until,
        "replies_that_differ": len(differ),
        "largest_relative_difference_until_then": [name, worst[name]],
        "last_step_here_and_in_one_process": last,
    }


def seconds(out: Path) -> float:
    """The median seconds of a step."""
    return round(statistics.median(row["time/step_seconds"] for row in rows(out, "metrics.jsonl")), 3)


def table(found: dict[str, Any]) -> str:
    """The rows of the page."""
    lines = []
    for name in RUNS:
        for workers, seconds_ in found[name]["seconds_of_a_step"].items():
            if workers == "1":
                lines.append(f"| {name} | 1 | | | | {seconds_} s |")
                continue
            row = found[name][f"{workers} processes"]
            metric, worst = row["largest_relative_difference_until_then"]
            ends = ", ".join(
                f"`{n}` {a:.2f} and {b:.2f}" for n, (a, b) in row["last_step_here_and_in_one_process"].items()
            )
            same = f"{row['replies_equal_until_step']} of {row['steps']}"
            lines.append(f"| {name} | {workers} | {same} | {worst:.0e} (`{metric}`) | {ends} | {seconds_} s |")
    return "\n".join(lines)


def main() -> None:
    """Runs all, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="the directory of a finished quickstart")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--keep", action="store_true", help="compare finished runs that are there from before")
    options = parser.parse_args()
    if not options.keep:
        shutil.rmtree(options.quickstart / "workers", ignore_errors=True)
    settings = options.quickstart / "ppo" / "settings.toml"
    result: dict[str, Any] = {"command": "python benchmarks/workers.py", "machine": machine()}
    for name, changed in RUNS.items():
        alone = options.quickstart / "workers" / f"{name}-1"
        train(settings, alone, 1, *changed)
        result[name] = {"seconds_of_a_step": {"1": seconds(alone)}}
        for workers in options.workers:
            out = alone.with_name(f"{name}-{workers}")
            train(settings, out, workers, *changed)
            result[name][f"{workers} processes"] = compared(out, alone)
            result[name]["seconds_of_a_step"][str(workers)] = seconds(out)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
