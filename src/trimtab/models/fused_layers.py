"""What lies between the matrix products of Llama-like blocks, each in one kernel.

Transformers writes a norm as six operations and a rotation as ten, and each of them reads and writes every hidden
state. Beside fast products that is a third of a training step on a GPU, and a fifth on a CPU. The same formulas are
kernels here for the forward and the backward pass: on a GPU compiled by torch, on a CPU in C (`compiled_layers.py`).
The proof of a model's form (`forms.py`) compares them with transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from trimtab.batches.device import is_gpu
from trimtab.core.terminal import note
from trimtab.data.tokenizers import first_line
from trimtab.models import compiled_layers
from trimtab.models.attention import LLAMA_LIKE, backbone, is_row, row_attention
from trimtab.models.compiled_attention import takes_compiled

NARROWEST = 512
"""On a GPU hidden states of fewer numbers are not worth the seconds that compiling takes."""


def fuse_layers(model: PreTrainedModel) -> None:
    """Makes the layers of a Llama-like model compute in fused kernels. Other models are left alone; so is every model
    where nothing compiles them, which on a GPU a line on stderr says."""
    layers = dict(_fusible(model))
    if layers and (not is_gpu(next(model.parameters())) or can_compile(model.device)):
        for layer, forward in layers.items():
            kind: Any = type(layer)
            layer.__class__ = _with_forward(kind, forward)


@contextmanager
def own_layers(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block the layers compute as transformers writes them."""
    fused = [(layer, type(layer)) for layer in model.modules() if _OWN in vars(type(layer))]
    for layer, kind in fused:
        layer.__class__ = getattr(kind, _OWN)
    try:
        yield
    finally:
        for layer, kind in fused:
            layer.__class__ = kind


_OWN = "transformers_own"


@cache
def _with_forward(kind: type, forward: Callable[..., Any]) -> type:
    """The class with another forward pass. It keeps its name, by which architectures are known."""
    return type(kind.__name__, (kind,), {"forward": forward, _OWN: kind, "__module__": kind.__module__})


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch can compile kernels for this device. It needs Triton and a C compiler."""
    try:
        _compiled(normed)(torch.zeros(2, 8, device=device), torch.ones(8, device=device), 1e-6, torch.float32)
    except Exception as error:  # whatever a compiler raises
        note(
            f"torch cannot compile for {device}, so norms and rotations are computed one operation at a time, "
            f"which is slower ({type(error).__name__}: {first_line(error):.150})"
        )
        return False
    return True


def _fusible(model: PreTrainedModel) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Yields the layers that can be fused, each with its fused forward pass."""
    base: Any = backbone(model)
    if type(base).__name__ not in LLAMA_LIKE:
        return
    norm = base.norm.weight
    if not (len(norm) >= NARROWEST if is_gpu(norm) else takes_compiled(norm) and compiled_layers.available()):
        return
    yield base.norm, _norm
    for block in base.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            yield norm, _norm_before_products
        if isinstance(block.mlp.act_fn, nn.SiLU) or type(block.mlp.act_fn).__name__ == "SiLUActivation":
            yield block.mlp, _mlp
        yield block.self_attn, _attention


def _compiler_of(x: Tensor) -> Literal["torch", "C"] | None:
    """What compiles operations on hidden states like `x`; None if transformers' own are to be used, as for a model that
    was sent elsewhere since its layers were fused."""
    if is_gpu(x):
        return "torch" if can_compile(x.device) else None
    in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return "C" if x.device.type == "cpu" and in_float32 else None


def _own(layer: Any) -> Callable[..., Any]:
    """The forward pass of transformers."""
    return partial(getattr(type(layer), _OWN).forward, layer)


def _norm(self: Any, x: Tensor) -> Tensor:
    compiler = _compiler_of(x)
    if compiler == "torch":
        return _compiled(normed)(x, self.weight, self.variance_epsilon, torch.promote_types(x.dtype, self.weight.dtype))
    found: Tensor = compiled_layers.normed(x, self.weight, self.variance_epsilon) if compiler else _own(self)(x)
    return found


def _norm_before_products(self: Any, x: Tensor) -> Tensor:
    """Under autocast each product would round what it reads to 16 bits; here it is rounded once."""
    if _compiler_of(x) != "torch" or not torch.is_autocast_enabled(x.device.type):
        return _norm(self, x)
    return _compiled(normed)(x, self.weight, self.variance_epsilon, torch.get_autocast_dtype(x.device.type))


def _mlp(self: Any, x: Tensor) -> Tensor:
    compiler = _compiler_of(x)
    if compiler is None:
        own: Tensor = _own(self)(x)
        return own
    gate, up = self.gate_proj(x), self.up_proj(x)
    found: Tensor = self.down_proj((_compiled(gated) if compiler == "torch" else compiled_layers.gated)(gate, up))
    return found


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    compiler = _compiler_of(hidden_states)
    if compiler is None or not is_row(attention_mask):
        own: tuple[Tensor, Tensor | None]
        own = _own(self)(hidden_states, position_embeddings, attention_mask, **kwargs)
        return own
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
    norms = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
    if compiler == "C":
        query, key = (
            compiled_layers.rotated(
                x if norm is None else compiled_layers.normed(x, norm.weight, norm.variance_epsilon),
                *position_embeddings,
            )
            for x, norm in zip((query, key), norms, strict=True)
        )
    else:
        cos, sin = (x.unsqueeze(2) for x in position_embeddings)
        query, key = (
            _compiled(rotated)(x, cos, sin, value.dtype)
            if norm is None
            else _compiled(normed_and_rotated)(x, cos, sin, norm.weight, norm.variance_epsilon, value.dtype)
            for x, norm in zip((query, key), norms, strict=True)
        )
    kwargs["dropout"] = self.attention_dropout if self.training else 0.0
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output, _ = row_attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
    return self.o_proj(output.flatten(2)), None


def normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32."""
    x = x.float()
    return (weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))).to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., D] with the pairs (i, i + D/2) rotated (RoPE, arXiv:2104.09864), for cos and sin that broadcast to x."""
    x = x.float()
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(dtype)


def normed_and_rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`rotated` of `normed`, without a rounding between them."""
    return rotated(normed(x, weight, eps, torch.float32), cos, sin, dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return (silu(gate.float()) * up.float()).to(up.dtype)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # One kernel for each width, precision and need of gradients, of all roles together.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Sums in one fixed order, instead of that which is fastest here today: a resumed run must give the same bits.
    known = hasattr(torch._inductor.config, "deterministic")
    return torch.compile(function, dynamic=True, options={"deterministic": True} if known else None)
