"""The guard of an online run: it can raise the KL coefficient too, and leaves no draw in flight.

Whatever the guard rolls back, the KL coefficient stays as it has raised it. The running moments of the reward and the
multiplier of a limited cost belong to the weights and go back with them.
"""

from __future__ import annotations

from typing import Any

from trimtab.engines.base import Scorer
from trimtab.evals.checkpoint_choice import MeasuredCheckpoint
from trimtab.rewards.base import Reward
from trimtab.runs.run import Run
from trimtab.stages.guard.measuring import CheckReplies, PolicyCheck
from trimtab.stages.guard.prompts import GuardPrompts
from trimtab.stages.guard.settings import GuardAction, OnlineGuardSettings
from trimtab.stages.guard.watch import RunGuard
from trimtab.stages.online.rollout_queue import RolloutQueue
from trimtab.stages.online.sampling import RolloutSource
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState


class OnlineGuard(RunGuard):
    """The guard of a run whose rollouts come from a queue, with a KL coefficient in its state."""

    settings: OnlineGuardSettings
    state: OnlineState

    def __init__(
        self,
        settings: OnlineGuardSettings,
        run: Run,
        state: OnlineState,
        policy_check: PolicyCheck,
        *,
        queue: RolloutQueue,
        num_trained_on: int,
        num_steps: int,
    ) -> None:
        super().__init__(settings, run, state, policy_check, num_trained_on=num_trained_on, num_steps=num_steps)
        self.queue = queue

    def replies(self, step: int) -> CheckReplies:
        """The replies of the policy as it is now. What is drawn ahead is finished first: a sampler draws for one at a
        time."""
        self.queue.finish()
        return super().replies(step)

    def act(self, action: GuardAction, step: int, why: str) -> list[dict[str, Any]]:
        """Takes an action after `step`, and returns it as rows of the record."""
        if action == "raise_kl":
            state, settings = self.state, self.settings
            before = state.kl_coef
            self.seen.lower_coefs.append(before)
            state.kl_coef = max(before * settings.kl_factor, settings.kl_floor)
            why = f"{why}; kl_coef {before:.4g} → {state.kl_coef:.4g}"
            return [{"event": action, "why": why, "kl_coef": state.kl_coef}]
        rows = super().act(action, step, why)
        if action == "roll_back":
            self.queue.drop_drawn()
        return rows

    def at_new_best(self, now: MeasuredCheckpoint) -> list[dict[str, Any]]:
        """Takes back the last rise of the KL coefficient, if there is one left."""
        if not self.seen.lower_coefs:
            return []
        state = self.state
        state.kl_coef, before = self.seen.lower_coefs.pop(), state.kl_coef
        why = f"the measure has a new best, {now.estimate}; kl_coef {before:.4g} → {state.kl_coef:.4g}"
        return [{"event": "lower_kl", "why": why, "kl_coef": state.kl_coef}]


def make_guard(
    settings: OnlineSettings,
    run: Run,
    state: OnlineState,
    queue: RolloutQueue,
    source: RolloutSource,
    prompts: GuardPrompts,
    measure: Reward,
    *,
    policy: Scorer,
    reference: Scorer,
) -> OnlineGuard | None:
    """The guard that the settings ask for; None without one. It draws and judges as the source of the run's rollouts
    does, and what it has seen becomes part of the state."""
    guard = settings.guard
    if guard is None:
        return None
    check = PolicyCheck(
        prompts=prompts.checks,
        replies_per_prompt=guard.replies_per_prompt,
        seed=settings.seed,
        sampler=source.sampler,
        policy=policy,
        reference=reference,
        reward=source.reward,
        measure=measure,
    )
    return OnlineGuard(
        guard, run, state, check, queue=queue, num_trained_on=prompts.num_trained_on, num_steps=settings.num_steps
    )
