"""Decoding in lockstep: all rows are equally long at every step, so that nothing is ever padded.

Left padding changes the state of a recurrent layer, and some attention does not handle it. Here all rows begin
together, and the first token is drawn at the end of the shortest prompt. A row with a longer prompt continues with its
prompt's next token instead of a drawn one. This is right for every causal model with its cache. Without a cache each
step computes every row again, which is slow and right by definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from trimtab.engines.local.padded import KEPT_WHILE
from trimtab.engines.local.replies import ReplyBuffer, Sampling
from trimtab.models.own_forward import last_logits, own_attention
from trimtab.models.roles import Policy


@dataclass(frozen=True)
class LockstepForm:
    """Rows of equal length, with the model's own cache or without any."""

    policy: Policy
    sampling: Sampling
    pad_id: int
    name: Literal["lockstep", "uncached"]

    def decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """See `DecodingForm.decode`."""
        with own_attention(self.policy.model):
            for numbers in batches(prompts, max(1, self.sampling.batch_size // group_size), replies.width):
                together = [prompts[i] for i in numbers]
                rows = LockstepRows(together, numbers, group_size, replies.width, self.pad_id)
                self._decode_batch(rows, replies)

    def _decode_batch(self, rows: LockstepRows, replies: ReplyBuffer) -> None:
        model = self.policy.model
        cache = DynamicCache(config=model.config) if self.name == "lockstep" else None
        length, new = rows.shortest, rows.tokens[:, : rows.shortest]
        while True:
            drawing = rows.prompt_lengths <= length
            if cache is None:
                logits = torch.empty(0)
                if drawing.any():
                    logits, _ = last_logits(model, rows.tokens[drawing, :length], use_cache=False)
            else:
                logits, _ = last_logits(model, new, cache=cache, use_cache=True)
                logits = logits[drawing]
            keep = rows.draw(logits, drawing, length, replies)
            if not len(keep):
                return
            if cache is not None and len(keep) < len(new):
                cache.reorder_cache(cast(torch.LongTensor, keep))
            new = rows.tokens[:, length : length + 1]
            length += 1


class LockstepRows:
    """Sequences being decoded, with the sequence that each row holds."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], group_size: int, reply_width: int, pad_id: int
    ) -> None:
        """One row for each reply to these prompts; `numbers` are the prompts' indices in the whole call."""
        lengths = torch.tensor([len(p) for p in prompts])
        tokens = torch.full((len(prompts), int(lengths.max()) + reply_width), pad_id)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self.tokens = tokens.repeat_interleave(group_size, 0)
        """[n, longest] prompts and replies."""
        self.sequences = (torch.tensor(numbers)[:, None] * group_size + torch.arange(group_size)).flatten()
        """[n] the sequence in each row."""
        self.prompt_lengths = lengths.repeat_interleave(group_size, 0)
        """[n] the length of its prompt."""
        self.alive = torch.ones(len(self.tokens), dtype=torch.bool)

    @property
    def shortest(self) -> int:
        """The length of the shortest prompt."""
        return int(self.prompt_lengths.min())

    def draw(self, logits: Tensor, drawing: Tensor, length: int, replies: ReplyBuffer) -> Tensor:
        """Draws a token for each row that is `drawing` [n] and has not ended. Returns [n'] the rows that are kept."""
        going = drawing & self.alive
        if going.any():
            places = length - self.prompt_lengths[going]
            tokens, ended = replies.draw(logits[self.alive[drawing]], self.sequences[going], places)
            self.tokens[going, length] = tokens
            self.alive[going] = ~ended
        keep = torch.arange(len(self.tokens))
        if int(self.alive.sum()) <= KEPT_WHILE * len(self.tokens):
            # Until an ended row is dropped it is given padding, and its outputs are not read.
            keep = keep[self.alive]
            self.tokens, self.sequences = self.tokens[keep], self.sequences[keep]
            self.prompt_lengths, self.alive = self.prompt_lengths[keep], self.alive[keep]
        return keep


def batches(prompts: Sequence[Sequence[int]], num_together: int, reply_width: int) -> Iterator[list[int]]:
    """Yields the indices of the prompts that are decoded together. They have similar lengths, so that few steps only
    read prompts."""
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while waiting:
        longest = len(prompts[waiting[0]]) + max(reply_width, 16)
        together = [i for i in waiting[:num_together] if len(prompts[i]) <= longest]
        yield together
        waiting = waiting[len(together) :]
