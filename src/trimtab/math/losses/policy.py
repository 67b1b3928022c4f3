"""Losses of the policy: the surrogates, the entropy bonus, and KL as a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.batches.outputs import TokenOutputs
from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TreeBatch
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.metrics import Metrics, Peak
from trimtab.core.registry import register
from trimtab.math.kl import ESTIMATORS, MAX_LOG_RATIO, k3
from trimtab.math.losses.aggregation import Aggregation, means, num_terms, terms
from trimtab.math.masking import at_least_float32, mean_per_sequence


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi(a_t) / pi_old(a_t), [M], held in [e^-20, e^20]: an infinite ratio gives nan gradients even if clipped."""
    log_ratio = at_least_float32(logprobs) - at_least_float32(old_logprobs)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Per-token PPO loss, to be minimised (Schulman et al., arXiv:1707.06347, eq. 7).

        L_t = -min(r_t * A_t, clip(r_t, 1 - low, 1 + high) * A_t),   r_t = pi(a_t) / pi_old(a_t)

    With `dual_clip` c > 1, L_t is at most -c * A_t if A_t < 0 ("dual-clip PPO", Ye et al., arXiv:1912.09729).
    Every tensor is [M], the result too. Nothing is averaged here.
    """
    ratio = probability_ratio(logprobs, old_logprobs)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """[M] at each token the ratio of its whole sequence, which is the geometric mean of its tokens' ratios (Zheng et
    al., arXiv:2507.18071, eq. 7).

        s = exp(mean_t (log pi(a_t) - log pi_old(a_t)))
    """
    log_ratio = at_least_float32(logprobs) - at_least_float32(old_logprobs)
    mean = mean_per_sequence(log_ratio, sequence_ids, num_sequences)
    return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[sequence_ids]


def held_by_clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """[M] true if the clip stops a token's gradient: the ratio is past its bound in the direction of the advantage."""
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def require_clips(low: float, high: float) -> None:
    """Raises ValueError unless clip_low lies in (0, 1] and clip_high is above 0."""
    if not 0 < low <= 1:
        raise ValueError(f"clip_low is {low}; it must lie in (0, 1]")
    if not high > 0:
        raise ValueError(f"clip_high is {high}; it must be above 0")


