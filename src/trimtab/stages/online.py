"""Online RL: sample, judge, and move the policy toward what was judged good, on a leash to the reference.

An algorithm is four named parts: an advantage estimator, a policy loss, where the KL goes, and whether there is a
critic. `train_step` reads as the algorithm; `online_parts.py` builds what it uses from the settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from trimtab import seeds
from trimtab.data.trees import TokenTrees
from trimtab.math.advantages import Episodes, token_rewards
from trimtab.math.kl import ESTIMATORS, k1, k3
from trimtab.math.masking import sum_per_sequence, whiten
from trimtab.metrics import Mean, Metrics, Total, merge
from trimtab.models.forward import exact_kl_of, token_logprobs_of, token_values_of
from trimtab.models.save import save_role
from trimtab.runs.loop import run_steps
from trimtab.runs.run import Run
from trimtab.stages.noise import seed_noise
from trimtab.stages.online_parts import Parts, PolicyBatch, build_parts
from trimtab.stages.online_sampling import draw, rollout_trees, shape
from trimtab.stages.online_settings import Settings
from trimtab.stages.online_watch import (
    Clock,
    checked_difference,
    rollout_metrics,
    rollout_rows,
    sampled_logprobs,
    say_truncation,
    value_metrics,
)
from trimtab.stages.supervised import last_metrics

__all__ = ["Settings", "run", "train_step"]


def run(settings: Settings, run: Run) -> None:
    """Trains to the last step and writes the policy to `run.model_dir`."""
    say_truncation(settings)
    parts = build_parts(settings, run)
    run.note_path("sampler", parts.generator.sampler)
    run.note_path("form", parts.policy.form)

    def step(number: int) -> Metrics:
        started = time.perf_counter()
        seed_noise(settings.seed, "online", number)
        metrics = train_step(number, parts, run)
        return metrics | {"time/step_seconds": Total(time.perf_counter() - started)}

    run_steps(
        run,
        parts.state,
        num_steps=settings.num_steps,
        step=step,
        checkpoint_every=settings.checkpoint_every,
        description="online",
    )
    run.save_model(lambda path: save_role(parts.policy, parts.chat.tokenizer, path, base=parts.base))
    run.finish(
        {"num_steps": settings.num_steps, "sampler": parts.generator.sampler, "counts": parts.counts}
        | last_metrics(run, "policy/kl", "reward/mean", "gold/mean")
    )


def train_step(number: int, parts: Parts, run: Run) -> Metrics:
    """One round of sampling and the updates made from it (Ouyang et al., arXiv:2203.02155, section 3.5, with the
    PPO of Schulman et al., arXiv:1707.06347)."""
    settings, clock = parts.settings, Clock()
    drawn = draw(number, parts, clock)

    trees = rollout_trees([group.rollouts for group in drawn.groups])
    budget = settings.token_budget
    old_logprobs = sampled_logprobs(drawn.rollouts)  # [M]
    agreement: Metrics = {}
    if settings.scores_old_policy(number):
        sampled, old_logprobs = old_logprobs, token_logprobs_of(parts.policy, trees, budget)
        difference = float((sampled - old_logprobs).abs().max())
        # Before anything is trained.
        agreement = checked_difference(difference, settings, f"step {number + 1}, before its updates")
    ref_logprobs = token_logprobs_of(parts.reference, trees, budget)
    values = torch.full_like(old_logprobs, torch.nan)
    if parts.critic is not None:
        values = token_values_of(parts.critic, trees, budget)
    correction, metrics = rollout_metrics(drawn.rollouts, old_logprobs, trees.sequence_ids, settings)
    clock.lap("logprobs")

    log_ratio = old_logprobs - ref_logprobs
    in_reward = parts.state.kl_coef if settings.kl_in == "reward" else 0.0
    rewards, baselines, shaping = shape(drawn, parts)  # [B]
    shaped = token_rewards(rewards, kl_to_pay(trees, log_ratio, parts), trees.sequence_ids, kl_coef=in_reward)  # [M]
    if settings.whiten_rewards:
        shaped = whiten(shaped, shift_mean=False)
    episodes = Episodes(shaped, values, trees.sequence_ids, drawn.group_ids, baselines)
    advantages = parts.advantage(episodes)  # [M]
    batch = PolicyBatch(
        trees=trees,
        old_logprobs=old_logprobs,
        correction=correction,
        ref_logprobs=ref_logprobs,
        old_values=values,
        advantages=whiten(advantages) if parts.advantage.whiten else advantages,
        returns=values + advantages,
    )
    updates = update_epochs(number, batch.keep(drawn.finished) if settings.skip_truncated else batch, parts)
    if not agreement and (moved := updates.get("policy/log_ratio_max")):
        agreement = checked_difference(moved.value, settings, f"step {number + 1}, in its only update")
    clock.lap("update")

    sequence_kl = sum_per_sequence(k1(log_ratio), trees.sequence_ids, trees.num_sequences)  # [B]
    metrics |= agreement | drawn.metrics | shaping | updates | clock.metrics()
    if parts.critic is not None:
        metrics |= value_metrics(values, batch.returns)
    metrics |= {
        "policy/kl": Mean(float(sequence_kl.double().sum()), trees.num_sequences),
        "policy/kl_k3": Mean(float(k3(log_ratio).double().sum()), trees.num_sequences),
        "kl/coef": Mean(parts.state.kl_coef, 1),
    }
    parts.state.kl_coef = settings.kl.update(
        parts.state.kl_coef, metrics["policy/kl"].value, num_sequences=trees.num_sequences
    )
    if settings.sample_every and number % settings.sample_every == 0:
        rows = rollout_rows(drawn.rollouts, rewards, sequence_kl, parts.world, settings.num_samples)
        run.add_samples(number + 1, rows)
    return metrics


def kl_to_pay(trees: TokenTrees, log_ratio: Tensor, parts: Parts) -> Tensor:
    """[M] the KL of each token as the reward counts it."""
    estimator = parts.settings.kl_estimator or "k1"
    if parts.settings.kl_in == "reward" and estimator == "exact":
        return exact_kl_of(parts.policy, parts.reference, trees, parts.settings.token_budget)
    return ESTIMATORS[estimator](log_ratio)


def update_epochs(number: int, batch: PolicyBatch, parts: Parts) -> Metrics:
    """Several passes over the rollouts in minibatches; the passes end early once the policy has moved too far."""
    settings = parts.settings
    done: list[Metrics] = []
    stopped, epoch = False, -1
    for epoch in range(settings.num_epochs if batch.num_sequences else 0):
        moved: list[Metrics] = []
        for index, minibatch in enumerate(
            minibatches(batch, settings.num_minibatches, seed=(number, epoch), parts=parts)
        ):
            for learner, losses in parts.losses_at(number):
                metrics = learner.update([(minibatch, losses), *parts.pretraining_mix(learner, number, epoch, index)])
                moved.append(metrics)
        done += moved
        divergence = merge(moved).get("policy/approx_kl")
        stopped = settings.stop_kl is not None and divergence is not None and divergence.value > settings.stop_kl
        if stopped:
            break
    return merge(done) | {"policy/epochs": Mean(epoch + 1, 1), "policy/stopped_early_fraction": Mean(stopped, 1)}


def minibatches(
    batch: PolicyBatch, num_minibatches: int, *, seed: tuple[int, int], parts: Parts
) -> Iterator[PolicyBatch]:
    """The batch in equal parts of whole trees, shuffled anew for every step and epoch; none is dropped."""
    order = seeds.generator(parts.settings.seed, "minibatches", *seed).permutation(len(batch.trees.trees)).tolist()
    for part in range(num_minibatches):
        if chosen := order[part::num_minibatches]:
            yield batch.select(chosen)
