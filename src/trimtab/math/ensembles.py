"""One score of several: what an ensemble of reward models says of a reply.

All of these are unchanged by the order of the members, and adding a constant to all members' scores adds it to the
result.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Aggregate = Literal["mean", "min", "variance", "lower_bound", "soft_min"]
COEFS: dict[str, float] = {"variance": 0.5, "lower_bound": 1.0, "soft_min": 1.0}
"""The default coefficient of each aggregate that has one."""


def aggregate(scores: Tensor, how: Aggregate, coef: float | None = None) -> Tensor:
    """[B] one score for each reply, from scores [K, B] of K members.

    mean          the mean
    min           the lowest score: worst-case optimisation, WCO (Coste et al., arXiv:2310.02743, eq. 4)
    variance      mean - coef * variance: uncertainty-weighted optimisation, UWO (eq. 5)
    lower_bound   mean - coef * deviation
    soft_min      -coef * log mean_k exp(-score_k / coef): the score under the worst weighting of the members within a
                  KL of the even one; coef to infinity gives the mean and coef to 0 the minimum

    Variance and deviation are those of the population (divided by K, not by K - 1): the members are all there are. The
    second order of soft_min is mean - variance / (2 coef). `coef` is that of `COEFS` if it is not given.
    """
    coef = COEFS.get(how, 0.0) if coef is None else coef
    if how == "min":
        return scores.amin(0)
    if how == "variance":
        return scores.mean(0) - coef * scores.var(0, correction=0)
    if how == "lower_bound":
        return scores.mean(0) - coef * scores.std(0, correction=0)
    if how == "soft_min":
        # Around the mean and in float64: for a large coefficient the logarithms differ in their last digits alone.
        mean = scores.double().mean(0)
        spread = -coef * ((-(scores - mean) / coef).logsumexp(0) - math.log(len(scores)))
        return (mean + spread).to(scores.dtype)
    return scores.mean(0)
