"""Attention over token trees: each token sees its prompt and the earlier tokens of its own branch.

The definition lays the trees side by side and masks. Torch's flash kernels give the same result in parts, whose outputs
are merged by their sums of exponentials: causal attention inside prompts and branches and, at each fork, attention of
all branches over the keys of their prompt. None of these parts needs a mask of the tree. On a CPU the parts lie side by
side in strips; on a GPU, in 16 bits, they are packed without padding. With a window and attention sinks, the one part
on a CPU is the trees side by side under their mask. In float32 a CPU with a compiler needs no parts: the whole row is
one (`compiled_attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from trimtab.batches.device import has_flash_attention, is_gpu, num_multiprocessors, repeatable
from trimtab.batches.trees import Packed, PackedParts, Strips, TokenTrees, TreeParts
from trimtab.models.attention import UNSEEN, Attend, Window, attention_with_lse, merge_attention, softmax_attention
from trimtab.models.compiled_attention import CompiledPart, takes_compiled

Way = Literal["masked", "packed", "strips", "compiled"]


def tree_attention(trees: TokenTrees) -> Attend:
    """Attention among the tokens of `trees`."""
    masks: dict[Window, Tensor] = {}
    parts: dict[tuple[Window, Way], Sequence[AttentionPart]] = {}
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    """Results on a GPU of layers that activation checkpointing may compute again: attention, the dearest part of a long
    row, is not. Without checkpointing autograd keeps the same tensors."""

    def mask(window: Window) -> Tensor:
        if window not in masks:
            masks[window] = trees.visible(window)[:, None]
        return masks[window]

    def parts_of(window: Window, query: Tensor, way: Way) -> Sequence[AttentionPart]:
        if way == "packed":
            return _packed_parts(trees.packed)
        if way == "compiled":
            assert not callable(window)
            return [CompiledPart.build(trees.trees, window)]
        return _parts(trees.parts) if window is None else [_whole(trees.strips, mask(window), query)]

    def attend(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: Window,
        sinks: Tensor | None = None,
    ) -> Tensor:
        way = way_of(query, window, sinks)
        if way == "masked":
            return masked_attention(query, key, value, trees.strips, mask(window), scaling, sinks)
        if (window, way) not in parts:
            parts[window, way] = parts_of(window, query, way)
        known = kept.pop(layer, None)
        output, lse = _PartedAttention.apply(query, key, value, sinks, parts[window, way], scaling, known)  # type: ignore[no-untyped-call]
        if way == "packed" and known is None and torch.is_grad_enabled():
            kept[layer] = output.detach(), lse
        return output  # type: ignore[no-any-return]

    return attend


def way_of(query: Tensor, window: Window, sinks: Tensor | None) -> Way:
    """How attention of these queries [N, H, D] is computed: masked, which is the definition, or in parts."""
    if window is None and sinks is None and takes_packed(query):
        return "packed"
    if not callable(window) and takes_compiled(query):
        return "compiled"
    return "masked" if query.device.type != "cpu" or (window is not None and sinks is None) else "strips"


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
    elif is_gpu(query):
        output = _MaskedAttention.apply(*cut, visible, scaling)  # type: ignore[no-untyped-call]
    else:
        output = _masked(*cut, visible, scaling)
    return torch.empty_like(query).index_copy(0, strips.tokens, strips.back(output))


def _masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if is_gpu(query) and repeats > 1:
        # Only a kernel that keeps all scores takes both a mask and key heads that several query heads share.
        key, value, repeats = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), 1
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=repeats > 1)


class _MaskedAttention(torch.autograd.Function):
    """`_masked` on a GPU, where the backward pass of torch's kernel adds in any order unless it is told otherwise. It
    is computed a second time there, so that only this kernel is told."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value, visible)
        ctx.scaling = scaling
        return _masked(query, key, value, visible, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, visible = ctx.saved_tensors
        states = tuple(x.detach().requires_grad_() for x in (query, key, value))
        with torch.enable_grad():
            output = _masked(states[0], states[1], states[2], visible, ctx.scaling)
        with repeatable():
            return (*torch.autograd.grad(output, states, grad_output), None, None)


class AttentionPart(Protocol):
    """Attention of some queries over some keys, of which it also gives the backward pass."""

    @property
    def asking(self) -> Tensor | None:
        """[n] the indices in the row of the queries; None if they are all tokens in their order, which only the first
        part may have."""

    @property
    def seen(self) -> Tensor | None:
        """[m] those of the keys; None like those of the queries."""

    @property
    def merges(self) -> bool:
        """Whether the output is merged with that of an earlier part, which had the same queries and other keys."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """The output [n, H, D] at its queries and the logsumexp [n, H] of their scores, from query, key and value of
        the whole row."""

    def gradients(
        self, grad: Tensor, states: tuple[Tensor, Tensor, Tensor], output: Tensor, lse: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of its queries [n, H, D], keys and values [m, KV heads, D]. `states` are query, key and value
        of the whole row, `output` and `lse` those of all parts together, from which the weights follow: exp(score -
        lse)."""


@dataclass(frozen=True)
class StripsPart:
    """Queries in some strips over keys in other strips, row by row, by the kernel of the CPU."""

    queries: Strips
    keys: Strips
    causal: bool
    bias: Tensor | None
    """[C, 1, L or 1, T] added to the scores to hide keys; None hides no keys."""
    merges: bool

    @property
    def asking(self) -> Tensor:
        """See `AttentionPart`."""
        return self.queries.tokens

    @property
    def seen(self) -> Tensor:
        """See `AttentionPart`."""
        return self.keys.tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """See `AttentionPart`."""
        states = self._cut(query, key, value)
        output, lse = attention_with_lse(*states, _like(self.bias, query), scaling, causal=self.causal)
        return self.queries.back(output), self.queries.back(lse)

    def gradients(
        self, grad: Tensor, states: tuple[Tensor, Tensor, Tensor], output: Tensor, lse: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionPart`."""
        empty = ~self.queries.filled
        of_query, *of_keys = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            # An empty place has no query: no gradient comes from it, and exp(score - lse) is 0.
            self.queries.cut(grad).masked_fill(empty[:, None, :, None], 0),
            *self._cut(*states),
            self.queries.cut(output),
            self.queries.cut(lse[..., None])[..., 0].masked_fill(empty[:, None], -UNSEEN),
            0.0,
            self.causal,
            attn_mask=_like(self.bias, grad),
            scale=scaling,
        )
        heads = states[1].shape[1]
        if of_query.shape[1] != heads:  # sum over all query heads that read one key head
            of_keys = [x.unflatten(1, (heads, -1)).sum(2) for x in of_keys]
        return self.queries.back(of_query), self.keys.back(of_keys[0]), self.keys.back(of_keys[1])

    def _cut(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        repeats = query.shape[1] // key.shape[1]
        keys, values = self.keys.cut(key), self.keys.cut(value)
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        return self.queries.cut(query), keys, values


@dataclass(frozen=True)
class PackedPart:
    """Queries in some stretches over keys in other stretches, by the flash kernel of the GPU (arXiv:2307.08691), which
    reads stretches of different lengths and key heads that several query heads share."""

    queries: Packed
    keys: Packed
    merges: bool
    """False for chains, which are causal and hold the whole row; true for forks."""

    @property
    def asking(self) -> Tensor | None:
        """See `AttentionPart`."""
        return self.queries.tokens if self.merges else None

    @property
    def seen(self) -> Tensor | None:
        """See `AttentionPart`."""
        return self.keys.tokens if self.merges else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """See `AttentionPart`."""
        states = (_rows(query, self.asking), _rows(key, self.seen), _rows(value, self.seen))
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            *states, *self._bounds, 0.0, not self.merges, False, scale=scaling
        )
        return output, lse.T

    def gradients(
        self, grad: Tensor, states: tuple[Tensor, Tensor, Tensor], output: Tensor, lse: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionPart`. Query heads are computed in groups that fill the GPU."""
        key, value = (_rows(x, self.seen) for x in states[1:])
        grad, query, output, lse = (_rows(x, self.asking) for x in (grad, states[0], output, lse))
        shared = query.shape[1] // key.shape[1]
        groups = head_groups(
            num_heads=query.shape[1],
            shared=shared,
            num_stretches=len(self.queries.bounds) - 1,
            num_blocks=-(-self.keys.longest // 128),
            num_processors=num_multiprocessors(query),
            causal=not self.merges,
        )
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        no_noise = torch.empty(2, dtype=torch.uint64, device=grad.device)  # what dropout would be drawn with
        start = 0
        with repeatable():
            for size in groups:
                heads, kv_heads = slice(start, start + size), slice(start // shared, (start + size) // shared)
                found.append(
                    torch.ops.aten._flash_attention_backward(
                        grad[:, heads].contiguous(),
                        *(query[:, heads], key[:, kv_heads], value[:, kv_heads]),
                        output[:, heads].contiguous(),
                        lse[:, heads].T.contiguous(),
                        *self._bounds,
                        *(0.0, not self.merges, no_noise, no_noise),
                        scale=scaling,
                    )
                )
                start += size
        if len(found) == 1:
            return found[0]
        of_query, of_key, of_value = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return of_query, of_key, of_value

    @property
    def _bounds(self) -> tuple[Tensor, Tensor, int, int]:
        return self.queries.bounds, self.keys.bounds, self.queries.longest, self.keys.longest


@lru_cache(maxsize=4096)
def head_groups(
    *, num_heads: int, shared: int, num_stretches: int, num_blocks: int, num_processors: int, causal: bool
) -> tuple[int, ...]:
    """How many query heads the flash kernel's backward pass is given at a time.

    For repeatable results the kernel deals each head's `num_blocks` blocks of keys to workers, as many as make the
    workers of all heads and stretches just exceed the processors. Sixteen heads of one stretch on 132 processors have 9
    workers each: 144 workers take two rounds where one would do. Groups of 4 and 12 heads, with 33 and 11 workers each,
    fill the GPU once each. `shared` query heads read one key head and stay together.
    """

    def rounds(heads: int) -> float:
        """The time of this many heads, in blocks of keys."""
        pairs = heads * num_stretches
        workers = min(max(1, (num_processors + pairs - 1) // pairs), num_blocks)
        # Later keys of a causal stretch have fewer queries.
        work = [2 * (num_blocks - i) / (num_blocks + 1) if causal else 1.0 for i in range(num_blocks)]
        slowest = max(sum(work[w::workers]) for w in range(workers))
        return slowest * -(-pairs * workers // num_processors)

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for total in range(shared, num_heads + 1, shared):
        choices = (
            (best[total - size][0] + rounds(size) + 0.25, (*best[total - size][1], size))  # a start costs a little too
            for size in range(shared, total + 1, shared)
        )
        best[total] = min(choices)
    return best[num_heads][1]


def takes_packed(query: Tensor) -> bool:
    """Whether the flash kernel of a GPU takes these queries [N, H, D]. It computes in 16 bits only."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and has_flash_attention(query)
    )


def _parts(parts: TreeParts) -> Sequence[AttentionPart]:
    """The parts of trees without a window. Chains come first, because every token of a fork is also in a chain."""
    chains = [StripsPart(chain, chain, True, None, False) for chain in parts.chains]
    forks = [StripsPart(branches, prompts, False, _padding(prompts), True) for branches, prompts in parts.forks]
    return chains + forks


def _packed_parts(parts: PackedParts) -> Sequence[AttentionPart]:
    chains = [PackedPart(parts.chains, parts.chains, False)]
    return chains + ([PackedPart(*parts.forks, True)] if parts.forks else [])


def _whole(strips: Strips, visible: Tensor, like: Tensor) -> AttentionPart:
    """The trees side by side under their mask [P, 1, L, L], as one part."""
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, UNSEEN)
    return StripsPart(strips, strips, False, bias, False)


