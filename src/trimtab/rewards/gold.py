"""A world's own score as a reward: for upper bounds, and for telling a weak policy from a weak reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.core.metrics import Metrics, mean_of
from trimtab.core.registry import register
from trimtab.core.types import Prompt, Rollout


@register("reward", "gold")
@dataclass(frozen=True, kw_only=True)
class GoldReward:
    """The gold score of a world, or one of its parts."""

    world: str
    """Name of the world that the prompts come from."""
    part: str | None = None
    """The part that is the reward, such as "harm" of helpdesk_harm; None is the whole score."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.part is None:
            return
        world = worlds.load(self.world)
        parts = world.gold(world.draw_prompt(Random(0)), "").parts
        if self.part not in parts:
            raise ValueError(f"part = {self.part!r}, and the gold score of {self.world} has {', '.join(parts)}")

    def load(self, *, token_budget: int) -> GoldScorer:
        """The scorer itself; nothing needs loading."""
        return GoldScorer(worlds.load(self.world), self.part)


class GoldScorer:
    """Scores rollouts, or plain replies, by the world's program, which reads facts and text alone."""

    thread_safe = True

    def __init__(self, world: worlds.World, part: str | None = None) -> None:
        self.world = world
        self._part = part

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] gold scores in [0, 1], or those of the part; the means of the whole score and of each named part."""
        golds = [self.gold(r.prompt, r.response) for r in rollouts]
        metrics: Metrics = {"gold/mean": mean_of(g.total for g in golds)}
        for part in golds[0].parts if golds else ():
            metrics[f"gold/{part}"] = mean_of(g.parts[part] for g in golds if part in g.parts)
        values = [g.total if self._part is None else g.parts[self._part] for g in golds]
        return torch.tensor(values, dtype=torch.float32), metrics

    def gold(self, prompt: Prompt, response: str) -> worlds.Gold:
        """The gold of one reply. Raises DataError, with the name of the fact, if the prompt is not of this world."""
        try:
            return self.world.gold(prompt, response)
        except KeyError as error:
            raise DataError(
                f"a prompt has no fact named {error}, which the gold score of this world needs",
                where=f"the prompt {prompt.messages[-1].content[:60]!r}",
                fix="use prompts of the same world, such as world:NAME?num=100, or leave the world out",
            ) from error
