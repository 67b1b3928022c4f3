"""KL between policy and reference: three estimators from samples, and controllers of its coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.registry import register
from trimtab.math.masking import at_least_float32

MAX_LOG_RATIO = 20.0
"""Bound on log-ratios before exp: e^20 is 5e8, and beyond it float32 sums and gradient norms overflow."""


def k1(log_ratio: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from d = logprobs - ref_logprobs at sampled tokens (Schulman,
    "Approximating KL divergence", 2020).

        k1 = d

    Unbiased, and negative at a token to which the policy gives a lower probability than the reference does. A mean
    below 0 over many sequences means that the tokens were not sampled from the distribution that `logprobs` describes:
    another temperature, truncated sampling, other weights, or a wrong mask.
    """
    return at_least_float32(log_ratio)


def k2(log_ratio: Tensor) -> Tensor:
    """Per-token estimate d^2 / 2 of the same KL (see `k1`): biased, of low variance, never negative.

    As a loss its expected gradient is that of KL(policy || reference).
    """
    return at_least_float32(log_ratio).square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Per-token estimate of the same KL (see `k1`): unbiased and never negative.

        k3 = exp(-d) - 1 + d

    As a loss its expected gradient is that of KL(reference || policy), the other direction. Below d = -20 (the policy
    gives a token 2e-9 of the reference's probability) it continues along its tangent: the value stays finite and the
    gradient keeps its sign, while exp would overflow and a clamp would reverse the sign of the gradient.
    """
    d = log_ratio.double()  # for small d the result is d^2 / 2, the difference of two numbers near d
    bounded = d.clamp(min=-MAX_LOG_RATIO)
    tangent = math.expm1(MAX_LOG_RATIO) * (-MAX_LOG_RATIO - d).clamp(min=0)
    return (torch.expm1(-bounded) + bounded + tangent).to(at_least_float32(log_ratio).dtype)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


class KLController(Protocol):
    """Sets the weight of the KL in the reward, as in `coef = kl.update(coef, observed_kl=6.5, num_sequences=64)`. The
    stage keeps the coefficient and saves it with its state."""

    @property
    def initial(self) -> float:
        """The coefficient of the first step."""

    def update(self, coef: float, observed_kl: float, num_sequences: int) -> float:
        """The next coefficient, from the present one and the mean KL per sequence in nats over `num_sequences`."""


@register("kl_controller", "fixed")
@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """The same coefficient throughout."""

    coef: float = 0.05
    """Reward subtracted for each nat of KL between policy and reference."""

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "coef")

    @property
    def initial(self) -> float:
        return self.coef

    def update(self, coef: float, observed_kl: float, num_sequences: int) -> float:
        return coef


@register("kl_controller", "adaptive")
@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """A coefficient that steers the KL towards a target (Ziegler et al., arXiv:1909.08593, section 2.2).

        e = clip((KL - target) / target, -0.2, 0.2),   coef <- coef * (1 + e * num_sequences / horizon)

    The gain num_sequences / horizon is at most 1, so a batch larger than the horizon changes the coefficient by at most
    a fifth and can never change its sign. A negative observed KL (see `k1`) is treated like any KL below the target.
    """

    coef: float = 0.2
    """The coefficient of the first step."""
    target: float = 6.0
    """Target of the mean KL per sequence, in nats."""
    horizon: float = 10_000.0
    """Sequences over which an error of a fifth changes the coefficient by about a fifth."""

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a number above 0")

    @property
    def initial(self) -> float:
        return self.coef

    def update(self, coef: float, observed_kl: float, num_sequences: int) -> float:
        error = max(-0.2, min(0.2, (observed_kl - self.target) / self.target))
        return coef * (1 + error * min(num_sequences / self.horizon, 1.0))
