"""Replies that were judged one by one, as a batch: one tree for each prompt, which holds its replies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from trimtab.batches.trees import TokenTrees, TreeBatch, per


@dataclass(frozen=True, kw_only=True)
class JudgedReplies(TreeBatch):
    """Prompts with their replies as trees, the reference's log-probabilities, and counts of good and bad judgements.

    A pair split in two gives a good reply and a bad one, each counted by the share of votes for it.
    """

    ref_logprobs: Tensor = per("token")
    desirable: Tensor = per("sequence")
    """[B] how many judgements call the reply good; may be a fraction."""
    undesirable: Tensor = per("sequence")
    """[B] how many judgements call the reply bad; may be a fraction."""

    def with_baseline(self, baseline: Tensor) -> BaselinedReplies:
        """A copy with the baseline: a log-ratio, in nats, to subtract from those of all replies of the update."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(JudgedReplies)}
        return BaselinedReplies(**fields, baseline=baseline.expand(self.num_sequences))


@dataclass(frozen=True, kw_only=True)
class MismatchedReplies(JudgedReplies):
    """Judged replies, and each prompt paired with the replies to another prompt."""

    mismatched: TokenTrees
    """One tree for each of `trees`: its prompt with the replies to another prompt."""
    mismatched_ref_logprobs: Tensor
    """The reference's log-probabilities of the trained tokens of `mismatched`."""

    def select(self, indices: Sequence[int]) -> Self:
        """A copy with only these trees, in this order."""
        places = self.mismatched.index_of("token", indices)
        return dataclasses.replace(
            super().select(indices),
            mismatched=self.mismatched.select(indices),
            mismatched_ref_logprobs=self.mismatched_ref_logprobs[places],
        )


@dataclass(frozen=True, kw_only=True)
class BaselinedReplies(JudgedReplies):
    """Judged replies with the baseline log-ratio of the update, repeated for every reply."""

    baseline: Tensor = per("sequence")


@dataclass(frozen=True, kw_only=True)
class GradedReplies(TreeBatch):
    """Prompts with their replies as trees, and labels at some tokens of the replies.

    A scalar model gives its value of a trained token at the token before it. The trained tokens of these trees are
    therefore those behind a labelled token; a label at the last token of a reply has no such token, and is apart.
    """

    labels: Tensor = per("token")
    """[M] the label of the token before each trained token."""
    last_labels: Tensor = per("sequence")
    """[B] the label at the last token of each reply; nan if it has none."""

    @property
    def num_labels(self) -> int:
        """The number of labels."""
        return len(self.labels) + int(self.last_labels.isfinite().sum())
