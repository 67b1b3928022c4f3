"""The same runs by every engine: `docs/evidence/data/workers.json`.

    python benchmarks/workers.py --quickstart runs/quickstart
    python benchmarks/workers.py … --vllm vllm/bin/python --ways vLLM --data engines_vllm.json

Runs the quickstart's PPO, and GRPO with the same models and prompts, from the models of a finished quickstart: in one
process with all threads; in two and three with as many threads together; with replies drawn by vLLM; and with workers
and vLLM started by Ray. Every reply of every step is kept. Noted are the first step in which any reply differs, the
largest relative difference of a metric until then, the metrics at the end, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from speed import DATA, machine

KEEP = ("sample_every=1", "num_samples=1000")
RUNS = {
    "PPO": (),
    "GRPO": ("advantage=grpo", "kl_in=loss", 'kl={name="fixed", coef=0.04}', "num_epochs=1", "num_minibatches=1"),
}


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a file of a run."""
    return [json.loads(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]


def ways(vllm: str | None) -> dict[str, list[str]]:
    """What computes beside one process, and the overrides that say so."""
    sampler = ["engine.sampler.name=vllm", f"engine.sampler.python={vllm}"]
    ray = ["engine.workers=2", "engine.ray=local"]
    return {
        "2 processes": ["engine.workers=2"],
        "3 processes": ["engine.workers=3"],
        "vLLM": sampler,
        "Ray, 2 processes": ray,
        "Ray, 2 processes, vLLM": [*ray, *sampler],
    }


def train(settings: Path, out: Path, *changed: str) -> None:
    """One run, from its beginning unless it is finished."""
    if (out / "summary.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    stage = [sys.executable, "-m", "trimtab", "online", str(settings), "--out", str(out)]
    subprocess.run([*stage, *KEEP, *changed], check=True, stdout=subprocess.DEVNULL)


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
        for way, seconds_ in found[name]["seconds_of_a_step"].items():
            if way == "one process":
                lines.append(f"| {name} | {way} | | | | {seconds_} s |")
                continue
            row = found[name][way]
            metric, worst = row["largest_relative_difference_until_then"]
            ends = ", ".join(
                f"`{n}` {a:.2f} and {b:.2f}" for n, (a, b) in row["last_step_here_and_in_one_process"].items()
            )
            same = f"{row['replies_equal_until_step']} of {row['steps']}"
            lines.append(f"| {name} | {way} | {same} | {worst:.0e} (`{metric}`) | {ends} | {seconds_} s |")
    return "\n".join(lines)


def command(options: argparse.Namespace) -> str:
    """What repeats the figures, with names for the places of this machine."""
    vllm = ["--vllm", "vllm/bin/python"] if options.vllm else []
    words = ["--quickstart", "runs/quickstart", *vllm, "--ways", *options.ways, "--data", options.data]
    return shlex.join(["python", "benchmarks/workers.py", *words])


def main() -> None:
    """Runs all, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="the directory of a finished quickstart")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter with vLLM")
    plain = ["2 processes", "3 processes"]
    parser.add_argument("--ways", nargs="+", choices=ways(None), default=plain, help="beside one process")
    parser.add_argument("--data", default="workers.json", choices=("workers.json", "engines_vllm.json"))
    parser.add_argument("--keep", action="store_true", help="compare finished runs that are there from before")
    options = parser.parse_args()
    if options.vllm is None and any("vLLM" in way for way in options.ways):
        parser.error("vLLM needs --vllm PYTHON")
    if not options.keep:
        shutil.rmtree(options.quickstart / "workers", ignore_errors=True)
    known = ways(options.vllm)
    chosen = {"one process": []} | {way: known[way] for way in options.ways}
    settings = options.quickstart / "ppo" / "settings.toml"
    result: dict[str, Any] = {"command": command(options), "machine": machine()}
    for name, changed in RUNS.items():
        result[name] = {"seconds_of_a_step": {}}
        alone = options.quickstart / "workers" / f"{name}, one process"
        for way, how in chosen.items():
            out = alone.with_name(f"{name}, {way}")
            train(settings, out, *how, *changed)
            if out != alone:
                result[name][way] = compared(out, alone)
            result[name]["seconds_of_a_step"][way] = seconds(out)
    DATA.with_name(options.data).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
