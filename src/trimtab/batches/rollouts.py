"""Rollouts as a batch, with everything that the losses of online training read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.batches.trees import TreeBatch, per


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(TreeBatch):
    """Rollouts as trees, a prompt with all its replies in each. Complete before the first update; all are [M]."""

    old_logprobs: Tensor = per("token")
    """Of the policy before this step's updates."""
    correction: Tensor = per("token")
    """What each token's loss is multiplied by: 1 if the sampler is the policy."""
    ref_logprobs: Tensor = per("token")
    old_values: Tensor = per("token")
    """Of the critic before this step's updates; nan without one."""
    advantages: Tensor = per("token")
    returns: Tensor = per("token")
    """What the critic is to learn."""
