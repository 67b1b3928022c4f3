"""Turns scores into rewards (normalising, clipping, penalties), with running moments that merge exactly."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.math.masking import at_least_float32


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all values seen, in float64.

    `RunningMoments(**moments.state())` is equal to `moments`, also if the state was saved as JSON in between.
    """

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of (x - mean)^2."""

    def merge(self, other: RunningMoments) -> RunningMoments:
        """The moments of both sets of values (Chan et al., 1979, eq. 2.1)."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta * delta * (self.count * other.count / count),
        )

    def update(self, values: Tensor) -> RunningMoments:
        """The moments with every entry of `values` added."""
        return self.merge(moments_of(values))

    @property
    def variance(self) -> float:
        """The biased variance; nan before the first value."""
        return self.m2 / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    def normalise(self, values: Tensor, *, shift_mean: bool = True) -> Tensor:
        """`(values - mean) / std`, or `values / std`. std counts as 1 as long as all values seen were equal."""
        scale = self.std if self.m2 > 0 else 1.0
        return (at_least_float32(values) - (self.mean if shift_mean else 0.0)) / scale

    def state(self) -> dict[str, float]:
        """The fields by name, for a checkpoint."""
        return dataclasses.asdict(self)


def moments_of(values: Tensor) -> RunningMoments:
    """The moments of every entry of `values`."""
    exact = values.detach().double()
    if not exact.numel():
        return RunningMoments()
    mean = exact.mean()
    m2 = (exact - mean).square().sum()
    mean_value, m2_value = torch.stack([mean, m2]).tolist()
    return RunningMoments(count=float(exact.numel()), mean=mean_value, m2=m2_value)


@dataclass(frozen=True)
class Deviation:
    """The standard deviation of values as a metric, stored as their moments so that parts merge exactly."""

    moments: RunningMoments

    def merge(self, other: Deviation) -> Deviation:
        return Deviation(self.moments.merge(other.moments))

    @property
    def value(self) -> float:
        return self.moments.std


def clip(rewards: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The rewards clipped to [low, high], and a bool mask of those that were changed, to be counted."""
    clipped = rewards.clamp(low, high)
    return clipped, clipped != rewards


def missing_eos_penalty(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """The scores [B], less `penalty` if the reply was cut off before its end token (`finished` [B] bool is false)."""
    return scores - penalty * (~finished).to(scores.dtype)
