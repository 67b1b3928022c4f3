"""Tiny models and tokenizers that tests build in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from trimtab.models.save import save_model
from trimtab.stages.pretrain import train_tokenizer

VOCAB = 64
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, **_ATTENTION, **_IDS),
    "qwen2": lambda: Qwen2Config(**_SHAPE, **_ATTENTION, **_IDS),
    "qwen3": lambda: Qwen3Config(**_SHAPE, **_ATTENTION, **_IDS, head_dim=8),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE, num_attention_heads=4, **_IDS),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
    "mistral_windowed": lambda: MistralConfig(**_SHAPE, **_ATTENTION, **_IDS, sliding_window=4),
    "gemma3_windowed": lambda: Gemma3TextConfig(**_SHAPE, **_ATTENTION, **_IDS, head_dim=8, sliding_window=4),
    "bert": lambda: BertConfig(**_SHAPE, num_attention_heads=4, pad_token_id=0),
}
DECODERS = tuple(name for name in CONFIGS if name != "bert")


def causal(name: str = "llama", seed: int = 0):
    """A random causal model with weights large enough that its outputs are not near-uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    return _louder(model)


def scalar(name: str = "llama", seed: int = 0):
    """A random model with one score."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.num_labels = 1
    return _louder(AutoModelForSequenceClassification.from_config(config))


def _louder(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


TEXTS = (
    "Item: lamp. Policy: refund within 30 days. I want a refund!",
    "We can refund the lamp. Thank you for asking.",
    "We can not refund it. You are wonderful.",
    "What is 12 + 30? The answer is #### 42",
)


def write_model_directory(directory: Path, *, seed: int = 0, hidden_size: int = 32) -> Path:
    """A tiny Llama with a real tokenizer, as a Hugging Face directory."""
    tokenizer = train_tokenizer([*TEXTS] * 2, 320)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    save_model(_louder(AutoModelForCausalLM.from_config(config)), tokenizer, directory)
    return directory
