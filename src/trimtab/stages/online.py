"""Online RL: sample, judge, and move the policy toward what was judged good, on a leash to the reference.

An algorithm is four named parts: an advantage estimator, a policy loss, where the KL goes, and whether there is a
critic. `train_step` reads as the algorithm; `online_parts.py` builds what it uses from the settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from trimtab import seeds
from trimtab.data.trees import TokenTrees, response_tree
from trimtab.math.advantages import token_rewards
from trimtab.math.kl import k1, k3
from trimtab.math.masking import sum_per_sequence, whiten
from trimtab.metrics import Mean, Metrics, Total, merge
from trimtab.models.forward import token_logprobs_of, token_values_of
from trimtab.models.load import save_role
from trimtab.runs.loop import run_steps
from trimtab.runs.run import Run
from trimtab.stages.online_parts import Parts, PolicyBatch, build_parts
from trimtab.stages.online_settings import Settings
from trimtab.stages.online_watch import rollout_metrics, rollout_rows, value_metrics
from trimtab.stages.supervised import last_metrics
from trimtab.types import Rollout

__all__ = ["Settings", "run", "train_step"]


def run(settings: Settings, run: Run) -> None:
    """Trains to the last step and writes the policy to `run.model_dir`."""
    parts = build_parts(settings, run)

    def step(number: int) -> Metrics:
        started = time.perf_counter()
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
        {"num_steps": settings.num_steps, "sampler": parts.generator.method, "counts": parts.counts}
        | last_metrics(run, "policy/kl", "reward/mean", "gold/mean")
    )


def train_step(number: int, parts: Parts, run: Run) -> Metrics:
    """One round of sampling and the updates made from it (Ouyang et al., arXiv:2203.02155, section 3.5, with the
    PPO of Schulman et al., arXiv:1707.06347)."""
    settings, clock = parts.settings, Clock()
    prompts = parts.prompts_of(number)
    rollouts = parts.generator.generate(
        prompts, group_size=settings.group_size, seed=seeds.derive(settings.seed, "rollouts", number)
    )
    clock.lap("generate")
    rewards, reward_metrics = parts.rewards.score(rollouts)  # [B]
    clock.lap("score")

    trees = to_trees(rollouts, settings.group_size)
    budget = settings.token_budget
    old_logprobs = token_logprobs_of(parts.policy, trees, budget)  # [M]
    ref_logprobs = token_logprobs_of(parts.reference, trees, budget)
    values = token_values_of(parts.critic, trees, budget)
    # Before anything is trained: it refuses a sampler that is not the policy.
    metrics = rollout_metrics(
        rollouts, old_logprobs, sampling=settings.sampling, step=number + 1, precision=settings.precision
    )
    clock.lap("logprobs")

    log_ratio = old_logprobs - ref_logprobs
    kl = k1(log_ratio)
    in_reward = parts.state.kl_coef if settings.kl_in == "reward" else 0.0
    shaped = token_rewards(rewards, kl, trees.sequence_ids, kl_coef=in_reward)  # [M]
    if settings.whiten_rewards:
        shaped = whiten(shaped, shift_mean=False)
    advantages, returns = parts.advantage(shaped, values, trees.sequence_ids)
    batch = PolicyBatch(
        trees=trees,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        old_values=values,
        advantages=whiten(advantages) if settings.whiten_advantages else advantages,
        returns=returns,
    )
    updates = update_epochs(number, batch, parts)
    clock.lap("update")

    sequence_kl = sum_per_sequence(kl, trees.sequence_ids, trees.num_sequences)  # [B]
    metrics |= reward_metrics | updates | value_metrics(values, returns) | clock.metrics()
    metrics |= {
        "policy/kl": Mean(float(sequence_kl.double().sum()), trees.num_sequences),
        "policy/kl_k3": Mean(float(k3(log_ratio).double().sum()), trees.num_sequences),
        "kl/coef": Mean(parts.state.kl_coef, 1),
    }
    parts.state.kl_coef = settings.kl.update(
        parts.state.kl_coef, metrics["policy/kl"].value, num_sequences=trees.num_sequences
    )
    if settings.sample_every and number % settings.sample_every == 0:
        run.add_samples(number + 1, rollout_rows(rollouts, rewards, sequence_kl, parts.world, settings.num_samples))
    return metrics


def update_epochs(number: int, batch: PolicyBatch, parts: Parts) -> Metrics:
    """Several passes over the rollouts in minibatches; the passes end early once the policy has moved too far."""
    settings = parts.settings
    done: list[Metrics] = []
    stopped = False
    for epoch in range(settings.num_epochs):
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


def to_trees(rollouts: list[Rollout], group_size: int) -> TokenTrees:
    """The rollouts as trees, the prompt of a group once; what was sampled is what is trained on."""
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    return TokenTrees.build([response_tree(g[0].prompt_ids, [r.response_ids for r in g]) for g in groups])


class Clock:
    """Seconds between laps, as `time/NAME_seconds`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._laps: Metrics = {}

    def lap(self, name: str) -> None:
        """Ends the lap that began with the clock or the lap before."""
        now = time.perf_counter()
        self._laps[f"time/{name}_seconds"] = Total(now - self._last)
        self._last = now

    def metrics(self) -> Metrics:
        """Every lap."""
        return self._laps
