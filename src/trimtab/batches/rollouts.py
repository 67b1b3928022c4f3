"""Rollouts as a batch, with everything that the losses of online training need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.batches.trees import TreeBatch, per


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
