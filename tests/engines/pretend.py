"""A pretend accelerator: its tensors say `device='pretend:0'` and compute on the CPU.

It shows on any machine what a GPU would refuse, which are operations on tensors of two devices, and where the program
would wait for it, which are copies to the CPU and operations whose result has a size that depends on values. Nothing is
raised: every case is counted with the line of this package it comes from, and the operation goes on. It says nothing of
a GPU's rounding, speed or memory.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PACKAGE = "src/trimtab/"
SIZED_BY_VALUES = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("is_nonzero", "equal", "bincount"),
}
"""Operations whose result the program has to wait for."""


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    # Asked for by whoever keeps all random states, also of devices that are not in use.
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(0)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
DEVICE = torch.device("pretend:0")

# Autocast of the device: as on a GPU, linear layers are computed in its precision, and nothing else is changed.
_others, _linear = (torch.library.Library(name, "IMPL", "AutocastPrivateUse1") for name in ("_", "aten"))
_others.fallback(torch.library.fallthrough_kernel)


def _linear_under_autocast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    dtype = torch.get_autocast_dtype(DEVICE.type)
    with torch.autocast(DEVICE.type, enabled=False):
        return nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


_linear.impl("linear", _linear_under_autocast)


class Log:
    """What was seen since it was made: each a counter of (line of the package, operation)."""

    def __init__(self) -> None:
        self.mixed: collections.Counter[tuple[str, str]] = collections.Counter()
        """Operations on tensors of two devices: an error on a GPU."""
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        """Operations that wait for the device."""
        self.operations = 0

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())


_log = Log()


class Pretend(torch.Tensor):
    """A tensor on the pretend device. `elem` holds its values on the CPU."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor, requires_grad: bool = False) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        made.elem = elem
        return made

    def __repr__(self) -> str:
        return f"Pretend({self.elem})"

    def tolist(self) -> Any:
        _log.waits[_line(), "tolist"] += 1
        return self.elem.tolist()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Also sees operations that make tensors on the device out of nothing or out of tensors of the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, Pretend) for x in tree_flatten((args, kwargs))[0]) or _is_device(kwargs.get("device")):
            return _compute(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def watched() -> Iterator[Log]:
    """Inside this block the device exists, and what happens on it is counted."""
    global _log
    _log = Log()
    # torch.tensor does not pass through the mode.
    with _Mode(), mock.patch.object(torch, "tensor", _tensor):
        yield _log


_plain_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    made = _plain_tensor(data, device=None if _is_device(device) else device, **options)
    return Pretend(made) if _is_device(device) else made


def on_device(module: nn.Module) -> nn.Module:
    """The module with its weights and buffers on the pretend device; shared weights stay shared."""
    made: dict[int, Pretend] = {}
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None and not isinstance(weight, Pretend):
                if id(weight) not in made:
                    made[id(weight)] = Pretend(weight.detach().clone(), weight.requires_grad)
                    made[id(weight)]._is_param = True
                part._parameters[name] = made[id(weight)]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not isinstance(buffer, Pretend):
                part._buffers[name] = Pretend(buffer.clone())
    return module


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _line() -> str:
    for frame in reversed(traceback.extract_stack(limit=80)):
        if PACKAGE in frame.filename:
            return f"{frame.filename.split(PACKAGE)[1]}:{frame.lineno}"
    return "outside the package"


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Pretend)]
    others = [x for x in tensors if not isinstance(x, Pretend) and x.dim() > 0]
    asked = kwargs.get("device")
    to_cpu = bool(ours) and asked is not None and not _is_device(asked)
    _log.operations += bool(ours)
    if ours:
        _count(name, args, others, to_cpu)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def bare(x: Any) -> Any:
        return x.elem if isinstance(x, Pretend) else x

    result = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if to_cpu or not (ours or _is_device(asked)) or (name == "copy_" and not isinstance(args[0], Pretend)):
        return args[0] if name == "copy_" else result
    # Operations in place, and those with `out`, give back the tensor that they were given.
    known = {id(x.elem): x for x in ours}
    return tree_map(lambda x: known.get(id(x), Pretend(x)) if isinstance(x, torch.Tensor) else x, result)


def _count(name: str, args: Any, others: list[torch.Tensor], to_cpu: bool) -> None:
    indexing = name in ("index", "index_put_", "_index_put_impl_", "index_put", "_unsafe_index")
    if others and name not in ("copy_", "_to_copy"):
        # CUDA takes indices from the CPU, and waits for their copy.
        values = [x for x in tree_flatten(args[2:])[0] if isinstance(x, torch.Tensor) and not isinstance(x, Pretend)]
        if not indexing or not isinstance(args[0], Pretend) or any(x.dim() for x in values):
            _log.mixed[_line(), name] += 1
        else:
            _log.waits[_line(), f"{name} by indices of the CPU"] += 1
    masks = [x for x in tree_flatten(args[1:2])[0] if isinstance(x, Pretend) and x.dtype == torch.bool]
    back = to_cpu or (name == "copy_" and not isinstance(args[0], Pretend))
    repeats = name == "repeat_interleave" and isinstance(args[0], Pretend)
    if name in SIZED_BY_VALUES or back or repeats or (indexing and masks):
        _log.waits[_line(), "copy to the CPU" if back else name] += 1
