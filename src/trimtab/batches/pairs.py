"""Compared replies as a batch: one tree for each prompt, which holds every reply to it once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from trimtab.batches.trees import TreeBatch, per


@dataclass(frozen=True)
class Compared:
    """One pair of branches of a tree, for example `Compared(chosen=0, rejected=2, margin=1.5, label=1.0)`: branch 0 is
    preferred to branch 2, by this margin, with this probability."""

    chosen: int
    rejected: int
    margin: float
    label: float


_PER_PAIR = {"pairs": True}
"""Marks a field of a `PairBatch` that has one entry for each pair."""


@dataclass(frozen=True, kw_only=True)
class PairBatch(TreeBatch):
    """Prompts with their replies as trees, and P compared pairs of these replies.

    All pairs of a prompt stay in one batch: K replies cost K forward passes for up to K (K - 1) / 2 pairs, and a reply
    is not seen again in a later update, which would overfit it (Ouyang et al., arXiv:2203.02155, section 3.5).
    """

    compared: tuple[tuple[Compared, ...], ...]
    """The pairs of each tree."""

    def select(self, indices: Sequence[int]) -> Self:
        """A copy with only these trees, in this order."""
        starts = [0, *accumulate(len(pairs) for pairs in self.compared)]
        places = torch.tensor([p for i in indices for p in range(starts[i], starts[i + 1])], dtype=torch.int64)
        own: dict[str, Any] = {
            f.name: getattr(self, f.name)[places] for f in dataclasses.fields(self) if f.metadata == _PER_PAIR
        }
        own["compared"] = tuple(self.compared[i] for i in indices)
        return dataclasses.replace(super().select(indices), **own)

    @cached_property
    def chosen_ids(self) -> Tensor:
        """[P] the sequence number (0 to B - 1) of each pair's chosen reply."""
        return self._sequences([[pair.chosen for pair in pairs] for pairs in self.compared])

    @cached_property
    def rejected_ids(self) -> Tensor:
        """[P] the sequence number (0 to B - 1) of each pair's rejected reply."""
        return self._sequences([[pair.rejected for pair in pairs] for pairs in self.compared])

    @cached_property
    def margins(self) -> Tensor:
        """[P] the margin of each pair; 0 if the data has none."""
        return torch.tensor([pair.margin for pairs in self.compared for pair in pairs])

    @cached_property
    def labels(self) -> Tensor:
        """[P] the probability that the chosen reply is preferred."""
        return torch.tensor([pair.label for pairs in self.compared for pair in pairs])

    def _sequences(self, branches: Sequence[Sequence[int]]) -> Tensor:
        starts = [0, *accumulate(len(tree.branches) for tree in self.trees.trees)]
        return torch.tensor([start + b for start, bs in zip(starts, branches, strict=False) for b in bs])


@dataclass(frozen=True, kw_only=True)
class ReferencePairs(PairBatch):
    """Pairs with the reference's log-probabilities of every reply."""

    ref_logprobs: Tensor = per("token")

    def with_targets(self, chosen: Tensor, rejected: Tensor) -> TargetedPairs:
        """A copy with per-pair targets [P], computed over the full update."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReferencePairs)}
        return TargetedPairs(**fields, chosen_targets=chosen, rejected_targets=rejected)


@dataclass(frozen=True, kw_only=True)
class TargetedPairs(ReferencePairs):
    """Pairs with the rank-matched target log-ratios that AOT compares them with."""

    chosen_targets: Tensor = dataclasses.field(metadata=_PER_PAIR)
    rejected_targets: Tensor = dataclasses.field(metadata=_PER_PAIR)
