"""Advantage estimators: token rewards in, advantages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.registry import register
from trimtab.math.masking import (
    at_least_float32,
    last_index_per_sequence,
    pad_per_sequence,
    sum_per_sequence,
    unpad_per_sequence,
)


def token_rewards(score: Tensor, kl: Tensor, sequence_ids: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token, [M]: `-kl_coef * kl`, and at a sequence's last token also its score (Ouyang et al.,
    arXiv:2203.02155, eq. 2).

    `score` is [B], `kl` [M] holds per-token estimates in nats. Every sequence must have a token.
    """
    rewards = -kl_coef * at_least_float32(kl)
    return rewards.index_add(0, last_index_per_sequence(sequence_ids, len(score)), score.to(rewards.dtype))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, sequence_ids: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [M] each (Schulman et al., arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1},   return_t = A_t + V_t

    The last token of a sequence is terminal: V and A after it are 0. Nothing here is differentiable, because both
    results are targets.
    """
    rewards, values = at_least_float32(rewards), at_least_float32(values)
    num_sequences = int(sequence_ids[-1]) + 1 if len(sequence_ids) else 0
    rewards_BT, mask = pad_per_sequence(rewards, sequence_ids, num_sequences)
    values_BT, _ = pad_per_sequence(values, sequence_ids, num_sequences)
    advantages_BT = torch.zeros_like(rewards_BT)
    # Rewards and values are 0 in the padding on the right, which makes each last token terminal.
    next_value = next_advantage = rewards_BT.new_zeros(num_sequences)
    for t in reversed(range(rewards_BT.shape[1])):
        delta = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values_BT[:, t]
        advantages_BT[:, t] = next_advantage
    advantages = unpad_per_sequence(advantages_BT, mask)
    return advantages, advantages + values


@dataclass(frozen=True)
class Episodes:
    """The inputs of an estimator: B finished replies with M tokens."""

    rewards: Tensor
    """[M] the reward of each token: the score at a reply's last token, less the KL penalty if it is part of the
    reward."""
    values: Tensor
    """[M] the critic's values; nan without a critic."""
    sequence_ids: Tensor
    """[M] the reply that each token belongs to."""
    group_ids: Tensor
    """[B] the number of the prompt that a reply answers: 0, 1, … in ascending order."""
    baselines: Tensor
    """[B] the score of the greedy reply to the same prompt; nan if no greedy reply was asked for."""
    parts: Sequence[tuple[float, Tensor]] = ()
    """The weight and the scores [B] of each reward, if there are several."""

    @cached_property
    def returns(self) -> Tensor:
        """[B] the sum of each reply's token rewards."""
        return sum_per_sequence(self.rewards, self.sequence_ids, len(self.group_ids))


def rewards_to_go(rewards: Tensor, sequence_ids: Tensor, *, gamma: float) -> Tensor:
    """[M] the sum of discounted rewards from each token to the end of its sequence: `gae` without a critic."""
    return gae(rewards, torch.zeros_like(rewards), sequence_ids, gamma=gamma, lam=1.0)[0]


def group_means(returns: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B] the mean of each reply's group, and its size [B]."""
    num_groups = int(group_ids[-1]) + 1 if len(group_ids) else 0
    sizes = torch.bincount(group_ids, minlength=num_groups)
    sums = torch.zeros(num_groups, dtype=torch.float64, device=returns.device).index_add_(
        0, group_ids, returns.double()
    )
    return (sums / sizes)[group_ids].to(returns.dtype), sizes[group_ids]


def group_deviations(returns: Tensor, group_ids: Tensor) -> Tensor:
    """[B] the standard deviation of each reply's group, with divisor size - 1; 0 for a group of one."""
    means, sizes = group_means(returns, group_ids)
    mean_squares, _ = group_means((returns.double() - means.double()).square(), group_ids)
    return (mean_squares * sizes / (sizes - 1).clamp(min=1)).sqrt().to(returns.dtype)


def leave_one_out(returns: Tensor, group_ids: Tensor) -> Tensor:
    """[B] each return less the mean of the other returns of its group (Ahmadian et al., arXiv:2402.14740, eq. 8); 0
    for a group of one, which has no others."""
    means, sizes = group_means(returns, group_ids)
    # R - (n mean - R) / (n - 1) = (R - mean) n / (n - 1)
    return (returns - means) * sizes / (sizes - 1).clamp(min=1)


class Estimator:
    """Base of every advantage estimator: a function of `Episodes`, and flags that tell the loop what it needs."""

    needs_critic: ClassVar[bool] = False
    """Whether it reads values. If so, the loop trains a critic towards values plus advantages."""
    needs_greedy: ClassVar[bool] = False
    """Whether it reads baselines, the scores of greedy replies."""
    credits_tokens: ClassVar[bool] = False
    """Whether a token's advantage depends on when the rewards after it are paid, and not only on their sum."""
    whiten: bool = False
    """Whether the advantages of a batch are scaled to mean 0 and deviation 1 over its tokens, after the returns are
    computed from them."""
    per_reward: bool = False
    """Whether it reads the parts, the scores of each reward, instead of the rewards of tokens."""

    @property
    def needs_group(self) -> bool:
        """Whether it needs several replies of each prompt: a single one would have no advantage."""
        return False

    def __call__(self, episodes: Episodes) -> Tensor:
        """[M] advantages."""
        raise NotImplementedError