class _PartedAttention(torch.autograd.Function):
    """Attention in parts. A sink is a part too: one key with the score `sinks` [H] and the value 0."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        parts: Sequence[AttentionPart],
        scaling: float,
        known: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """`known` are the results of an earlier call with the same states, which are not computed again."""
        if known is not None:
            output, lse = known
        else:
            output = torch.empty_like(query)
            lse = query.new_empty(query.shape[:2], dtype=torch.float32)
            for p in parts:
                part, part_lse = p.attend(query, key, value, scaling)
                if p.asking is None:
                    output, lse = part, part_lse
                    continue
                if p.merges:
                    part, part_lse = merge_attention(output[p.asking], lse[p.asking], part, part_lse)
                output[p.asking], lse[p.asking] = part, part_lse
            if sinks is not None:
                output, lse = merge_attention(output, lse, torch.zeros_like(output), sinks.float().expand_as(lse))
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.mark_non_differentiable(lse)
        ctx.parts, ctx.scaling = parts, scaling
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        grads: list[Tensor] = []
        for p in ctx.parts:
            part = p.gradients(grad_output, (query, key, value), output, lse, ctx.scaling)
            if p.asking is None:  # the whole row, which comes first
                grads = list(part)
                continue
            grads = grads or [torch.zeros_like(x) for x in (query, key, value)]
            for grad, rows, x in zip(grads, (p.asking, p.seen, p.seen), part, strict=True):
                grad.index_add_(0, rows, x)
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # d output / d sink = -weight of the sink * output, since its value is zero.
            weight = (sinks.float() - lse).exp()
            grad_sinks = -(weight * (grad_output.float() * output.float()).sum(-1)).sum(0).to(sinks.dtype)
        return (*grads, grad_sinks, None, None, None)


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _padding(strips: Strips) -> Tensor | None:
    """[C, 1, 1, L] added to the scores to hide the empty places of `strips`; None if there are no empty places."""
    if strips.is_full:
        return None
    filled = strips.filled
    return torch.zeros(filled.shape, device=filled.device).masked_fill_(~filled, UNSEEN)[:, None, None]


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
