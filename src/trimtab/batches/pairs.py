"""Compared replies as a batch: one tree for each prompt, which holds every reply to it once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations
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


def ranks_of(compared: Iterable[Compared], num_replies: int) -> list[int]:
    """The rank of each of `num_replies` replies, 0 for the best, if these are all pairs of one ranking; tied replies,
    of which there is no pair, share one rank.

    `ranks_of([Compared(0, 1, 0, 1), Compared(0, 2, 0, 1)], 3)` is [0, 1, 1]. Raises ValueError that says why the pairs
    are no ranking: one reply is preferred to another and the other to it, or the order of two replies follows from the
    others but is not among the pairs (a gap).
    """
    better = {(pair.chosen, pair.rejected) for pair in compared}
    ranks = [sum((i, reply) in better for i in range(num_replies)) for reply in range(num_replies)]
    for a, b in combinations(range(num_replies), 2):
        if (a, b) in better and (b, a) in better:
            raise ValueError(f"of replies {a} and {b}, each is preferred to the other")
        first, second = (a, b) if ranks[a] < ranks[b] else (b, a)
        if ranks[a] == ranks[b] and ((a, b) in better or (b, a) in better):
            raise ValueError(f"replies {a} and {b} are beaten by {ranks[a]} others each, and one by the other")
        if ranks[a] != ranks[b] and (first, second) not in better:
            raise ValueError(f"no pair says whether reply {first} is better than reply {second}")
    return ranks


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

    @cached_property
    def sequence_trees(self) -> Tensor:
        """[B] the number of the tree that each reply belongs to, 0 for the first of this batch."""
        return torch.tensor([i for i, tree in enumerate(self.trees.trees) for _ in tree.branches], dtype=torch.int64)

    @cached_property
    def shares(self) -> Tensor:
        """[P] one divided by the number of pairs of the same tree: 1 / C(K, 2) for K replies without ties."""
        return torch.tensor([1 / len(pairs) for pairs in self.compared for _ in pairs])

    @cached_property
    def ranks(self) -> Tensor:
        """[B] the rank of each reply among those of its tree, 0 for the best; tied replies share one. Raises ValueError
        if the pairs of a tree are not those of a ranking; see `ranks_of`."""
        pairs_of = zip(self.compared, self.trees.trees, strict=True)
        return torch.tensor([rank for pairs, tree in pairs_of for rank in ranks_of(pairs, len(tree.branches))])

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
