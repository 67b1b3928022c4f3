"""One round of sampling: rollouts in groups, judged, with what is to be left out left out and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab import seeds
from trimtab.data.trees import TokenTrees, response_tree
from trimtab.errors import EngineError
from trimtab.math.rewards import clip, missing_eos_penalty
from trimtab.metrics import Mean, Metrics, Total, mean_of, merge
from trimtab.stages.online_parts import Parts
from trimtab.stages.online_watch import Clock
from trimtab.types import Prompt, Rollout


@dataclass(frozen=True)
class Group:
    """The replies to one prompt with their rewards [G] and the greedy reply's, nan where there is none."""

    rollouts: Sequence[Rollout]
    rewards: Tensor
    baseline: float

    @property
    def has_signal(self) -> bool:
        """Whether some reply is better than another."""
        return bool(self.rewards.min() < self.rewards.max())


@dataclass(frozen=True)
class Drawn:
    """What a step trains on: groups of rollouts, B in all."""

    groups: Sequence[Group]
    metrics: Metrics

    @property
    def rollouts(self) -> list[Rollout]:
        return [r for group in self.groups for r in group.rollouts]

    @property
    def rewards(self) -> Tensor:
        """[B]"""
        return torch.cat([group.rewards for group in self.groups])

    @property
    def baselines(self) -> Tensor:
        """[B]"""
        return torch.cat([torch.full_like(group.rewards, group.baseline) for group in self.groups])

    @property
    def group_ids(self) -> Tensor:
        """[B]"""
        sizes = torch.tensor([len(group.rollouts) for group in self.groups])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @property
    def finished(self) -> Tensor:
        """[B] whether a reply ended by itself."""
        return torch.tensor([r.finish_reason == "stop" for r in self.rollouts])


def draw(number: int, parts: Parts, clock: Clock) -> Drawn:
    """The groups of a step. With dynamic sampling, groups without a signal are replaced while rounds are left; what is
    still missing then is filled with them, since a step needs a batch and they do no harm."""
    settings = parts.settings
    max_rounds = settings.dynamic_sampling.max_rounds if settings.dynamic_sampling else 1
    kept: list[Group] = []
    flat: list[Group] = []
    logged: list[Metrics] = []
    for attempt in range(max_rounds):
        groups, metrics = draw_once(number, attempt, settings.prompts_per_step - len(kept), parts, clock)
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
    return Drawn([*kept, *filled], metrics)


def draw_once(number: int, attempt: int, num_prompts: int, parts: Parts, clock: Clock) -> tuple[list[Group], Metrics]:
    """`num_prompts` groups, sampled and judged; fewer where every reply to a prompt could not be judged."""
    settings = parts.settings
    prompts = parts.take_prompts(num_prompts)
    purpose = ("rollouts", number) if attempt == 0 else ("rollouts", number, attempt)
    rollouts = parts.generator.generate(
        prompts, group_size=settings.group_size, seed=seeds.derive(settings.seed, *purpose)
    )
    clock.lap("generate")
    scores, metrics = parts.reward.score(rollouts)
    if parts.world is not None:
        metrics |= parts.world.score(rollouts)[1]
    clock.lap("score")
    judged = scores.isfinite()
    if not judged.all() and settings.on_failed_reward == "stop":
        raise _not_judged(rollouts, judged, number, metrics)
    baselines = greedy_scores(number, prompts, parts)
    clock.lap("generate")
    size = settings.group_size
    groups = []
    for i in range(len(prompts)):
        mine = [j for j in range(i * size, (i + 1) * size) if judged[j]]
        if mine:
            groups.append(Group([rollouts[j] for j in mine], scores[mine], float(baselines[i])))
    return groups, metrics | {"rollout/unjudged": Total(int((~judged).sum()))}


def greedy_scores(number: int, prompts: Sequence[Prompt], parts: Parts) -> Tensor:
    """[P] the score of the likeliest reply to each prompt; nan where the advantages do not ask for it."""
    if parts.greedy is None:
        return torch.full((len(prompts),), torch.nan)
    replies = parts.greedy.generate(prompts, group_size=1, seed=seeds.derive(parts.settings.seed, "greedy", number))
    scores, _ = parts.reward.score(replies)
    if not scores.isfinite().all():
        raise _not_judged(replies, scores.isfinite(), number, {})
    return scores


def shape(drawn: Drawn, parts: Parts) -> tuple[Tensor, Tensor, Metrics]:
    """[B] rewards and [B] baselines, normalised, clipped and penalised, in that order."""
    shaping = parts.settings.shaping
    rewards, baselines = drawn.rewards, drawn.baselines
    if shaping.normalize:
        parts.state.moments = parts.state.moments.update(rewards)
        shift = not shaping.scale_only
        rewards, baselines = (parts.state.moments.normalise(x, shift_mean=shift) for x in (rewards, baselines))
    clipped = torch.zeros(len(rewards), dtype=torch.bool)
    if shaping.clip is not None:
        rewards, clipped = clip(rewards, low=-shaping.clip, high=shaping.clip)
        baselines, _ = clip(baselines, low=-shaping.clip, high=shaping.clip)
    rewards = missing_eos_penalty(rewards, drawn.finished, shaping.missing_eos_penalty)
    return rewards, baselines, {"reward/clipped_fraction": mean_of(clipped.tolist())}


def in_groups(rollouts: Sequence[Rollout], size: int) -> list[list[Rollout]]:
    """The rollouts of each prompt, `size` of each as a generator gives them."""
    return [list(rollouts[i : i + size]) for i in range(0, len(rollouts), size)]


def rollout_trees(groups: Sequence[Sequence[Rollout]]) -> TokenTrees:
    """The rollouts as trees, the prompt of a group once; what was sampled is what is trained on."""
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
