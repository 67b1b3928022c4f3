"""Reward models: preferences as differences of scores, over pairs (Bradley-Terry) or rankings (Plackett-Luce)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.batches.outputs import ScoreOutputs
from trimtab.batches.pairs import PairBatch
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.metrics import Metrics
from trimtab.core.registry import register
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


def unbiased_label(label: Tensor, flipped: float) -> Tensor:
    """The label [P] to learn from when a share `flipped` of the labels is wrong (Natarajan et al., 2013, lemma 1; for
    preferences: Chowdhury et al., arXiv:2403.00409, section 3).

        q' = (q - flipped) / (1 - 2 flipped)

    The mean of the loss over noisy labels is then the mean over correct ones. q' is above 1 for a clear label, so the
    loss of a pair can be negative, and it has no lower bound.
    """
    return (label - flipped) / (1 - 2 * flipped)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Penalty of each pair, [P]: (chosen + rejected)^2. It fixes the zero of scores, which Bradley-Terry leaves free
    (Eisenstein et al., arXiv:2312.09244, eq. 2)."""
    return (at_least_float32(chosen) + at_least_float32(rejected)).square()


def plackett_luce(scores: Tensor, ranks: Tensor, rankings: Tensor) -> Tensor:
    """Loss of each reply in nats, [B]; its sum over a ranking is the negative log-likelihood of that order (Plackett,
    1975; Luce, 1959; as a loss: Xia et al., 2008, "ListMLE").

        L_i = log sum_{j: rank_j >= rank_i} exp(s_j) - s_i

    The best reply is chosen among all, the next among those that are left, and so on. `ranks` [B] are those of
    `PairBatch.ranks`, and `rankings` [B] is the ranking that each reply belongs to. Each of several tied replies is
    chosen among all that are not better than it (Breslow, 1974). With two replies this is Bradley-Terry.
    """
    scores = at_least_float32(scores)
    left = (rankings[:, None] == rankings[None, :]) & (ranks[None, :] >= ranks[:, None])
    return torch.where(left, scores[None, :], -torch.inf).logsumexp(1) - scores


@register("reward_loss", "bradley_terry")
@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """Bradley-Terry over pairs, with their margins and soft labels if they have any."""

    coef: float = 1.0
    """Weight in the sum of losses."""
    label_smoothing: float = 0.0
    """Share of the labels assumed to be wrong."""
    unbiased: bool = False
    """Correct for the wrong labels instead of learning that they occur; see `unbiased_label`."""
    margin_coef: float = 1.0
    """Factor of the margins: 0 ignores them, 1/3 makes 1 of the strongest of the grades 0 to 3."""
    centering_coef: float = 0.01
    """Weight of the penalty that keeps scores around zero; 0 leaves their level free."""
    mean_over: Literal["pairs", "prompts"] = "pairs"
    """What counts the same: all pairs, or all prompts; then a pair of a prompt with K ranked replies weighs
    1 / C(K, 2)."""

    needs_ranking: ClassVar[bool] = False

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "centering_coef", "label_smoothing")
        if self.unbiased and not self.label_smoothing:
            raise ValueError("unbiased = true corrects for wrong labels; label_smoothing says how many there are")

    def weight(self, batch: PairBatch) -> Tensor:
        """The number of pairs, or of prompts."""
        return torch.tensor(len(batch.chosen_ids if self.mean_over == "pairs" else batch.compared), dtype=torch.float64)

    def __call__(self, outputs: ScoreOutputs, batch: PairBatch) -> tuple[Tensor, Metrics]:
        scores = at_least_float32(outputs.scores)
        chosen, rejected = scores[batch.chosen_ids], scores[batch.rejected_ids]
        losses = bradley_terry(
            chosen,
            rejected,
            margin=self.margin_coef * batch.margins.nan_to_num(nan=0.0),
            label=unbiased_label(batch.labels, self.label_smoothing) if self.unbiased else batch.labels,
            label_smoothing=0.0 if self.unbiased else self.label_smoothing,
        ) + self.centering_coef * centering(chosen, rejected)
        if self.mean_over == "prompts":
            losses = losses * batch.shares
        return losses.sum(), _metrics(losses, self.weight(batch), chosen - rejected, batch)


@register("reward_loss", "plackett_luce")
@dataclass(frozen=True, kw_only=True)
class PlackettLuce:
    """Plackett-Luce over the whole ranking of a prompt's replies; every prompt counts the same."""

    coef: float = 1.0
    """Weight in the sum of losses."""
    centering_coef: float = 0.01
    """Weight of the penalty that keeps scores around zero; 0 leaves their level free."""
    ties: Literal["refuse", "breslow"] = "refuse"
    """Refuse rankings with tied replies, or choose each of them among all that are not better (Breslow)."""

    needs_ranking: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "centering_coef")

    def weight(self, batch: PairBatch) -> Tensor:
        """The number of rankings."""
        return torch.tensor(len(batch.compared), dtype=torch.float64)

    def __call__(self, outputs: ScoreOutputs, batch: PairBatch) -> tuple[Tensor, Metrics]:
        scores = at_least_float32(outputs.scores)
        chosen, rejected = scores[batch.chosen_ids], scores[batch.rejected_ids]
        losses = torch.cat(
            [
                plackett_luce(scores, batch.ranks, batch.sequence_trees),
                self.centering_coef * centering(chosen, rejected) * batch.shares,
            ]
        )
        return losses.sum(), _metrics(losses, self.weight(batch), chosen - rejected, batch)


def _metrics(losses: Tensor, weight: Tensor, difference: Tensor, batch: PairBatch) -> Metrics:
    """The loss per unit of its weight, and the accuracy and margin over pairs."""
    right = (difference.sign() + 1) / 2  # a tie is half right
    return means(
        {
            "loss/train": losses,
            "reward/margin": difference,
            "reward/accuracy": right[batch.labels != 0.5],  # pairs judged a tie have no right side
        },
        {"loss/train": weight},
    )
