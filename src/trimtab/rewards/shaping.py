"""Costs of length and of repetition, to be added to a reward that says what is good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.registry import register
from trimtab.core.types import Rollout
from trimtab.evals.text import repetition
from trimtab.rewards.each import EachReply, Score


@register("reward", "length")
@dataclass(frozen=True, kw_only=True)
class Length(EachReply):
    """0 for a reply with a length in the range; each token outside it costs `per_token`.

    `reward/length_outside` is the share of replies outside the range.
    """

    min_tokens: int = 0
    """Shorter replies are charged for each token that they lack."""
    max_tokens: int
    """Longer replies are charged for each token above this."""
    per_token: float = 0.01
    """Charge for one token."""
    most: float = 1.0
    """The highest charge for a reply."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} and max_tokens = {self.max_tokens} are no range")
        refuse_out_of_range(self, "per_token", "most")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest reward that there is."""
        return -self.most, 0.0

    def _judge(self, rollout: Rollout) -> Score:
        num = num_tokens(rollout)
        outside = max(self.min_tokens - num, num - self.max_tokens, 0)
        return Score(0.0 - min(self.per_token * outside, self.most), {"outside": float(outside > 0)})


@register("reward", "overlong")
@dataclass(frozen=True, kw_only=True)
class Overlong(EachReply):
    """DAPO's soft overlong punishment (Yu et al., arXiv:2503.14476, eq. 13).

    0 up to max_tokens - buffer_tokens, then falling in a line to -1 at max_tokens, and -1 beyond.
    `reward/overlong_punished` is the share of replies below 0.
    """

    max_tokens: int
    """The length at which the punishment is complete: that of the longest reply that can be sampled."""
    buffer_tokens: int
    """The number of tokens before that over which the punishment grows."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (-1.0, 0.0)

    def __post_init__(self) -> None:
        if not 0 < self.buffer_tokens <= self.max_tokens:
            raise ValueError(
                f"buffer_tokens = {self.buffer_tokens} with max_tokens = {self.max_tokens}; "
                "it must be at least 1 and at most max_tokens"
            )

    def _judge(self, rollout: Rollout) -> Score:
        free = self.max_tokens - self.buffer_tokens
        value = min(0.0, max(-1.0, (free - num_tokens(rollout)) / self.buffer_tokens))
        return Score(value, {"punished": float(value < 0)})


@register("reward", "repetition")
@dataclass(frozen=True, kw_only=True)
class Repetition(EachReply):
    """Minus the share of a reply's n-grams of words that repeat an earlier one, in [-1, 0]."""

    n: int = 4
    """Words per n-gram."""
    free: float = 0.0
    """This share costs nothing; the rest is stretched back to [-1, 0]."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (-1.0, 0.0)

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "n", "free")

    def _judge(self, rollout: Rollout) -> Score:
        share = repetition(rollout.response, self.n)
        return Score(0.0 - max(share - self.free, 0.0) / (1 - self.free))


def num_tokens(rollout: Rollout) -> int:
    """The number of tokens that the policy chose, with its end token."""
    return len(rollout.logprobs)
