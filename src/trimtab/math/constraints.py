"""The Lagrangian of a limit on a cost: its multiplier grows while the limit is broken and shrinks while it is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Multiplier:
    """The Lagrange multiplier lambda, and the costs of the latest episodes, from which it is updated.

    `Multiplier(**multiplier.state())` is equal to `multiplier`, also if the state was saved as JSON in between.
    """

    log_lambda: float
    costs: Sequence[float] = ()
    """The latest costs, oldest first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", tuple(self.costs))  # JSON gives a list back

    @classmethod
    def starting_at(cls, value: float) -> Multiplier:
        """lambda = `value` (above 0), and no costs seen."""
        return cls(math.log(value))

    @property
    def value(self) -> float:
        """lambda."""
        return math.exp(self.log_lambda)

    @property
    def mean_cost(self) -> float:
        """The mean J of the latest costs; nan before the first."""
        return math.fsum(self.costs) / len(self.costs) if self.costs else math.nan

    def see(self, costs: Sequence[float], *, window: int) -> Multiplier:
        """The multiplier with these costs added; the latest `window` are kept."""
        return dataclasses.replace(self, costs=[*self.costs, *costs][-window:])

    def update(self, *, limit: float, learning_rate: float, least: float, most: float) -> Multiplier:
        """A step of gradient ascent on lambda * (J - limit) in log lambda (Dai et al., arXiv:2310.12773):

            lambda <- lambda * exp(learning_rate * lambda * (J - limit)),   from `least` to `most`

        A small lambda moves slowly in both directions: back from lambda_0 it takes about
        1 / (learning_rate * lambda_0 * (J - limit)) steps, which `least` bounds.
        """
        moved = self.log_lambda + learning_rate * self.value * (self.mean_cost - limit)
        return dataclasses.replace(self, log_lambda=min(max(moved, math.log(least)), math.log(most)))

    def damped(self, *, limit: float, damping: float, most: float) -> float:
        """lambda with a term in proportion to the distance from the limit, at most `most`:

            lambda * exp(damping * (J - limit))

        The update alone is an integral: it answers late, and the cost swings around the limit. This term answers at
        once, as in a PI controller (Stooke et al., arXiv:2007.03964), here in log lambda as the update is.
        """
        return math.exp(min(self.log_lambda + damping * (self.mean_cost - limit), math.log(most)))

    def state(self) -> Mapping[str, Any]:
        """The fields by name, for a checkpoint."""
        return {"log_lambda": self.log_lambda, "costs": list(self.costs)}


def lagrangian(advantages: Tensor, cost_advantages: Tensor, multiplier: float) -> Tensor:
    """`(A - lambda * A_cost) / (1 + lambda)`, [M]: what the policy is moved by under a limit (Dai et al.,
    arXiv:2310.12773). The divisor keeps their size as lambda grows."""
    return (advantages - multiplier * cost_advantages) / (1 + multiplier)
