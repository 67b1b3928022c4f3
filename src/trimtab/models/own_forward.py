"""A model's own forward pass in transformers, with which every other way of computing the same must agree."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batches.device import to_device
from trimtab.models.attention import ROW_ATTENTION
from trimtab.models.precision import products_in_float32


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block the model uses transformers' attention, even if it was set to this package's for flat rows."""
    if model.config._attn_implementation != ROW_ATTENTION:
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ROW_ATTENTION)


def last_logits(model: PreTrainedModel, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """[B, V] the model's own logits after the last token of each row [B, T], and all outputs of the forward pass. The
    head computes in float32, whatever the precision of the model's products."""
    if _takes_logits_to_keep(type(model).forward):
        inputs["logits_to_keep"] = 1
    inputs = {name: to_device(x, model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    autocast = torch.is_autocast_enabled(model.device.type)
    head = model.get_output_embeddings() if autocast else None  # type: ignore[no-untyped-call]
    with products_in_float32([head] if head is not None else []):
        outputs = model(input_ids=to_device(input_ids, model.device), **inputs)
    logits: Tensor = outputs.logits[:, -1]
    return logits, outputs


@functools.cache
def _takes_logits_to_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def learned_positions(model: PreTrainedModel) -> int | None:
    """The number of positions of a model that has a table with a row for each, such as GPT-2. None if positions are
    computed, as with rotary embeddings, and therefore have no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    tables = (
        x for name, x in (*model.named_parameters(), *model.named_buffers()) if x.ndim == 2 and _POSITIONS.search(name)
    )
    # OPT and others leave the first two rows unused.
    return limit if any(limit <= len(x) <= limit + 4 for x in tables) else None


_POSITIONS = re.compile(r"wpe|positions?\b|positions?_(embed|encod)|pos_(embed|encod)|embed_pos", re.IGNORECASE)
