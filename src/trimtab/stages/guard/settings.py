"""Settings of the guard: the table [guard] of a run file, as each stage has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from trimtab.core.config import Choice
from trimtab.engines.local.sampler import Sampling
from trimtab.stages.guard.independence import refuse_empty_measure
from trimtab.stages.stage import FEW_STEPS

LEAST_FOR_ACTIONS = 8
"""With fewer prompts than this, replies that happen to fall alike are not rare enough to act on."""
GuardAction = Literal["raise_kl", "roll_back", "stop"]


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What a guard asks, how often, and what it may do about the answer. Without `actions` it only watches."""

    measure: Annotated[tuple[Any, ...], Choice("reward")]
    """The independent measure that decides: rewards as in the table [[rewards]] of online training, added up with their
    weights; for example { name = "gold", world = "helpdesk" }, or a reward model that was trained on other votes."""
    prompts: str | None
    """The prompts of all checks: a file, a hub id or a world."""
    num_prompts: int = 64
    """How many of them."""
    replies_per_prompt: int = 1
    """Replies to each prompt in a check."""
    every: int = 10
    """Steps between checks. There is also one before the first step, and one after the last."""
    measure_every: int = 1
    """Every how many checks the measure is asked without a reason. In the checks between, only a cheap signal that
    newly fires has it asked."""
    alpha: float = 0.05
    """The probability of acting on any fall in a whole run that has none, at most."""
    margin: float = 0.0
    """A fall has to be larger than this to count, in the unit of the measure."""
    actions: tuple[GuardAction, ...] = ()
    """What is done, one after the other, each time a fall is found to be real: "roll_back" goes on from the best
    checkpoint so far, "stop" ends the run, and in online training "raise_kl" multiplies the KL coefficient by kl_factor
    (and takes that back when the measure reaches a new best). An entry may be repeated."""
    patience: int = 2
    """After an action, the measure is asked this often before the next action may be taken."""
    kl_budget: float | None = None
    """End the run when the mean KL of a reply to the reference is above this in a check, in nats; None does not."""
    writes: Literal["last", "best"] = "last"
    """The model that the finished run writes: that of its last step, or the one that decision.json names."""

    def __post_init__(self) -> None:
        refuse_empty_measure(self.measure)
        if self.num_prompts < self.least_prompts:
            raise ValueError(f"num_prompts = {self.num_prompts} with actions; a test of a fall needs at least 8")
        if "stop" in self.actions[:-1]:
            raise ValueError(f"actions = {list(self.actions)}: nothing comes after 'stop'; make it the last one")

    @property
    def least_prompts(self) -> int:
        """How many different prompts there have to be: for an interval, and for a test that is acted on."""
        return LEAST_FOR_ACTIONS if self.actions else 2

    def num_checks(self, num_steps: int) -> int:
        """The number of checks in a run of so many steps: before the first, every `every`, and after the last."""
        return 1 + math.ceil(num_steps / self.every)


@dataclass(frozen=True, kw_only=True)
class OnlineGuardSettings(GuardSettings):
    """The guard of online training, which draws replies as training does."""

    prompts: str | None = None
    """The prompts of all checks: a file, a hub id or a world. None holds num_prompts of the run's own prompts out of
    training."""
    kl_factor: float = 2.0
    """What "raise_kl" multiplies the KL coefficient by."""
    kl_floor: float = 0.02
    """What "raise_kl" raises the KL coefficient to at least, for runs that begin with a smaller one or with 0."""


@dataclass(frozen=True, kw_only=True)
class PreferenceGuardSettings(GuardSettings):
    """The guard of preference training. A step there is a single update that draws nothing, so checks are rarer, and
    say themselves how replies are drawn."""

    prompts: str
    """The prompts of all checks, which are not trained on: a file, a hub id or a world."""
    every: int = 50
    """Steps between checks. There is also one before the first step, and one after the last."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256))
    """How the replies of checks are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "raise_kl" in self.actions:
            raise ValueError(
                f"actions = {list(self.actions)}: 'raise_kl' has nothing to raise here, since losses on preferences "
                "pay no KL. The beta of most of them scales an implied reward: on pairs with one verdict a larger one "
                "only lets the loss be satisfied sooner, and pulls nothing back that has gone too far; use "
                "'roll_back' or 'stop', and set a larger loss.beta from the start"
            )
        if self.sampling.temperature != 1.0:
            raise ValueError(
                f"sampling.temperature = {self.sampling.temperature}: preference training, and the KL of a check, are "
                "about the policy at temperature 1; leave it out"
            )


def rehearsed(table: Mapping[str, Any]) -> dict[str, Any]:
    """The guard of a table of settings as a rehearsal of a few steps has it, by its key: a check before the first step
    and one after the last, and no action. Empty if there is no guard."""
    guard = table.get("guard")
    return {"guard": {**guard, "every": FEW_STEPS, "actions": []}} if isinstance(guard, Mapping) else {}
