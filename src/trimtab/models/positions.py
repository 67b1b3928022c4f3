"""Rotary embeddings that depend on the length of a row: the "dynamic" kind stretches with every token past the length
that the model was trained at, and "longrope" uses another set of frequencies for the whole of a longer row.

Transformers takes the length from the largest position in the batch, and the dynamic kind remembers the longest row
that it has seen. This package scores a sequence by its own length, as if it were alone. Rows up to the limit share
batches, since they all have the frequencies of short rows; a longer row is computed alone (`models/forms.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_STRETCHED = ("dynamic", "longrope")


def length_limit(model: nn.Module) -> int | None:
    """The longest row whose rotary embeddings do not depend on its length; None if they never do."""
    limits = [limit for module in model.modules() for limit in _limits(module)]
    return min(limits, default=None)


def forget_lengths(model: nn.Module) -> None:
    """Makes the model's rotary embeddings forget, before each forward pass, the lengths of earlier rows."""
    for module in model.modules():
        if any("dynamic" in kind for kind in _kinds(module).values()) and not hasattr(module, "_trimtab_forgets"):
            module._trimtab_forgets = module.register_forward_pre_hook(_forget)  # type: ignore[assignment]


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kind of rotary embedding: under None, or by layer type if there are several."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return {k: v for k, v in kinds.items() if isinstance(v, str)}
    return {None: kinds} if isinstance(kinds, str) else {}


def _limits(module: Any) -> Iterator[int]:
    for layer_type, kind in _kinds(module).items():
        if not any(word in kind for word in _STRETCHED):
            continue
        parameters = module.config.rope_parameters
        parameters = parameters[layer_type] if layer_type is not None else parameters
        original = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
        yield int(original if original is not None else module.original_max_seq_len)


def _forget(module: Any, _: Any) -> None:
    for layer_type, kind in _kinds(module).items():
        if "dynamic" in kind:
            prefix = "" if layer_type is None else f"{layer_type}_"
            getattr(module, f"{prefix}inv_freq").data = getattr(module, f"{prefix}original_inv_freq").clone()
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
