"""A limit on what replies cost, beside the reward: PPO with a Lagrangian (Safe RLHF: Dai et al., arXiv:2310.12773).

The cost has advantages of its own, by the same estimator as the reward's, and a critic of its own if one is needed;
the policy is moved by both. Unlike in the paper's code, advantages are whitened, if at all, after the two are joined:
whitened apart, lambda would weigh deviations and not the units in which the limit is set. Costs are not shaped either,
since they are compared with the limit as they are.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.batches.rollouts import PolicyBatch
from trimtab.core.metrics import Mean, Metrics, mean_of, merge
from trimtab.engines.base import Learner
from trimtab.engines.build import Engines
from trimtab.math.advantages import Episodes, token_rewards
from trimtab.math.constraints import Multiplier, lagrangian
from trimtab.rewards.combined import COST
from trimtab.stages.online.models import Models
from trimtab.stages.online.objectives import Minibatches
from trimtab.stages.online.rollouts import RolloutBatch
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState


class Limit(Protocol):
    """What a limit makes of the advantages of a step: `no_limit`, or a `Lagrangian`."""

    def __call__(
        self, number: int, advantages: Tensor, rollouts: RolloutBatch, kl: Tensor, state: OnlineState
    ) -> tuple[Tensor, Metrics]:
        """[M] the advantages that move the policy, and metrics; `kl` [M] is that of each token, in nats."""


def no_limit(
    number: int, advantages: Tensor, rollouts: RolloutBatch, kl: Tensor, state: OnlineState
) -> tuple[Tensor, Metrics]:
    """The advantages as they are."""
    return advantages, {}


class Lagrangian:
    """Holds the mean cost of replies at a limit."""

    def __init__(self, settings: OnlineSettings, critic: Learner | None) -> None:
        """`critic` gives the values of the cost; None for estimators that need none."""
        assert settings.cost is not None
        self._settings = settings
        self._cost = settings.cost
        self._critic = critic

    def __call__(
        self, number: int, advantages: Tensor, rollouts: RolloutBatch, kl: Tensor, state: OnlineState
    ) -> tuple[Tensor, Metrics]:
        """Moves lambda by the costs of all replies of this step, also of those that dynamic sampling replaced; lets the
        cost's critic learn them, and joins both advantages.

        While only critics learn, lambda stays where it is: the policy could not follow it. A KL that the reward pays is
        added to the cost, so that its coefficient in the joined advantages is the same for every lambda.
        """
        settings, cost = self._settings, self._cost
        trees, ids = rollouts.trees, rollouts.trees.sequence_ids
        costs = cost.reward.weight * rollouts.parts[COST]  # [B]
        baselines = cost.reward.weight * rollouts.baseline_parts[COST]
        assert state.multiplier is not None
        seen = [*costs.tolist(), *(cost.reward.weight * score for score in rollouts.replaced_costs)]
        # A shorter window than a step would hold the last of its prompts alone.
        state.multiplier = state.multiplier.see(seen, window=max(cost.window, len(seen)))
        if self._critic is None or number >= settings.critic.warmup_steps:
            state.multiplier = state.multiplier.update(
                limit=cost.limit, learning_rate=cost.learning_rate, least=cost.least_lambda, most=cost.most_lambda
            )
        values = self._critic.values(trees) if self._critic is not None else torch.full_like(advantages, torch.nan)
        paid = token_rewards(costs, kl, ids, kl_coef=-state.kl_coef if settings.kl_in == "reward" else 0.0)
        parts = [(1.0, costs)] if settings.reads_parts else []
        of_cost = settings.advantage(Episodes(paid, values, ids, rollouts.group_ids, baselines, parts))
        learned = self._learn(number, rollouts, values, of_cost)
        multiplier = state.multiplier
        weight = multiplier.damped(limit=cost.limit, damping=cost.damping, most=cost.most_lambda)
        metrics: Metrics = {
            "cost/mean": mean_of(seen),
            "cost/moving_mean": Mean(multiplier.mean_cost, 1),
            "cost/above_limit": Mean(multiplier.mean_cost - cost.limit, 1),
            "cost/lambda": Mean(multiplier.value, 1),
            "cost/weight": Mean(weight, 1),
        }
        return lagrangian(advantages, of_cost, weight), metrics | learned

    def _learn(self, number: int, rollouts: RolloutBatch, values: Tensor, advantages: Tensor) -> Metrics:
        """The passes of the cost's critic over the step; its metrics as `cost_critic/NAME`."""
        critic, settings = self._critic, self._settings
        if critic is None:
            return {}
        unread = torch.full_like(values, torch.nan)  # the value loss reads values and returns alone
        batch = PolicyBatch(
            trees=rollouts.trees,
            old_logprobs=unread,
            correction=unread,
            ref_logprobs=unread,
            old_values=values,
            advantages=unread,
            returns=values + advantages,
        )
        if settings.skip_truncated:
            batch = batch.filter(rollouts.finished)
        passes = Minibatches(number, batch, settings)
        logged = [critic.update([(minibatch, [settings.critic.loss])]) for _, minibatch in passes]
        return {name.replace("critic/", "cost_critic/", 1): metric for name, metric in merge(logged).items()}


def make_limit(settings: OnlineSettings, models: Models, engines: Engines, state: OnlineState) -> Limit:
    """The limit that the settings ask for. Its multiplier and its critic become part of the state."""
    if settings.cost is None:
        return no_limit
    critic: Learner | None = None
    if models.cost_critic is not None:
        how: dict[str, Any] = {"token_budget": settings.token_budget, "precision": settings.precision}
        critic = engines.learner(
            models.cost_critic,
            settings.critic.optimizer,
            name="cost_critic",
            num_updates=settings.num_steps * settings.num_epochs * settings.num_minibatches,
            checkpoint_activations=settings.checkpoint_activations,
            **how,
        )
        state.learners = [*state.learners, critic]
    state.multiplier = Multiplier.starting_at(settings.cost.initial_lambda)
    return Lagrangian(settings, critic)
