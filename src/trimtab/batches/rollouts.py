"""Rollouts as trees, and as a batch with everything that the losses of online training need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.batches.trees import TokenTrees, TreeBatch, per, response_tree
from trimtab.core.types import Rollout


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(TreeBatch):
    """Rollouts as trees, each a prompt with all its replies. Complete before the first update; every tensor is [M]."""

    old_logprobs: Tensor = per("token")
    """Log-probabilities under the policy before this step's updates."""
    correction: Tensor = per("token")
    """Importance weight that multiplies each token's loss; 1 if the sampler is the policy."""
    ref_logprobs: Tensor = per("token")
    old_values: Tensor = per("token")
    """Values of the critic before this step's updates; nan without a critic."""
    advantages: Tensor = per("token")
    returns: Tensor = per("token")
    """The targets of the critic."""


def rollout_trees(groups: Sequence[Sequence[Rollout]]) -> TokenTrees:
    """The rollouts as trees, the prompt of a group once; the sampled token ids are the ids that are trained on."""
    return TokenTrees.build(
        [response_tree(g[0].prompt_ids, [r.response_ids for r in g], [r.response_mask for r in g]) for g in groups]
    )


def in_groups(rollouts: Sequence[Rollout], size: int) -> list[list[Rollout]]:
    """The rollouts of each prompt; a sampler gives `size` of them for each prompt, one prompt after the other."""
    return [list(rollouts[i : i + size]) for i in range(0, len(rollouts), size)]
