"""What `trimtab plan` predicts of memory against what the run then takes, on the workloads of `speed.py`.

    python benchmarks/plan_memory.py --rows HH_JSONL_GZ

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
    "SFT, 30m, 2 processes": ("sft", "30m"),
    "SFT, 30m, 2 processes with shards": ("sft", "30m"),
    "PPO, 30m, 2 processes": ("ppo", "30m"),
    "PPO, 30m, 2 processes with shards": ("ppo", "30m"),
}
STAGES = {"dpo": "preference", "ppo": "online", "grpo": "online"}


def measure(values: dict[str, Any]) -> float:
    """Peak memory in GB of the run in a process of its own."""
    code = (
        "import json, sys; from pathlib import Path; from trimtab.stages.pipeline import run_pipeline\n"
        "print(json.dumps(run_pipeline(json.loads(sys.argv[1]), Path(sys.argv[2]))['peak_rss_gb']))"
    )
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", code, json.dumps(values), f"{scratch}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "benchmarks")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Writes predicted and measured peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="harmless-base/test.jsonl.gz of Anthropic/hh-rlhf")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "bench" / "models")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--data", type=Path, default=DATA / "plan.json")
    o = parser.parse_args()
    o.rows, o.models, o.data = o.rows.resolve(), o.models.resolve(), o.data.resolve()
    make(o.rows, o.models)
    os.chdir(ROOT / "benchmarks")  # where GRPO's reward function is
    found = json.loads(o.data.read_text(encoding="utf-8")) if o.data.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl.gz"
        choose_rows(o.rows, o.models / "30m", 16 * o.steps, 0, rows)
        for name in o.workloads:
            kind, model = WORKLOADS[name][0], o.models / WORKLOADS[name][1]
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
            table = settings_of(kind, used, str(rows), options) | {"stage": STAGES.get(kind, kind)}
            values: dict[str, Any] = {"stages": {kind: table}}
            if "processes" in name:
                values["engine"] = {"workers": 2, "shard": "shards" in name}
            predicted = plan(values, where=name)[0].peak_rss_gb
            measured = measure(values)
            found[name] = {"predicted_gb": predicted, "measured_gb": measured, "ratio": predicted / measured}
            print(name, found[name], flush=True)
            o.data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
