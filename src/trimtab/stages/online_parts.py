"""What the online loop works with, found and loaded before the first step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab import worlds
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.data.trees import TokenTrees, TreeBatch, per, response_tree
from trimtab.engines.local_generator import LocalGenerator
from trimtab.engines.local_learner import LocalLearner
from trimtab.errors import DataError
from trimtab.math.losses.policy import EntropyBonus, KLPenalty
from trimtab.math.losses.sft import SFTLoss
from trimtab.math.rewards import RunningMoments, clip, missing_eos_penalty
from trimtab.metrics import Mean, Metrics, mean_of, merge
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import Policy, ScalarModel
from trimtab.protocols import Generator, Learner, Loss, Reward
from trimtab.rewards.gold import GoldScorer
from trimtab.runs.run import Run
from trimtab.stages.online_models import load_models
from trimtab.stages.online_settings import Settings, Shaping
from trimtab.stages.supervised import Epochs
from trimtab.types import Demonstration, Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(TreeBatch):
    """Rollouts with everything the losses read, complete before the first update; all [M]."""

    old_logprobs: Tensor = per("token")
    ref_logprobs: Tensor = per("token")
    old_values: Tensor = per("token")
    advantages: Tensor = per("token")
    returns: Tensor = per("token")


@dataclass
class OnlineState:
    """What a run needs to go on bit for bit: learners, KL coefficient and running reward moments."""

    learners: Sequence[LocalLearner]
    kl_coef: float
    moments: RunningMoments

    def save(self, path: Path) -> None:
        """Write the state into the directory `path`."""
        for learner in self.learners:
            learner.save(path)
        numbers = {"kl_coef": self.kl_coef, "moments": self.moments.state()}
        (path / "state.json").write_text(json.dumps(numbers), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        for learner in self.learners:
            learner.load(path)
        numbers = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self.kl_coef = numbers["kl_coef"]
        self.moments = RunningMoments(**numbers["moments"])


@dataclass(frozen=True)
class Rewards:
    """Several rewards added up with their weights, then shaped; every part is logged apart."""

    parts: Sequence[tuple[str, float, Reward]]
    shaping: Shaping
    state: OnlineState
    world: GoldScorer | None

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] shaped rewards. `reward/mean` is the reward before shaping."""
        total = torch.zeros(len(rollouts))
        logged: list[Metrics] = [self.world.score(rollouts)[1]] if self.world else []
        for name, weight, reward in self.parts:
            scores, metrics = reward.score(rollouts)
            total += weight * scores
            logged.append(metrics if len(self.parts) == 1 else {f"reward/{name}": mean_of(scores.tolist())})
        metrics = merge(logged) | {
            "reward/mean": Mean(float(total.double().sum()), len(total)),
            "reward/std": Mean(float(total.std(correction=0)) * len(total), len(total)),
        }
        finished = torch.tensor([r.finish_reason == "stop" for r in rollouts])
        shaped, shaping_metrics = self.shape(total, finished)
        return shaped, metrics | shaping_metrics

    def shape(self, rewards: Tensor, finished: Tensor) -> tuple[Tensor, Metrics]:
        """[B] normalised, clipped and penalised, in that order."""
        if self.shaping.normalize:
            self.state.moments = self.state.moments.update(rewards)
            rewards = self.state.moments.normalise(rewards, shift_mean=not self.shaping.scale_only)
        clipped = torch.zeros(len(rewards), dtype=torch.bool)
        if self.shaping.clip is not None:
            rewards, clipped = clip(rewards, low=-self.shaping.clip, high=self.shaping.clip)
        shaped = missing_eos_penalty(rewards, finished, self.shaping.missing_eos_penalty)
        return shaped, {"reward/clipped_fraction": mean_of(clipped.tolist())}


