"""One round of sampling: rollouts in groups, with their rewards; what is left out is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core import seeds
from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.metrics import Mean, Metrics, Total, mean_of, merge
from trimtab.core.types import Prompt, Rollout
from trimtab.engines.base import Sampler
from trimtab.math.rewards import RunningMoments, clip, missing_eos_penalty, moments_of
from trimtab.rewards.combined import COST, CombinedReward, part_names
from trimtab.rewards.gold import GoldScorer
from trimtab.stages.online.checks import Clock, check_scores
from trimtab.stages.online.rollouts import Group, Replies, RolloutBatch
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState

INSTEAD = "let the reward give one number for each reply"
"""What a reward of the user's own can do instead of paying tokens."""


@dataclass(frozen=True)
class RolloutSource:
    """The source of a step's rollouts and their rewards."""

    sampler: Sampler
    greedy: Sampler | None
    """The sampler of the likeliest reply, for advantages that compare with it."""
    reward: CombinedReward
    world: GoldScorer | None
    """Gives the gold scores, which are only watched."""
    settings: OnlineSettings

    def draw(self, number: int, state: OnlineState, clock: Clock) -> Replies:
        """The replies to the prompts of a step, not judged yet."""
        return self._draw(number, 0, state.take_prompts(self.settings.prompts_per_step), clock)

    def judge(self, number: int, replies: Replies, state: OnlineState, clock: Clock) -> RolloutBatch:
        """The groups of the replies that `draw` gave. With dynamic sampling, groups without a signal are replaced while
        rounds are left. If groups are still missing then, the batch is filled with such groups: a step needs a batch,
        and they do no harm."""
        settings = self.settings
        parts_apart = settings.scales_parts
        max_rounds = settings.dynamic_sampling.max_rounds if settings.dynamic_sampling else 1
        kept: list[Group] = []
        flat: list[Group] = []
        logged: list[Metrics] = []
        for attempt in range(max_rounds):
            if attempt:
                prompts = state.take_prompts(settings.prompts_per_step - len(kept))
                replies = self._draw(number, attempt, prompts, clock)
            groups, metrics = self._groups(number, replies, clock, check=number == attempt == 0)
            logged.append(metrics)
            for group in groups:
                useful = not settings.dynamic_sampling or group.has_signal(parts_apart=parts_apart)
                (kept if useful else flat).append(group)
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
        replaced = [cost for g in flat[len(filled) :] if COST in g.parts for cost in g.parts[COST].tolist()]
        return RolloutBatch([*kept, *filled], metrics, replaced_costs=replaced)

    def sync(self) -> None:
        """Gives the samplers the policy's weights as they are now."""
        for sampler in self.samplers:
            sampler.sync()

    @property
    def samplers(self) -> list[Sampler]:
        """The samplers that there are."""
        return [sampler for sampler in (self.sampler, self.greedy) if sampler is not None]

    def _draw(self, number: int, attempt: int, prompts: Sequence[Prompt], clock: Clock) -> Replies:
        settings = self.settings
        purpose = ("rollouts", number) if attempt == 0 else ("rollouts", number, attempt)
        seed = seeds.derive(settings.seed, *purpose)
        rollouts = self.sampler.generate(prompts, group_size=settings.group_size, seed=seed)
        greedy: Sequence[Rollout] = ()
        if self.greedy is not None:
            greedy = self.greedy.generate(prompts, group_size=1, seed=seeds.derive(settings.seed, "greedy", number))
        clock.mark("generate")
        return Replies(prompts, rollouts, greedy)

    def _groups(self, number: int, replies: Replies, clock: Clock, *, check: bool) -> tuple[list[Group], Metrics]:
        """A group for each prompt, judged. A prompt has no group if none of its replies could be judged. `check` is
        true in the first round of a run; see `check_scores`."""
        settings, rollouts = self.settings, replies.rollouts
        scores, parts, metrics, by_token = self.reward.score_tokens(rollouts)
        lengths = [len(r.logprobs) for r in rollouts]
        tokens = torch.split(by_token, lengths) if by_token is not None else None
        # A reward of the user's own does not say in the settings that it pays tokens.
        if tokens is not None and (refusal := settings.credit_refusal("that pay single tokens", INSTEAD)):
            problem, fix = refusal
            raise ConfigError(problem, where=f"rewards, step {number + 1}", fix=fix)
        if check:
            check_scores(parts, settings, pays_tokens=tokens is not None)
        if self.world is not None:
            metrics |= self.world.score(rollouts)[1]
        judged = scores.isfinite()
        if not judged.all() and settings.on_failed_reward == "stop":
            raise _not_judged(rollouts, judged, number, metrics)
        baselines, baseline_parts = self._greedy_scores(number, replies)
        clock.mark("score")
        size = settings.group_size
        if self.greedy is not None:  # a reply without its baseline has no advantage
            judged &= baselines.isfinite().repeat_interleave(size)
        several = parts if len(parts) > 1 else {}
        groups = []
        for i in range(len(replies.prompts)):
            mine = [j for j in range(i * size, (i + 1) * size) if judged[j]]
            if mine:
                paid = torch.cat([tokens[j] for j in mine]) if tokens is not None else None
                judgements = {name: values[mine] for name, values in several.items()}
                greedy = {name: float(baseline_parts[name][i]) for name in several if name in baseline_parts}
                own = [rollouts[j] for j in mine]
                groups.append(Group(own, scores[mine], float(baselines[i]), judgements, greedy, paid))
        return groups, metrics | {"rollout/unjudged": Total(int((~judged).sum()))}

    def _greedy_scores(self, number: int, replies: Replies) -> tuple[Tensor, Mapping[str, Tensor]]:
        """[P] the score of the likeliest reply to each prompt, and [P] those of each part; nan and none if the
        advantages do not ask for it."""
        if self.greedy is None:
            return torch.full((len(replies.prompts),), torch.nan), {}
        scores, parts, _ = self.reward.score_parts(replies.greedy)
        if not scores.isfinite().all() and self.settings.on_failed_reward == "stop":
            raise _not_judged(replies.greedy, scores.isfinite(), number, {})
        return scores, parts


