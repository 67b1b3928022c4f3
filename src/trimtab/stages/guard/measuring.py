"""Asks one policy: replies to fixed prompts, their KL, the reward that training sees, and the independent measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.batches.rollouts import in_groups, rollout_trees
from trimtab.core import config, seeds
from trimtab.core.types import Prompt, Rollout, records_hash
from trimtab.engines.base import Sampler, Scorer
from trimtab.evals.checkpoint_choice import MeasuredCheckpoint
from trimtab.evals.reply_signals import ReplySet
from trimtab.math.kl import k1
from trimtab.math.masking import sum_per_sequence
from trimtab.rewards.base import Reward, by_reply
from trimtab.rewards.combined import CombinedReward, load_rewards
from trimtab.stages.guard.independence import measure_digest
from trimtab.stages.noise import seed_noise


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


@dataclass(frozen=True, kw_only=True)
class PolicyCheck:
    """Asks a policy the same prompts again and again. Every check draws by the same seed, so that a policy that has not
    moved gives the same replies."""

    prompts: Sequence[Prompt]
    replies_per_prompt: int
    seed: int
    """That of the run, from which checks have random numbers of their own."""
    sampler: Sampler
    policy: Scorer
    reference: Scorer
    reward: Reward | None
    """What training raises; None if it raises nothing that judges replies."""
    measure: Reward

    def replies(self, step: int) -> CheckReplies:
        """The replies of the policy as it is after `step`."""
        seed_noise(self.seed, "guard", step)  # the next step sets the global generators again
        self.sampler.sync()
        seed = seeds.derive(self.seed, "guard")
        rollouts = self.sampler.generate(self.prompts, group_size=self.replies_per_prompt, seed=seed)
        trees = rollout_trees(in_groups(rollouts, self.replies_per_prompt))
        log_ratio = self.policy.logprobs(trees) - self.reference.logprobs(trees)
        kl = sum_per_sequence(k1(log_ratio), trees.sequence_ids, trees.num_sequences)
        rewards = torch.full((len(rollouts),), torch.nan)
        if self.reward is not None:
            rewards = by_reply(self.reward.score(rollouts)[0], rollouts)
        rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan)
        return CheckReplies(rollouts, self.replies_per_prompt, kl, rewards)


def evidence_of(settings: Any, prompts: Sequence[Prompt], num_trained_on: int | None) -> dict[str, Any]:
    """What a decision rests on: the measure, and the prompts with the number of those that are trained on. `settings`
    are those of a guard, or of a choice made afterwards."""
    table = config.dump(settings)["measure"]
    return {
        "measure": {"settings": table, "sha256": measure_digest(table)},
        "prompts": {
            "source": settings.prompts or "held out of the run's own",
            "num": len(prompts),
            "sha256": records_hash(prompts),
            "num_trained_on": num_trained_on,
            "replies_per_prompt": settings.replies_per_prompt,
        },
    }


def load_measure(settings: Any) -> CombinedReward:
    """What the guard of a stage with these settings measures by, with models of its own; without a guard, nothing."""
    options: dict[str, Any] = {"token_budget": settings.token_budget, "device": settings.engine.find_device()}
    return load_rewards(settings.guard.measure if settings.guard else (), **options)
