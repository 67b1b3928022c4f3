"""Plans on paper: beside measured peaks and times, and for models that no machine here holds.

    python benchmarks/paper_plans.py            # a few seconds on any machine: docs/evidence/data/paper_plans.json

Nothing is run. What was measured is read from `gpu.json` (one H200) and `plan.json` (a CPU). The plans are those of
`trimtab plan FILE --on MACHINE`, from run files and the config.json of public models that are written below.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from make_models import SHAPES
from plan_memory import WORKLOADS
from spine import DATA

from trimtab.engines.machines import MACHINES, Machine, machine_of
from trimtab.engines.paper import PaperPlan, remedies
from trimtab.engines.placement import GIB, Job, RoleOnPaper, SamplingOnPaper, Spread, holding
from trimtab.engines.step_time import products_rate, step_time
from trimtab.models.shape import ModelShape, shape_of
from trimtab.stages.paper import OnPaper, plan_on_paper

LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "8B": LLAMA | {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 14336},
    "70B": LLAMA
    | {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80, "intermediate_size": 28672},
    "0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
CONFIGS["4B"] = CONFIGS["0.6B"] | {
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "intermediate_size": 9728,
}
"""Llama 3 8B and 70B, and Qwen3 0.6B and 4B."""
PUBLISHED_4B = 49_700
"""Tokens a second of prime-rl's trainer (January 2026) on eight H100: SFT of a model of 4 billion weights."""
COMMON = {"precision": "bfloat16", "checkpoint_activations": True, "token_budget": 16384}
ONLINE = COMMON | {
    "stage": "online",
    "prompts": "prompts.jsonl",
    "prompts_per_step": 512,
    "sampling": {
        "max_prompt_tokens": 512,
        "max_new_tokens": 1024,
        "precision": "bfloat16",
        "cache_gb": 16.0,
        "batch_size": 256,
    },
}
GRPO = ONLINE | {
    "advantage": {"name": "grpo"},
    "kl_in": "loss",
    "group_size": 8,
    "prompts_per_step": 128,
    "num_epochs": 1,
    "rewards": [{"name": "exact_answer"}],
}
LORA = {"adapter": {"rank": 16}}
EXAMPLES = {"data": "data.jsonl", "max_tokens": 4096}
SFT = COMMON | EXAMPLES | {"stage": "sft", "batch_size": 128}
DPO = COMMON | EXAMPLES | {"stage": "preference", "batch_size": 32}
SHORT = {"token_budget": 4096, "group_size": 4, "sampling": ONLINE["sampling"] | {"max_new_tokens": 768}}
"""For 70B: a group is one micro-batch at least."""
PPO = ONLINE | {"rewards": [{"name": "model", "path": "the model"}]}
SHARDED = {"engine": {"shard": True}}
BUILT = ("bfloat16-frozen", "shard-frozen", "gather-bfloat16", "vllm")
"""What is assumed to have been built."""
PLANS: dict[str, tuple[str, dict[str, Any], OnPaper]] = {
    "SFT, 8B": ("8B", SFT | SHARDED, OnPaper(on="h100", gpus=8)),
    "DPO, 8B, adapter": ("8B", DPO | LORA, OnPaper(on="h100")),
    "GRPO, 8B": ("8B", GRPO | SHARDED, OnPaper(on="h100", gpus=8)),
    "GRPO, 8B, assumed": ("8B", GRPO | SHARDED, OnPaper(on="h100", gpus=8, assume=BUILT)),
    "PPO, 8B": ("8B", PPO | SHARDED, OnPaper(on="h100", gpus=8)),
    "PPO, 8B, assumed": ("8B", PPO | SHARDED, OnPaper(on="h100", gpus=8, assume=BUILT)),
    "SFT, 70B": ("70B", SFT | SHARDED, OnPaper(on="h100", gpus=64)),
    "GRPO, 70B": ("70B", GRPO | SHORT | SHARDED, OnPaper(on="h100", gpus=64)),
    "GRPO, 70B, assumed": ("70B", GRPO | SHORT | SHARDED, OnPaper(on="h100", gpus=64, assume=BUILT)),
}
PRICE = 2.5
"""Of an hour of one GPU, to have one; no offer was asked for."""
CONTEXT_GIB = 0.45
"""What a process of a CPU run takes without tensors: torch, transformers and this package, loaded."""


def shape(name: str) -> ModelShape:
    """The shape of one of the public models."""
    return shape_of(CONFIGS[name], where=name)


