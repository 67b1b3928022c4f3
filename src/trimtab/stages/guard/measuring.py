"""Asks one policy: replies to fixed prompts, their KL, the reward that training sees, and the independent measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.batches.rollouts import in_groups, rollout_trees
from trimtab.core.types import Prompt, Rollout
from trimtab.engines.base import Sampler, Scorer
from trimtab.evals.checkpoint_choice import MeasuredCheckpoint
from trimtab.evals.reply_signals import ReplySet
from trimtab.math.kl import k1
from trimtab.math.masking import sum_per_sequence
from trimtab.rewards.base import Reward, by_reply
from trimtab.rewards.combined import CombinedReward, load_rewards


@dataclass(frozen=True)
class CheckReplies:
    """The replies of a check, B = prompts × replies per prompt, with what training knows of them."""

    rollouts: Sequence[Rollout]
    replies_per_prompt: int
    kl: Tensor
    """[B] in nats (k1)."""
    rewards: Tensor
    """[B] the reward that is trained on; nan if unknown."""

    @property
    def texts(self) -> ReplySet:
        """The replies as signals read them."""
        return ReplySet(
            prompts=tuple(r.prompt.text for r in self.rollouts),
            replies=tuple(r.response for r in self.rollouts),
            rewards=tuple(self.rewards.tolist()),
        )

    @property
    def truncated_fraction(self) -> float:
        """The share of replies that were cut off."""
        return sum(r.finish_reason == "length" for r in self.rollouts) / len(self.rollouts)

    def measured(self, step: int, measure: Reward) -> MeasuredCheckpoint:
        """The checkpoint of `step` as the measure judges these replies."""
        scores = by_reply(measure.score(self.rollouts)[0], self.rollouts).double().view(-1, self.replies_per_prompt)
        scores = scores.masked_fill(~scores.isfinite(), torch.nan)
        return MeasuredCheckpoint(
            step=step,
            values=tuple(scores.nanmean(dim=1).tolist()),
            kl=float(self.kl.double().mean()),
            reward=float(self.rewards.double().nanmean()),
        )


def ask(
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler,
    policy: Scorer,
    reference: Scorer,
    reward: Reward | None,
    replies_per_prompt: int,
    seed: int,
) -> CheckReplies:
    """The replies of a policy to the prompts of a check. Every check draws by the same `seed`, so that a policy that
    has not moved gives the same replies."""
    rollouts = sampler.generate(prompts, group_size=replies_per_prompt, seed=seed)
    trees = rollout_trees(in_groups(rollouts, replies_per_prompt))
    log_ratio = policy.logprobs(trees) - reference.logprobs(trees)
    kl = sum_per_sequence(k1(log_ratio), trees.sequence_ids, trees.num_sequences)
    rewards = torch.full((len(rollouts),), torch.nan)
    if reward is not None:
        rewards = by_reply(reward.score(rollouts)[0], rollouts)
    return CheckReplies(rollouts, replies_per_prompt, kl, rewards.masked_fill(~rewards.isfinite(), torch.nan))


def load_measure(settings: Any) -> CombinedReward:
    """What the guard of a stage with these settings measures by, with models of its own; without a guard, nothing."""
    options: dict[str, Any] = {"token_budget": settings.token_budget, "device": settings.engine.find_device()}
    return load_rewards(settings.guard.measure if settings.guard else (), **options)
