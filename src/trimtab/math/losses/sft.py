"""Imitation: cross-entropy of the demonstrated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.batches.outputs import TokenOutputs
from trimtab.batches.trees import TreeBatch
from trimtab.core.metrics import Metrics
from trimtab.math.losses.aggregation import Aggregation, means, num_terms, terms
from trimtab.math.masking import at_least_float32


def cross_entropy(logprobs: Tensor) -> Tensor:
    """Loss of each token in nats, [M]: `-logprobs`, in float32."""
    return -at_least_float32(logprobs)


@dataclass(frozen=True, kw_only=True)
class SFTLoss:
    """Cross-entropy of the trained tokens under the model itself: at temperature 1, also when it is mixed into the
    updates of a policy that samples at another temperature (Ouyang et al., arXiv:2203.02155, eq. 2)."""

    at_temperature: ClassVar[float] = 1.0

    coef: float = 1.0
    """Weight in the sum of losses."""
    aggregation: Aggregation = "token_mean"
    """Average over all tokens of the step, or over the token mean of each sequence."""
    logged_as: str = "loss/train"
    """Name of the metric of the mean loss."""

    def weight(self, batch: TreeBatch) -> Tensor:
        return num_terms(batch, self.aggregation)

    def __call__(self, outputs: TokenOutputs, batch: TreeBatch) -> tuple[Tensor, Metrics]:
        losses = terms(cross_entropy(outputs.logprobs), batch, self.aggregation)
        return losses.sum(), means({self.logged_as: losses})
