"""A reward of your own, in one file:

trimtab online run.toml 'rewards=[{ name = "examples/extending/my_reward.py:CosineAnswer", max_tokens = 64 }]'
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.core.metrics import Metrics
from trimtab.core.types import Rollout
from trimtab.rewards.answers import find_answer
from trimtab.rewards.each import Score, fact, score_each


@dataclass(frozen=True, kw_only=True)
class CosineAnswer:
    """Right answers are worth more the shorter they are, wrong ones less, along half a cosine of the length (Yeo et
    al., arXiv:2502.03373, section 4.2): being brief pays once one is right, and thinking on while one is wrong."""

    max_tokens: int
    """The longest reply that can be sampled."""
    right: tuple[float, float] = (2.0, 1.0)
    """A right answer's worth at length 0 and at max_tokens."""
    wrong: tuple[float, float] = (-10.0, 0.0)
    """A wrong answer's."""
    cut_off: float = -10.0
    """That of a reply which did not end."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    def load(self, *, token_budget: int) -> "CosineAnswer":
        """The reward itself; nothing needs loading."""
        return self

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B]; `reward/cosine_right` is the share of right answers."""
        return score_each("cosine", rollouts, self.judge)

    def judge(self, rollout: Rollout) -> Score:
        """The worth of one reply."""
        right = find_answer(rollout.response, ("hashes", "boxed")) == str(fact(rollout.prompt, "answer"))
        short, long = self.right if right else self.wrong
        done = len(rollout.response_ids) / self.max_tokens
        value = long + (short - long) * (1 + math.cos(math.pi * done)) / 2
        return Score(value if rollout.finish_reason == "stop" else self.cut_off, {"right": float(right)})
