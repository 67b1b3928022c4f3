"""The models of `speed.py` and `plan_memory.py`: random weights, a tokenizer of the rows, and reward models.

    python benchmarks/make_models.py --rows HH_JSONL_GZ --out runs/bench/models

Ordinary model directories that both sides load: `6m`, `30m` and `bigvocab` (the small one with 151,936 entries in its
head), each with `-rm`, the same with one score. Weights are drawn with seed 0. The template has no line end behind a
turn: TRL trains on one there, trimtab ends where the turn ends, and the work is to be the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TOKENS = 8192
SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "intermediate_size": 768}  # fmt: skip
SHAPES = {
    "6m": SMALL | {"vocab_size": TOKENS},
    "30m": {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 64, "intermediate_size": 1536, "vocab_size": TOKENS},
    "bigvocab": SMALL | {"vocab_size": 151936},
}  # fmt: skip


def texts(rows: Path) -> Iterator[str]:
    """Every transcript of the rows: the chosen ones, then the rejected ones."""
    for side in ("chosen", "rejected"):
        with gzip.open(rows, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)[side]


def tokenizer_of(rows: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the rows, with the template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts(rows), trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make(rows: Path, out: Path) -> None:
    """Writes the models that are not there yet."""
    if all((out / f"{name}-rm" / "config.json").exists() for name in SHAPES):
        return
    tokenizer = tokenizer_of(rows)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        config = Qwen3Config(**shape, **ids, max_position_embeddings=2048, tie_word_embeddings=True)
        model = Qwen3ForCausalLM(config)
        model.save_pretrained(out / name)
        torch.manual_seed(0)
        scores = AutoModelForSequenceClassification.from_pretrained(out / name, num_labels=1, dtype=torch.float32)
        scores.save_pretrained(out / f"{name}-rm")
        for directory in (out / name, out / f"{name}-rm"):
            tokenizer.save_pretrained(directory)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million weights in {out / name}")


def main() -> None:
    """Makes all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="harmless-base/test.jsonl.gz of Anthropic/hh-rlhf")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "models")
    options = parser.parse_args()
    make(options.rows, options.out)


if __name__ == "__main__":
    main()
