"""A policy loss of your own, in one file:

trimtab online run.toml 'loss={ name = "examples/extending/spo_loss.py:SPO", epsilon = 0.2 }'
"""

from dataclasses import dataclass

from torch import Tensor

from trimtab.batches.rollouts import PolicyBatch
from trimtab.math.losses.policy import PolicyLoss, held_by_clip, probability_ratio


@dataclass(frozen=True, kw_only=True)
class SPO(PolicyLoss):
    """Simple Policy Optimization (Xie et al., arXiv:2401.16025): a quadratic price where PPO clips.

        L_t = -(r_t * A_t - |A_t| / (2 * epsilon) * (r_t - 1)^2),   r_t = pi(a_t) / pi_old(a_t)

    The best ratio is 1 + epsilon * sign(A_t); one that has gone beyond is pulled back, not only let go.
    """

    epsilon: float = 0.2
    """How far from 1 the ratio is to move."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}; it must be above 0")

    def token_losses(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        ratio = probability_ratio(logprobs, batch.old_logprobs)
        price = batch.advantages.abs() / (2 * self.epsilon) * (ratio - 1).square()
        beyond = held_by_clip(ratio.detach(), batch.advantages, self.epsilon, self.epsilon)
        return price - ratio * batch.advantages, beyond
