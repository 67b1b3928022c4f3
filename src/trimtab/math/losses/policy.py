"""What moves the policy: the clipped surrogate, the entropy bonus, and KL as a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.math.kl import ESTIMATORS, MAX_LOG_RATIO, k3
from trimtab.math.losses import PolicyBatch, ReferenceBatch, SequenceBatch, TokenOutputs
from trimtab.math.losses.aggregation import Aggregation, means, num_terms, terms
from trimtab.math.masking import at_least_float32
from trimtab.metrics import Metrics
from trimtab.registry import register


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi(a_t) / pi_old(a_t), [M], held in [e^-20, e^20]: an infinite ratio gives nan gradients even where clipped."""
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

    With `dual_clip` c > 1, L_t is at most -c * A_t where A_t < 0 ("dual-clip PPO", Ye et al., arXiv:1912.09729).
    Every tensor is [M], the result too. Nothing is averaged here.
    """
    ratio = probability_ratio(logprobs, old_logprobs)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def entropy_bonus(entropy: Tensor) -> Tensor:
    """Per-token loss that falls as the policy spreads out, [M]: `-entropy`, in nats."""
    return -at_least_float32(entropy)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Literal["k2", "k3"]) -> Tensor:
    """Per-token KL to the reference as a loss, [M], differentiable in `logprobs`.

    See `kl.k2` and `kl.k3` for the direction each one's gradient has. There is no "k1": the expected gradient of its
    value as a loss is zero.
    """
    return ESTIMATORS[estimator](at_least_float32(logprobs) - at_least_float32(ref_logprobs))


@register("policy_loss", "ppo")
@dataclass(frozen=True, kw_only=True)
class PPO:
    """The clipped surrogate of `clipped_surrogate`."""

    coef: float = 1.0
    """Share in the sum of losses."""
    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is held below 1 + clip_high."""
    dual_clip: float | None = None
    """Ratios that weigh a negative advantage are held below this, if given; 3 in its paper."""
    aggregation: Aggregation = "token_mean"
    """Average over all tokens of the update, or over sequences of each one's token mean."""

    needs_entropy: ClassVar[bool] = True  # to log it: its collapse is the first sign of trouble

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low is {self.clip_low}; it must lie in (0, 1]")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high is {self.clip_high}; it must be above 0")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be above 1")

    def weight(self, batch: SequenceBatch) -> Tensor:
        return num_terms(batch, self.aggregation)

    def __call__(self, outputs: TokenOutputs, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        token_losses = clipped_surrogate(
            outputs.logprobs,
            batch.old_logprobs,
            batch.advantages,
            low=self.clip_low,
            high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        losses = terms(token_losses, batch, self.aggregation)
        with torch.no_grad():
            ratio = probability_ratio(outputs.logprobs, batch.old_logprobs)
            held_up = (ratio > 1 + self.clip_high) & (batch.advantages > 0)
            held_down = (ratio < 1 - self.clip_low) & (batch.advantages < 0)
            logged = {
                "policy/loss": losses,
                "policy/clip_fraction": held_up | held_down,
                "policy/approx_kl": k3(batch.old_logprobs - outputs.logprobs),
                "policy/ratio_mean": ratio,
            }
        if outputs.entropy is not None:
            logged["policy/entropy"] = outputs.entropy
        return losses.sum(), means(logged)


@dataclass(frozen=True, kw_only=True)
class EntropyBonus:
    """Rewards the policy for staying undecided."""

    coef: float
    """Loss paid back for each nat of entropy."""
    aggregation: Aggregation = "token_mean"
    """As the policy loss's."""

    needs_entropy: ClassVar[bool] = True

    def weight(self, batch: SequenceBatch) -> Tensor:
        return num_terms(batch, self.aggregation)

    def __call__(self, outputs: TokenOutputs, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
        assert outputs.entropy is not None, "the learner computes entropy for a loss with needs_entropy"
        # The policy loss logs the entropy.
        return terms(entropy_bonus(outputs.entropy), batch, self.aggregation).sum(), {}


@dataclass(frozen=True, kw_only=True)
class KLPenalty:
    """KL to the reference as a loss beside the policy's, instead of in the reward."""

    coef: float
    """Loss for each nat."""
    estimator: Literal["k2", "k3"] = "k3"
    """See `kl_penalty`; k3 is GRPO's (Shao et al., arXiv:2402.03300, eq. 4)."""
    aggregation: Aggregation = "token_mean"
    """As the policy loss's."""

    def weight(self, batch: SequenceBatch) -> Tensor:
        return num_terms(batch, self.aggregation)

    def __call__(self, outputs: TokenOutputs, batch: ReferenceBatch) -> tuple[Tensor, Metrics]:
        token_losses = kl_penalty(outputs.logprobs, batch.ref_logprobs, estimator=self.estimator)
        losses = terms(token_losses, batch, self.aggregation)
        return losses.sum(), means({"policy/kl_loss": losses})
