"""Losses over pairs with a reference: functions of the implied rewards of both replies, [P] each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from trimtab.batches.pairs import ReferencePairs
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.registry import register
from trimtab.math.losses.preference.common import ReferenceLoss, expected, reply_logprobs, shared_length_sums
from trimtab.math.losses.reward import bradley_terry
from trimtab.math.masking import sequence_lengths

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

_MAX_EXPONENT = 40.0
"""Bound on exponents: IPO squares e^40, which is still a finite float32. With larger ones a gradient would be nan."""


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """f'(u) at u = e^log_ratio: the implied reward, up to a constant, of a policy regularised by the divergence f
    (f-DPO: Wang et al., arXiv:2309.16240, theorem 1).

        reverse_kl  log u        forward_kl  -1 / u        js  log(2 u / (1 + u))        alpha  (1 - u^-alpha) / alpha

    The alpha divergence is the reverse KL at alpha -> 0 and, up to a constant, the forward KL at alpha = 1.
    """
    if divergence == "forward_kl":
        return -(-log_ratio).clamp(max=_MAX_EXPONENT).exp()
    if divergence == "js":
        return math.log(2) + logsigmoid(log_ratio)
    if divergence == "alpha":
        return (1 - (-alpha * log_ratio).clamp(max=_MAX_EXPONENT).exp()) / alpha
    return log_ratio


def dpo(gap: Tensor) -> Tensor:
    """DPO: -log sigmoid(gap), where gap is chosen minus rejected reward (Rafailov et al., arXiv:2305.18290, eq. 7)."""
    return -logsigmoid(gap)


def robust_dpo(gap: Tensor, flipped: float) -> Tensor:
    """DPO's loss corrected for a share `flipped` of wrong labels (Chowdhury et al., arXiv:2403.00409, section 3): its
    mean over noisy labels equals DPO's mean over correct ones. It can be negative."""
    return ((1 - flipped) * dpo(gap) - flipped * dpo(-gap)) / (1 - 2 * flipped)


def ipo(gap: Tensor, tau: float) -> Tensor:
    """IPO: (h - 1 / (2 tau))^2 with h = gap / tau the difference of log-ratios (Azar et al., arXiv:2310.12036,
    eq. 17)."""
    return (gap / tau - 1 / (2 * tau)).square()


def hinge(gap: Tensor) -> Tensor:
    """SLiC's hinge on the difference of rewards, max(0, 1 - gap) (Zhao et al., arXiv:2305.10425; with a
    reference: Liu et al., arXiv:2309.06657)."""
    return relu(1 - gap)


def exo(gap: Tensor, target: Tensor) -> Tensor:
    """EXO: KL(p || target) over the two replies, p = (sigmoid(gap), sigmoid(-gap)), target = (t, 1 - t) (Ji et al.,
    arXiv:2402.00856, eq. 16)."""
    return gap.sigmoid() * (logsigmoid(gap) - target.log()) + (-gap).sigmoid() * (logsigmoid(-gap) - (1 - target).log())


def discopop(gap: Tensor, tau: float) -> Tensor:
    """DiscoPOP: (1 - m) * -log sigmoid(gap) + m * e^-gap, m = sigmoid(gap / tau) (Lu et al., arXiv:2406.08414, eq. 5).

    The second term is computed as e^(-gap + log m), because e^-gap alone overflows when m is near 0.
    """
    mixed = (gap / tau).sigmoid()
    return (1 - mixed) * dpo(gap) + (logsigmoid(gap / tau) - gap).exp()


