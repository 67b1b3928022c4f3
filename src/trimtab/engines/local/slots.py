"""Decoding in slots: every reply has a row of a cache that is allocated once (`slot_cache.py`). When a reply ends, a
waiting one takes its row. A prompt is computed once for its group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.batches.device import to_device
from trimtab.core.errors import EngineError
from trimtab.engines.local.fused import FusedForward
from trimtab.engines.local.kernels import Kernels, find, product_dtype
from trimtab.engines.local.replies import ReplyBuffer, Sampling
from trimtab.engines.local.slot_cache import SlotCache
from trimtab.models.attention import Attend, backbone, row_states
from trimtab.models.roles import Policy

PREFILL_TOKENS = 256
"""Prompts are started in rows of about this many tokens: enough for fast products, with little memory."""


@dataclass(frozen=True)
class Forward:
    """The two halves of a decoding step."""

    hidden: Callable[[Tensor, Tensor, Attend], Tensor]
    """[n, D] hidden states from token ids [n], positions [n] and their attention."""
    logits: Callable[[Tensor], Tensor]
    """[n, V] logits from hidden states [n, D]."""


@dataclass(frozen=True)
class SlotForm:
    """Slots with a fused forward pass (Llama-like models), or with the model's own forward pass over one flat row."""

    policy: Policy
    sampling: Sampling
    name: Literal["fused", "rows"]

    @property
    def kernels(self) -> Kernels:
        """The kernels of the decoding steps: C if this machine and these weights allow it, else torch. C takes
        queries, keys and values in float32, which a model's own forward pass does not hand it under autocast."""
        weight = next(self.policy.model.parameters())
        return Kernels() if self.name == "rows" and product_dtype(weight) != weight.dtype else find(weight)

    def decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """See `DecodingForm.decode`."""
        kernels = self.kernels
        forward = self._forward(kernels)
        num_groups = self.num_groups(prompts, group_size, replies.width)
        slots = SlotCache(
            num_rows=num_groups * group_size,
            # A prompt stays until the last reply of its group has ended, while rows of its other replies are free.
            num_prompts=min(len(prompts), num_groups if group_size == 1 else 2 * num_groups),
            group_size=group_size,
            prompt_width=max(len(p) for p in prompts),
            reply_width=replies.width,
            kernels=kernels,
            device=self.policy.device,
        )
        # Prompts are taken from the end, the longest first, so that similar lengths are decoded together.
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        hidden: Tensor | None = None
        while waiting or len(slots.sequences):
            # Several prompts start at a time, because a forward pass over few tokens is slow.
            if waiting and slots.room >= min(len(waiting), max(1, num_groups // 8)):
                started = start_prompts(forward, slots, prompts, waiting)
                hidden = started if hidden is None else torch.cat([hidden, started])
            assert hidden is not None
            tokens, ended = replies.draw(forward.logits(hidden), slots.sequences, slots.lengths)
            if ended.any():
                tokens = tokens[slots.keep(~ended)]
            hidden = forward.hidden(tokens, slots.positions, slots.extend()) if len(tokens) else None

    def num_groups(self, prompts: Sequence[Sequence[int]], group_size: int, reply_width: int) -> int:
        """The number of prompts that are decoded together, with all their replies. Raises EngineError if the cache of a
        single one would be larger than the settings allow."""
        held, longest = self.kernels.cache_tokens, max(map(len, prompts))
        tokens = held(longest + reply_width) if group_size == 1 else 2 * held(longest) + group_size * held(reply_width)
        needed, allowed = self._bytes_per_token * tokens / 2**30, self.sampling.cache_gb
        if needed > allowed:
            raise EngineError(
                f"the keys and values of one prompt and its replies take {needed:.3g} GB, and cache_gb = {allowed:g}",
                where=f"{group_size} replies of up to {reply_width} tokens to a prompt",
                fix="lower max_new_tokens or the replies to a prompt, or raise sampling.cache_gb",
            )
        room = int(allowed / needed)
        return max(1, min(len(prompts), self.sampling.batch_size // group_size, room))

    @functools.cached_property
    def _bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers. Measured, not read from the configuration, because
        layers may differ in their heads, and some may keep nothing."""
        sizes: list[int] = []
        kernels = self.kernels

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            sizes.extend(x.numel() * kernels.cache_dtype(x).itemsize for x in (key, value))
            return value.repeat_interleave(query.shape[1] // value.shape[1], 1)

        zero = torch.zeros(1, dtype=torch.int64)
        row_states(backbone(self.policy.model), zero, zero, attend)
        return max(1, sum(sizes))

    def _forward(self, kernels: Kernels) -> Forward:
        """The forward pass of this form, with the model's weights as they are now."""
        model = self.policy.model
        if self.name == "rows":
            return Forward(lambda *row: row_states(backbone(model), *row), self.policy.logits)
        # Made again for every call, because weights change between calls in ways that no version counter shows.
        fused = FusedForward(model, self.sampling.batch_size, kernels)
        fused.prove_fresh(model)
        return Forward(fused, lambda hidden: self.policy.shaped(fused.head(hidden)))


def start_prompts(forward: Forward, slots: SlotCache, prompts: Sequence[Sequence[int]], waiting: list[int]) -> Tensor:
    """[n, D] the hidden states from which the first tokens of newly started replies are drawn. Takes as many prompts as
    there is room for from the end of `waiting`."""
    states = []
    while waiting and slots.room:
        numbers: list[int] = []
        num_tokens = 0
        while waiting and len(numbers) < slots.room and num_tokens < PREFILL_TOKENS:
            numbers.append(waiting.pop())
            num_tokens += len(prompts[numbers[-1]])
        rows = [prompts[i] for i in numbers]
        ids = torch.tensor([token for row in rows for token in row])
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        hidden = forward.hidden(ids, positions, slots.add(numbers, rows))
        states.append(hidden[to_device(last, hidden.device)].repeat_interleave(slots.group_size, 0))
    return torch.cat(states)
