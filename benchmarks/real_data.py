"""DPO on hh-rlhf and GRPO on GSM8K as the examples have them, the second killed once: figures of `algorithms.md`.

    python benchmarks/real_data.py [--hh HH_JSONL_GZ] [--gsm8k GSM8K_JSONL_GZ]

The data come from the hub, or from files that are named. Pipelines that have finished are not repeated; both runs
start afresh. Writes docs/evidence/data/real.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "evidence" / "data" / "real.json"
KILL_AFTER = 30
GRPO_COLUMNS = ("reward/exact_answer", "reward/regex", "reward/overlong", "rollout/length_mean",
                "rollout/truncated_fraction", "policy/kl", "reward/mean")  # fmt: skip
DPO_VALUES = ("accuracy", "accuracy_low", "accuracy_high", "policy/validation_margin", "loss/validation",
              "policy/validation_chosen_reward", "policy/validation_rejected_reward", "num_held_out", "num_prompts",
              "num_steps", "counts")  # fmt: skip


def trimtab(*arguments: str) -> list[str]:
    """The command line, by this interpreter."""
    return [sys.executable, "-m", "trimtab", *arguments]


def pipeline(name: str, rows: str) -> None:
    """Makes the model that a run starts from, unless it is there."""
    out = f"runs/{name}"
    if not (ROOT / out / "sft" / "model").exists():
        subprocess.run(
            trimtab("run", f"examples/{name}/pipeline.toml", *given("variables.rows", rows), "--out", out),
            check=True,
            cwd=ROOT,
        )


def given(key: str, value: str) -> list[str]:
    """The override, if there is a value for it."""
    return [f"{key}={value}"] if value else []


def lines_of(run: Path) -> list[str]:
    """A line for each step whose metrics are written; one being written is left out."""
    file = run / "metrics.jsonl"
    return file.read_text("utf-8").split("\n")[:-1] if file.exists() else []


def dpo(rows: str) -> dict[str, Any]:
    """Figures of the DPO run."""
    pipeline("hh", rows)
    out = ROOT / "runs" / "hh" / "dpo"
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(
        trimtab("preference", "examples/hh/dpo.toml", *given("data", rows), "--out", str(out)), check=True, cwd=ROOT
    )
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    return {name: summary[name] for name in DPO_VALUES}


def grpo(rows: str) -> dict[str, Any]:
    """Figures of the GRPO run, which is killed after KILL_AFTER steps and started again by the same command."""
    pipeline("gsm8k", rows)
    out = ROOT / "runs" / "gsm8k" / "grpo"
    shutil.rmtree(out, ignore_errors=True)
    command = trimtab("online", "examples/gsm8k/grpo.toml", *given("prompts", rows), "--out", str(out))
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT) as process:
        while len(lines_of(out)) < KILL_AFTER and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    at_kill = len(lines_of(out))
    subprocess.run(command, check=True, cwd=ROOT)
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines_of(out)]
    parts = {"first": rows[:10], "last": rows[-10:]}
    return {
        "killed_after_step": at_kill,
        "steps": len(rows),
        "each_step_once": [row["step"] for row in rows] == list(range(1, len(rows) + 1)),
        "seconds": round(time.perf_counter() - began),
        "failed_rewards": sum(row[k] for row in rows for k in row if k.startswith("reward/") and k.endswith("_failed")),
        "largest_logprob_difference": max(row["rollout/logprob_difference"] for row in rows),
        **{name: {k: statistics.mean(r[k] for r in part) for k in GRPO_COLUMNS} for name, part in parts.items()},
    }


def main() -> None:
    """Runs both and writes what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hh", default="", help="harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; without it, the hub"
    )
    parser.add_argument("--gsm8k", default="", help="train.jsonl.gz of openai/gsm8k; without it, the hub")
    options = parser.parse_args()
    hh, gsm8k = (str(Path(path).resolve()) if path else "" for path in (options.hh, options.gsm8k))
    result = {"hh_dpo": dpo(hh), "gsm8k_grpo": grpo(gsm8k)}
    DATA.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
