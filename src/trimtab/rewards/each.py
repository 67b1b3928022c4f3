"""Scores replies one at a time. A reply that cannot be judged gets nan, which `CombinedReward` counts, and the log says
why."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from trimtab.core import registry
from trimtab.core.errors import DataError, TrimtabError
from trimtab.core.metrics import Metrics, mean_of
from trimtab.core.types import JsonDict, Prompt, Rollout
from trimtab.math.rewards import Deviation, moments_of
from trimtab.rewards.helper import Helper

_log = logging.getLogger("trimtab.rewards")


@dataclass(frozen=True)
class Score:
    """The reward of one reply, and amounts to log as `reward/NAME_PART`."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


def score_each(
    name: str, rollouts: Sequence[Rollout], judge: Callable[[Rollout], Score], *, num_parallel: int = 1
) -> tuple[Tensor, Metrics]:
    """[B] scores, nan for each reply for which `judge` raises or gives a number that is not finite. The log says how
    many these are, and the reason of the first one. The parts are means over the replies that were judged.

    `judge` runs in up to `num_parallel` threads.
    """

    def attempt(rollout: Rollout) -> Score | str:
        try:
            score = judge(rollout)
        except Exception as error:  # foreign code may raise anything; here this means that there is no score
            return error.problem if isinstance(error, TrimtabError) else f"{type(error).__name__}: {error}"
        # 1e300 is finite in Python, and infinite among the rewards
        fits = math.isfinite(score.value) and abs(score.value) <= torch.finfo(torch.float32).max
        return score if fits else f"the score is {score.value}, which is no finite number of 32 bits"

    if num_parallel > 1:
        with ThreadPoolExecutor(num_parallel) as pool:
            found = list(pool.map(attempt, rollouts))
    else:
        found = [attempt(rollout) for rollout in rollouts]
    reasons = [(r, why) for r, why in zip(rollouts, found, strict=True) if isinstance(why, str)]
    if reasons:
        first, why = reasons[0]
        _log.warning(
            "reward %s could not judge %d of %d replies; the first, to prompt %s: %s",
            name,
            len(reasons),
            len(rollouts),
            first.prompt.id,
            why,
        )
    judged = [score for score in found if isinstance(score, Score)]
    metrics: Metrics = {}
    for part in dict.fromkeys(p for score in judged for p in score.parts):
        metrics[f"reward/{name}_{part}"] = mean_of(s.parts[part] for s in judged if part in s.parts)
    values = [score.value if isinstance(score, Score) else math.nan for score in found]
    return torch.tensor(values, dtype=torch.float32), metrics | moments(values)


class EachReply(ABC):
    """A reward that judges every reply by itself, in any thread, as `_judge` says. Its settings are its scorer."""

    thread_safe: ClassVar[bool] = True

    def load(self, *, token_budget: int) -> Self:
        """The reward itself; nothing needs loading."""
        return self

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] the scores of the replies; see `score_each`."""
        return score_each(registry.name_of("reward", type(self)), rollouts, self._judge)

    @abstractmethod
    def _judge(self, rollout: Rollout) -> Score:
        """The score of one reply. What it raises says why there is none."""


class HelpedReply(EachReply):
    """A reward that judges every reply by itself, and has a process of its own for judgements that may take for
    ever."""

    seconds: float
    """Processor time for one judgement."""

    @cached_property
    def helper(self) -> Helper:
        """The process; it starts with the first question."""
        return Helper(seconds=self.seconds)


def moments(values: Sequence[float]) -> Metrics:
    """`reward/mean` and `reward/std` of the values that are finite."""
    known = [v for v in values if math.isfinite(v)]
    return {
        "reward/mean": mean_of(known),
        "reward/std": Deviation(moments_of(torch.tensor(known, dtype=torch.float64))),
    }


def fact(prompt: Prompt, name: str) -> object:
    """The prompt's fact `name`. Raises a DataError that names the facts that the prompt has."""
    facts: Mapping[str, object] | JsonDict = prompt.facts
    if name not in facts:
        raise DataError(
            f"the prompt has no fact {name!r}, only {', '.join(sorted(facts)) or 'none at all'}",
            where=f"prompt {prompt.id}",
            fix="add a column of that name to the prompts' file, or name the right fact in the reward's settings",
        )
    return facts[name]
