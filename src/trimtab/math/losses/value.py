"""The loss of the critic, which learns the returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.batches.outputs import ValueOutputs
from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TreeBatch
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.metrics import Metrics
from trimtab.math.losses.aggregation import means, num_terms, terms
from trimtab.math.masking import at_least_float32
from trimtab.math.rewards import RunningMoments, moments_of


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Per-token loss, [M], as in PPO's published code (Schulman et al., arXiv:1707.06347; not in its text).

        L_t = max((v_t - R_t)^2, (clip(v_t, v_old - clip, v_old + clip) - R_t)^2) / 2

    Without `clip` it is half the squared error.
    """
    values, old_values, returns = at_least_float32(values), at_least_float32(old_values), at_least_float32(returns)
    errors = (values - returns).square()
    if clip is not None:
        held = values.clamp(old_values - clip, old_values + clip)
        errors = torch.maximum(errors, (held - returns).square())
    return 0.5 * errors


@dataclass(frozen=True)
class ExplainedVariance:
    """1 - Var(returns - values) / Var(returns), stored as moments so that parts merge exactly.

    1 is a perfect critic, 0 is no better than a constant, and below 0 is worse. It is nan if all returns are equal.
    """

    residuals: RunningMoments
    returns: RunningMoments

    def merge(self, other: ExplainedVariance) -> ExplainedVariance:
        return ExplainedVariance(self.residuals.merge(other.residuals), self.returns.merge(other.returns))

    @property
    def value(self) -> float:
        return 1 - self.residuals.m2 / self.returns.m2 if self.returns.m2 > 0 else math.nan


def explained_variance(values: Tensor, returns: Tensor) -> ExplainedVariance:
    """The share of the variance of the returns [M] that the values [M] predict, as a metric."""
    return ExplainedVariance(moments_of(returns.double() - values.double()), moments_of(returns))


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Half the squared error of the critic, clipped around its values at the time of the rollout."""

    coef: float = 1.0
    """Weight in the sum of losses."""
    clip: float | None = 0.2
    """Clip range around the old value estimates, in units of reward; `inf` for no limit."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Average over all tokens of the update, or over the token mean of each sequence."""

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "clip")

    def weight(self, batch: TreeBatch) -> Tensor:
        return num_terms(batch, self.aggregation)

    def __call__(self, outputs: ValueOutputs, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        token_losses = clipped_value_loss(outputs.values, batch.old_values, batch.returns, self.clip)
        losses = terms(token_losses, batch, self.aggregation)
        logged = {"critic/loss": losses}
        if self.clip is not None:
            unclipped = clipped_value_loss(outputs.values, batch.old_values, batch.returns, None)
            logged["critic/clip_fraction"] = token_losses > unclipped
        metrics = means(logged)
        metrics["critic/explained_variance"] = explained_variance(batch.old_values, batch.returns)
        return losses.sum(), metrics
