"""What `trimtab plan` predicts of memory against what the run then takes, on the workloads of `speed.py`.

    python benchmarks/plan_memory.py --rows HH_JSONL_GZ                       # one process: plan.json
    python benchmarks/plan_memory.py --rows HH_JSONL_GZ --processes --steps 12  # several: plan_processes.json

Uses the models of `make_models.py`, which are made if they are not there. The run has `--steps` steps of other rows
than the rehearsal saw last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from make_models import make
from speed import choose_rows
from speed_ours import settings_of
from spine import DATA, ROOT

from trimtab.stages.plan import plan

WORKLOADS = {
    "SFT, 30m": ("sft", "30m"),
    "reward, 30m": ("reward", "30m"),
    "DPO, 30m": ("dpo", "30m"),
    "GRPO, 30m": ("grpo", "30m"),
    "PPO, 30m": ("ppo", "30m"),
    "SFT, bigvocab": ("sft", "bigvocab"),
    "PPO, bigvocab": ("ppo", "bigvocab"),
}
IN_PROCESSES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "SFT, 30m, in 2": ("sft", "30m", {"workers": 2}, {}),
    "SFT, 30m, sharded in 2": ("sft", "30m", {"workers": 2, "shard": True}, {}),
    "GRPO, 30m with an adapter, in 2": ("grpo", "30m", {"workers": 2}, {"adapter": {"rank": 16}}),
    "PPO, 6m, in 2": ("ppo", "6m", {"workers": 2}, {"num_epochs": 1}),
    "PPO, 6m, sharded in 3": ("ppo", "6m", {"workers": 3, "shard": True}, {"num_epochs": 1}),
}
"""Stage, model, settings of the engine, and further settings of the stage."""
STAGES = {"dpo": "preference", "ppo": "online", "grpo": "online"}


def measure(values: dict[str, Any]) -> list[float]:
    """Peak memory in GB of each process of the run, which has a program of its own."""
    code = (
        "import json, sys; from pathlib import Path; from trimtab.stages.pipeline import run_pipeline\n"
        "print(json.dumps(run_pipeline(json.loads(sys.argv[1]), Path(sys.argv[2]))['peak_rss_gb_each']))"
    )
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", code, json.dumps(values), f"{scratch}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "benchmarks")
    return [float(gb) for gb in json.loads(done.stdout.splitlines()[-1])]


def table(found: dict[str, Any]) -> str:
    """The rows of runs in several processes on the page."""
    lines = []
    for name, row in found.items():
        each = [", ".join(f"{gb:.2f}" for gb in row[key]) for key in ("predicted_gb_each", "measured_gb_each")]
        lines.append(
            f"| {name} | {row['predicted_gb']:.2f} | {row['measured_gb']:.2f} | {row['ratio']:.2f} | {each[0]} "
            f"| {each[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Writes predicted and measured peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="harmless-base/test.jsonl.gz of Anthropic/hh-rlhf")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "bench" / "models")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--processes", action="store_true", help="those of several processes")
    parser.add_argument("--workloads", nargs="*", help=", ".join([*WORKLOADS, *IN_PROCESSES]))
    parser.add_argument("--data", type=Path)
    o = parser.parse_args()
    o.workloads = o.workloads or list(IN_PROCESSES if o.processes else WORKLOADS)
    o.data = o.data or DATA / ("plan_processes.json" if o.processes else "plan.json")
    o.rows, o.models, o.data = o.rows.resolve(), o.models.resolve(), o.data.resolve()
    make(o.rows, o.models)
    os.chdir(ROOT / "benchmarks")  # where GRPO's reward function is
    found = json.loads(o.data.read_text(encoding="utf-8")) if o.data.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl.gz"
        choose_rows(o.rows, o.models / "30m", 16 * o.steps, 0, rows)
        for name in o.workloads:
            kind, size, engine, more = IN_PROCESSES[name] if o.processes else (*WORKLOADS[name], {}, {})
            model = o.models / size
            options = SimpleNamespace(
                token_budget=2048,
                batch=16,
                maxlen=512,
                steps=o.steps,
                gen=64,
                group=8,
                precision="",
                reward_model=f"{model}-rm",
            )
            used = f"{model}-rm" if kind == "reward" else str(model)
            stage = settings_of(kind, used, str(rows), options) | {"stage": STAGES.get(kind, kind)} | more
            values: dict[str, Any] = {"stages": {kind: stage}, "engine": engine}
            predicted = plan(values, where=name)[0].peak_rss_gb_each
            measured = measure(values)
            sums = {"predicted_gb": sum(predicted), "measured_gb": sum(measured)}
            found[name] = sums | {"ratio": sum(predicted) / sum(measured)}
            if o.processes:
                found[name] |= {"predicted_gb_each": predicted, "measured_gb_each": measured}
            print(name, found[name], flush=True)
            o.data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