def nca(chosen: Tensor, rejected: Tensor) -> Tensor:
    """NCA for a pair: -log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2 (Chen et al., arXiv:2402.05369,
    with K = 2 and all weight on the chosen reply)."""
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def sppo(chosen: Tensor, rejected: Tensor, labels: Tensor, beta: float) -> Tensor:
    """SPPO: the sum over both replies of (log-ratio - (P - 1/2) / beta)^2, with P the probability that the reply wins
    (Wu et al., arXiv:2405.00675, eq. 4.7; its eta is 1 / beta). `chosen` and `rejected` are beta times the
    log-ratios."""
    ahead = labels - 0.5
    return ((chosen - ahead) / beta).square() + ((rejected + ahead) / beta).square()


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """APO-zero: -sigmoid(c) + sigmoid(r), plus 1. It raises the chosen reply and lowers the rejected one (D'Oosterlinck
    et al., arXiv:2408.06266, eq. 7)."""
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """APO-down: sigmoid(c) - sigmoid(c - r), plus 1. It lowers both replies, the rejected one more (D'Oosterlinck et
    al., arXiv:2408.06266, eq. 8)."""
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


@dataclass(frozen=True, kw_only=True)
class GapLoss(ReferenceLoss):
    """Base of a loss on the gap, the difference of two implied rewards."""

    label_smoothing: float = 0.0
    """Share of the labels assumed to be flipped (cDPO)."""
    margin_coef: float = 0.0
    """Weight of a pair's margin, which is subtracted from the gap (ODPO: arXiv:2402.10571)."""
    divergence: Divergence = "reverse_kl"
    """The divergence that keeps the policy close to the reference (f-DPO)."""
    divergence_alpha: float = 0.5
    """alpha of the alpha divergence, between 0 (the reverse KL) and 1 (the forward KL)."""
    length_normalised: bool = False
    """Divide the score of each reply by its number of tokens."""
    ld_alpha: float = 1.0
    """Weight of the tokens past the length of the pair's shorter reply (LD-DPO); 1 weights all tokens alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_out_of_range(self, "divergence_alpha", "ld_alpha")

    def rewards(self, logprobs: Tensor, batch: ReferencePairs) -> tuple[Tensor, Tensor]:
        """beta f'(pi / pi_ref) of both replies, two [P]."""
        differences = logprobs - batch.ref_logprobs
        if self.ld_alpha == 1:
            ratios = reply_logprobs(differences, batch)
            chosen, rejected = ratios[batch.chosen_ids], ratios[batch.rejected_ids]
        else:
            chosen, rejected = shared_length_sums(differences, batch, self.ld_alpha)
        chosen, rejected = (divergence_score(x, self.divergence, self.divergence_alpha) for x in (chosen, rejected))
        if self.length_normalised:
            lengths = sequence_lengths(batch.sequence_ids, batch.num_sequences)
            chosen, rejected = chosen / lengths[batch.chosen_ids], rejected / lengths[batch.rejected_ids]
        return self.beta * chosen, self.beta * rejected

    def losses(self, chosen: Tensor, rejected: Tensor, batch: ReferencePairs) -> Tensor:
        """The loss of each pair, [P], under its label."""
        gap = chosen - rejected
        if self.margin_coef:
            gap = gap - self.margin_coef * batch.margins
        return self.of_gap(gap, self.smoothed(batch.labels))

    def smoothed(self, labels: Tensor) -> Tensor:
        """The labels [P] with a share `label_smoothing` of them flipped."""
        return labels * (1 - self.label_smoothing) + (1 - labels) * self.label_smoothing

    def of_gap(self, gap: Tensor, labels: Tensor) -> Tensor:
        """The loss [P] of gaps [P], if the chosen reply is the better one with probability `labels` [P]."""
        raise NotImplementedError


@register("preference_loss", "dpo")
@dataclass(frozen=True, kw_only=True)
class DPO(GapLoss):
    """Direct preference optimisation: see `dpo`."""

    def of_gap(self, gap: Tensor, labels: Tensor) -> Tensor:
        return bradley_terry(gap, torch.zeros_like(gap), label=labels)


@register("preference_loss", "robust_dpo")
@dataclass(frozen=True, kw_only=True)
class RobustDPO(GapLoss):
    """DPO for labels of which a known share is wrong: see `robust_dpo`."""

    label_smoothing: float = 0.1
    """Share of the labels assumed to be flipped."""

    def of_gap(self, gap: Tensor, labels: Tensor) -> Tensor:
        return expected(lambda a, b: robust_dpo(a - b, self.label_smoothing), gap, torch.zeros_like(gap), labels)

    def smoothed(self, labels: Tensor) -> Tensor:
        """The labels unchanged, because the loss itself corrects for flipped labels."""
        return labels


