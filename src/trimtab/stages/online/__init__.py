"""Train a policy against a reward, with PPO, GRPO and their family.

One loop serves them all. An algorithm is four choices in the settings: an advantage estimator, a policy loss, where the
KL to the reference goes (into the reward of each token, or into the loss), and whether there is a critic. `train_step`
is the algorithm; `run` loads what it uses and holds the loop around it, in which things are measured and checked. A new
member of the family is a class registered as an advantage or a policy loss, in tens of lines, and nothing here changes.

Unlike in InstructGPT (Ouyang et al., arXiv:2203.02155), the critic may first learn alone, and advantages are whitened
over the whole step, not over a minibatch, since a small minibatch has a mean of its own. Unlike in the usual code for
GRPO, the old policy is not scored if a step makes a single update: the sampler has reported the log-probability of each
token, and the update itself shows whether the two agree. Replies that a reward cannot judge never count as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab import worlds
from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TokenTrees
from trimtab.core.metrics import Mean, Metrics
from trimtab.data.chat import Chat
from trimtab.engines.base import Learner, Scorer
from trimtab.engines.build import Engines
from trimtab.engines.local.learner import AdamW
from trimtab.math.advantages import Episodes, token_rewards
from trimtab.math.kl import ESTIMATORS, k1, k3
from trimtab.math.masking import sum_per_sequence, whiten
from trimtab.models.lengths import refuse_long
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import Policy, ScalarModel
from trimtab.models.save import save_role
from trimtab.rewards.gold import GoldScorer
from trimtab.runs.loop import stepping
from trimtab.runs.run import Run
from trimtab.stages.guard.measuring import load_measure
from trimtab.stages.guard.settings import rehearsed
from trimtab.stages.guard.watch import DECISION, RECORD
from trimtab.stages.noise import seed_noise
from trimtab.stages.online.cards import CardWatch
from trimtab.stages.online.checks import (
    Clock,
    check_sampler,
    learned_from,
    rollout_metrics,
    rollout_rows,
    say_truncation,
    value_metrics,
)
from trimtab.stages.online.cost import Limit, make_limit
from trimtab.stages.online.data import read_data
from trimtab.stages.online.guard import make_guard
from trimtab.stages.online.models import Models, load_models, load_roles
from trimtab.stages.online.objectives import Minibatches, PretrainingBatches, objectives
from trimtab.stages.online.rollout_queue import RolloutQueue
from trimtab.stages.online.rollouts import RolloutBatch
from trimtab.stages.online.samplers import make_samplers
from trimtab.stages.online.sampling import RolloutSource, shape_rewards
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState
from trimtab.stages.reward_positions import refuse_short_reward_models
from trimtab.stages.stage import FEW_STEPS, Stage
from trimtab.stages.supervised import last_metrics

FIT = "set pretraining_mix.max_tokens = LIMIT, or use another model"

__all__ = ["STAGE", "OnlineSettings", "run", "train_step"]


def run(settings: OnlineSettings, run: Run) -> None:
    """Trains to the last step and writes the policy to `run.model_dir`."""
    say_truncation(settings)
    chat = Chat(load_tokenizer(settings.model))
    data = read_data(settings, chat, run)
    models, measure = load_models(settings, chat), load_measure(settings)
    refuse_long(models.policy.model, data.demonstrations, where="pretraining_mix", fix=FIT)
    longest = settings.sampling.max_new_tokens
    refuse_short_reward_models([models.rewards, measure], data.every_prompt, chat, max_new_tokens=longest)

    engines = Engines.start(settings, run.directory, load=load_roles, models=models.roles)
    sampler, greedy = make_samplers(settings, models.policy, chat, data.every_prompt, engines.sampler)
    policy, reference, critic = make_engines(settings, models, engines)
    world = GoldScorer(worlds.load(settings.world)) if settings.world else None
    pretraining = PretrainingBatches(data.demonstrations, settings)
    learners = [policy] if critic is None or critic is policy else [policy, critic]
    state = OnlineState(learners, data.prompts, settings.seed, settings.kl.initial)
    limit = make_limit(settings, models, engines, state)
    source = RolloutSource(sampler, greedy, models.rewards, world, settings)
    queue = RolloutQueue(source, state, settings)
    guard = make_guard(settings, run, state, queue, source, data.checks, measure, policy=policy, reference=reference)
    run.note_path("sampler", sampler.sampler)
    run.note_path("form", models.policy.way)
    cards = CardWatch(settings, run)

    how: dict[str, Any] = {"checkpoint_every": settings.checkpoint_every, "keep_checkpoints": settings.keep_checkpoints}
    how |= {"before_save": queue.finish, "also_kept": guard.kept if guard else tuple}
    with queue, engines, stepping(run, state, num_steps=settings.num_steps, description="online", **how) as steps:
        if guard:
            guard.begin(steps)
        for number in steps:
            seed_noise(settings.seed, "online", number)
            clock = Clock()
            done = train_step(
                number,
                queue=queue,
                policy=policy,
                reference=reference,
                critic=critic,
                limit=limit,
                pretraining=pretraining,
                state=state,
                settings=settings,
                clock=clock,
            )
            clock.mark("update")
            metrics = checked_metrics(number, done, settings) | cards(number, done.rollouts.rollouts)
            if settings.sample_every and number % settings.sample_every == 0:
                rows = rollout_rows(done.rollouts.rollouts, done.rewards, done.kl, world, settings.num_samples)
                run.add_samples(number + 1, rows)
            if guard:
                metrics |= guard.check(number + 1, steps)
                clock.mark("guard")
            steps.log(metrics | clock.metrics)
        guarded = {"guard": guard.finish()} if guard else {}

    run.save_model(lambda path: save_role(models.policy, chat.tokenizer, path, base=models.base))
    run.finish(
        {"num_steps": steps.done, "sampler": sampler.sampler, "counts": data.counts}
        | guarded
        | last_metrics(run, "policy/kl", "reward/mean", "gold/mean")
    )


@dataclass(frozen=True)
class StepDone:
    """The results of a step that the loop around it watches."""

    rollouts: RolloutBatch
    rewards: Tensor
    """[B] after shaping."""
    batch: PolicyBatch
    kl_coef: float
    """The KL coefficient of this step, before it was adapted."""
    metrics: Metrics

    @cached_property
    def kl(self) -> Tensor:
        """[B] the KL of each reply to the reference, in nats (k1), before the updates."""
        log_ratio = self.batch.old_logprobs - self.batch.ref_logprobs
        return sum_per_sequence(k1(log_ratio), self.batch.sequence_ids, self.batch.num_sequences)


def train_step(
    number: int,
    *,
    queue: RolloutQueue,
    policy: Learner,
    reference: Scorer,
    critic: Learner | None,
    limit: Limit,
    pretraining: PretrainingBatches,
    state: OnlineState,
    settings: OnlineSettings,
    clock: Clock,
) -> StepDone:
    """One round of sampling and the updates made from it (Ouyang et al., arXiv:2203.02155, section 3.5, with the
    PPO of Schulman et al., arXiv:1707.06347)."""
    rollouts = queue.take(number, clock)  # in groups, with their rewards
    trees, ids = rollouts.trees, rollouts.trees.sequence_ids  # a prompt once for all its replies, nothing padded

    old_logprobs, agreement = old_logprobs_of(rollouts, policy, number, settings)  # [M]
    ref_logprobs = reference.logprobs(trees)
    values = critic.values(trees) if critic is not None else torch.full_like(old_logprobs, torch.nan)
    clock.mark("logprobs")

    shaped = shape_rewards(rollouts, settings, state)  # [B]
    kl = kl_per_token(trees, old_logprobs - ref_logprobs, policy, reference, settings)  # [M]
    paid = rewards_per_token(shaped.rewards, rollouts.paid, kl, ids, state.kl_coef, settings)  # [M]
    advantages = settings.advantage(Episodes(paid, values, ids, rollouts.group_ids, shaped.baselines, shaped.parts))
    moving, limited = limit(number, advantages, rollouts, kl, state)  # [M]
    weights, weighed = settings.weigh(old_logprobs, rollouts.logprobs, ids, trees.num_sequences)
    batch = PolicyBatch(
        trees=trees,
        old_logprobs=old_logprobs,
        correction=weights,
        ref_logprobs=ref_logprobs,
        old_values=values,
        advantages=whiten(moving) if settings.advantage.whiten else moving,
        returns=values + advantages,
    )
    minibatches = Minibatches(number, learned_from(number, batch, rollouts, settings), settings)
    for update, minibatch in minibatches:
        for learner, losses in objectives(number, settings, policy=policy, critic=critic, kl_coef=state.kl_coef):
            mixed = pretraining.work(update) if learner is policy else []
            minibatches.log(learner.update([(minibatch, losses), *mixed]))
    logged = weighed | agreement | rollouts.metrics | shaped.metrics | limited | minibatches.metrics
    done = StepDone(rollouts, shaped.rewards, batch, state.kl_coef, logged)
    state.kl_coef = next_kl_coef(number, done, settings)
    return done


def old_logprobs_of(
    rollouts: RolloutBatch, policy: Learner, number: int, settings: OnlineSettings
) -> tuple[Tensor, Metrics]:
    """The log-probabilities [M] of the policy that sampled, and a metric of how far the sampler is from it.

    They are the sampler's own in a step with a single update, unless `OnlineSettings.scores_old_policy` asks for more.
    If they are scored, raises EngineError before the updates of this step for a difference that is more than rounding
    and that no setting explains (`check_sampler`). Rollouts of older weights are not compared.
    """
    if not settings.scores_old_policy(number):
        return rollouts.logprobs, {}
    scored = policy.logprobs(rollouts.trees)
    if rollouts.staleness:
        return scored, {}
    difference = float((rollouts.logprobs - scored).abs().max())
    return scored, check_sampler(difference, settings, f"step {number + 1}, before its updates")


def rewards_per_token(
    rewards: Tensor,
    step_rewards: Tensor | None,
    kl: Tensor,
    sequence_ids: Tensor,
    kl_coef: float,
    settings: OnlineSettings,
) -> Tensor:
    """The token rewards [M]: the reward of each reply at its last token, less the KL of each token if it is paid here,
    and whitened around their mean if the settings ask for that. Of a reward that pays tokens, `step_rewards` [M] are
    paid where they are, and the last token gets what shaping made of their sum, such as a penalty."""
    if step_rewards is not None:
        rewards = rewards - sum_per_sequence(step_rewards, sequence_ids, len(rewards))
    paid = token_rewards(rewards, kl, sequence_ids, kl_coef=kl_coef if settings.kl_in == "reward" else 0.0)
    paid = paid if step_rewards is None else paid + step_rewards
    return whiten(paid, shift_mean=False) if settings.whiten_rewards else paid


def kl_per_token(
    trees: TokenTrees, log_ratio: Tensor, policy: Learner, reference: Scorer, settings: OnlineSettings
) -> Tensor:
    """[M] the KL of each token as the reward counts it, in nats; `log_ratio` [M] is that of policy to reference."""
    estimator = settings.kl_estimator or "k1"
    if settings.kl_in == "reward" and estimator == "exact":
        return policy.kl_to(reference, trees)
    return ESTIMATORS[estimator](log_ratio)


def next_kl_coef(number: int, done: StepDone, settings: OnlineSettings) -> float:
    """The KL coefficient of the step after this one. It waits while only the critic learns, because a policy that stays
    could not follow it."""
    if settings.only_critic_learns(number):
        return done.kl_coef
    return settings.kl.update(done.kl_coef, mean(done.kl).value, num_sequences=done.batch.num_sequences)


def checked_metrics(number: int, done: StepDone, settings: OnlineSettings) -> Metrics:
    """The metrics of a step. Raises EngineError if its only update shows that the sampler was not the policy."""
    batch, metrics = done.batch, rollout_metrics(done.rollouts.rollouts) | done.metrics
    if not settings.scores_old_policy(number) and (moved := metrics.get("policy/log_ratio_max")):
        metrics |= check_sampler(moved.value, settings, f"step {number + 1}, in its only update")
    if settings.advantage.needs_critic:
        metrics |= value_metrics(batch.old_values, batch.returns)
    kl_k3 = k3(batch.old_logprobs - batch.ref_logprobs).double().sum()
    return metrics | {
        "policy/kl": mean(done.kl),
        "policy/kl_k3": Mean(float(kl_k3), batch.num_sequences),
        "kl/coef": Mean(done.kl_coef, 1),
    }


def mean(values: Tensor) -> Mean:
    """The mean of [B] values, summed in float64."""
    return Mean(float(values.double().sum()), len(values))


def make_engines(
    settings: OnlineSettings, models: Models, engines: Engines | None = None
) -> tuple[Learner, Scorer, Learner | None]:
    """Policy, reference and critic as engines. A critic that is a head on the policy is the policy's own engine."""
    how: dict[str, Any] = {"token_budget": settings.token_budget, "precision": settings.precision}
    per_step = settings.num_epochs * settings.num_minibatches
    engines = engines or Engines()

    def learner(role: Policy | ScalarModel, optimizer: AdamW, name: str, num_steps: int) -> Learner:
        return engines.learner(
            role,
            optimizer,
            name=name,
            num_updates=num_steps * per_step,
            checkpoint_activations=settings.checkpoint_activations,
            **how,
        )

    # While the critic warms up the policy makes no update, and its schedule has not begun.
    warmup_steps = settings.critic.warmup_steps if models.critic not in (None, models.policy) else 0
    policy = learner(models.policy, settings.optimizer, "policy", max(1, settings.num_steps - warmup_steps))
    critic = policy if models.critic is models.policy else None
    if models.critic is not None and critic is None:
        critic = learner(models.critic, settings.critic.optimizer, "critic", settings.num_steps)
    return policy, engines.scorer(models.reference, name="reference", **how), critic


