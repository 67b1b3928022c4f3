"""The precision of matrix products: float32, or bfloat16 if that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.core.process import keep_freed_memory

Precision = Literal["float32", "bfloat16"]

# oneDNN, which computes bfloat16 products and some layers, compiles a kernel of about a megabyte for each new shape. It
# keeps 1024 of them, and torch's interface to it another 1024, while token trees make new shapes all the time. A block
# uses about 20 shapes in one micro-batch, so 128 are enough. Both variables are read when the first kernel is made.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")
keep_freed_memory()


@contextmanager
def products_in_float32(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside this block these layers compute in float32, even under autocast."""
    plain = [layer.forward for layer in layers]
    for layer, forward in zip(layers, plain, strict=True):
        layer.forward = partial(_in_float32, forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _in_float32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.float())


@contextmanager
def computing_in(precision: Precision, device_type: str) -> Iterator[None]:
    """Inside this block products are computed in this precision. Weights, sums of losses and log-probabilities stay
    float32.

    torch's settings "high" and "medium" are never used for float32. They allow products to be rounded to TF32 or
    bfloat16, and an exact product at one shape proves nothing about another shape. On CPUs with AVX-512 "medium" uses
    oneDNN, which compiles and keeps a kernel for every new shape, and token trees make new shapes all the time: 25 PPO
    steps of the quickstart take 70 s and 2.58 GB with it on such a machine, 40 s and 0.66 GB without.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
