"""Moves tensors to the device on which a model computes.

Everything that a stage holds lives on the CPU: trees, batches, log-probabilities, metrics. A model moves what it reads
to its own device and gives its results back on the CPU, so no code above it names a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CPU = torch.device("cpu")
Tensors = TypeVar("Tensors", bound="DataclassInstance")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy to a GPU goes on in the background, which needs pinned memory."""
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def tensors_to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """A copy of a dataclass with its tensors on a device; `tensors` itself if they are there."""
    columns = {f.name: x for f in dataclasses.fields(tensors) if isinstance(x := getattr(tensors, f.name), Tensor)}
    moved = {name: to_device(x, device) for name, x in columns.items() if x.device != device}
    return dataclasses.replace(tensors, **moved) if moved else tensors


def to_cpu(first: Tensor, *others: Tensor | None) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
    """Columns of one length on the CPU. A GPU is waited for once, whatever their number: they travel together in
    float64, which holds token ids and log-probabilities exactly."""
    if first.device.type == "cpu":
        return (first, *others)
    there = iter(torch.stack([x.double() for x in (first, *others) if x is not None]).cpu())
    return (next(there).to(first.dtype), *(None if x is None else next(there).to(x.dtype) for x in others))


def is_gpu(x: Tensor) -> bool:
    """Whether the tensor is on a GPU, which has kernels of its own."""
    return x.device.type == "cuda"


def has_flash_attention(x: Tensor) -> bool:
    """Whether the tensor is on a GPU on which torch's flash kernel runs: Ampere or newer."""
    return (
        is_gpu(x)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def num_multiprocessors(x: Tensor) -> int:
    """The multiprocessors of the GPU that the tensor is on: parts that compute at the same time."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside this block a GPU adds in an order that does not change from run to run, where torch has such a way. Only
    for single operations: others have none and would raise."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
