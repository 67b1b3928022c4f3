"""Losses over replies that were judged one by one, with a thumbs up or down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.batches.outputs import TokenOutputs
from trimtab.batches.replies import BaselinedReplies, JudgedReplies, MismatchedReplies
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.metrics import Mean, Metrics
from trimtab.core.registry import register
from trimtab.math.losses.preference.common import LogprobsOf, mean_logprobs, reply_logprobs
from trimtab.math.masking import at_least_float32, sum_per_sequence


@dataclass(frozen=True)
class Gap:
    """The difference of two means, `upper` - `lower`, stored so that parts merge exactly."""

    upper: Mean
    lower: Mean

    def merge(self, other: Gap) -> Gap:
        return Gap(self.upper.merge(other.upper), self.lower.merge(other.lower))

    @property
    def value(self) -> float:
        return self.upper.value - self.lower.value


def kto_value(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a good reply, 1 - sigmoid(x), and of a bad one, 1 - sigmoid(-x), for rewards x [B] less the baseline
    (Ethayarajh et al., arXiv:2402.01306, section 4.1: lambda - v at lambda = 1)."""
    return (-rewards).sigmoid(), rewards.sigmoid()


def binary_cross_entropy(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a good reply, -log sigmoid(x), and of a bad one, -log sigmoid(-x), for rewards x [B] less the shift
    (BCO: Jung et al., arXiv:2404.04656, section 3)."""
    return softplus(-rewards), softplus(rewards)


def mean_over_judgements(values: Tensor, judgements: Tensor) -> Tensor:
    """The mean of values [B], each weighted by its number of judgements [B]."""
    return (judgements * values).sum() / judgements.sum()


@dataclass(frozen=True, kw_only=True)
class ReplyLoss:
    """Base of a loss over judged replies. A subclass defines `good_and_bad`, and the baseline in `complete`."""

    coef: float = 1.0
    """Weight in the sum of losses."""
    beta: float = 0.1
    """Implied reward for each nat of log-ratio to the reference. With a larger beta the policy stays closer to the
    reference."""
    nll_coef: float = 0.0
    """Weight of the good replies' negative log-likelihood per token (RPO: arXiv:2404.19733)."""
    desirable_weight: float = 1.0
    """Weight of good replies; raise it if they are few."""
    undesirable_weight: float = 1.0
    """Weight of bad replies."""

    reads: ClassVar[Literal["pairs", "replies"]] = "replies"
    needs_reference: ClassVar[bool] = True
    uses_margins: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "beta", "desirable_weight", "undesirable_weight", "nll_coef")

    @property
    def needs_mismatched(self) -> bool:
        """Whether `complete` needs each prompt with the replies to another prompt."""
        return False

    def complete(self, batch: Any, logprobs_of: LogprobsOf) -> Any:
        """The batch with the baseline of its update."""
        raise NotImplementedError

    def good_and_bad(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [B] of replies with these rewards [B], less the baseline, if they are good and if they are bad."""
        raise NotImplementedError

    def weight(self, batch: JudgedReplies) -> Tensor:
        """The number of judgements."""
        return (batch.desirable.double() + batch.undesirable.double()).sum()

    def __call__(self, outputs: TokenOutputs, batch: BaselinedReplies) -> tuple[Tensor, Metrics]:
        logprobs = at_least_float32(outputs.logprobs)
        good_num, bad_num = (n.to(logprobs.dtype) for n in (batch.desirable, batch.undesirable))
        rewards = self.beta * reply_logprobs(logprobs - batch.ref_logprobs, batch)
        surplus = rewards - self.beta * batch.baseline
        good, bad = self.good_and_bad(surplus)
        losses = self.desirable_weight * good_num * good + self.undesirable_weight * bad_num * bad
        if self.nll_coef:
            nll = -mean_logprobs(logprobs, batch)
            losses = losses + self.nll_coef * good_num * nll
        with torch.no_grad():
            whole = reply_logprobs(logprobs, batch)
            right = (surplus.sign() + 1) / 2
            sums = [good_num, bad_num, losses, good_num * right + bad_num * (1 - right)]
            sums += [good_num * rewards, bad_num * rewards, good_num * whole, bad_num * whole]
            sums += [good_num * nll] if self.nll_coef else []
            num_good, num_bad, loss, num_right, r_good, r_bad, l_good, l_bad, *nlls = torch.stack(
                [x.double().sum() for x in sums]
            ).tolist()
            metrics: Metrics = {
                "loss/train": Mean(loss, num_good + num_bad),
                "policy/accuracy": Mean(num_right, num_good + num_bad),
                "policy/margin": Gap(Mean(r_good, num_good), Mean(r_bad, num_bad)),
                "policy/chosen_reward": Mean(r_good, num_good),
                "policy/rejected_reward": Mean(r_bad, num_bad),
                "policy/chosen_logprobs": Mean(l_good, num_good),
                "policy/rejected_logprobs": Mean(l_bad, num_bad),
                "policy/baseline": Mean(float(batch.baseline.double().sum()), batch.num_sequences),
            }
            if nlls:
                metrics["loss/nll"] = Mean(nlls[0], num_good)
        return losses.sum(), metrics


@register("preference_loss", "kto")
@dataclass(frozen=True, kw_only=True)
class KTO(ReplyLoss):
    """Kahneman-Tversky optimisation: see `kto_value`. The baseline is an estimate of the KL to the reference, max(0,
    mean log-ratio of prompts with the replies to other prompts), and passes no gradient."""

    baseline: Literal["mismatched", "none"] = "mismatched"
    """The baseline that is subtracted from each reply's log-ratio: the KL estimate, or none, which makes this loss
    APO-zero on unpaired replies (arXiv:2408.06266)."""

    @property
    def needs_mismatched(self) -> bool:
        """Whether `complete` needs each prompt with the replies to another prompt."""
        return self.baseline == "mismatched"

    def complete(self, batch: Any, logprobs_of: LogprobsOf) -> Any:
        """The batch with its KL estimate. Costs a forward pass without gradients over about as many tokens again."""
        if self.baseline == "none":
            return batch.with_baseline(torch.zeros(()))
        pairs: MismatchedReplies = batch
        differences = logprobs_of(pairs.mismatched) - pairs.mismatched_ref_logprobs
        ratios = sum_per_sequence(differences, pairs.mismatched.sequence_ids, pairs.mismatched.num_sequences)
        return pairs.with_baseline(ratios.mean().clamp(min=0))

    def good_and_bad(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        return kto_value(rewards)


@register("preference_loss", "bco")
@dataclass(frozen=True, kw_only=True)
class BCO(ReplyLoss):
    """Binary classifier optimisation: see `binary_cross_entropy`. The shift, which is subtracted from rewards, is half
    way between the mean rewards of good and of bad replies, and passes no gradient."""

    shift: Literal["update", "none"] = "update"
    """Compute the shift anew for each update, or use none."""

    def complete(self, batch: Any, logprobs_of: LogprobsOf) -> Any:
        """The batch with its shift. Costs a forward pass over the update without gradients."""
        if self.shift == "none":
            return batch.with_baseline(torch.zeros(()))
        judged: JudgedReplies = batch
        ratios = reply_logprobs(logprobs_of(judged.trees) - judged.ref_logprobs, judged)
        kinds = [n.to(ratios.dtype) for n in (judged.desirable, judged.undesirable)]
        means = [mean_over_judgements(ratios, n) for n in kinds if bool(n.sum() > 0)]
        return judged.with_baseline(torch.stack(means).mean())

    def good_and_bad(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        return binary_cross_entropy(rewards)
