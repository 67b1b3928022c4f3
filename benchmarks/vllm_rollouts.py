"""GRPO of a real chat model whose replies vLLM draws, on questions with exact answers: `data/vllm_rollouts.json`.

    python benchmarks/vllm_rollouts.py --model DIR --vllm vllm/bin/python --rows train.jsonl.gz

`--rows` are GSM8K's. Twenty steps of four questions with four replies each, in float32. Noted are how far
log-probabilities of vLLM and of the policy differ in each step, the effective share of draws, the seconds of a step and
of its parts, and the memory of all processes beside what `trimtab plan` said before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from speed import DATA, machine

from trimtab.core import config

OUT = DATA.with_name("vllm_rollouts.json")
PARTS = ("sync", "generate", "logprobs", "update")


def settings(model: str, vllm: str, rows: str, steps: int) -> dict[str, Any]:
    """The run file."""
    return {
        "model": os.path.abspath(model),
        "prompts": os.path.abspath(rows),
        "rewards": [
            {"name": "exact_answer"},
            {"name": "overlong", "max_tokens": 96, "buffer_tokens": 32, "weight": 0.1},
        ],
        "advantage": "grpo",
        "kl": {"name": "fixed", "coef": 0.02},
        "kl_in": "loss",
        "prompts_per_step": 4,
        "group_size": 4,
        "num_steps": steps,
        "num_epochs": 1,
        "num_minibatches": 1,
        "optimizer": {"learning_rate": 1e-5},
        "sampling": {"max_new_tokens": 96, "max_prompt_tokens": 256, "batch_size": 16},
        "token_budget": 1024,
        "limit": 400,
        "sample_every": 1,
        "engine": {"sampler": {"name": "vllm", "python": os.path.abspath(vllm)}},
    }


def planned_gb(run_file: Path) -> float:
    """The memory that the plan says the run will take."""
    plan = [sys.executable, "-m", "trimtab", "plan", str(run_file)]
    said = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
    return float(said.split("at most ")[1].split(" GB")[0])


def table(found: dict[str, Any]) -> str:
    """The rows of the page."""
    parts = ", ".join(f"{name} {found['seconds'][name]} s" for name in PARTS)
    low, high = found["accuracy_of_first_and_last_five_steps"]
    return "\n".join(
        (
            f"| largest difference of a log-probability in a step, median and largest | "
            f"{found['difference_median']:.1e}, {found['difference_largest']:.1e} nats |",
            f"| KL of sampler to policy a token (k3), largest | {found['sampler_kl_largest']:.0e} nats |",
            f"| effective share of draws, smallest | {found['effective_fraction_smallest']:.6f} |",
            f"| a step, median | {found['seconds']['step']} s: {parts} |",
            f"| memory of both, planned and measured | {found['planned_gb']:.2f} and {found['peak_gb']:.2f} GB |",
            f"| right answers in the first and the last five steps | {low:.0%} and {high:.0%} of 80 |",
        )
    )


def main() -> None:
    """Plans, runs, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm", required=True, help="an interpreter with vLLM")
    parser.add_argument("--rows", required=True, help="questions and answers")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/vllm_rollouts"), help="where the run is, or goes on")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    stage = settings(options.model, options.vllm, options.rows, options.steps)
    run_file = out / "run.toml"
    run_file.write_text(config.to_toml({"stages": {"grpo": {"stage": "online", **stage}}}), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "trimtab", "run", str(run_file), "--out", str(out / "run")], check=True)
    rows = [json.loads(x) for x in (out / "run/grpo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = json.loads((out / "run/summary.json").read_text(encoding="utf-8"))["peak_rss_gb"]
    planned = planned_gb(run_file)
    differences = [row["rollout/logprob_difference"] for row in rows]
    right = [row["reward/exact_answer"] for row in rows]
    result = {
        "command": "python benchmarks/vllm_rollouts.py",
        "machine": machine(),
        "steps": len(rows),
        "difference_median": statistics.median(differences),
        "difference_largest": max(differences),
        "sampler_kl_largest": max(abs(row["rollout/sampler_kl"]) for row in rows),
        "effective_fraction_smallest": min(row["rollout/effective_fraction"] for row in rows),
        "seconds": {
            name: round(statistics.median(row[f"time/{name}_seconds"] for row in rows), 2) for name in ("step", *PARTS)
        },
        "planned_gb": planned,
        "peak_gb": round(peak, 2),
        "accuracy_of_first_and_last_five_steps": [statistics.mean(right[:5]), statistics.mean(right[-5:])],
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
