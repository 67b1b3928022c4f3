"""Attention over token trees: each token sees its prompt and the earlier tokens of its own branch.

The definition lays the trees side by side and masks. Where there is no window and torch has its flash kernel, the
same result comes from parts that need no mask: causal attention inside prompts and branches, and at each fork all
branches over the keys of their prompt, merged by what the exponentials of each part sum to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from trimtab.data.trees import Strips, TokenTrees, TreeParts
from trimtab.models.attention import UNSEEN, Attend, attention_with_lse, merge_attention, row_states
from trimtab.models.last_block import reading


def tree_attention(trees: TokenTrees) -> Attend:
    """Attention among the tokens of `trees`."""
    masks: dict[int | None, Tensor] = {}

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        if window is None and query.device.type == "cpu":
            return _PartedAttention.apply(query, key, value, trees.parts, scaling)  # type: ignore[no-any-return,no-untyped-call]
        if window not in masks:
            masks[window] = trees.visible(window)[:, None]
        return masked_attention(query, key, value, trees.strips, masks[window], scaling)

    return attend


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, strips: Strips, visible: Tensor, scaling: float
) -> Tensor:
    """Attention [N, H, D] within each strip, over the keys that `visible` [P, 1, L, L] shows: the definition."""
    output = scaled_dot_product_attention(
        strips.cut(query),
        strips.cut(key),
        strips.cut(value),
        attn_mask=visible,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return torch.empty_like(query).index_copy(0, strips.tokens, strips.back(output))


Place = Literal["predict_from", "last_tokens"]
"""Where hidden states are read: at the M tokens that predict a trained one, or at the B ends of sequences."""


def hidden_states(
    backbone: PreTrainedModel, trees: TokenTrees, places: Sequence[Place], *, tree_form: bool, pad_id: int
) -> list[Tensor]:
    """Last hidden states at each of `places`, [M, D] or [B, D].

    `tree_form` runs the shared row; otherwise sequences run as padded rows, with the same numbers to rounding.
    """
    if tree_form:
        wanted = [getattr(trees, place) for place in places]
        rows, found = torch.unique(torch.cat(wanted), return_inverse=True)
        with reading(backbone, rows, trees.num_tokens):
            hidden = row_states(backbone, trees.input_ids, trees.position_ids, tree_attention(trees))
        if len(hidden) == trees.num_tokens:
            return [hidden.index_select(0, where) for where in wanted]
        return [hidden.index_select(0, where) for where in found.split([len(w) for w in wanted])]
    padded = trees.padded(pad_id)
    hidden = backbone(
        input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
    ).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return [hidden.index_select(0, getattr(padded, place)) for place in places]


class _PartedAttention(torch.autograd.Function):
    """Attention in parts. Backward runs the kernel's own backward on each part with the merged output and
    log-sum-exp, from which it forms the weights of the whole: exp(score - lse)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: TreeParts, scaling: float) -> Tensor:
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for chain in parts.chains:
            part, part_lse = attention_with_lse(*_cut(query, key, value, chain, chain), None, scaling, causal=True)
            output[chain.tokens] = chain.back(part)
            lse[chain.tokens] = chain.back(part_lse)
        for branches, prompts in parts.forks:
            part, part_lse = attention_with_lse(
                *_cut(query, key, value, branches, prompts), _padding(prompts, query), scaling
            )
            tokens = branches.tokens
            output[tokens], lse[tokens] = merge_attention(
                output[tokens], lse[tokens], branches.back(part), branches.back(part_lse)
            )
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        pairs = [(chain, chain, True) for chain in ctx.parts.chains]
        pairs += [(branches, prompts, False) for branches, prompts in ctx.parts.forks]
        for asking, seen, causal in pairs:
            empty = ~asking.filled
            part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                # An empty place asks nothing: no gradient comes from it, and exp(score - lse) is 0.
                asking.cut(grad_output).masked_fill(empty[:, None, :, None], 0),
                *_cut(query, key, value, asking, seen),
                asking.cut(output),
                asking.cut(lse[..., None])[..., 0].masked_fill(empty[:, None], -UNSEEN),
                0.0,
                causal,
                attn_mask=None if causal else _padding(seen, query),
                scale=ctx.scaling,
            )
            for grad, strips, x in zip(grads, (asking, seen, seen), part, strict=True):
                heads = grad.shape[1]
                if x.shape[1] != heads:  # the gradients of all query heads that read one key head
                    x = x.unflatten(1, (heads, -1)).sum(2)
                grad.index_add_(0, strips.tokens, strips.back(x))
        return (*grads, None, None)


def _cut(query: Tensor, key: Tensor, value: Tensor, asking: Strips, seen: Strips) -> tuple[Tensor, Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    keys, values = seen.cut(key), seen.cut(value)
    if repeats > 1:
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    return asking.cut(query), keys, values


def _padding(strips: Strips, like: Tensor) -> Tensor | None:
    """[C, 1, 1, L] what hides the empty places of `strips` from everyone; None where there are none."""
    if bool(strips.filled.all()):
        return None
    bias = torch.zeros(strips.filled.shape, dtype=like.dtype).masked_fill_(~strips.filled, UNSEEN)
    return bias[:, None, None]
