"""What the online loop works with, found and loaded before the first step."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import worlds
from trimtab.data.chat import Chat
from trimtab.data.pairs import group
from trimtab.data.tokens import Lazy
from trimtab.data.trees import TokenTrees, Tree, TreeBatch, per
from trimtab.engines.episodes import EpisodeGenerator
from trimtab.engines.form_choice import choose_form
from trimtab.engines.local_generator import LocalGenerator, Sampling
from trimtab.engines.local_learner import LocalLearner
from trimtab.errors import ConfigError, DataError
from trimtab.math.advantages import Estimator
from trimtab.math.losses.policy import EntropyBonus, KLPenalty
from trimtab.math.losses.sft import SFTLoss
from trimtab.math.rewards import RunningMoments
from trimtab.models.lengths import refuse_long
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import Policy, ScalarModel
from trimtab.protocols import Generator, Learner, Loss
from trimtab.rewards.combined import CombinedReward
from trimtab.rewards.gold import GoldScorer
from trimtab.runs.run import Run
from trimtab.stages.online_models import load_models
from trimtab.stages.online_settings import Settings
from trimtab.stages.reading import prepare_data, read
from trimtab.stages.sft import FEW, say_lost
from trimtab.stages.supervised import Epochs
from trimtab.types import Demonstration, Prompt


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(TreeBatch):
    """Rollouts with everything the losses read, complete before the first update; all [M]."""

    old_logprobs: Tensor = per("token")
    correction: Tensor = per("token")
    ref_logprobs: Tensor = per("token")
    old_values: Tensor = per("token")
    advantages: Tensor = per("token")
    returns: Tensor = per("token")


@dataclass
class OnlineState:
    """What a run needs to go on bit for bit: learners, KL coefficient, running reward moments and place in the data."""

    learners: Sequence[LocalLearner]
    kl_coef: float
    moments: RunningMoments
    num_prompts_taken: int = 0

    def save(self, path: Path) -> None:
        """Write the state into the directory `path`."""
        for learner in self.learners:
            learner.save(path)
        numbers = {
            "kl_coef": self.kl_coef,
            "moments": self.moments.state(),
            "num_prompts_taken": self.num_prompts_taken,
        }
        (path / "state.json").write_text(json.dumps(numbers), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        for learner in self.learners:
            learner.load(path)
        numbers = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self.kl_coef = numbers["kl_coef"]
        self.moments = RunningMoments(**numbers["moments"])
        self.num_prompts_taken = numbers["num_prompts_taken"]


@dataclass(frozen=True)
class Parts:
    """Everything `train_step` names."""

    settings: Settings
    chat: Chat
    prompts: Sequence[Prompt]
    generator: Generator
    greedy: Generator | None
    """For advantages that compare with the likeliest reply."""
    reward: CombinedReward
    advantage: Estimator
    policy: Policy
    reference: Policy
    critic: Policy | ScalarModel | None
    policy_learner: LocalLearner
    critic_learner: LocalLearner | None
    mixed: Sequence[Tree]
    """The demonstrations of the pretraining mix."""
    world: GoldScorer | None
    state: OnlineState
    base: str
    """What the policy's adapter, if it is one, belongs to."""
    counts: dict[str, int]
    """Prompts read, and those dropped because they are too long."""

    def take_prompts(self, num: int) -> list[Prompt]:
        """The next prompts: every prompt once before any comes again, each pass in an order of its own."""
        start = self.state.num_prompts_taken
        self.state.num_prompts_taken += num
        return [self.prompts[i] for i in self._passes(len(self.prompts), 1).take(start, start + num)]

    def losses_at(self, number: int) -> list[tuple[Learner, list[Loss]]]:
        """Who learns from a minibatch of this step, and by which losses."""
        settings = self.settings
        averaged: Any = {"aggregation": settings.loss.aggregation, "length": settings.loss.length}
        policy: list[Loss] = [settings.loss]
        if settings.entropy_coef:
            policy.append(EntropyBonus(coef=settings.entropy_coef, **averaged))
        if settings.kl_in == "loss":
            estimator: Any = settings.kl_estimator or "k3"  # the settings let only k2 and k3 into the loss
            policy.append(KLPenalty(coef=self.state.kl_coef, estimator=estimator, **averaged))
        if self.critic is None:
            return [(self.policy_learner, policy)]
        if self.critic_learner is None:
            return [(self.policy_learner, [*policy, settings.critic.loss])]
        critic: tuple[Learner, list[Loss]] = (self.critic_learner, [settings.critic.loss])
        if number < settings.critic.warmup_steps:
            return [critic]
        return [(self.policy_learner, policy), critic]

    def pretraining_mix(
        self, learner: Learner, number: int, epoch: int, index: int
    ) -> list[tuple[TreeBatch, list[Loss]]]:
        """The demonstrations mixed into this update of the policy, or nothing."""
        mix = self.settings.pretraining_mix
        if mix is None or learner is not self.policy_learner:
            return []
        update = (number * self.settings.num_epochs + epoch) * self.settings.num_minibatches + index
        chosen = self._passes(len(self.mixed), mix.batch_size).examples(update)
        trees = TokenTrees.build([self.mixed[i] for i in chosen])
        return [(TreeBatch(trees=trees), [SFTLoss(coef=mix.coef)])]

    def _passes(self, num_examples: int, batch_size: int) -> Epochs:
        return Epochs(num_examples=num_examples, batch_size=batch_size, num_epochs=1e9, seed=self.settings.seed)


