"""Model outputs for a batch. Losses read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TokenOutputs:
    """A policy's outputs for the trained tokens. Every tensor is [M]; those that no loss asked for are None."""

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class ScoreOutputs:
    """A scalar model's outputs: `values` [M] at the token before each trained token, and `scores` [B] at the last token
    of each sequence."""

    values: Tensor
    scores: Tensor


class ValueOutputs(Protocol):
    """The outputs of a critic, which is a model of its own or a policy with a value head."""

    @property
    def values(self) -> Tensor:
        """[M] the value at the token before each trained token."""
