"""One round of sampling: rollouts in groups, with their rewards; what is left out is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core import seeds
from trimtab.core.errors import EngineError
from trimtab.core.metrics import Mean, Metrics, Total, mean_of, merge
from trimtab.core.types import Prompt, Rollout
from trimtab.engines.base import Sampler
from trimtab.math.rewards import clip, missing_eos_penalty
from trimtab.rewards.base import Reward
from trimtab.rewards.gold import GoldScorer
from trimtab.stages.online.checks import Clock
from trimtab.stages.online.settings import OnlineSettings, Shaping
from trimtab.stages.online.state import OnlineState


@dataclass(frozen=True)
class Group:
    """The replies to one prompt with their rewards [G], and the reward of the greedy reply, nan if there is none."""

    rollouts: Sequence[Rollout]
    rewards: Tensor
    baseline: float

    @property
    def has_signal(self) -> bool:
        """Whether some reply is better than another."""
        return bool(self.rewards.min() < self.rewards.max())


@dataclass(frozen=True)
class RolloutBatch:
    """The rollouts that a step trains on: groups with their rewards, B rollouts in all, and the metrics of sampling."""

    groups: Sequence[Group]
    metrics: Metrics

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, group after group."""
        return [r for group in self.groups for r in group.rollouts]

    @cached_property
    def trees(self) -> TokenTrees:
        """The rollouts as trees, the prompt of a group once."""
        return rollout_trees([group.rollouts for group in self.groups])

    @cached_property
    def logprobs(self) -> Tensor:
        """[M] the sampler's log-probability of every token that it drew."""
        return torch.tensor([x for r in self.rollouts for x in r.logprobs])

    @property
    def rewards(self) -> Tensor:
        """[B] the rewards, group after group."""
        return torch.cat([group.rewards for group in self.groups])

    @property
    def baselines(self) -> Tensor:
        """[B] the reward of the greedy reply to the same prompt; nan if none was asked for."""
        return torch.cat([torch.full_like(group.rewards, group.baseline) for group in self.groups])

    @property
    def group_ids(self) -> Tensor:
        """[B] the number of each rollout's group."""
        sizes = torch.tensor([len(group.rollouts) for group in self.groups])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @property
    def finished(self) -> Tensor:
        """[B] whether a reply ended by itself."""
        return torch.tensor([r.finish_reason == "stop" for r in self.rollouts])


@dataclass(frozen=True)
class RolloutSource:
    """The source of a step's rollouts and their rewards."""

    sampler: Sampler
    greedy: Sampler | None
    """The sampler of the likeliest reply, for advantages that compare with it."""
    reward: Reward
    world: GoldScorer | None
    """Gives the gold scores, which are only watched."""
    settings: OnlineSettings

    def sample(self, number: int, state: OnlineState, clock: Clock) -> RolloutBatch:
        """The groups of a step. With dynamic sampling, groups without a signal are replaced while rounds are left. If
        groups are still missing then, the batch is filled with such groups: a step needs a batch, and they do no
        harm."""
        settings = self.settings
        self.sampler.sync()
        max_rounds = settings.dynamic_sampling.max_rounds if settings.dynamic_sampling else 1
        kept: list[Group] = []
        flat: list[Group] = []
        logged: list[Metrics] = []
        for attempt in range(max_rounds):
            prompts = state.take_prompts(settings.prompts_per_step - len(kept))
            groups, metrics = self._sample_once(number, attempt, prompts, clock)
            logged.append(metrics)
            for group in groups:
                (kept if group.has_signal or not settings.dynamic_sampling else flat).append(group)
            if len(kept) >= settings.prompts_per_step:
                break
        metrics = merge(logged)
        if not kept and not flat:
            raise EngineError(
                f"none of {int(metrics['rollout/unjudged'].value)} replies got a reward",
                where=f"step {number + 1}",
                fix="mend the reward; the log says why it failed",
            )
        filled = flat[: settings.prompts_per_step - len(kept)]
        if settings.dynamic_sampling:
            metrics |= {
                "rollout/rounds": Mean(attempt + 1, 1),
                "rollout/replaced_groups": Total(len(flat) - len(filled)),
                "rollout/flat_groups": Total(len(filled)),
            }
        return RolloutBatch([*kept, *filled], metrics)

    def _sample_once(
        self, number: int, attempt: int, prompts: Sequence[Prompt], clock: Clock
    ) -> tuple[list[Group], Metrics]:
        """A group for each prompt, sampled and judged. A prompt has no group if none of its replies could be judged."""
        settings = self.settings
        purpose = ("rollouts", number) if attempt == 0 else ("rollouts", number, attempt)
        seed = seeds.derive(settings.seed, *purpose)
        rollouts = self.sampler.generate(prompts, group_size=settings.group_size, seed=seed)
        clock.mark("generate")
        scores, metrics = self.reward.score(rollouts)
        if self.world is not None:
            metrics |= self.world.score(rollouts)[1]
        clock.mark("score")
        judged = scores.isfinite()
        if not judged.all() and settings.on_failed_reward == "stop":
            raise _not_judged(rollouts, judged, number, metrics)
        baselines = self._greedy_scores(number, prompts)
        clock.mark("generate")
        size = settings.group_size
        if self.greedy is not None:  # a reply without its baseline has no advantage
            judged &= baselines.isfinite().repeat_interleave(size)
        groups = []
        for i in range(len(prompts)):
            mine = [j for j in range(i * size, (i + 1) * size) if judged[j]]
            if mine:
                groups.append(Group([rollouts[j] for j in mine], scores[mine], float(baselines[i])))
        return groups, metrics | {"rollout/unjudged": Total(int((~judged).sum()))}

    def _greedy_scores(self, number: int, prompts: Sequence[Prompt]) -> Tensor:
        """[P] the score of the likeliest reply to each prompt; nan if the advantages do not ask for it."""
        if self.greedy is None:
            return torch.full((len(prompts),), torch.nan)
        replies = self.greedy.generate(prompts, group_size=1, seed=seeds.derive(self.settings.seed, "greedy", number))
        scores, _ = self.reward.score(replies)
        if not scores.isfinite().all() and self.settings.on_failed_reward == "stop":
            raise _not_judged(replies, scores.isfinite(), number, {})
        return scores


