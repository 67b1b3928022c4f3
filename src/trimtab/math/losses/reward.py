"""Reward models: preferences as differences of scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.batches.outputs import ScoreOutputs
from trimtab.batches.pairs import PairBatch
from trimtab.core.metrics import Metrics
from trimtab.math.losses.aggregation import means
from trimtab.math.masking import at_least_float32


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair in nats, [P] (Ouyang et al., arXiv:2203.02155, eq. 1; margin: Touvron et al.,
    arXiv:2307.09288, eq. 2).

        x = chosen - rejected - margin,   L = -q log sigmoid(x) - (1 - q) log sigmoid(-x)

    `label` is the probability that the chosen side is preferred (1 unless given). A share `label_smoothing` of the
    labels is assumed to be flipped: q = label * (1 - label_smoothing) + (1 - label) * label_smoothing.
    """
    logits = at_least_float32(chosen) - at_least_float32(rejected)
    if margin is not None:
        logits = logits - margin
    label = torch.ones_like(logits) if label is None else label.to(logits.dtype)
    q = label * (1 - label_smoothing) + (1 - label) * label_smoothing
    return -q * logsigmoid(logits) - (1 - q) * logsigmoid(-logits)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Penalty of each pair, [P]: (chosen + rejected)^2. It fixes the zero of scores, which Bradley-Terry leaves free
    (Eisenstein et al., arXiv:2312.09244, eq. 2)."""
    return (at_least_float32(chosen) + at_least_float32(rejected)).square()


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Bradley-Terry over pairs, with their margins and soft labels if they have any."""

    coef: float = 1.0
    """Weight in the sum of losses."""
    label_smoothing: float = 0.0
    """Share of the labels assumed to be wrong."""
    centering_coef: float = 0.01
    """Weight of the penalty that keeps scores around zero; 0 leaves their level free."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 0.5)")
        if self.centering_coef < 0:
            raise ValueError(f"centering_coef is {self.centering_coef}; it must be at least 0")

    def weight(self, batch: PairBatch) -> Tensor:
        """The number of pairs."""
        return torch.tensor(len(batch.chosen_ids), dtype=torch.float64)

    def __call__(self, outputs: ScoreOutputs, batch: PairBatch) -> tuple[Tensor, Metrics]:
        scores = at_least_float32(outputs.scores)
        chosen, rejected = scores[batch.chosen_ids], scores[batch.rejected_ids]
        losses = bradley_terry(
            chosen,
            rejected,
            margin=batch.margins.nan_to_num(nan=0.0),
            label=batch.labels,
            label_smoothing=self.label_smoothing,
        ) + self.centering_coef * centering(chosen, rejected)
        difference = chosen - rejected
        right = (difference.sign() + 1) / 2  # a tie is half right
        metrics = means(
            {
                "loss/train": losses,
                "reward/margin": difference,
                "reward/accuracy": right[batch.labels != 0.5],  # pairs judged a tie have no right side
            }
        )
        return losses.sum(), metrics
