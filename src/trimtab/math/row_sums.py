"""Sums into rows that several summands share, in an order that does not depend on threads."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_to_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds `values` [..., D] to the rows of `total` [V, D] that `rows` [...] names, in place; a row may be named often.

    torch's own index_put_ lets the threads of a CPU add to one row as they come, and its index_add_ those of a GPU:
    the last digits then differ from run to run. Here the values of equal rows are summed first, as the backward pass
    of an embedding with only these rows does, and every row is added to once.
    """
    places, which = rows.reshape(-1).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    flat = values.reshape(len(which), math.prod(total.shape[1:])).to(total.dtype)
    summed = torch.ops.aten.embedding_dense_backward(flat, which, len(places), -1, False)
    total.index_put_((places,), total[places] + summed.reshape(len(places), *total.shape[1:]))