def shape_rewards(rollouts: RolloutBatch, shaping: Shaping, state: OnlineState) -> tuple[Tensor, Tensor, Metrics]:
    """[B] rewards, normalised, clipped and less the penalty, in that order; [B] baselines, normalised and clipped;
    and metrics.

    The running moments of `state` take in the rewards of this step first.
    """
    rewards, baselines = rollouts.rewards, rollouts.baselines
    if shaping.normalize:
        state.moments = state.moments.update(rewards)
        shift = not shaping.scale_only
        rewards, baselines = (state.moments.normalise(x, shift_mean=shift) for x in (rewards, baselines))
    clipped = torch.zeros(len(rewards), dtype=torch.bool)
    if shaping.clip is not None:
        rewards, clipped = clip(rewards, low=-shaping.clip, high=shaping.clip)
        baselines, _ = clip(baselines, low=-shaping.clip, high=shaping.clip)
    rewards = missing_eos_penalty(rewards, rollouts.finished, shaping.missing_eos_penalty)
    return rewards, baselines, {"reward/clipped_fraction": mean_of(clipped.tolist())}


def in_groups(rollouts: Sequence[Rollout], size: int) -> list[list[Rollout]]:
    """The rollouts of each prompt; a sampler gives `size` of them for each prompt, one prompt after the other."""
    return [list(rollouts[i : i + size]) for i in range(0, len(rollouts), size)]


def rollout_trees(groups: Sequence[Sequence[Rollout]]) -> TokenTrees:
    """The rollouts as trees, the prompt of a group once; the sampled token ids are the ids that are trained on."""
    return TokenTrees.build(
        [response_tree(g[0].prompt_ids, [r.response_ids for r in g], [r.response_mask for r in g]) for g in groups]
    )


def _not_judged(rollouts: Sequence[Rollout], judged: Tensor, number: int, metrics: Metrics) -> EngineError:
    first = rollouts[int((~judged).nonzero()[0])]
    failed = [
        name.removeprefix("reward/").removesuffix("_failed")
        for name, m in metrics.items()
        if "_failed" in name and m.value
    ]
    return EngineError(
        f"{int((~judged).sum())} of {len(rollouts)} replies got no reward"
        + (f" from {', '.join(failed)}" if failed else "")
        + f"; the first: {first.response[:80]!r} to {first.prompt.text[:60]!r}",
        where=f"step {number + 1}",
        fix="mend the reward, or leave such replies out and count them with on_failed_reward = 'drop'",
    )
