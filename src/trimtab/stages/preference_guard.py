"""The guard of a preference run. The losses of the DPO family overoptimise too (Rafailov et al., arXiv:2406.02900):
held-out accuracy goes on rising while the replies become worse, and nothing that training computes draws a reply.

The check is that of online training (`stages/guard`), and so are the decision and its record. A step here is one
update, so a check costs several steps; it needs a reference that stays as it was, which a run without a guard does not
keep in memory if the policy starts as its own reference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.types import Prompt, prompt_id
from trimtab.data.chat import Chat
from trimtab.data.pairs import Comparisons, Judgements
from trimtab.data.tokens import hash_of
from trimtab.engines.base import Learner, Sampler
from trimtab.engines.build import Engines
from trimtab.models.roles import Policy
from trimtab.runs.run import Run
from trimtab.stages.guard.measuring import PolicyCheck, load_measure
from trimtab.stages.guard.prompts import GuardPrompts, check_prompts, read_checks
from trimtab.stages.guard.settings import PreferenceGuardSettings
from trimtab.stages.guard.state import GuardState
from trimtab.stages.guard.watch import RunGuard
from trimtab.stages.reward_positions import refuse_short_reward_models


@dataclass
class GuardedLearner:
    """A learner and what its guard has seen, as the state of one run."""

    learner: Learner
    guard: GuardState | None = None

    @property
    def form(self) -> str:
        """How the model computes a batch."""
        return self.learner.form

    def save(self, path: Path) -> None:
        """Writes the state into the directory `path`."""
        self.learner.save(path)
        assert self.guard is not None
        (path / "state.json").write_text(json.dumps({"guard": self.guard.plain()}), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Restores what `save` wrote."""
        self.load_models(path)
        self.guard = GuardState.of(json.loads((path / "state.json").read_text(encoding="utf-8"))["guard"])

    def load_models(self, path: Path) -> None:
        """Restores of it the weights and the optimizer."""
        self.learner.load(path)


def guard_prompts(
    guard: PreferenceGuardSettings, train: Comparisons | Judgements, run: Run, chat: Chat
) -> GuardPrompts:
    """The prompts of checks. Raises DataError if they are too few, or lack a fact that the measure compares with."""
    chosen = read_checks(guard, guard.prompts, run, chat, longest=guard.sampling.max_prompt_tokens)
    trained = np.unique(train.groups.column("messages_hash"))

    def is_trained(prompt: Prompt) -> bool:
        return bool(np.isin(np.uint64(hash_of(prompt_id(prompt.messages))), trained))

    return check_prompts(guard, chosen, where=guard.prompts, is_trained=is_trained)


def make_sampler(
    settings: Any, run: Run, policy: Policy, chat: Chat, prompts: GuardPrompts, engines: Engines
) -> Sampler:
    """The sampler of checks. It is made before the learner, which may spread the weights over processes: its form is
    chosen while the policy has all of them. Raises an error with its fix if the longest prompt leaves no room for a
    reply."""
    sampler = engines.sampler(policy, chat, settings.guard.sampling)
    run.note_path("sampler", sampler.sampler)
    sampler.check_prompts(prompts.checks)
    return sampler


def make_guard(
    settings: Any,
    run: Run,
    state: GuardedLearner,
    prompts: GuardPrompts,
    sampler: Sampler,
    engines: Engines,
    chat: Chat,
    *,
    reference: Policy,
    num_steps: int,
) -> RunGuard:
    """The guard of a run with these settings, whose `guard` is not None. Raises an error with its fix if a reply could
    be longer than a model of the measure can read."""
    guard: PreferenceGuardSettings = settings.guard
    measure = load_measure(settings)
    refuse_short_reward_models([measure], prompts.checks, chat, max_new_tokens=guard.sampling.max_new_tokens)
    how: dict[str, Any] = {"token_budget": settings.token_budget, "precision": settings.precision}
    check = PolicyCheck(
        prompts=prompts.checks,
        replies_per_prompt=guard.replies_per_prompt,
        seed=settings.seed,
        sampler=sampler,
        policy=state.learner,
        reference=engines.scorer(reference, name="reference", **how),
        reward=None,
        measure=measure,
    )
    return RunGuard(guard, run, state, check, num_trained_on=prompts.num_trained_on, num_steps=num_steps)
