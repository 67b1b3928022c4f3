"""The state that one step of online training leaves to the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.core.types import Prompt
from trimtab.engines.base import Learner
from trimtab.math.constraints import Multiplier
from trimtab.math.rewards import RunningMoments
from trimtab.stages.guard.state import GuardState
from trimtab.stages.online.draws import Draw, load_draws, save_draws
from trimtab.stages.supervised import Epochs


@dataclass
class OnlineState:
    """Learners, KL coefficient, running reward moments, the multiplier of a limited cost, place in the prompts and
    rollouts that were drawn ahead: a run goes on from it bit for bit."""

    learners: Sequence[Learner]
    prompts: Sequence[Prompt]
    seed: int
    kl_coef: float
    moments: RunningMoments = field(default_factory=RunningMoments)
    part_moments: dict[str, RunningMoments] = field(default_factory=dict)
    """Of each reward by name, if rewards are normalised before they are combined."""
    multiplier: Multiplier | None = None
    """That of the limit on a cost; None without one."""
    num_prompts_taken: int = 0
    drawn: list[Draw] = field(default_factory=list)
    """The rollouts of the steps to come, as far as they are drawn and judged; see `RolloutQueue`."""
    guard: GuardState | None = None
    """What the guard has seen and done; None without one."""

    def take_prompts(self, num: int) -> list[Prompt]:
        """The next prompts: every prompt once before any comes again, each pass in an order of its own."""
        start = self.num_prompts_taken
        self.num_prompts_taken += num
        return [self.prompts[i] for i in endless(len(self.prompts), 1, self.seed).take(start, start + num)]

    def save(self, path: Path) -> None:
        """Writes the state into the directory `path`."""
        for learner in self.learners:
            learner.save(path)
        numbers: dict[str, Any] = {
            "kl_coef": self.kl_coef,
            "moments": self.moments.state(),
            "num_prompts_taken": self.num_prompts_taken,
        }
        if self.part_moments:
            numbers["part_moments"] = {name: moments.state() for name, moments in self.part_moments.items()}
        if self.multiplier is not None:
            numbers["multiplier"] = self.multiplier.state()
        if self.drawn:
            numbers["drawn"] = save_draws(self.drawn, path)
        if self.guard is not None:
            numbers["guard"] = self.guard.plain()
        (path / "state.json").write_text(json.dumps(numbers), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Restores what `save` wrote."""
        numbers = self.load_models(path)
        self.kl_coef = numbers["kl_coef"]
        self.num_prompts_taken = numbers["num_prompts_taken"]
        self.drawn = load_draws(numbers.get("drawn", []), path)
        if self.guard is not None:
            self.guard = GuardState.of(numbers["guard"])

    def load_models(self, path: Path) -> dict[str, Any]:
        """Restores of what `save` wrote the learners with what was measured of their replies, the moments of the reward
        and the multiplier with its costs; and returns the numbers beside them."""
        for learner in self.learners:
            learner.load(path)
        numbers: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self.moments = RunningMoments(**numbers["moments"])
        self.part_moments = {name: RunningMoments(**m) for name, m in numbers.get("part_moments", {}).items()}
        if "multiplier" in numbers:
            self.multiplier = Multiplier(**numbers["multiplier"])
        return numbers


def endless(num_examples: int, batch_size: int, seed: int) -> Epochs:
    """Endless passes over examples, each in an order of its own."""
    return Epochs(num_examples=num_examples, batch_size=batch_size, num_epochs=1e9, seed=seed)