def training_job(trees: int, prompt: int, reply: int, replies: int) -> Job:
    """A step of `gpu.py`: Qwen3 0.6B in bfloat16, activations computed again, 18,432 tokens in a forward pass."""
    return Job(
        roles=(RoleOnPaper(name="policy", shape=shape("0.6B"), trained=True),),
        bfloat16=True,
        checkpointed=True,
        token_budget=18 * 1024,
        num_trees=trees,
        prompt_tokens=prompt,
        reply_tokens=reply,
        replies=replies,
    )


TRAINED = {
    "16,384 tokens": training_job(2, 1024, 15 * 1024, 1),
    "replies alone": training_job(16, 1024, 1024, 1),
    "groups of 8": training_job(2, 1024, 1024, 8),
}


def sampling_job(num: int, bfloat16: bool) -> Job:
    """The replies of `gpu.py`: 128 tokens to prompts of 128."""
    return Job(
        roles=(RoleOnPaper(name="policy", shape=shape("0.6B")),),
        bfloat16=bfloat16,
        checkpointed=False,
        token_budget=4096,
        num_trees=num,
        prompt_tokens=128,
        reply_tokens=128,
        replies=1,
        sampling=SamplingOnPaper(batch_size=num, cache_gib=30, bfloat16=bfloat16),
    )


def on_the_gpu(measured: dict[str, Any]) -> dict[str, Any]:
    """Plans for one H200 beside what `gpu.py` measured there."""
    jobs = {"SFT, 2 x 8,192": (training_job(2, 0, 8192, 1), measured["sft"]["bfloat16"])}
    jobs |= {f"PPO, {name}": (job, measured["rl"][name]) for name, job in TRAINED.items()}
    for name, row in measured["sampling"].items():
        if isinstance(row, dict):
            jobs[f"sampling, {name}"] = (sampling_job(int(name.split()[0]), "bfloat16" in name), row)
    found = {}
    for name, (job, row) in jobs.items():
        tensors = holding(job, MACHINES["h200"], Spread()).tensors / GIB
        seconds = step_time(job, MACHINES["h200"], Spread()).total
        found[name] = {
            "gib": round(tensors, 2),
            "measured_gib": row["gib"],
            "gib_ratio": round(tensors / row["gib"], 3),
            "seconds": round(seconds, 3),
            "measured_seconds": row["seconds"],
            "seconds_ratio": round(seconds / row["seconds"], 3),
        }
    return found


def bfloat16_share(measured: dict[str, Any]) -> float:
    """The share of the product rate that blocks reach in training, by the step with least attention: what its time
    leaves for them, when attention, the head and the optimizer have had theirs."""
    job, h200 = TRAINED["replies alone"], MACHINES["h200"]
    linear = 8.0 * shape("0.6B").num_layers * shape("0.6B").linear_weights * job.num_trees * job.tree_tokens
    others = step_time(job, h200, Spread()).total - linear / products_rate(h200, bfloat16=True)
    return linear / (measured["rl"]["replies alone"]["seconds"] - others) / h200["bfloat16_products"]


def a_cpu() -> Machine:
    """A CPU of which only memory is asked."""
    rates = {"float32_products": 1e11, "bfloat16_products": 1e11, "bandwidth": 1e10}
    return machine_of("cpu", "cpu", rates | {"memory": 24.0, "context": CONTEXT_GIB}, "not used: memory only")


def cpu_job(kind: str, size: str) -> Job:
    """The workloads of `plan_memory.py`, with examples as long as they may be."""
    values = {"model_type": "qwen3", "tie_word_embeddings": True, **SHAPES[size]}
    model, scores = (shape_of(values, where=size, scalar=scalar) for scalar in (False, True))
    policy = RoleOnPaper(name="policy", shape=scores if kind == "reward" else model, trained=True)
    common: dict[str, Any] = {"bfloat16": False, "checkpointed": False, "token_budget": 2048, "up_to": True}
    if kind in ("sft", "reward", "dpo"):
        replies = 1 if kind == "sft" else 2
        tokens = {"num_trees": 16, "prompt_tokens": 256, "reply_tokens": 256, "replies": replies}
        return Job(roles=(policy,), **common, **tokens)
    roles = [policy, RoleOnPaper(name="reference", shape=model, passes=1)]
    if kind == "ppo":
        roles.append(RoleOnPaper(name="critic", shape=scores, trained=True, passes=1))
        roles.append(RoleOnPaper(name="reward model", shape=scores, passes=1, controller_only=True))
    group = 8 if kind == "grpo" else 1
    return Job(
        roles=tuple(roles),
        **common,
        num_trees=16 // group,
        prompt_tokens=512,
        reply_tokens=64,
        replies=group,
        sampling=SamplingOnPaper(batch_size=16, cache_gib=4.0, bfloat16=False),
    )


