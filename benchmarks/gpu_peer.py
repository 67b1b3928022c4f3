"""The peer's side of the SFT steps of `gpu.py`: TRL's own trainer on the same shape; prints one JSON line.

    python benchmarks/gpu_peer.py [--liger] [--dry]

Qwen3 of 0.6 billion random weights in float32 under autocast to bfloat16, activations computed again, two sequences of
8,192 tokens a step. `--liger` turns on the kernels that TRL offers for it. `--dry` is a tiny size on the CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Steps(TrainerCallback):
    """The seconds of every optimizer step."""

    def __init__(self, wait) -> None:
        self.wait = wait
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.wait()
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.wait()
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    """Six steps, of which the first is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--liger", action="store_true", help="with the kernels of liger-kernel")
    parser.add_argument("--dry", action="store_true", help="a tiny size on the CPU")
    options = parser.parse_args()
    size = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 1000}
    full = {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "vocab_size": 151936}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16 if options.dry else 128}
    shape, length = (size, 128) if options.dry else (full, 8192)
    torch.manual_seed(0)
    with torch.device("cpu" if options.dry else "cuda"):
        config = Qwen3Config(**shape, **heads, max_position_embeddings=40960, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rows = torch.randint(2, shape["vocab_size"], (16, length), generator=torch.Generator().manual_seed(0))
    steps = Steps((lambda: None) if options.dry else torch.cuda.synchronize)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            max_length=length,
            max_steps=6,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            bf16=True,
            use_cpu=options.dry,
            use_liger_kernel=options.liger,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
            processing_class=tokenizer,
            callbacks=[steps],
        )
        if not options.dry:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = sorted(steps.seconds[1:])[len(steps.seconds[1:]) // 2]
    found = {"seconds": round(seconds, 4), "tokens_per_second": round(2 * length / seconds)}
    if not options.dry:
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["gib_reserved"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    print(json.dumps(found | {"liger": options.liger}))


if __name__ == "__main__":
    main()
