"""Tiny random models of the causal families of transformers, and what plain transformers says of them.

A family is a model type and the settings that bring out what is particular about it: windows shorter than the rows,
attention sinks, caps and scales of logits, experts, latent attention, states instead of attention. Weights are drawn so
large that attention is not near uniform: a wrong mask then moves a log-probability by tenths of a nat, and rounding by
less than 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trimtab.batches.trees import Tree, response_tree

VOCAB = 64
PAD, END, BEGIN = 0, 1, 2
WINDOW = 5
"""Shorter than the rows of `trees`, so that a window that is lost is felt."""
TOLERANCE = 1e-4
"""Nats between a right log-probability and transformers' own; what is right is within 1e-5, what is wrong is not."""


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Set beside `SIZES`."""


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": BEGIN,
    # Widths and depths, under the names that families have for them.
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size", "lru_width"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "attention_hidden_size"], 32),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads", "attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_global_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"], 8),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["n_layer", "num_layers"], 3),
    "num_hidden_layers": 4,
    "decoder_layers": 2,
    "rotary_dim": 4,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"], 128),
    "original_max_position_embeddings": 128,
    "type_vocab_size": 2,
    "is_decoder": True,
    # Windows.
    **dict.fromkeys(["sliding_window", "attention_window", "local_attention", "window_size"], WINDOW),
    "use_sliding_window": True,
    "max_window_layers": 2,
    "attention_chunk_size": 8,
    "global_attn_every_n_layers": 2,
    # Experts.
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 24),
    "expert_ffn_hidden_size": 24,
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    "aux_loss_alpha": 0.0,
    # Latent and sparse attention.
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    "index_topk": 4,
    # A key counts zero if every indexing head finds it negative: with few heads many tie, and which of them are taken
    # depends on the length of the row, in transformers' own forward too.
    "index_n_heads": 32,
    "index_head_dim": 16,
    # Embeddings for each layer, and layers that share.
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "adapter_rank": 4,
    "num_codebooks": 1,
    # States.
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["mamba_d_conv", "conv_kernel", "time_step_rank", "mamba_dt_rank"], 4),
    **dict.fromkeys(["mamba_expand", "expand"], 2),
    **dict.fromkeys(["n_groups", "mamba_n_groups"], 1),
    "mamba_d_ssm": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    "linear_conv_kernel_dim": 4,
}
"""Sizes by the name of a field of the configuration; a family takes those that it has."""

_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}

_MIXED = ["sliding_attention", "full_attention"] * 2
_LATENT = {"num_key_value_heads": 4}
_HYBRID = ["linear_attention", "full_attention"] * 2

PARTICULAR: dict[str, Family] = {
    # Windows in some layers and not in others.
    **{t: Family(t, {"layer_types": _MIXED}) for t in ("gemma3_text", "olmo3", "cohere2", "ministral", "gpt_oss")},
    "qwen2 with windows": Family("qwen2", {"layer_types": _MIXED}),
    "qwen2_moe": Family("qwen2_moe", {"layer_types": _MIXED}),
    "gemma4_text": Family("gemma4_text", {"layer_types": _MIXED, "final_logit_softcapping": 2.0}),
    # Caps and scales small enough to be felt.
    "gemma2": Family("gemma2", {"layer_types": _MIXED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}),
    "gemma3n_text": Family("gemma3n_text", {"layer_types": _MIXED, "final_logit_softcapping": 2.0}),
    "gemma3n with shared keys": Family("gemma3n_text", {"layer_types": _MIXED, "num_kv_shared_layers": 2}),
    "vaultgemma": Family(
        "vaultgemma", {"layer_types": _MIXED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}
    ),
    "nanochat": Family("nanochat", {"final_logit_softcapping": 2.0}),
    "recurrent_gemma": Family("recurrent_gemma", {"logits_soft_cap": 2.0}),
    "cohere": Family("cohere", {"logit_scale": 0.7}),
    "cohere2": Family("cohere2", {"layer_types": _MIXED, "logit_scale": 0.7}),
    **{
        t: Family(
            t,
            {
                "logits_scaling": 3.0,
                "attention_multiplier": 0.3,
                "embedding_multiplier": 2.0,
                "residual_multiplier": 0.7,
            },
        )
        for t in ("granite", "granitemoe", "granitemoeshared")
    },
    "granitemoehybrid": Family("granitemoehybrid", {"logits_scaling": 3.0, "layer_types": ["mamba", "attention"] * 2}),
    # Latent attention has as many key heads as query heads.
    **{
        t: Family(t, _LATENT)
        for t in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "youtu", "minicpm3")
    },
    **{t: Family(t, _LATENT) for t in ("axk1", "glm_moe_dsa")},
    # States and attention.
    "mamba2": Family("mamba2", {"num_heads": 8}),
    **{t: Family(t, {"layer_types": _HYBRID}) for t in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    **{t: Family(t, {"layer_types": ["conv", "full_attention"] * 2}) for t in ("lfm2", "lfm2_moe")},
    # Positions that depend on the length of the row.
    "llama with dynamic positions": Family(
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 16,
        },
    ),
    "phi3 with long positions": Family("phi3", {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 16}),
    # What is off as the configuration comes.
    "falcon": Family("falcon", {"alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "falcon with alibi": Family("falcon", {"alibi": True, "multi_query": True}),
    "gpt_bigcode": Family("gpt_bigcode", {"multi_query": True}),
    "gpt_neo": Family("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    "phimoe with windows": Family("phimoe", {"sliding_window": WINDOW}),
}
"""Families that need more than their model type, by name."""


COMPOSITE = {
    *(
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_assistant",
        "gemma4_unified",
        "git",
        "llama4",
    ),
    *("gemma4_unified_assistant", "got_ocr2", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody"),
    *("phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "blt", "whisper"),
}
"""Models of pictures, sound or bytes around a decoder, whose text models are families of their own."""


def every_family() -> dict[str, Family]:
    """The causal families of transformers by name, and the particular ones beside them."""
    return {t: Family(t) for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t not in COMPOSITE} | PARTICULAR


PROMISED = (
    *("llama", "llama4_text", "mistral", "ministral", "ministral3", "mixtral"),
    *("qwen2", "qwen2 with windows", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"),
    *("qwen3_5_moe_text", "gemma2", "gemma3_text", "gemma3n_text", "gemma3n with shared keys", "gemma4_text"),
    *("phi3", "phi3 with long positions", "phimoe with windows"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "gpt_oss", "glm4", "glm4_moe", "glm4_moe_lite"),
    *("olmo2", "olmo3", "granite", "granitemoe", "granitemoehybrid", "lfm2", "lfm2_moe", "smollm3"),
    *("cohere", "cohere2", "falcon_h1", "mamba2", "bloom", "gpt2", "gpt_neox"),
)
"""What is promised to be right, scored and sampled."""


def config_of(name: str, **settings: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of the family; `settings` come last."""
    family = every_family()[name]
    kind = CONFIG_MAPPING[family.model_type]
    plain = kind()
    sizes = {key: value for key, value in SIZES.items() if _has(plain, key)}
    for key, other in kind.attribute_map.items():  # one setting under two names
        if key in sizes and other in sizes:
            del sizes[key]
    config: PreTrainedConfig = kind(**sizes | family.settings | settings)
    return config


