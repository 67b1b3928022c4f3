"""What models say of a batch, which losses read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TokenOutputs:
    """What a policy says of the trained tokens; all [M]."""

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class ScoreOutputs:
    """What a scalar model says: [M] where trained tokens are predicted from, [B] at the end of each sequence."""

    values: Tensor
    scores: Tensor


class ValueOutputs(Protocol):
    """What a critic says: a model of its own, or a policy with a value head."""

    @property
    def values(self) -> Tensor:
        """[M] where trained tokens are predicted from."""
        ...