@dataclass(frozen=True)
class ShapedRewards:
    """The rewards of a step as the advantages read them."""

    rewards: Tensor
    """[B] combined, whitened or normalised, clipped and less the penalty, in that order."""
    baselines: Tensor
    """[B] of the greedy replies: the same without the penalty."""
    parts: Sequence[tuple[float, Tensor]]
    """The weight and the scores [B] of each reward, normalised if they are combined so; empty if there is only one."""
    metrics: Metrics


def shape_rewards(rollouts: RolloutBatch, settings: OnlineSettings, state: OnlineState) -> ShapedRewards:
    """The rewards of a step, combined and shaped as the settings say.

    The running moments of `state` take in the rewards of this step first.
    """
    shaping, combine = settings.shaping, settings.combine
    rewards, baselines = rollouts.rewards, rollouts.baselines
    weights = {name: r.weight for name, r in zip(part_names(settings.rewards), settings.rewards, strict=True)}
    parts = {name: scores for name, scores in rollouts.parts.items() if name in weights} if len(weights) > 1 else {}
    if combine.normalize != "none":
        if combine.normalize == "running" or not state.part_moments:
            seen = state.part_moments
            state.part_moments = {name: seen.get(name, RunningMoments()).update(x) for name, x in parts.items()}
        unflagged = torch.zeros(len(rewards), dtype=torch.bool)
        parts, greedy = (
            {name: state.part_moments[name].normalise(x[name]) for name in parts}
            for x in (parts, rollouts.baseline_parts)
        )
        rewards, baselines = (combine.total(x, weights, unflagged)[0] for x in (parts, greedy))
    if combine.whiten:
        moments = moments_of(rewards)
        rewards, baselines = moments.normalise(rewards), moments.normalise(baselines)
    if shaping.normalize:
        state.moments = state.moments.update(rewards)
        shift = not shaping.scale_only
        rewards, baselines = (state.moments.normalise(x, shift_mean=shift) for x in (rewards, baselines))
    clipped = torch.zeros(len(rewards), dtype=torch.bool)
    if shaping.clip is not None:
        rewards, clipped = clip(rewards, low=-shaping.clip, high=shaping.clip)
        baselines, _ = clip(baselines, low=-shaping.clip, high=shaping.clip)
    rewards = missing_eos_penalty(rewards, rollouts.finished, shaping.missing_eos_penalty)
    weighted = [(weights[name], scores) for name, scores in parts.items()]
    return ShapedRewards(rewards, baselines, weighted, {"reward/clipped_fraction": mean_of(clipped.tolist())})


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