def entropy_bonus(entropy: Tensor) -> Tensor:
    """Per-token loss `-entropy`, [M], in nats: it falls as the policy's entropy rises."""
    return -at_least_float32(entropy)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Literal["k2", "k3"]) -> Tensor:
    """Per-token KL to the reference as a loss, [M], differentiable in `logprobs`.

    See `kl.k2` and `kl.k3` for the KL direction of each gradient. There is no "k1", because its expected gradient as a
    loss is zero.
    """
    return ESTIMATORS[estimator](at_least_float32(logprobs) - at_least_float32(ref_logprobs))


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Base of every policy loss: how token losses are averaged and what is logged. A new loss only defines
    `token_losses`."""

    coef: float = 1.0
    """Weight in the sum of losses."""
    aggregation: Aggregation = "token_mean"
    """Average over all tokens of the update, over the token mean of each sequence, or with a constant length."""
    length: int | None = None
    """The constant of aggregation = "constant_length": usually max_new_tokens."""

    needs_entropy: ClassVar[bool] = True  # to log it: its collapse is the first sign of trouble
    bounds_ratio: ClassVar[bool] = False
    """Whether the loss bounds the ratio of new to old policy, which rollouts of older weights need."""

    def __post_init__(self) -> None:
        if (self.aggregation == "constant_length") != (self.length is not None):
            raise ValueError(
                f"aggregation = {self.aggregation!r} with length = {self.length}: the two belong together; "
                "give length (usually max_new_tokens) with aggregation = 'constant_length' only"
            )
        refuse_out_of_range(self, "length")

    def token_losses(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """[M] the loss of each token, and [M] bool, true at tokens whose gradient is stopped or limited."""
        raise NotImplementedError

    def weight(self, batch: TreeBatch) -> Tensor:
        return num_terms(batch, self.aggregation, self.length or 1)

    def __call__(self, outputs: TokenOutputs, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        token_losses, held = self.token_losses(outputs.logprobs, batch)
        losses = terms(token_losses * batch.correction, batch, self.aggregation)
        with torch.no_grad():
            logged = {
                "policy/loss": losses,
                "policy/clip_fraction": held,
                "policy/approx_kl": k3(batch.old_logprobs - outputs.logprobs),
                "policy/ratio_mean": probability_ratio(outputs.logprobs, batch.old_logprobs),
            }
            moved = (outputs.logprobs - batch.old_logprobs).abs()
            largest = float(moved.max()) if moved.numel() else 0.0
        if outputs.entropy is not None:
            logged["policy/entropy"] = outputs.entropy
        metrics = means(logged, {"policy/loss": self.weight(batch)})
        return losses.sum(), metrics | {"policy/log_ratio_max": Peak(largest)}


@register("policy_loss", "ppo")
@dataclass(frozen=True, kw_only=True)
class PPO(PolicyLoss):
    """The clipped surrogate of `clipped_surrogate`. A `clip_high` above `clip_low` is DAPO's clip-higher (Yu et al.,
    arXiv:2503.14476, section 3.1: 0.28 and 0.2), which lets unlikely tokens rise."""

    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is held below 1 + clip_high."""
    dual_clip: float | None = None
    """Dual-clip bound c on the ratio for negative advantages; None disables it. The paper uses 3."""

    bounds_ratio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clips(self.clip_low, self.clip_high)
        refuse_out_of_range(self, "dual_clip")

    def token_losses(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        losses = clipped_surrogate(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            low=self.clip_low,
            high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        ratio = probability_ratio(logprobs.detach(), batch.old_logprobs)
        held = held_by_clip(ratio, batch.advantages, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            held = held | ((ratio > self.dual_clip) & (batch.advantages < 0))
        return losses, held


@register("policy_loss", "gspo")
@dataclass(frozen=True, kw_only=True)
class GSPO(PolicyLoss):
    """PPO's clip on the ratio of whole replies instead of tokens; see `sequence_ratio`."""

    aggregation: Aggregation = "sequence_mean"
    """Average over the token mean of each sequence, over all tokens of the update, or with a constant length."""
    clip_low: float = 3e-4
    """The sequence's ratio is held above 1 - clip_low."""
    clip_high: float = 4e-4
    """The sequence's ratio is held below 1 + clip_high."""

    bounds_ratio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clips(self.clip_low, self.clip_high)

    def token_losses(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        ratio = sequence_ratio(logprobs, batch.old_logprobs, batch.sequence_ids, batch.num_sequences)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
        return losses, held_by_clip(ratio.detach(), batch.advantages, self.clip_low, self.clip_high)


@register("policy_loss", "cispo")
@dataclass(frozen=True, kw_only=True)
class CISPO(PolicyLoss):
    """REINFORCE with a truncated importance weight, so that no token loses its gradient (MiniMax, arXiv:2506.13585,
    eq. 4): L_t = -sg(min(r_t, max_ratio)) * A_t * log pi(a_t), where sg stops the gradient."""

    max_ratio: float = 5.0
    """Upper bound of the importance weights."""

    bounds_ratio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_out_of_range(self, "max_ratio")

    def token_losses(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        ratio = probability_ratio(logprobs.detach(), batch.old_logprobs)
        losses = -ratio.clamp(max=self.max_ratio) * batch.advantages * at_least_float32(logprobs)
        return losses, ratio > self.max_ratio


@register("policy_loss", "reinforce")
@dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyLoss):
    """The plain policy gradient (Williams, 1992): L_t = -A_t * log pi(a_t). For one update on each batch of rollouts,
    because nothing corrects for a policy that has changed since they were sampled."""

    def token_losses(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        return -batch.advantages * at_least_float32(logprobs), torch.zeros_like(batch.sequence_ids, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class EntropyBonus:
    """Rewards the policy for high entropy."""

    coef: float
    """Loss subtracted for each nat of entropy."""
    aggregation: Aggregation = "token_mean"
    """The aggregation of the policy loss."""
    length: int | None = None
    """The length of the policy loss."""

    needs_entropy: ClassVar[bool] = True

    def weight(self, batch: TreeBatch) -> Tensor:
        return num_terms(batch, self.aggregation, self.length or 1)

    def __call__(self, outputs: TokenOutputs, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        assert outputs.entropy is not None, "the learner computes entropy for a loss with needs_entropy"
        # The policy loss logs the entropy.
        return terms(entropy_bonus(outputs.entropy), batch, self.aggregation).sum(), {}


@dataclass(frozen=True, kw_only=True)
class KLPenalty:
    """KL to the reference as a loss beside the policy loss, instead of in the reward."""

    coef: float
    """Loss for each nat of KL."""
    estimator: Literal["k2", "k3"] = "k3"
    """See `kl_penalty`; k3 is GRPO's (Shao et al., arXiv:2402.03300, eq. 4)."""
    aggregation: Aggregation = "token_mean"
    """The aggregation of the policy loss."""
    length: int | None = None
    """The length of the policy loss."""

    def weight(self, batch: TreeBatch) -> Tensor:
        return num_terms(batch, self.aggregation, self.length or 1)

    def __call__(self, outputs: TokenOutputs, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        token_losses = kl_penalty(outputs.logprobs, batch.ref_logprobs, estimator=self.estimator)
        losses = terms(token_losses, batch, self.aggregation)
        return losses.sum(), means({"policy/kl_loss": losses}, {"policy/kl_loss": self.weight(batch)})
