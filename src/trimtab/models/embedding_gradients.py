"""Adds gradients of embeddings to `.grad` in place.

By default autograd makes a gradient over the whole vocabulary for every micro-batch, although the lookup used only a
few hundred rows, makes another one in the head, adds the two, and adds the sum to the gradient so far. With 151,936
entries that is a gigabyte of memory traffic for each micro-batch, which takes as long as all blocks of a small model.
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
    """Inside this block lookups in these embeddings add their gradient to `weight.grad` directly.

    This holds for the embeddings and heads for which `takes_in_place` is true; their `.grad` is set to zeros first if
    it is None. The gradient of a head is added by the function that computes it (`token_logprobs`).

    Not for the linear layers of the blocks: the cost of autograd's addition is small there beside the products, and
    adding in the product (beta = 1) was 4% slower.
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
    """Looks up rows of an embedding. The gradient is added to `weight.grad`, and none is returned."""

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
