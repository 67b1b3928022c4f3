"""Which learners learn from a minibatch of rollouts and by which losses, and the minibatches of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TokenTrees, Tree, TreeBatch
from trimtab.core import seeds
from trimtab.core.metrics import Mean, Metrics, merge
from trimtab.engines.base import Learner, Loss, Work
from trimtab.math.losses.policy import EntropyBonus, KLPenalty
from trimtab.math.losses.sft import SFTLoss
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import endless


def objectives(
    number: int, settings: OnlineSettings, *, policy: Learner, critic: Learner | None, kl_coef: float
) -> list[tuple[Learner, list[Loss]]]:
    """The learners of this step, each with its losses. A critic that is a head on the policy learns with it; a critic
    with a model of its own learns alone in the first steps."""
    averaged: Any = {"aggregation": settings.loss.aggregation, "length": settings.loss.length}
    losses: list[Loss] = [settings.loss]
    if settings.entropy_coef:
        losses.append(EntropyBonus(coef=settings.entropy_coef, **averaged))
    if settings.kl_in == "loss":
        estimator: Any = settings.kl_estimator or "k3"  # the settings let only k2 and k3 into the loss
        losses.append(KLPenalty(coef=kl_coef, estimator=estimator, **averaged))
    if critic is policy:
        return [(policy, [*losses, settings.critic.loss])]
    if critic is None:
        return [(policy, losses)]
    alone = settings.only_critic_learns(number)
    return [*([] if alone else [(policy, losses)]), (critic, [settings.critic.loss])]


class PretrainingBatches:
    """PPO-ptx: the demonstrations, if there are any, that the policy learns beside the rollouts in each update."""

    def __init__(self, trees: Sequence[Tree], settings: OnlineSettings) -> None:
        self._trees = trees
        self._settings = settings

    def work(self, update: int) -> Work:
        """The demonstrations of an update, with their loss; updates are counted from 0 over the whole run."""
        mix = self._settings.pretraining_mix
        if mix is None:
            return []
        chosen = endless(len(self._trees), mix.batch_size, self._settings.seed).examples(update)
        batch = TreeBatch(trees=TokenTrees.build([self._trees[i] for i in chosen]))
        return [(batch, [SFTLoss(coef=mix.coef, logged_as="loss/pretraining")])]


class Minibatches:
    """Several passes over the rollouts of a step, in minibatches. They end early once the policy has moved too far."""

    def __init__(self, number: int, batch: PolicyBatch, settings: OnlineSettings) -> None:
        self._number = number
        self._batch = batch
        self._settings = settings
        self._metrics: list[Metrics] = []
        self._epochs_done = 0
        self._stopped = False

    def __iter__(self) -> Iterator[tuple[int, PolicyBatch]]:
        """The number of each update over the whole run, and its minibatch.

        Each update is logged before the next is asked for: at the end of an epoch what was logged says whether to stop.
        """
        settings = self._settings
        for epoch in range(settings.num_epochs if self._batch.num_sequences else 0):
            before = len(self._metrics)
            first = (self._number * settings.num_epochs + epoch) * settings.num_minibatches
            order = (self._number, epoch)
            yield from enumerate(
                minibatches(self._batch, settings.num_minibatches, seed=settings.seed, order=order), start=first
            )
            self._epochs_done = epoch + 1
            moved = merge(self._metrics[before:]).get("policy/approx_kl")
            too_far = settings.stop_kl is not None and moved is not None and moved.value > settings.stop_kl
            self._stopped = too_far and epoch + 1 < settings.num_epochs
            if self._stopped:
                return

    def log(self, metrics: Metrics) -> None:
        """Takes the metrics of an update."""
        self._metrics.append(metrics)

    @property
    def metrics(self) -> Metrics:
        """The metrics of all updates, how many passes were made, and whether further ones were left out."""
        return merge(self._metrics) | {
            "policy/epochs": Mean(self._epochs_done, 1),
            "policy/stopped_early_fraction": Mean(self._stopped, 1),
        }


def minibatches(
    batch: PolicyBatch, num_minibatches: int, *, seed: int, order: tuple[int, int]
) -> Iterator[PolicyBatch]:
    """The batch in equal parts of whole trees, shuffled anew for every step and epoch (`order`); none is dropped."""
    shuffled = seeds.generator(seed, "minibatches", *order).permutation(len(batch.trees.trees)).tolist()
    for part in range(num_minibatches):
        if chosen := shuffled[part::num_minibatches]:
            yield batch.select(chosen)
