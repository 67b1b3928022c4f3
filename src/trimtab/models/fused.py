"""A forward pass for decoding: the weights of Llama-like models copied into fewer, larger products.

The copy is made anew for every round of sampling and then proved fresh: both sides compute the same fixed sequence.
Other architectures decode through their own forward, which gives the same numbers more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu
from transformers import PreTrainedModel

from trimtab.data.trees import TokenTrees, sequence_tree
from trimtab.errors import EngineError
from trimtab.models.adapters import weight_of
from trimtab.models.attention import LLAMA_LIKE, Attend, backbone, row_states
from trimtab.models.tree_attention import tree_attention

PACK_FROM = 1 << 16
"""Matrices of at least this many entries are reordered for oneDNN, where torch has it: 1.4 to 2 times faster for the
few rows of a decoding step, slower for small matrices. A rule and not a measurement, so that a resumed run rounds as
the interrupted one did."""


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class Matrix:
    """A linear layer without gradient, laid out for products with few rows."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None], num_rows: int) -> None:
        weight = torch.cat(weights)
        present = [b.detach() for b in biases if b is not None]
        self.bias = torch.cat(present) if present else None
        self.weight = weight
        packs = weight.device.type == "cpu" and weight.numel() >= PACK_FROM and has_onednn()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows) if packs else None
        if self.packed is not None:
            self.weight = weight.new_empty(0)  # a slice would hold on to all of it

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, [n, out]."""
        if self.packed is None:
            return linear(x, self.weight, self.bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


@dataclass(frozen=True)
class Layer:
    """One block: attention and gated MLP, each after a norm."""

    norm: Tensor
    query_key_value: Matrix
    query_key_norm: Tensor | None
    output: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix
    scaling: float
    window: int | None


class FusedForward:
    """Hidden states of flat rows of tokens, by a copy of the model's weights."""

    def __init__(self, model: PreTrainedModel, num_rows: int) -> None:
        """`num_rows` is the number of tokens of a usual step, a hint for the layout."""
        base: Any = model.base_model
        config = model.config.get_text_config()
        self.eps = config.rms_norm_eps
        self.embedding = base.embed_tokens.weight.detach()
        self.rotary = base.rotary_emb
        self.final_norm = base.norm.weight.detach()
        self.layers = [_layer(block, num_rows) for block in base.layers]
        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head = Matrix([weight_of(output)], [output.bias], num_rows)
        self.head_size: int = base.layers[0].self_attn.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """[n, D] last hidden states of the tokens [n] at these positions."""
        x = self.embedding[input_ids]
        cos, sin = (c[0, :, None] for c in self.rotary(x, position_ids[None]))
        num_rotated = (self.num_heads + self.num_kv_heads) * self.head_size
        half = self.head_size // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for index, layer in enumerate(self.layers):
            states = layer.query_key_value(rms_norm(x, (x.shape[-1],), layer.norm, self.eps))
            rotated = states[:, :num_rotated].view(len(x), -1, self.head_size)
            if layer.query_key_norm is not None:
                rotated = rms_norm(rotated, (self.head_size,), None, self.eps) * layer.query_key_norm
            rotated = torch.addcmul(rotated * cos, rotated.roll(half, -1), sin)
            value = states[:, num_rotated:].view(len(x), -1, self.head_size)
            query, key = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
            mixed = attend(index, query, key, value, layer.scaling, layer.window)
            x += layer.output(mixed.flatten(1))
            gate, up = layer.gate_up(rms_norm(x, (x.shape[-1],), layer.mlp_norm, self.eps)).chunk(2, -1)
            x += layer.down(silu(gate).mul_(up))
        return rms_norm(x, (x.shape[-1],), self.final_norm, self.eps)

    def prove_fresh(self, model: PreTrainedModel) -> None:
        """Computes a fixed sequence here and in the model; raises EngineError unless the logits agree."""
        trees = TokenTrees.build([sequence_tree([i % len(self.embedding) for i in range(3, 19)])])
        attend = tree_attention(trees)
        with torch.no_grad():
            ours = self.head(self(trees.input_ids, trees.position_ids, attend))
            hidden = row_states(backbone(model), trees.input_ids, trees.position_ids, attend)
            theirs = model.get_output_embeddings()(hidden)  # type: ignore[no-untyped-call]
        difference = float((ours - theirs).abs().max())
        if not difference <= 1e-3 * max(1.0, float(theirs.abs().max())):
            raise EngineError(
                f"the fused copy that replies are sampled from differs from the model by {difference:.3g} in a logit",
                where=f"architecture {type(model).__name__}",
                fix="please report this; until it is mended, sample with another engine",
            )


def _layer(block: Any, num_rows: int) -> Layer:
    attention, mlp = block.self_attn, block.mlp

    def matrix(*modules: Any) -> Matrix:
        return Matrix([weight_of(m) for m in modules], [m.bias for m in modules], num_rows)

    norm = None
    if hasattr(attention, "q_norm"):
        heads = (attention.q_proj.out_features, attention.k_proj.out_features)
        query_heads, key_heads = (h // attention.head_dim for h in heads)
        norm = torch.cat(
            [
                attention.q_norm.weight.detach().expand(query_heads, -1),
                attention.k_norm.weight.detach().expand(key_heads, -1),
            ]
        )
    return Layer(
        norm=block.input_layernorm.weight.detach(),
        query_key_value=matrix(attention.q_proj, attention.k_proj, attention.v_proj),
        query_key_norm=norm,
        output=matrix(attention.o_proj),
        mlp_norm=block.post_attention_layernorm.weight.detach(),
        gate_up=matrix(mlp.gate_proj, mlp.up_proj),
        down=matrix(mlp.down_proj),
        scaling=attention.scaling,
        # Qwen says it for each layer, Mistral once for all, Llama has none.
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    )


def supports_fusing(model: PreTrainedModel) -> bool:
    """Whether the model is built as `FusedForward` computes it."""
    config = model.config.get_text_config()
    return type(model.base_model).__name__ in LLAMA_LIKE and config.hidden_act in ("silu", "swish")
