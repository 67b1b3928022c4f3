"""Importance weights for rollouts that were not drawn from the policy being trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.metrics import Mean, Metrics, Peak
from trimtab.math.kl import MAX_LOG_RATIO, k3
from trimtab.math.masking import at_least_float32, mean_per_sequence, sum_per_sequence


@dataclass(frozen=True, kw_only=True)
class SamplerCorrection:
    """Weights each token by w = pi_old / pi_sampler. The two differ if the sampler is another engine, has another
    precision, or draws from a truncated distribution.

    "truncate" holds w at `high` or below, which accepts a bounded bias for a bounded variance (Espeholt et al.,
    arXiv:1802.01561, section 4.1). "mask" sets w to 0 if it is outside [low, high], and keeps it otherwise.
    """

    kind: Literal["truncate", "mask"] = "truncate"
    """What happens to weights out of bounds: they are set to the bound, or to 0."""
    level: Literal["token", "sequence", "sequence_mean"] = "token"
    """One weight for each token, or for each whole sequence: the product of its tokens' ratios (exact but of high
    variance), or their geometric mean."""
    high: float = 2.0
    """Largest weight."""
    low: float = 0.0
    """Smallest weight that is not masked."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1 < self.high:
            raise ValueError(f"low = {self.low} and high = {self.high}; 1 must lie between them, and low is at least 0")
        if self.low and self.kind == "truncate":
            raise ValueError(f"low = {self.low} with kind = 'truncate'; only kind = 'mask' has a lower bound")

    def __call__(
        self, old_logprobs: Tensor, rollout_logprobs: Tensor, sequence_ids: Tensor, num_sequences: int
    ) -> tuple[Tensor, Metrics]:
        """[M] the weights, and metrics of the raw weights before they are bounded, of how many draws they are worth
        (the effective sample size, as a share), and of the KL of sampler to policy per token (k3, nats)."""
        log_ratio = at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs)
        sampler_kl = k3(-log_ratio).double().sum()
        if self.level != "token":
            pool = sum_per_sequence if self.level == "sequence" else mean_per_sequence
            log_ratio = pool(log_ratio, sequence_ids, num_sequences)[sequence_ids]
        raw = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.kind == "truncate":
            bounded = raw > self.high
            weights = raw.clamp(max=self.high)
        else:
            bounded = (raw > self.high) | (raw < self.low)
            weights = raw.masked_fill(bounded, 0.0)
        total, squares = float(raw.double().sum()), float(raw.double().square().sum())
        return weights, {
            "rollout/sampler_kl": Mean(float(sampler_kl), log_ratio.numel()),
            # Kish: as many draws from the policy itself would give estimates of the same variance.
            "rollout/effective_fraction": Mean(total**2 / squares if squares else 0.0, raw.numel()),
            "rollout/ratio_mean": Mean(total, raw.numel()),
            "rollout/ratio_max": Peak(float(raw.max()) if raw.numel() else 1.0),
            "rollout/ratio_bounded_fraction": Mean(float(bounded.sum()), bounded.numel()),
        }


def no_correction(
    old_logprobs: Tensor, rollout_logprobs: Tensor, sequence_ids: Tensor, num_sequences: int
) -> tuple[Tensor, Metrics]:
    """[M] weights of 1, which assume that the sampler is the policy."""
    return torch.ones_like(old_logprobs), {}
