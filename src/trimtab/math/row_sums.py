"""Reads rows several times and adds values to rows that several values share, in an order that does not depend on
threads."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_to_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds `values` [..., D] to the rows of `total` [V, D] with the indices `rows` [...], in place. Indices may repeat.

    torch's own index_put_ lets CPU threads add to one row in any order, and its index_add_ lets GPU threads do so: the
    last digits then differ from run to run. Here the values of equal rows are summed first, as in the backward pass of
    an embedding with only these rows, and every row is added to once.
    """
    if total.device.type != "cpu":
        # On a GPU this sorts the indices, adds in their order, and needs no count that the program would wait for.
        total.index_put_((rows.reshape(-1),), values.reshape(rows.numel(), *total.shape[1:]).to(total.dtype), True)
        return
    places, which = rows.reshape(-1).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    flat = values.reshape(len(which), math.prod(total.shape[1:])).to(total.dtype)
    summed = torch.ops.aten.embedding_dense_backward(flat, which, len(places), -1, False)
    total.index_put_((places,), total[places] + summed.reshape(len(places), *total.shape[1:]))


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of `x` [N, D] with the indices `rows` [n], which may repeat. In the backward pass gradients of equal
    rows are added in one order: that of index_select on a CPU, and of indexing on a GPU, whose index_select has
    none."""
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]
