"""A trained reward model, or an ensemble of them, as a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.batches.device import CPU
from trimtab.core.errors import ConfigError
from trimtab.core.hub import is_ensemble, on_base, refuse_process_model
from trimtab.core.registry import register
from trimtab.evals.length_curves import LengthMethod
from trimtab.math.ensembles import COEFS, Aggregate
from trimtab.rewards.ensemble import EnsembleScorer
from trimtab.rewards.length_correction import read_correction
from trimtab.rewards.scorer import RewardModelScorer


@dataclass(frozen=True, kw_only=True)
class ModelReward:
    """A reward that a model gives: `load` takes a device, and a base that the model may share."""

    path: str
    """Directory written by the reward stage, or for the reward `model` any sequence classifier with one label."""
    weight: float = 1.0
    """Factor in the sum of rewards."""


@register("reward", "model")
@dataclass(frozen=True, kw_only=True)
class RewardModel(ModelReward):
    """The score of a reward model directory, calibrated: a demonstration scores 0 on average. Of a model of outcomes it
    is the log-odds of a right reply, of one of ratings the rating."""

    aggregate: Aggregate = "mean"
    """How the scores of an ensemble become one: "mean", "min" (WCO), "variance" (UWO), "lower_bound" or "soft_min"."""
    aggregate_coef: float | None = None
    """Its coefficient; None takes 0.5 for "variance" and 1 for "lower_bound" and "soft_min"."""
    length_correction: LengthMethod | None = None
    """Subtract what the model pays for the length of a reply, by the curve in its directory: a straight line
    ("regression") or a local one ("lowess"). The reward stage and `trimtab debias` fit both; None subtracts nothing."""

    def __post_init__(self) -> None:
        if self.aggregate_coef is not None and self.aggregate not in COEFS:
            raise ValueError(f"aggregate_coef = {self.aggregate_coef:g}, and aggregate = {self.aggregate!r} has none")

    def load(
        self,
        *,
        token_budget: int,
        device: torch.device = CPU,
        name: str = "model",
        shared: PreTrainedModel | None = None,
        base: str = "",
    ) -> RewardModelScorer:
        """The model on a device. If it is an adapter of the `shared` base, it becomes another adapter on that. `name`
        is that of the reward in metrics. Raises ConfigError if one model is to be aggregated, or if it is to be
        corrected and no correction was fitted."""
        refuse_process_model(self.path, where=self.path)
        correction = self.length_correction and read_correction(self.path, self.length_correction, name=name)
        on_shared = shared if shared is not None and on_base(self.path, base) else None
        scorer = self._scorer(token_budget=token_budget, device=device, name=name, shared=on_shared)
        scorer.length_correction = correction
        return scorer

    def _scorer(
        self, *, token_budget: int, device: torch.device, name: str, shared: PreTrainedModel | None
    ) -> RewardModelScorer:
        """The model without a correction, on the `shared` base if that is given."""
        if is_ensemble(self.path):
            how = (self.aggregate, self.aggregate_coef)
            where: dict[str, Any] = {"token_budget": token_budget, "device": device, "shared": shared}
            return EnsembleScorer.load(self.path, name=name, how=how, **where)
        if self.aggregate != "mean":
            raise ConfigError(
                f"aggregate = {self.aggregate!r}, and this is one reward model",
                where=self.path,
                fix="leave aggregate out, or train an ensemble: trimtab reward with members = 5",
            )
        if shared is not None:
            return RewardModelScorer.on_shared(shared, f"reward_{name}", self.path, token_budget=token_budget)
        return RewardModelScorer.from_directory(self.path, token_budget=token_budget, device=device)