def read_mix(settings: Settings, chat: Chat, run: Run, counts: dict[str, int]) -> Sequence[Tree]:
    """The demonstrations of the pretraining mix, fitted; what was dropped or truncated is counted.

    Raises DataError when none is left."""
    mix = settings.pretraining_mix
    if mix is None:
        return ()
    prepared = prepare_data(Demonstration, mix.data, run, chat, on_bad_row=settings.on_bad_row, by_prompt=False)
    found: dict[str, int] = {"records": len(prepared.table)}
    groups = group(
        prepared.table,
        chat,
        max_tokens=mix.max_tokens,
        on_too_long="truncate_prompt_left",
        counts=found,
        alone=True,
    )
    say_lost(found, mix)
    counts |= {f"mix_{name}": num for name, num in found.items() if name != "records"}
    if not len(groups):
        raise DataError(
            f"none of {len(prepared.table)} demonstrations has at most max_tokens = {mix.max_tokens} tokens",
            where=f"pretraining_mix, {mix.data}",
            fix="raise pretraining_mix.max_tokens, or give shorter demonstrations",
        )
    return Lazy(len(groups), lambda i: groups.tree(i)[0])


def build_parts(settings: Settings, run: Run) -> Parts:
    """Loads models and data. Raises an error that teaches for whatever cannot be used."""
    chat = Chat(load_tokenizer(settings.model))
    options: dict[str, Any] = {"on_bad_row": settings.on_bad_row, "accepts": chat.refusal}
    loaded = read(Prompt, settings.prompts, run, limit=settings.limit, **options)
    prompts = [p for p in loaded.records if len(chat.encode_prompt(p.messages)) <= settings.sampling.max_prompt_tokens]
    if not prompts:
        raise DataError(
            f"none of {len(loaded.records)} prompts has at most {settings.sampling.max_prompt_tokens} tokens",
            where=settings.prompts,
            fix="raise sampling.max_prompt_tokens",
        )
    if len(prompts) < settings.prompts_per_step:
        raise ConfigError(
            f"prompts_per_step = {settings.prompts_per_step} of {len(prompts)} prompts: a step would hold some twice",
            where=f"prompts_per_step and {settings.prompts}",
            fix="give more prompts, or lower prompts_per_step",
        )
    counts = dict(loaded.counts) | {"dropped_long_prompts": len(loaded.records) - len(prompts)}
    if (num := counts["dropped_long_prompts"]) > FEW:
        longest = settings.sampling.max_prompt_tokens
        note = f"note: {num:,} of {len(loaded.records):,} prompts are left out: they are longer than"
        print(f"{note} sampling.max_prompt_tokens = {longest}", file=sys.stderr)
    mixed = read_mix(settings, chat, run, counts)
    models, advantage = load_models(settings, chat), settings.advantage
    policy, critic = models.policy, models.critic
    fix = "set pretraining_mix.max_tokens = LIMIT, or use another model"
    refuse_long(policy.model, mixed, where="pretraining_mix", fix=fix)
    updates = settings.num_steps * settings.num_epochs * settings.num_minibatches
    policy_learner = LocalLearner(
        policy, settings.optimizer, token_budget=settings.token_budget, num_updates=updates, name="policy"
    )
    critic_learner = None
    if critic is not None and critic is not policy:
        critic_learner = LocalLearner(
            critic, settings.critic.optimizer, token_budget=settings.token_budget, num_updates=updates, name="critic"
        )
    trained = {policy, critic or policy}
    for role in {*trained, models.reference}:
        role.precision = settings.precision
    if settings.checkpoint_activations:
        for role in trained:
            role.checkpoint_activations()
    learners = [policy_learner] + ([critic_learner] if critic_learner else [])
    state = OnlineState(learners, settings.kl.initial, RunningMoments())
    world = GoldScorer(worlds.load(settings.world)) if settings.world else None
    environment = settings.environment.load() if settings.environment is not None else None

    choice = choose_form(policy, settings.sampling, chat)

    def generator(sampling: Sampling) -> Generator:
        # The step compares every reply; under truncation it cannot, for the two are different distributions.
        options: dict[str, Any] = {"choice": choice, "watched": sampling.truncates and settings.correction is None}
        if environment is None:
            return LocalGenerator(policy, chat, sampling, **options)
        return EpisodeGenerator(policy, chat, sampling, environment, settings.episodes, **options)

    LocalGenerator(policy, chat, settings.sampling, choice=choice).check_prompts(prompts)
    return Parts(
        settings=settings,
        chat=chat,
        prompts=prompts,
        generator=generator(settings.sampling),
        greedy=generator(replace(settings.sampling, top_k=1)) if advantage.needs_greedy else None,
        reward=models.rewards,
        advantage=advantage,
        policy=policy,
        reference=models.reference,
        base=models.base,
        critic=critic,
        policy_learner=policy_learner,
        critic_learner=critic_learner,
        mixed=mixed,
        world=world,
        state=state,
        counts=counts,
    )
