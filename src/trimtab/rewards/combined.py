"""Several rewards as one. Every part is logged by itself, and replies that a part could not judge are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batches.device import CPU
from trimtab.core import registry
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.metrics import Mean, Metrics, Total, mean_of, merge
from trimtab.core.types import Prompt, Rollout
from trimtab.math.combining import Combination, WeightedSum
from trimtab.math.masking import last_index_per_sequence
from trimtab.math.rewards import Deviation, moments_of
from trimtab.rewards.base import Reward, by_reply, token_owners
from trimtab.rewards.model import ModelReward

COST = "cost"
"""The name of the part that is a cost: it is judged beside the others, and no part of the combined reward."""


@dataclass(frozen=True)
class RewardPart:
    """One of the rewards, for example `RewardPart("length", 0.5, Length(max_tokens=200))`."""

    name: str
    weight: float
    reward: Reward
    kind: str = ""
    """The name by which the reward calls its own metrics, if that is not `name`."""

    def named(self, metrics: Metrics) -> Metrics:
        """The reward's own metrics under the name of this part: those of a second length reward, whose `name` is
        "length_2" and whose `kind` is "length", are `reward/length_2_outside`."""
        if self.kind in ("", self.name):
            return metrics
        return {key.replace(f"reward/{self.kind}_", f"reward/{self.name}_", 1): m for key, m in metrics.items()}


@dataclass(frozen=True)
class CombinedReward:
    """The combination of its parts; by default their weighted sum."""

    parts: Sequence[RewardPart]
    combine: Combination = field(default_factory=WeightedSum)

    @property
    def thread_safe(self) -> bool:
        """Whether all parts are; see `Reward`."""
        return all(getattr(part.reward, "thread_safe", False) for part in self.parts)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] combined rewards, nan for a reply that a part could not judge; see `score_parts`. If a part pays single
        tokens, [M]; see `score_tokens`."""
        total, _, metrics, paid = self.score_tokens(rollouts)
        return total if paid is None else paid, metrics

    def score_parts(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, dict[str, Tensor], Metrics]:
        """[B] combined rewards, each part's own scores [B] by name before its weight, and metrics. A score is nan if
        the part could not judge the reply.

        `reward/mean` and `reward/std` are of the combined rewards, before the shaping of online training; with several
        parts, `reward/NAME` is the mean of each. Means are over the replies that were judged, and `reward/NAME_failed`
        counts the others: a score that is not a finite number is no score, and above all not zero.
        """
        return self.score_tokens(rollouts)[:3]

    def score_tokens(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, dict[str, Tensor], Metrics, Tensor | None]:
        """What `score_parts` gives, and [M] what each token that the policy chose is paid: the weighted amounts of the
        parts that pay tokens, and at the last token of each reply what the other parts give. None if no part pays
        tokens; a cost never does."""
        paid: Tensor | None = None
        by_name: dict[str, Tensor] = {}
        logged: list[Metrics] = []
        for part in self.parts:
            given, metrics = part.reward.score(rollouts)
            scores = by_reply(given, rollouts)
            if scores is not given and part.name != COST:
                paid = part.weight * given if paid is None else paid + part.weight * given
            judged = scores.isfinite()
            by_name[part.name] = scores.float().masked_fill(~judged, torch.nan)
            logged.append(part.named(metrics) | {f"reward/{part.name}_failed": Total(int((~judged).sum()))})
            if len(self.parts) > 1:
                logged.append({f"reward/{part.name}": mean_of(scores[judged].tolist())})
        rewarded = {name: scores for name, scores in by_name.items() if name != COST}
        weights = {part.name: part.weight for part in self.parts}
        total, combined = self.combine.total(rewarded, weights, self._flagged(rollouts))
        logged.append(combined)
        if COST in by_name:
            total = total.masked_fill(by_name[COST].isnan(), torch.nan)
        known = total[total.isfinite()].double()
        metrics = merge(logged) | {
            "reward/mean": Mean(float(known.sum()), len(known)),
            "reward/std": Deviation(moments_of(known)),
        }
        if paid is not None:
            last = last_index_per_sequence(token_owners(rollouts), len(rollouts))
            paid = paid.index_add(0, last, total - by_reply(paid, rollouts))
        return total, by_name, metrics, paid

    def _flagged(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[B] whether the prompt has the flag that the combination reads."""
        name = self.combine.flag
        return torch.tensor([name is not None and is_flagged(r.prompt, name) for r in rollouts], dtype=torch.bool)


def load_rewards(
    rewards: Sequence[Any],
    *,
    token_budget: int,
    combine: Combination | None = None,
    cost: Any = None,
    device: torch.device = CPU,
    shared: PreTrainedModel | None = None,
    base: str = "",
) -> CombinedReward:
    """The rewards of a run file, with their models on a device; a repeated name gets a number, such as `length_2`. A
    reward model that is an adapter of the `shared` base becomes another adapter on it. `cost` is a further reward,
    whose scores are kept apart under the name "cost"."""
    named = [*zip(part_names(rewards), rewards, strict=True), *([(COST, cost)] if cost is not None else [])]
    parts = []
    for name, reward in named:
        # A reward that is no model has no device and no base, and is not told its name.
        is_model = isinstance(reward, ModelReward)
        place = {"device": device, "name": name, "shared": shared, "base": base}
        scorer = reward.load(token_budget=token_budget, **(place if is_model else {}))
        kind = "" if is_model else registry.name_of("reward", type(reward))
        parts.append(RewardPart(name, reward.weight, scorer, kind))
    return CombinedReward(parts, combine or WeightedSum())


def judges(settings: Any) -> dict[str, Any]:
    """Every reward that the settings of a stage name, by its key path: "rewards.0", "teacher.0" of the reward stage,
    and "cost.reward" of a limit."""
    cost = getattr(settings, "cost", None)
    lists = {key: getattr(settings, key, ()) for key in ("rewards", "teacher")}
    rewards = {f"{key}.{number}": reward for key, own in lists.items() for number, reward in enumerate(own)}
    return rewards | ({"cost.reward": cost.reward} if cost is not None else {})


def judges_and_measure(settings: Any) -> dict[str, Any]:
    """The rewards that `judges` gives, and those that a guard measures by: "guard.measure.0"."""
    guard = getattr(settings, "guard", None)
    measure = guard.measure if guard is not None else ()
    return judges(settings) | {f"guard.measure.{number}": reward for number, reward in enumerate(measure)}


def refuse_missing_facts(
    rewards: Mapping[str, Any], prompts: Sequence[Prompt], *, where: str, droppable: bool = False
) -> None:
    """Raises DataError if prompts lack a fact that a reward, given by its key path, compares with. `droppable` says
    whether the stage has `on_failed_reward`."""
    drop = "; on_failed_reward = 'drop' leaves out the replies to them" if droppable else ""
    for key, reward in rewards.items():
        fact = getattr(reward, "fact", None)
        lacking = [p for p in prompts if p.facts.get(fact) in (None, "")] if isinstance(fact, str) else []
        if lacking:
            raise DataError(
                f"{len(lacking)} of {len(prompts)} prompts have no fact {fact!r} that {key} compares with; "
                f"the first is {lacking[0].text[:60]!r}",
                where=where,
                fix=f"give each its fact, or remove them{drop}",
            )


_YES = frozenset({"true", "yes", "y"})
_NO = frozenset({"false", "no", "n", "", "none", "null"})


def is_flagged(prompt: Prompt, name: str) -> bool:
    """Whether the prompt's fact `name` is true, also if it is written as text, such as "no" or "0" in a table. A prompt
    without it is not flagged. Raises DataError if it can not be read as yes or no."""
    value = prompt.facts.get(name)
    word = "" if value is None else str(value).strip().lower()
    if word in _YES or word in _NO:
        return word in _YES
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise DataError(
            f"the flag {name!r} is {value!r:.60}, which is neither yes nor no",
            where=f"the prompt {prompt.text[:60]!r}",
            fix="write true or false, yes or no, 1 or 0; a prompt without the flag is not flagged",
        )
    return number != 0


def refuse_unread_flags(combine: Combination, prompts: Sequence[Prompt], *, where: str, needed: bool = True) -> None:
    """Raises DataError if a flag can not be read, or, where it is `needed`, if no prompt has the fact that it is."""
    if combine.flag is None:
        return
    for prompt in prompts:
        is_flagged(prompt, combine.flag)
    if needed and not any(combine.flag in prompt.facts for prompt in prompts):
        raise DataError(
            f"none of {len(prompts)} prompts has the fact {combine.flag!r}, the flag that combine reads",
            where=where,
            fix="add a column of that name to the prompts' file, or leave combine.flag out",
        )


SCALES_APART = 100.0
"""Rewards whose deviations, times their weights, differ by more than this factor are not added up without a word."""


def scales_apart(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> str:
    """What is wrong with a sum of rewards of which one hardly counts, from the scores [B] and the weight of each by its
    name; "" if all count. A reward that is the same for all replies says nothing of its scale yet."""
    spreads = {}
    for name, weight in weights.items():
        scores = parts[name][parts[name].isfinite()].double()
        if len(scores) and (spread := abs(weight) * float(scores.std(correction=0))) > 0:
            spreads[name] = spread
    if not spreads or max(spreads.values()) <= SCALES_APART * min(spreads.values()):
        return ""
    small, large = min(spreads, key=spreads.__getitem__), max(spreads, key=spreads.__getitem__)
    return (
        f"with its weight, the reward {large} varies {spreads[large] / spreads[small]:.3g} times as much as {small} "
        f"(deviations {spreads[large]:.3g} and {spreads[small]:.3g}), which hardly counts"
    )


def part_names(rewards: Sequence[Any]) -> list[str]:
    """The names of rewards in metrics: that of the run file, with a number from the second of a name on."""
    seen: dict[str, int] = {}
    names = []
    for reward in rewards:
        name = registry.name_of("reward", type(reward))
        if name == COST:
            raise ConfigError(
                f"a reward is registered under the name {COST!r}, which is that of a limited cost",
                where=f"rewards, {type(reward).__qualname__}",
                fix="register it under another name",
            )
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