def causal(name: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal model of the family, with transformers' own eager attention."""
    torch.manual_seed(seed)
    config = config_of(name, **settings)
    return louder(AutoModelForCausalLM.from_config(config, attn_implementation="eager").float())


def scalar(name: str, *, seed: int = 1, **settings: Any) -> PreTrainedModel:
    """A random model of the family with one score, likewise."""
    torch.manual_seed(seed)
    config = config_of(name, num_labels=1, **settings)
    return louder(AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float())


def write(model: PreTrainedModel, directory: Path) -> Path:
    """The model as a directory, without a tokenizer."""
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def louder(model: PreTrainedModel, gain: float = 5.0) -> PreTrainedModel:
    """The model with its matrices multiplied by `gain` and its biases and sinks drawn: as they are made biases are
    zero, and sinks are uninitialised. What rules the decay of states stays."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("A_log", "conv", "dt_", "ssm", "lru")):
            continue
        if "sink" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        elif parameter.ndim >= 2:
            parameter.mul_(gain)
        elif "bias" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def trees(seed: int = 3) -> list[Tree]:
    """Three prompts with three, one and two replies, of lengths from 1 to 12: rows of up to 21 tokens."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=draw).tolist()

    return [
        response_tree(ids(12), [ids(4), ids(9), ids(1)]),
        response_tree(ids(5), [ids(7)]),
        response_tree(ids(9), [ids(11), ids(6)]),
    ]


def rows_of(some: Sequence[Tree]) -> list[tuple[Tensor, int]]:
    """Every sequence as a row [1, T] of its own, and the length of its prompt."""
    return [(torch.tensor([[*t.prompt, *b.ids]]), len(t.prompt)) for t in some for b in t.branches]


def plain_logprobs(model: PreTrainedModel, some: Sequence[Tree], temperature: float = 1.0) -> Tensor:
    """[M] log-probabilities of the replies by transformers alone: one unpadded row at a time, with gradients."""
    found = []
    for row, start in rows_of(some):
        logits = model(input_ids=row, use_cache=False).logits[0].float() / temperature
        logprobs = logits.log_softmax(-1)
        found.append(logprobs[start - 1 : -1].gather(1, row[0, start:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def plain_scores(model: PreTrainedModel, some: Sequence[Tree]) -> Tensor:
    """[B] scores of a model with one label, likewise."""
    return torch.stack([model(input_ids=row).logits[0, 0] for row, _ in rows_of(some)])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of a backward pass, by the names that transformers has for the parameters. `model` is one of its
    models or a role around one."""
    prefix = "" if isinstance(model, PreTrainedModel) else "model."
    return {n.removeprefix(prefix): p.grad for n, p in model.named_parameters() if p.grad is not None}


def _has(config: PreTrainedConfig, key: str) -> bool:
    of_class = getattr(type(config), key, None)
    if isinstance(of_class, property) and of_class.fset is None:
        return False
    try:
        return hasattr(config, key)
    except Exception:  # some properties of some configurations raise what they like
        return True