@register("preference_loss", "ipo")
@dataclass(frozen=True, kw_only=True)
class IPO(GapLoss):
    """Identity preference optimisation: see `ipo`. Its tau is beta. With length_normalised each log-ratio is the mean
    over a reply's tokens, as its authors ran it; the equation uses whole replies."""

    def of_gap(self, gap: Tensor, labels: Tensor) -> Tensor:
        return expected(lambda a, b: ipo(a - b, self.beta), gap, torch.zeros_like(gap), labels)


@register("preference_loss", "hinge")
@dataclass(frozen=True, kw_only=True)
class Hinge(GapLoss):
    """A hinge on the difference of rewards: see `hinge`."""

    def of_gap(self, gap: Tensor, labels: Tensor) -> Tensor:
        return expected(lambda a, b: hinge(a - b), gap, torch.zeros_like(gap), labels)


@register("preference_loss", "exo")
@dataclass(frozen=True, kw_only=True)
class EXO(GapLoss):
    """Efficient exact optimisation: see `exo`."""

    label_smoothing: float = 1e-3
    """Probability that the target gives the rejected reply. It is above 0, because its logarithm is taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing == 0:
            raise ValueError("label_smoothing is 0; EXO takes its logarithm, so it must be above 0")

    def of_gap(self, gap: Tensor, labels: Tensor) -> Tensor:
        return exo(gap, labels.to(gap.dtype))


@register("preference_loss", "discopop")
@dataclass(frozen=True, kw_only=True)
class DiscoPOP(GapLoss):
    """The loss that its paper found by automatic search: see `discopop`."""

    beta: float = 0.05
    """The beta of DPO."""
    tau: float = 0.05
    """Width, in units of the gap, of the change from the logistic to the exponential loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_out_of_range(self, "tau")

    def of_gap(self, gap: Tensor, labels: Tensor) -> Tensor:
        return expected(lambda a, b: discopop(a - b, self.tau), gap, torch.zeros_like(gap), labels)


@register("preference_loss", "nca")
@dataclass(frozen=True, kw_only=True)
class NCA(ReferenceLoss):
    """Noise contrastive alignment: see `nca`."""

    def losses(self, chosen: Tensor, rejected: Tensor, batch: ReferencePairs) -> Tensor:
        return expected(nca, chosen, rejected, batch.labels)


@register("preference_loss", "sppo")
@dataclass(frozen=True, kw_only=True)
class SPPO(ReferenceLoss):
    """Self-play preference optimisation on given pairs: see `sppo`."""

    beta: float = 1e-3
    """1 / eta of the paper. A reply that surely wins has the target log-ratio eta / 2, in nats."""

    def losses(self, chosen: Tensor, rejected: Tensor, batch: ReferencePairs) -> Tensor:
        return sppo(chosen, rejected, batch.labels.to(chosen.dtype), self.beta)


@register("preference_loss", "apo_zero")
@dataclass(frozen=True, kw_only=True)
class APOZero(ReferenceLoss):
    """Anchored preference optimisation, for chosen replies that are better than the policy's own: see `apo_zero`."""

    def losses(self, chosen: Tensor, rejected: Tensor, batch: ReferencePairs) -> Tensor:
        return expected(apo_zero, chosen, rejected, batch.labels)


@register("preference_loss", "apo_down")
@dataclass(frozen=True, kw_only=True)
class APODown(ReferenceLoss):
    """Anchored preference optimisation, for chosen replies that are worse than the policy's own: see `apo_down`."""

    def losses(self, chosen: Tensor, rejected: Tensor, batch: ReferencePairs) -> Tensor:
        return expected(apo_down, chosen, rejected, batch.labels)