def on_cpus(measured: dict[str, Any]) -> dict[str, Any]:
    """Peaks on paper beside those that runs in one process took."""
    found = {}
    for name, row in measured.items():
        planned = holding(cpu_job(*WORKLOADS[name]), a_cpu(), Spread()).total / GIB
        taken = row["measured_gb"]
        found[name] = {"gib": round(planned, 2), "measured_gib": round(taken, 2), "ratio": round(planned / taken, 2)}
    return found


def of_large_models() -> dict[str, Any]:
    """The plans of models that no machine here holds, by the path of the command line."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: Path(scratch) / f"{name}.json" for name in CONFIGS}
        for name, path in paths.items():
            path.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
        for name, (model, stage, asked) in PLANS.items():
            table = stage | {"model": str(paths[model])}
            if "path" in str(stage.get("rewards")):
                table["rewards"] = [{"name": "model", "path": str(paths[model])}]
            values = {"stages": {"stage": table}}
            (plan,), _ = plan_on_paper(values, OnPaper(**(vars(asked) | {"price": PRICE})), where=name)
            found[name] = summary(plan)
    return found


def summary(plan: PaperPlan) -> dict[str, Any]:
    """The figures of a plan."""
    held, time = plan.controller, plan.time
    return {
        "processes": plan.spread.processes,
        "assumed": sorted(plan.spread.assumed),
        "held_gib": {name: round(size / GIB, 2) for name, size in held.held.items()},
        "peak": held.peak_phase,
        "at_the_peak_gib": {name: round(size / GIB, 2) for name, size in held.phases[held.peak_phase].items()},
        "gib": round(held.total / GIB, 1),
        "fits": plan.fits,
        "seconds": {name: round(seconds, 1) for name, seconds in vars(time).items()},
        "step_seconds": round(time.total, 1),
        "cost_of_a_step": round(plan.cost(1) or 0.0, 2),
        "remedies": [
            {
                "changes": remedy.changes,
                "gib": round(remedy.plan.controller.total / GIB, 1),
                "step_seconds": round(remedy.plan.time.total, 1),
            }
            for remedy in remedies(plan)
        ],
    }


def of_published() -> dict[str, Any]:
    """Tokens a second on paper where eight GPUs were measured by others, with examples of 8,192 tokens."""
    role = RoleOnPaper(name="policy", shape=shape("4B"), trained=True)
    job = replace(training_job(16, 0, 8192, 1), roles=(role,), token_budget=16384)
    seconds = step_time(job, MACHINES["h100"], Spread(processes=8, shard=True)).total
    return {"SFT, 4B, 8 x h100": {"tokens_per_second": round(16 * 8192 / seconds), "published": PUBLISHED_4B}}


def gpu_table(found: dict[str, Any]) -> str:
    """The rows on the page of plans beside what one H200 took."""
    return "\n".join(
        f"| {name} | {r['gib']:.2f} | {r['measured_gib']:.2f} | {r['gib_ratio']:.2f} | {r['seconds']:.3f} | "
        f"{r['measured_seconds']:.3f} | {r['seconds_ratio']:.2f} |"
        for name, r in found.items()
    )


def cpu_table(found: dict[str, Any]) -> str:
    """The rows on the page of plans beside peaks on CPUs."""
    return "\n".join(
        f"| {name} | {r['gib']:.2f} | {r['measured_gib']:.2f} | {r['ratio']:.2f} |" for name, r in found.items()
    )


def plans_table(found: dict[str, Any]) -> str:
    """The rows on the page of plans of large models."""
    lines = []
    for name, r in found.items():
        remedy = "; or ".join(f"{', '.join(x['changes'])} ({x['gib']:.0f} GiB)" for x in r["remedies"])
        seconds = " + ".join(f"{seconds:,.0f}" for seconds in r["seconds"].values())
        lines.append(
            f"| {name} | {r['processes']} | {r['gib']:.0f} | {'yes' if r['fits'] else 'no'} | {seconds} | "
            f"{r['cost_of_a_step']:.2f} | {remedy} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Writes the plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "paper_plans.json")
    options = parser.parse_args()

    def read(name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
        return values

    measured = read("gpu")
    found = {
        "bfloat16_share": round(bfloat16_share(measured), 4),
        "gpu": on_the_gpu(measured),
        "cpu": on_cpus(read("plan")),
        "published": of_published(),
        "plans": of_large_models(),
    }
    options.data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for table in (gpu_table(found["gpu"]), cpu_table(found["cpu"]), plans_table(found["plans"])):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
