"""A forward pass for decoding, which computes Llama-like models in fewer, larger steps (`kernels.py`). The weights are
used in place or copied into another layout.

It is made again for every round of sampling and then checked against the model: both compute the same fixed sequence.
Other architectures decode through their own forward pass, which gives the same numbers more slowly.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from trimtab.batches.device import to_device
from trimtab.batches.trees import TokenTrees, sequence_tree
from trimtab.core.errors import EngineError
from trimtab.engines.local.kernels import (
    GATED,
    Block,
    CompiledBlocks,
    CompiledKernels,
    Kernels,
    Matrices,
    ProductForm,
    find,
    product_dtype,
)
from trimtab.engines.local.slot_cache import StepAttend
from trimtab.models.adapters import is_adapted, weight_of
from trimtab.models.attention import LLAMA_LIKE, Attend, backbone, row_states
from trimtab.models.quantized import is_quantized
from trimtab.models.tree_attention import tree_attention

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference of a logit from the model's own, relative to the largest logit, by the dtype of products."""


class FusedForward:
    """Computes hidden states of flat rows of tokens with the model's weights, used in place or copied."""

    def __init__(self, model: PreTrainedModel, num_rows: int, kernels: Kernels) -> None:
        """`num_rows` is the usual number of tokens of a step, a hint for the layout."""
        self.kernels = kernels
        base: Any = model.base_model
        config = model.config.get_text_config()
        self.eps = config.rms_norm_eps
        self.embedding = base.embed_tokens.weight.detach()
        self.rotary = base.rotary_emb
        self.final_norm = base.norm.weight.detach()
        self.layers = [_block(block, num_rows, kernels, self.eps) for block in base.layers]
        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if kernels.compiled:  # whose sums are float32, also of bfloat16
            self._head = kernels.matrices([weight_of(output)], [output.bias], num_rows)
        else:
            with _float32(self.embedding):
                self._head = find(self.embedding).matrices([weight_of(output)], [output.bias], num_rows)
        self.tolerance = TOLERANCE[product_dtype(self.embedding)]
        self.head_size: int = base.layers[0].self_attn.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self._blocks: CompiledBlocks | None = None
        if isinstance(kernels, CompiledKernels):
            self._blocks = CompiledBlocks(kernels, self.layers, self.num_heads, self.num_kv_heads)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """[n, D] last hidden states of the tokens [n] at these positions."""
        # Kernels in C round what they multiply by themselves, and take and give float32.
        with _float32(self.embedding) if self.kernels.compiled else nullcontext():
            return self._hidden(input_ids, position_ids, attend)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        input_ids, position_ids = (to_device(x, self.embedding.device) for x in (input_ids, position_ids))
        x = self.embedding[input_ids]
        cos, sin = (c[0] for c in self.rotary(x, position_ids[None]))
        if self._blocks is not None and isinstance(attend, StepAttend):
            self._blocks(x, cos, sin, caches=attend.caches(len(self.layers)), **attend.seen)
            return rms_norm(x, (x.shape[-1],), self.final_norm, self.eps)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        for index, layer in enumerate(self.layers):
            states = layer.query_key_value(x, layer.norm)
            states = states.view(x.shape[0], -1, self.head_size)
            self.kernels.rotate(states, self.num_heads + self.num_kv_heads, layer.query_key_norm, self.eps, cos, sin)
            query, key, value = torch.split_with_sizes(states, heads, 1)
            mixed = attend(index, query, key, value, layer.scaling, layer.window)
            layer.output(mixed.flatten(1), add_to=x)
            gate_up = layer.gate_up(x, layer.mlp_norm)
            layer.down(gate_up, GATED, add_to=x)
        return rms_norm(x, (x.shape[-1],), self.final_norm, self.eps)

    def head(self, hidden: Tensor) -> Tensor:
        """[n, V] the output of the head in float32, from hidden states [n, D]."""
        with _float32(hidden):
            return self._head(hidden)

    def prove_fresh(self, model: PreTrainedModel) -> None:
        """Computes a fixed sequence here and in the model; raises EngineError unless the logits agree. Under autocast
        both round, and each in its own way: then ours may be as far from the float32 logits as twice theirs."""
        row = TokenTrees.build([sequence_tree([i % len(self.embedding) for i in range(3, 19)])])
        trees = row.to(self.embedding.device)

        def own() -> Tensor:
            hidden = row_states(backbone(model), trees.input_ids, trees.position_ids, tree_attention(trees))
            with _float32(hidden):
                logits: Tensor = model.get_output_embeddings()(hidden.float())  # type: ignore[no-untyped-call]
            return logits

        with torch.no_grad():
            ours = self.head(self(trees.input_ids, trees.position_ids, tree_attention(trees)))
            with _float32(ours):
                exact = own()
            difference = float((ours - exact).abs().max())
            bound = self.tolerance * max(1.0, float(exact.abs().max()))
            if difference > bound and torch.is_autocast_enabled(ours.device.type):
                bound = max(bound, 2 * float((own() - exact).abs().max()))
        if not difference <= bound:
            raise EngineError(
                f"the fused copy that replies are sampled from differs from the model by {difference:.3g} in a logit",
                where=f"architecture {type(model).__name__}",
                fix="please report this; until it is mended, sample with another engine",
            )


def _float32(x: Tensor) -> torch.autocast:
    """Inside this block no products are rounded to bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def _block(block: Any, num_rows: int, kernels: Kernels, eps: float) -> Block:
    attention, mlp = block.self_attn, block.mlp

    def matrix(*modules: Any) -> Matrices:
        return kernels.matrices([weight_of(m) for m in modules], [m.bias for m in modules], num_rows)

    norm = None
    if hasattr(attention, "q_norm"):
        normed = ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj))
        norm = torch.cat([n.weight.detach().expand(p.out_features // attention.head_dim, -1) for n, p in normed])
    return Block(
        norm=ProductForm("normed", block.input_layernorm.weight.detach(), eps),
        query_key_value=matrix(attention.q_proj, attention.k_proj, attention.v_proj),
        query_key_norm=norm,
        output=matrix(attention.o_proj),
        mlp_norm=ProductForm("normed", block.post_attention_layernorm.weight.detach(), eps),
        gate_up=matrix(mlp.gate_proj, mlp.up_proj),
        down=matrix(mlp.down_proj),
        scaling=attention.scaling,
        # Qwen sets the window for each layer, Mistral once for all layers, and Llama has none.
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    )


def supports_fusing(model: PreTrainedModel) -> bool:
    """Whether `FusedForward` computes models of this architecture."""
    config = model.config.get_text_config()
    known = type(model.base_model).__name__ in LLAMA_LIKE and config.hidden_act in ("silu", "swish")
    return known and not is_quantized(model) and all(map(_is_plain, model.modules()))


def _is_plain(module: Any) -> bool:
    """Whether the layer does no more than `weight_of` says. This is read from its flags, because a new DoRA, bias or
    embedding adapter changes nothing until it is trained, so comparing numbers would not find it."""
    if not is_adapted(module):
        return True
    flags = [*getattr(module, "use_dora", {}).values(), *getattr(module, "lora_bias", {}).values()]
    return not any(flags) and not len(getattr(module, "lora_embedding_A", ()))
