"""Decoding for models whose attention cannot be replaced: padded rows and the model's own cache.

Gives the same replies as slots (`slots.py`), more slowly: prompts are padded to the longest, and rows of finished
replies are dropped when there are many, but not refilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trimtab.batches.device import to_device
from trimtab.engines.local.replies import ReplyBuffer, Sampling
from trimtab.models.own_forward import last_logits, own_attention
from trimtab.models.roles import Policy

KEPT_WHILE = 0.75
"""Rows of ended replies are dropped once no more than this share of all rows is still decoded."""


@dataclass(frozen=True)
class PaddedForm:
    """Prompts padded on the left to the longest of a batch, with the model's own cache."""

    policy: Policy
    sampling: Sampling
    pad_id: int
    name = "padded"

    def decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """See `DecodingForm.decode`."""
        per_batch = max(1, self.sampling.batch_size // group_size)
        with own_attention(self.policy.model):
            for start in range(0, len(prompts), per_batch):
                self._decode_batch(prompts[start : start + per_batch], group_size, replies, first=start * group_size)

    def _decode_batch(
        self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer, *, first: int
    ) -> None:
        model = self.policy.model
        width = max(len(p) for p in prompts)
        input_ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.arange(width)[None, :] >= torch.tensor([[width - len(p)] for p in prompts])
        cache = roomy_cache(model)

        def step(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return last_logits(
                model, input_ids, attention_mask=mask, position_ids=position_ids, cache=cache, use_cache=True
            )[0]

        logits = step(input_ids, (mask.cumsum(1) - 1).clamp(min=0))
        cache.batch_repeat_interleave(group_size)
        logits, mask = logits.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)
        prompt_lengths = mask.sum(1)
        rows = torch.arange(len(mask))  # the sequence in each row of the cache
        alive = torch.ones(len(mask), dtype=torch.bool)  # whether that sequence is still decoded
        place = 0
        while True:
            # Until an ended row is dropped it is given padding, and its outputs are not read.
            going = rows[alive]
            drawn, ended = replies.draw(logits[alive], going + first, torch.full_like(going, place))
            tokens = torch.full((len(rows),), self.pad_id)
            tokens[alive] = drawn
            alive[alive.clone()] = ~ended
            if not alive.any():
                return
            if int(alive.sum()) <= KEPT_WHILE * len(rows):
                keep = torch.nonzero(alive).squeeze(1)
                cache.batch_select_indices(to_device(keep, model.device))
                rows, mask, tokens, alive = rows[keep], mask[keep], tokens[keep], alive[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = step(tokens[:, None], (prompt_lengths[rows] + place)[:, None])
            place += 1


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer with room to grow, so that a new token is written after the old ones without copying them.

    `keys` and `values` are views of the filled part of two buffers. An operation that replaces them (repeating or
    selecting rows) discards the buffers, and the next token makes new ones.
    """

    ROOM = 32

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the states of new tokens [B, H, T, D]; returns all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._extended("_key_buffer", self.keys, key_states)
        self.values = self._extended("_value_buffer", self.values, value_states)
        return self.keys, self.values

    def _extended(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        length = old.shape[2] + new.shape[2]
        buffer, filled = getattr(self, name, (None, None))
        if buffer is None or filled is not old or buffer.shape[2] < length:
            batch, heads, _, size = new.shape
            buffer = new.new_empty(batch, heads, length + self.ROOM, size)
            buffer[:, :, : old.shape[2]] = old
        buffer[:, :, old.shape[2] : length] = new
        filled = buffer[:, :, :length]
        setattr(self, name, (buffer, filled))
        return filled


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache, with its plain layers replaced by ones that are not copied at every token."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
        for layer in cache.layers
    ]
    return cache