@dataclass(frozen=True)
class Parts:
    """Everything `train_step` names."""

    settings: Settings
    chat: Chat
    prompts: Sequence[Prompt]
    generator: Generator
    rewards: Rewards
    advantage: Any
    policy: Policy
    reference: Policy
    critic: Policy | ScalarModel
    policy_learner: LocalLearner
    critic_learner: LocalLearner | None
    demonstrations: Sequence[Demonstration]
    world: GoldScorer | None
    state: OnlineState
    base: str
    """What the policy's adapter, if it is one, belongs to."""
    counts: dict[str, int]
    """Prompts read, and those dropped because they are too long."""

    def prompts_of(self, number: int) -> list[Prompt]:
        """The prompts of a step: every prompt once before any comes again, each pass in an order of its own."""
        return [
            self.prompts[i] for i in self._passes(len(self.prompts), self.settings.prompts_per_step).examples(number)
        ]

    def losses_at(self, number: int) -> list[tuple[Learner, list[Loss]]]:
        """Who learns from a minibatch of this step, and by which losses."""
        settings = self.settings
        policy: list[Loss] = [settings.loss]
        if settings.entropy_coef:
            policy.append(EntropyBonus(coef=settings.entropy_coef, aggregation=settings.loss.aggregation))
        if settings.kl_in == "loss":
            estimator = settings.kl_loss_estimator
            policy.append(
                KLPenalty(coef=self.state.kl_coef, estimator=estimator, aggregation=settings.loss.aggregation)
            )
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
        chosen = [
            self.demonstrations[i] for i in self._passes(len(self.demonstrations), mix.batch_size).examples(update)
        ]
        trees = TokenTrees.build(
            [
                response_tree(self.chat.encode_prompt(d.prompt.messages), [self.chat.encode_response(d.response)])
                for d in chosen
            ]
        )
        return [(TreeBatch(trees=trees), [SFTLoss(coef=mix.coef)])]

    def _passes(self, num_examples: int, batch_size: int) -> Epochs:
        return Epochs(num_examples=num_examples, batch_size=batch_size, num_epochs=1e9, seed=self.settings.seed)


def build_parts(settings: Settings, run: Run) -> Parts:
    """Loads models and data. Raises an error that teaches for whatever cannot be used."""
    chat = Chat(load_tokenizer(settings.model))
    loaded = load(Prompt, settings.prompts, on_bad_row=settings.on_bad_row, limit=settings.limit)
    run.add_data(settings.prompts, loaded.sha256, len(loaded.records))
    prompts = [p for p in loaded.records if len(chat.encode_prompt(p.messages)) <= settings.sampling.max_prompt_tokens]
    if not prompts:
        raise DataError(
            f"none of {len(loaded.records)} prompts has at most {settings.sampling.max_prompt_tokens} tokens",
            where=settings.prompts,
            fix="raise sampling.max_prompt_tokens",
        )
    models = load_models(settings, chat)
    policy, critic = models.policy, models.critic
    updates = settings.num_steps * settings.num_epochs * settings.num_minibatches
    policy_learner = LocalLearner(
        policy, settings.optimizer, token_budget=settings.token_budget, num_updates=updates, name="policy"
    )
    critic_learner = None
    if critic is not policy:
        critic_learner = LocalLearner(
            critic, settings.critic.optimizer, token_budget=settings.token_budget, num_updates=updates, name="critic"
        )
    for role in (policy, models.reference, critic):
        role.precision = settings.precision
    if settings.checkpoint_activations:
        for role in {policy, critic}:
            role.checkpoint_activations()
    learners = [policy_learner] + ([critic_learner] if critic_learner else [])
    state = OnlineState(learners, settings.kl.initial, RunningMoments())
    world = GoldScorer(worlds.load(settings.world)) if settings.world else None
    mix = settings.pretraining_mix
    return Parts(
        settings=settings,
        chat=chat,
        prompts=prompts,
        generator=LocalGenerator(policy, chat, settings.sampling),
        rewards=Rewards(
            models.rewards,
            settings.shaping,
            state,
            world,
        ),
        advantage=settings.advantage,
        policy=policy,
        reference=models.reference,
        base=models.base,
        critic=critic,
        policy_learner=policy_learner,
        critic_learner=critic_learner,
        demonstrations=load(Demonstration, mix.data).records if mix else (),
        world=world,
        state=state,
        counts=dict(loaded.counts) | {"dropped_long_prompts": len(loaded.records) - len(prompts)},
    )
