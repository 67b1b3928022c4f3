"""How products are computed: float32 at the machine's best speed, or bfloat16 where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]

MAX_ERROR = 2e-6
"""Relative error of a float32 product against float64; bfloat16 is off by 3e-3."""


@contextmanager
def computing_in(precision: Precision, device_type: str = "cpu") -> Iterator[None]:
    """Products inside run in this precision. Weights, sums of losses and log-probabilities stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(fastest_float32())
    try:
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def fastest_float32() -> str:
    """The setting of torch under which float32 products are fastest here and still float32.

    On CPUs "medium" sends them through oneDNN. With AVX-512 that is up to twice as fast as the path torch takes by
    itself on some makes, and with AVX2 it gains nothing. Where a CPU multiplies bfloat16 in hardware "medium" may
    really round to it, so it is taken only if a product comes out as exact as before. No timing decides: a resumed
    run must round as the interrupted one did.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX512_VNNI"):
        return "highest"
    return "medium" if product_error("medium") <= MAX_ERROR else "highest"


def product_error(setting: str) -> float:
    """Largest error of a float32 matrix product under this setting, relative to its largest entry."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=draw) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        result = torch.nn.functional.linear(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double().T
    return float((result.double() - exact).abs().max() / exact.abs().max())
