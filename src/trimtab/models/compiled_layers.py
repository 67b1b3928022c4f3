"""What lies between the matrix products of Llama-like blocks in C (`layers.c`), for float32 on a CPU.

The formulas are those of `fused_layers.py`, each with its own backward pass.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.compiled import library

SOURCE = Path(__file__).with_name("layers.c")
PART = 64
"""Rows over which the gradient of a norm is summed together: one order, however many threads there are."""


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    return _Normed.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _Gated.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, N, H, D] with the pairs (i, i + D/2) rotated (RoPE, arXiv:2104.09864), for cos and sin [1, N, D], which
    take no gradient."""
    return _Rotated.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        size = x.shape[-1]
        y, scales = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _functions().norm_forward(
            x.data_ptr(), scales.numel(), size, weight.data_ptr(), eps, y.data_ptr(), scales.data_ptr(), _threads()
        )
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        grad, n, size = grad.contiguous(), scales.numel(), x.shape[-1]
        of_x, of_norm = torch.empty_like(x), x.new_empty(-(-n // PART), size)
        _functions().norm_backward(
            grad.data_ptr(), x.data_ptr(), n, size, weight.data_ptr(), scales.data_ptr(), of_x.data_ptr(),
            of_norm.data_ptr(), PART, _threads(),
        )  # fmt: skip
        return of_x, of_norm.sum(0), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _functions().gate_forward(gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr(), _threads())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, of_gate, of_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _functions().gate_backward(
            grad.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.numel(), of_gate.data_ptr(), of_up.data_ptr(),
            _threads(),
        )  # fmt: skip
        return of_gate, of_up


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(grad, *ctx.saved_tensors, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    _, n, heads, size = x.shape
    _functions().turn(
        x.data_ptr(), x.stride(1), x.stride(2), n, heads, size, cos.data_ptr(), sin.data_ptr(), back, y.data_ptr(),
        _threads(),
    )  # fmt: skip
    return y


def available() -> bool:
    """Whether a compiler makes these functions here."""
    return library(SOURCE, _declare) is not None


def _functions() -> ctypes.CDLL:
    found = library(SOURCE, _declare)
    assert found is not None
    return found


def _declare(found: ctypes.CDLL) -> None:
    p, i, f = c_void_p, c_int64, c_float
    found.norm_forward.argtypes = [p, i, i, p, f, p, p, i]
    found.norm_backward.argtypes = [p, p, i, i, p, p, p, p, i, i]
    found.gate_forward.argtypes = [p, p, i, p, i]
    found.gate_backward.argtypes = [p, p, p, i, p, p, i]
    found.turn.argtypes = [p, i, i, i, i, i, p, p, i, p, i]
    for function in (found.norm_forward, found.norm_backward, found.gate_forward, found.gate_backward, found.turn):
        function.restype = None


def _threads() -> int:
    return torch.get_num_threads()
