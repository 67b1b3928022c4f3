"""From rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.math.masking import at_least_float32, last_index_per_sequence, pad_per_sequence, unpad_per_sequence
from trimtab.registry import register


def token_rewards(score: Tensor, kl: Tensor, sequence_ids: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token, [M]: `-kl_coef * kl`, plus its sequence's score at the last token (Ouyang et al.,
    arXiv:2203.02155, eq. 2).

    `score` [B], `kl` [M] per-token estimates in nats. Every sequence must have a token.
    """
    rewards = -kl_coef * at_least_float32(kl)
    return rewards.index_add(0, last_index_per_sequence(sequence_ids, len(score)), score.to(rewards.dtype))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, sequence_ids: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [M] each (Schulman et al., arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1},   return_t = A_t + V_t

    The last token of a sequence is terminal: V and A after it are 0. Not differentiable; both results are targets.
    """
    rewards, values = at_least_float32(rewards), at_least_float32(values)
    num_sequences = int(sequence_ids[-1]) + 1 if len(sequence_ids) else 0
    rewards_BT, mask = pad_per_sequence(rewards, sequence_ids, num_sequences)
    values_BT, _ = pad_per_sequence(values, sequence_ids, num_sequences)
    advantages_BT = torch.zeros_like(rewards_BT)
    # Rewards and values are 0 in the padding at the right, which makes the ends terminal.
    next_value = next_advantage = rewards_BT.new_zeros(num_sequences)
    for t in reversed(range(rewards_BT.shape[1])):
        delta = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values_BT[:, t]
        advantages_BT[:, t] = next_advantage
    advantages = unpad_per_sequence(advantages_BT, mask)
    return advantages, advantages + values


@register("advantage", "gae")
@dataclass(frozen=True, kw_only=True)
class GAE:
    """Generalised advantage estimation, with a learned critic; see `gae`."""

    gamma: float = 1.0
    """What a reward one token later is worth now."""
    lam: float = 0.95
    """1 trusts the rewards alone, 0 the critic's next value."""

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")

    def __call__(self, rewards: Tensor, values: Tensor, sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, sequence_ids, gamma=self.gamma, lam=self.lam)
