"""Our side of `speed.py`: one stage as a user runs it, on a fixed workload; prints one JSON line.

python benchmarks/speed_ours.py STAGE MODEL ROWS --steps N --batch B --gen L --maxlen T --promptlen P
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

ADAMW = {"learning_rate": 1e-5, "schedule": "linear"}
"""What the peer's Trainer uses when it is not told otherwise."""


def settings_of(stage: str, model: str, rows: str, o: argparse.Namespace) -> dict[str, Any]:
    """The run file of a stage."""
    common: dict[str, Any] = {"model": model, "optimizer": ADAMW, "token_budget": o.token_budget}
    common["checkpoint_every"] = 10**6
    if o.precision == "bfloat16":
        common["precision"] = "bfloat16"
    supervised = common | {"batch_size": o.batch, "max_tokens": o.maxlen, "shuffle": False}
    if stage == "sft":
        return supervised | {"data": rows, "chosen_as_demonstrations": True, "held_out": 0.0}
    if stage == "reward":
        return supervised | {"data": rows, "held_out_data": rows, "loss": {"centering_coef": 0.0}}
    if stage == "dpo":
        return supervised | {"data": rows, "held_out": 0.0}
    if stage == "grpo":
        return common | {
            "prompts": rows,
            "rewards": [{"name": "callable", "function": "speed_ours:hundreds_of_characters"}],
            "advantage": {"name": "grpo"},
            "kl": {"name": "fixed", "coef": 0.04},
            "kl_in": "loss",
            "prompts_per_step": o.batch // o.group,
            "group_size": o.group,
            "num_steps": o.steps,
            "num_epochs": 1,
            "sampling": {"max_new_tokens": o.gen, "batch_size": o.batch},
            "sample_every": 0,
        }
    return common | {
        "prompts": rows,
        "rewards": [{"name": "model", "path": o.reward_model}],
        "prompts_per_step": o.batch,
        "num_steps": o.steps,
        "num_epochs": 4,
        "critic": {"init": "reward", "optimizer": ADAMW},
        "sampling": {"max_new_tokens": o.gen, "temperature": 0.7, "batch_size": o.batch},
        "sample_every": 0,
    }


def hundreds_of_characters(prompt: Any, response: str, facts: Any) -> float:
    """The peer's reward in its GRPO benchmark."""
    return len(response) / 100.0


def timed_reference(module: Any) -> list[float]:
    """Seconds of every pass in which the preference stage asks its reference, added up as they happen."""
    seconds: list[float] = []
    ask = module.reference_logprobs

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = ask(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    module.reference_logprobs = timed
    return seconds


def train(stage: str, model: str, rows: str, o: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, its loss, and peak memory, of a stage run from its settings."""
    from trimtab.core import config
    from trimtab.runs.run import Run
    from trimtab.stages import online, preference, reward, sft

    module = {"sft": sft, "reward": reward, "dpo": preference, "ppo": online, "grpo": online}[stage]
    reference_seconds = timed_reference(preference)
    settings = config.resolve(module.STAGE.settings, settings_of(stage, model, rows, o), where="the benchmark")
    with tempfile.TemporaryDirectory() as scratch:
        with Run.open(
            Path(scratch) / "run",
            stage=module.__name__.rsplit(".", 1)[-1],
            settings=config.dump(settings),
            resume=False,
        ) as run:
            module.run(settings, run)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    # What the reference says is asked once for all steps; the peer asks it in each.
    each = sum(reference_seconds) / len(steps)
    return {
        "steps_s": [row["time/step_seconds"] + each for row in steps],
        "losses": [row["loss/train"] for row in steps if "loss/train" in row],
        "laps": {k: row[k] for row in steps[-1:] for k in row if k.startswith("time/")},
    }


def prompts_and_stops(model: str, rows: str, options: dict[str, int]) -> tuple[list[list[int]], list[int], int]:
    """Prompts of exactly `promptlen` tokens cut from the rows, the ids that end a reply (`stops` of them), and pad."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with gzip.open(rows, "rt", encoding="utf-8") as file:
        ids = tokenizer("\n".join(re.sub(r"\s+", " ", json.loads(line)["chosen"]) for line in file))["input_ids"]
    length = options["promptlen"]
    prompts = [ids[i * length : (i + 1) * length] for i in range(options["num"])]
    return prompts, list(range(100, 100 + options["stops"])), tokenizer.pad_token_id


def generate(model: str, rows: str, o: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the local generator, over the same prompts."""
    from types import SimpleNamespace

    import torch

    from trimtab.engines.local.sampler import LocalSampler, Sampling
    from trimtab.models.load import load_causal
    from trimtab.models.roles import Policy

    prompts, stops, pad = prompts_and_stops(model, rows, vars(o))
    chat = SimpleNamespace(stop_ids=set(stops), pad_id=pad)
    generator = LocalSampler(
        Policy(load_causal(model), pad_id=pad), chat, Sampling(max_new_tokens=o.gen, batch_size=o.batch)
    )
    rates = []
    for repeat in range(o.repeats + 1):
        uniforms = torch.rand(len(prompts), o.gen, dtype=torch.float64, generator=torch.Generator().manual_seed(repeat))
        started = time.perf_counter()
        drawn = sum(len(ids) for ids, _, _ in generator.continue_ids(prompts, group_size=1, uniforms=uniforms))
        rates.append(drawn / (time.perf_counter() - started))
    return {"tokens_per_second": rates[1:], "tokens": drawn}


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["sft", "reward", "dpo", "grpo", "ppo", "generate"])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--reward-model", default="")
    parser.add_argument("--precision", default="")
    defaults = {
        "steps": 4, "batch": 16, "gen": 64, "maxlen": 512, "promptlen": 256, "token-budget": 0, "num": 32,
        "stops": 0, "repeats": 2, "group": 8,
    }  # fmt: skip
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    # PPO holds two trained models; its micro-batches of half the tokens take as long.
    options.token_budget = options.token_budget or (1024 if options.stage == "ppo" else 2048)
    if options.precision and options.precision != "bfloat16":
        import torch

        torch.set_float32_matmul_precision(options.precision)
    if options.stage == "generate" and options.precision == "bfloat16":
        raise SystemExit("replies are sampled in float32 whatever training's precision: nothing to compare")
    if options.stage == "generate":
        result = generate(options.model, options.rows, options)
    else:
        result = train(options.stage, options.model, options.rows, options)
    from trimtab.core.process import peak_rss_gb

    print(json.dumps(result | {"rss_gb": round(peak_rss_gb(), 3)}))


if __name__ == "__main__":
    main()