@register("advantage", "gae")
@dataclass(frozen=True, kw_only=True)
class GAE(Estimator):
    """Generalised advantage estimation, with a learned critic; see `gae`."""

    gamma: float = 1.0
    """Discount of a reward for each token that it comes later."""
    lam: float = 0.95
    """lambda of GAE: 1 uses the rewards alone, 0 relies on the critic's value of the next token."""
    whiten: bool = True
    """Scale the advantages of a batch to mean 0 and deviation 1."""

    needs_critic: ClassVar[bool] = True
    credits_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "advantage.gamma", "lam")

    def __call__(self, episodes: Episodes) -> Tensor:
        rewards, values = episodes.rewards, episodes.values
        return gae(rewards, values, episodes.sequence_ids, gamma=self.gamma, lam=self.lam)[0]


@register("advantage", "grpo")
@dataclass(frozen=True, kw_only=True)
class GRPO(Estimator):
    """The return of a reply less its group's mean, the same for all its tokens (Shao et al., arXiv:2402.03300, section
    4.1.2). `scale = "none"` is Dr. GRPO (Liu et al., arXiv:2503.20783): dividing by a group's deviation gives very
    easy and very hard prompts more weight.

    `per_reward = true` is GDPO (Liu et al., arXiv:2601.05242): each of several rewards has advantages of its own,
    scaled by its own deviation. Their weighted sums are then divided by the deviation of the sums over the batch.
    Replies that differ in their rewards, and not in the sum of these, have different advantages.
    """

    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group, by that of the whole batch, or do not divide."""
    eps: float = 1e-4
    """Added to the deviation before dividing."""
    per_reward: bool = False
    """Compute the advantages of each reward apart, and add them up with the weights of the rewards."""

    def __post_init__(self) -> None:
        if self.per_reward and self.scale == "none":
            raise ValueError(
                "per_reward = true with scale = 'none': without a scale the advantages of the rewards add up to "
                "those of their sum; set scale = 'group', or per_reward = false"
            )

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, episodes: Episodes) -> Tensor:
        groups = episodes.group_ids
        if not self.per_reward:
            return self._scaled(episodes.returns, groups)[episodes.sequence_ids]
        total = torch.zeros_like(episodes.returns)
        for weight, scores in episodes.parts:
            total += weight * self._scaled(scores, groups)
        everyone = torch.zeros_like(groups)
        total = total - group_means(total, everyone)[0]
        return (total / (group_deviations(total, everyone) + self.eps))[episodes.sequence_ids]

    def _scaled(self, returns: Tensor, groups: Tensor) -> Tensor:
        """[B] returns less their group's mean, divided as `scale` says."""
        advantages = returns - group_means(returns, groups)[0]
        if self.scale == "group":
            advantages = advantages / (group_deviations(returns, groups) + self.eps)
        elif self.scale == "batch":
            advantages = advantages / (group_deviations(returns, torch.zeros_like(groups)) + self.eps)
        return advantages


@register("advantage", "rloo")
@dataclass(frozen=True, kw_only=True)
class RLOO(Estimator):
    """The return of a reply less the mean return of the others in its group; see `leave_one_out`."""

    whiten: bool = False
    """Scale the advantages of a batch to mean 0 and deviation 1."""

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, episodes: Episodes) -> Tensor:
        return leave_one_out(episodes.returns, episodes.group_ids)[episodes.sequence_ids]


@register("advantage", "reinforce_pp")
@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Estimator):
    """REINFORCE++ (Hu et al., arXiv:2501.03262): rewards to go, normalised over all tokens of the batch and never over
    a group. With `baseline = "group"` the group's mean is subtracted first, for several replies of each prompt."""

    baseline: Literal["none", "group"] = "none"
    """What is subtracted before the batch is normalised."""
    gamma: float = 1.0
    """Discount of a reward for each token that it comes later."""

    whiten: ClassVar[bool] = True  # type: ignore[misc]
    credits_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "advantage.gamma")

    @property
    def needs_group(self) -> bool:
        return self.baseline == "group"

    def __call__(self, episodes: Episodes) -> Tensor:
        to_go = rewards_to_go(episodes.rewards, episodes.sequence_ids, gamma=self.gamma)
        if self.baseline == "group":
            to_go = to_go - group_means(episodes.returns, episodes.group_ids)[0][episodes.sequence_ids]
        return to_go


@register("advantage", "remax")
@dataclass(frozen=True, kw_only=True)
class ReMax(Estimator):
    """Rewards to go less the score of the greedy reply to the same prompt (Li et al., arXiv:2310.10505, algorithm 1).
    The greedy reply is sampled and scored in addition to the others."""

    gamma: float = 1.0
    """Discount of a reward for each token that it comes later."""

    needs_greedy: ClassVar[bool] = True
    credits_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "advantage.gamma")

    def __call__(self, episodes: Episodes) -> Tensor:
        to_go = rewards_to_go(episodes.rewards, episodes.sequence_ids, gamma=self.gamma)
        return to_go - episodes.baselines[episodes.sequence_ids]
