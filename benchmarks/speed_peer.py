"""The peer's side of `speed.py`: runs its benchmark script with the rows in order and every step's loss shown.

    python benchmarks/speed_peer.py TRL_BENCH.py STAGE MODEL ROWS [its options] [--precision medium | bfloat16]

Two things are changed to make the work the same, neither of them the peer's computation: rows come in the order of the
file, and losses are printed with all their digits. `STAGE` "generate" times `model.generate` instead.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time


def in_order() -> None:
    """Makes the Trainer read its rows in their order and print each loss as it is."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    Trainer._get_train_sampler = lambda self, dataset=None: SequentialSampler(dataset or self.train_dataset)
    log = Trainer.log

    def log_and_print(self, logs, *args, **kwargs):
        if "loss" in logs:
            print(json.dumps({"loss": logs["loss"]}), flush=True)
        return log(self, logs, *args, **kwargs)

    Trainer.log = log_and_print


def in_bfloat16() -> None:
    """Makes every Trainer run under autocast to bfloat16."""
    from transformers import TrainingArguments

    check = TrainingArguments.__post_init__

    def check_with_bfloat16(self):
        self.bf16 = True
        check(self)

    TrainingArguments.__post_init__ = check_with_bfloat16


def generate(model_dir: str, rows: str, options: dict[str, int]) -> None:
    """Prints tokens per second of `model.generate` over batches of prompts, and peak memory."""
    import torch
    from speed_ours import prompts_and_stops
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompts, stops, pad = prompts_and_stops(model_dir, rows, options)
    torch.manual_seed(0)
    rates = []
    for _ in range(options["repeats"] + 1):
        started, drawn = time.perf_counter(), 0
        for start in range(0, len(prompts), options["batch"]):
            part = prompts[start : start + options["batch"]]
            width = max(map(len, part))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=options["gen"],
                do_sample=True,
                top_k=0,
                eos_token_id=stops or None,
                pad_token_id=pad,
            )
            for row in out[:, width:].tolist():
                ends = [i for i, token in enumerate(row) if token in set(stops)]
                drawn += ends[0] + 1 if ends else len(row)
        rates.append(drawn / (time.perf_counter() - started))
    print(json.dumps({"tokens_per_second": rates[1:], "tokens": drawn, "rss_gb": peak_rss_gb()}))


def peak_rss_gb() -> float:
    """The most memory this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def main() -> None:
    """Runs one stage."""
    script, stage, model, rows, *rest = sys.argv[1:]
    if "--precision" in rest:
        import torch

        at = rest.index("--precision")
        if rest[at + 1] == "bfloat16":
            in_bfloat16()
        else:
            torch.set_float32_matmul_precision(rest[at + 1])
        del rest[at : at + 2]
    if stage == "generate":
        generate(model, rows, {k.strip("-"): int(v) for k, v in zip(rest[::2], rest[1::2], strict=True)})
        return
    in_order()
    sys.argv = [script, stage, model, rows, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
