"""Gradients of embeddings, added to where they are kept.

Left to itself autograd makes a gradient of the whole vocabulary for every micro-batch, of which the lookup touched a
few hundred rows, makes another in the head, adds them, and adds the sum to what it has. With 151,936 entries that is
a gigabyte of traffic for each micro-batch, as much time as all blocks of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.math.row_sums import add_to_rows


@contextmanager
def gradients_in_place(modules: list[nn.Module | None]) -> Iterator[None]:
    """Within it those of the embeddings and heads that `takes_in_place` have a gradient from the start, zero if there
    was none, and lookups add to it themselves. A head's gradient is added by who computes it (`token_logprobs`).

    Not for the linear layers of the blocks: what autograd makes and adds there is small beside the products, and adding
    in the product (beta = 1) was 4% slower.
    """
    weights = [m.weight for m in modules if m is not None and takes_in_place(m)]
    lookups = [m for m in modules if isinstance(m, nn.Embedding) and takes_in_place(m)]
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    for module in lookups:
        module.forward = partial(_look_up, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in lookups:
            del module.forward


def takes_in_place(module: nn.Module | None) -> bool:
    """Whether gradients of the module's weight can be added in place: a plain trained embedding or linear head in
    float32, in which a sum of many parts loses nothing."""
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear or (
        type(module) is nn.Embedding and not (module.max_norm is not None or module.scale_grad_by_freq or module.sparse)
    )
    return plain and type(weight) is nn.Parameter and weight.requires_grad and weight.dtype == torch.float32


def _look_up(module: nn.Embedding, ids: Tensor) -> Tensor:
    return cast(Tensor, _Lookup.apply(ids, module.weight, module.padding_idx))  # type: ignore[no-untyped-call]


class _Lookup(torch.autograd.Function):
    """Rows of an embedding; the gradient goes to `weight.grad`, and none is returned."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        add_to_rows(ctx.weight.grad, ids, grad)
        return None, None, None