def few_steps(table: Mapping[str, Any], _settings: OnlineSettings) -> dict[str, Any]:
    """Settings for a few steps that are like the later ones of a run: without the critic's warm-up, in which the policy
    is not updated, and without a lag, because of which the first step draws for several and the last ones for none."""
    steps = min(FEW_STEPS, table.get("num_steps", FEW_STEPS))
    critic = dict(table.get("critic", {})) | {"warmup_steps": 0}
    changed = {"num_steps": steps, "critic": critic} | rehearsed(table)
    engine = dict(table.get("engine", {}))
    return changed | ({"engine": engine | {"max_staleness": 0}} if engine.get("max_staleness") else {})


STAGE = Stage(
    settings=OnlineSettings,
    run=run,
    makes="policy",
    trains="policy",
    writes=("metrics.jsonl", "samples.jsonl", RECORD, DECISION),
    grows=("num_steps",),
    least_prompts=lambda settings: settings.prompts_per_step,
    few=few_steps,
    about="Reinforcement learning: sample replies, score them with the reward model, move towards the better ones.",
    charts=(
        ("reward/mean",),
        ("gold/mean",),
        ("guard/measure", "guard/measure_low", "guard/measure_high"),
        ("policy/kl",),
        ("rollout/length_mean",),
        ("policy/entropy",),
        ("policy/loss",),
        ("policy/clip_fraction",),
        ("critic/loss",),
        ("critic/explained_variance",),
    ),
)
