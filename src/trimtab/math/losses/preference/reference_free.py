"""Losses over pairs that need no reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.batches.pairs import PairBatch
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.registry import register
from trimtab.math.losses.preference.common import PairLoss, expected, mean_logprobs, reply_logprobs
from trimtab.math.losses.preference.pairs import dpo
from trimtab.math.losses.reward import bradley_terry

_CERTAIN = -1e-6
"""Upper bound of a mean log-probability, because the odds of a certain reply are infinite."""


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^mean_logprobs, the geometric mean of a reply's token probabilities."""
    logp = mean_logprobs.clamp(max=_CERTAIN)
    return logp - torch.log(-torch.expm1(logp))


@register("preference_loss", "orpo")
@dataclass(frozen=True, kw_only=True)
class ORPO(PairLoss):
    """Odds ratio preference optimisation: imitation of the chosen reply plus -log sigmoid of the log odds ratio (Hong
    et al., arXiv:2403.07691, eq. 6 and 7). The implied rewards are log odds."""

    nll_coef: float = 1.0
    """Weight of the imitation of the chosen reply."""
    odds_coef: float = 0.1
    """Weight of the odds ratio term: lambda of the paper."""

    needs_reference: ClassVar[bool] = False

    def rewards(self, logprobs: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The log odds of both replies, two [P]."""
        odds = log_odds(mean_logprobs(logprobs, batch))
        return odds[batch.chosen_ids], odds[batch.rejected_ids]

    def losses(self, chosen: Tensor, rejected: Tensor, batch: PairBatch) -> Tensor:
        return self.odds_coef * expected(lambda c, r: dpo(c - r), chosen, rejected, batch.labels)


@register("preference_loss", "simpo")
@dataclass(frozen=True, kw_only=True)
class SimPO(PairLoss):
    """SimPO: -log sigmoid(beta (log pi(y_c) / |y_c| - log pi(y_r) / |y_r|) - gamma) (Meng et al., arXiv:2405.14734,
    eq. 6). With nll_coef = 1 it is CPO-SimPO."""

    beta: float = 2.0
    """Implied reward for each nat of mean log-probability per token."""
    gamma: float = 1.0
    """Target margin: the difference of rewards should exceed it; half of beta is a good start."""
    label_smoothing: float = 0.0
    """Share of the labels assumed to be flipped."""

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_out_of_range(self, "gamma")

    def rewards(self, logprobs: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """beta times the mean log-probability of both replies' tokens, two [P]."""
        means = self.beta * mean_logprobs(logprobs, batch)
        return means[batch.chosen_ids], means[batch.rejected_ids]

    def losses(self, chosen: Tensor, rejected: Tensor, batch: PairBatch) -> Tensor:
        def of_vote(better: Tensor, worse: Tensor) -> Tensor:
            return bradley_terry(better - self.gamma, worse, label_smoothing=self.label_smoothing)

        # A vote for the rejected reply wants it ahead by the margin, so a soft label is not one of bradley_terry's.
        return expected(of_vote, chosen, rejected, batch.labels)


@register("preference_loss", "cpo")
@dataclass(frozen=True, kw_only=True)
class CPO(PairLoss):
    """Contrastive preference optimisation: DPO with a uniform reference, plus imitation of the chosen reply (Xu et
    al., arXiv:2401.08417, eq. 3 to 5)."""

    nll_coef: float = 1.0
    """Weight of the imitation of the chosen reply."""
    beta: float = 0.1
    """Implied reward for each nat of log-probability."""
    label_smoothing: float = 0.0
    """Share of the labels assumed to be flipped."""

    needs_reference: ClassVar[bool] = False

    def rewards(self, logprobs: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """beta times the log-probability of both replies, two [P]."""
        sums = self.beta * reply_logprobs(logprobs, batch)
        return sums[batch.chosen_ids], sums[batch.rejected_ids]

    def losses(self, chosen: Tensor, rejected: Tensor, batch: PairBatch) -> Tensor:
        return bradley_terry(chosen, rejected, label=batch.labels, label_smoothing=self.label_smoothing)
