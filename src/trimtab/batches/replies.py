"""Replies that were judged one by one, as a batch: a tree for each prompt, with every reply to it once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from trimtab.batches.trees import TokenTrees, TreeBatch, per


@dataclass(frozen=True, kw_only=True)
class JudgedReplies(TreeBatch):
    """Prompts with their replies as trees, what the reference says of each, and how often each was called good or bad.

    A pair split in two is a good reply and a bad one, each by the share of votes for it.
    """

    ref_logprobs: Tensor = per("token")
    desirable: Tensor = per("sequence")
    """[B] judgements that call the reply good."""
    undesirable: Tensor = per("sequence")
    """[B] those that call it bad."""

    def with_baseline(self, baseline: Tensor) -> BaselinedReplies:
        """The same with one log-ratio, in nats, that all replies of the update are measured from."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(JudgedReplies)}
        return BaselinedReplies(**fields, baseline=baseline.expand(self.num_sequences))


@dataclass(frozen=True, kw_only=True)
class MismatchedReplies(JudgedReplies):
    """Judged replies, and beside each prompt the replies to another one."""

    mismatched: TokenTrees
    """A tree for each of `trees`: its prompt with the replies to another."""
    mismatched_ref_logprobs: Tensor
    """What the reference says of their trained tokens."""

    def select(self, indices: Sequence[int]) -> Self:
        """The same batch with only these trees, in this order."""
        places = self.mismatched.index_of("token", indices)
        return dataclasses.replace(
            super().select(indices),
            mismatched=self.mismatched.select(indices),
            mismatched_ref_logprobs=self.mismatched_ref_logprobs[places],
        )


@dataclass(frozen=True, kw_only=True)
class BaselinedReplies(JudgedReplies):
    """Judged replies with the log-ratio that the update measures them from."""

    baseline: Tensor = per("sequence")
