"""Attention over token trees: each token sees its prompt and the earlier tokens of its own branch.

The definition lays the trees side by side and masks. On a CPU, torch's flash kernel gives the same result in parts,
whose outputs are merged by their sums of exponentials: causal attention inside prompts and branches and, at each fork,
attention of all branches over the keys of their prompt. None of these parts needs a mask of the tree. With a window and
attention sinks, the one part is the trees side by side under their mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from trimtab.batches.trees import Strips, TokenTrees, TreeParts
from trimtab.models.attention import UNSEEN, Attend, Window, attention_with_lse, merge_attention, softmax_attention


def tree_attention(trees: TokenTrees) -> Attend:
    """Attention among the tokens of `trees`."""
    masks: dict[Window, Tensor] = {}
    parts: dict[Window, list[AttentionPart]] = {}

    def attend(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: Window,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if window is not None and window not in masks:
            masks[window] = trees.visible(window)[:, None]
        if query.device.type == "cpu" and (window is None or sinks is not None):
            if window not in parts:
                parts[window] = _parts(trees.parts) if window is None else [_whole(trees.strips, masks[window], query)]
            return _PartedAttention.apply(query, key, value, sinks, parts[window], scaling)  # type: ignore[no-any-return,no-untyped-call]
        if window not in masks:
            masks[window] = trees.visible()[:, None]
        return masked_attention(query, key, value, trees.strips, masks[window], scaling, sinks)

    return attend


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    strips: Strips,
    visible: Tensor,
    scaling: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention [N, H, D] within each strip, over the keys that are true in `visible` [P, 1, L, L]: the definition."""
    cut = (strips.cut(query), strips.cut(key), strips.cut(value))
    if sinks is not None:
        output = softmax_attention(*cut, visible, scaling, sinks=sinks)
    else:
        output = scaled_dot_product_attention(
            *cut, attn_mask=visible, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return torch.empty_like(query).index_copy(0, strips.tokens, strips.back(output))


@dataclass(frozen=True)
class AttentionPart:
    """Attention of queries in some strips over keys in other strips, row by row."""

    asking: Strips
    seen: Strips
    causal: bool
    bias: Tensor | None
    """[C, 1, L or 1, T] added to the scores to hide keys; None hides no keys."""
    merges: bool
    """Whether the output is merged with that of an earlier part, which had the same queries and other keys."""


def _parts(parts: TreeParts) -> list[AttentionPart]:
    """The parts of trees without a window. Chains come first, because every token of a fork is also in a chain."""
    chains = [AttentionPart(chain, chain, True, None, False) for chain in parts.chains]
    forks = [AttentionPart(branches, prompts, False, _padding(prompts), True) for branches, prompts in parts.forks]
    return chains + forks


def _whole(strips: Strips, visible: Tensor, like: Tensor) -> AttentionPart:
    """The trees side by side under their mask [P, 1, L, L], as one part."""
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, UNSEEN)
    return AttentionPart(strips, strips, False, bias, False)


class _PartedAttention(torch.autograd.Function):
    """Attention in parts. Backward runs the kernel's own backward on each part with the merged output and logsumexp,
    which give the attention weights over all keys: exp(score - lse). A sink is a part too: one key with the score
    `sinks` [H] and the value 0."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        parts: list[AttentionPart],
        scaling: float,
    ) -> Tensor:
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for p in parts:
            states = _cut(query, key, value, p.asking, p.seen)
            part, part_lse = attention_with_lse(*states, _like(p.bias, query), scaling, causal=p.causal)
            tokens = p.asking.tokens
            part, part_lse = p.asking.back(part), p.asking.back(part_lse)
            if p.merges:
                part, part_lse = merge_attention(output[tokens], lse[tokens], part, part_lse)
            output[tokens], lse[tokens] = part, part_lse
        if sinks is not None:
            output, lse = merge_attention(output, lse, torch.zeros_like(output), sinks.float().expand_as(lse))
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        for p in ctx.parts:
            empty = ~p.asking.filled
            part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                # An empty place has no query: no gradient comes from it, and exp(score - lse) is 0.
                p.asking.cut(grad_output).masked_fill(empty[:, None, :, None], 0),
                *_cut(query, key, value, p.asking, p.seen),
                p.asking.cut(output),
                p.asking.cut(lse[..., None])[..., 0].masked_fill(empty[:, None], -UNSEEN),
                0.0,
                p.causal,
                attn_mask=_like(p.bias, query),
                scale=ctx.scaling,
            )
            for grad, strips, x in zip(grads, (p.asking, p.seen, p.seen), part, strict=True):
                heads = grad.shape[1]
                if x.shape[1] != heads:  # sum over all query heads that read one key head
                    x = x.unflatten(1, (heads, -1)).sum(2)
                grad.index_add_(0, strips.tokens, strips.back(x))
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # d output / d sink = -weight of the sink * output, since its value is zero.
            weight = (sinks.float() - lse).exp()
            grad_sinks = -(weight * (grad_output.float() * output.float()).sum(-1)).sum(0).to(sinks.dtype)
        return (*grads, grad_sinks, None, None)


def _cut(query: Tensor, key: Tensor, value: Tensor, asking: Strips, seen: Strips) -> tuple[Tensor, Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    keys, values = seen.cut(key), seen.cut(value)
    if repeats > 1:
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    return asking.cut(query), keys, values


def _padding(strips: Strips) -> Tensor | None:
    """[C, 1, 1, L] added to the scores to hide the empty places of `strips`; None if there are no empty places."""
    if strips.is_full:
        return None
    filled = strips.filled
    return torch.zeros(filled.shape, device=filled.device).masked_fill_(~filled, UNSEEN)[:, None, None]


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
