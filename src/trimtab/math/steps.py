"""One reward from the probabilities that the steps of a reply are right."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StepAggregate = Literal["last", "min", "product", "mean"]
"""How the probabilities of steps become one number. Which is right depends on how labels were made (Zhang et al.,
arXiv:2501.07301): a label from rollouts says whether the answer will be right from here on, so the last one says it of
the whole reply; a label of people says whether this step alone is right, so all of them have to be."""


def running_aggregate(probabilities: Tensor, how: StepAggregate) -> Tensor:
    """[T] the aggregate of the first step, the first two, and so on, of the probabilities [T] of T steps."""
    if how == "last":
        return probabilities
    if how == "min":
        return probabilities.cummin(0).values
    if how == "product":
        return probabilities.cumprod(0)
    return probabilities.cumsum(0) / torch.arange(1, len(probabilities) + 1)


def differences(potentials: Tensor) -> Tensor:
    """[T] how much each step adds to the potential [T], which is 0 before the first: their sum is the last potential,
    however many steps there are (potential-based shaping: Ng et al., 1999)."""
    return potentials.diff(prepend=potentials.new_zeros(1))
