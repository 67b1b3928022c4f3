"""Shared parts of the DPO family: log-probabilities of replies, implied rewards, soft labels, metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from trimtab.batches.outputs import TokenOutputs
from trimtab.batches.pairs import PairBatch, ReferencePairs
from trimtab.batches.trees import TreeBatch
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.metrics import Metrics
from trimtab.math.losses.aggregation import means
from trimtab.math.masking import (
    at_least_float32,
    mean_per_sequence,
    pad_per_sequence,
    sequence_lengths,
    sum_per_sequence,
)

LogprobsOf = Callable[[Any], Tensor]
"""A function from trees to their log-probabilities [M] under the policy before the update, without gradients."""


class PreferenceLoss(Protocol):
    """A loss of the DPO family, for example `DPO(beta=0.1)`, as the preference stage uses it."""

    @property
    def reads(self) -> Literal["pairs", "replies"]:
        """Whether it reads compared pairs, or replies judged one by one. A pair can be split into two such replies."""

    @property
    def needs_reference(self) -> bool: ...

    @property
    def needs_mismatched(self) -> bool:
        """Whether `complete` needs each prompt with the replies to another prompt."""

    @property
    def coef(self) -> float: ...

    @property
    def uses_margins(self) -> bool:
        """Whether the margins of pairs enter the loss."""

    @property
    def uses_labels(self) -> bool:
        """Whether soft labels enter the loss."""

    def complete(self, batch: Any, logprobs_of: LogprobsOf) -> Any:
        """The batch with quantities that must be computed over the whole update. Called once, before it is split into
        micro-batches."""

    def weight(self, batch: Any) -> Tensor: ...

    def __call__(self, outputs: Any, batch: Any) -> tuple[Tensor, Metrics]: ...


def reply_logprobs(logprobs: Tensor, batch: TreeBatch) -> Tensor:
    """log pi(y | x) of each sequence, [B]: the sum over its trained tokens [M]."""
    return sum_per_sequence(logprobs, batch.sequence_ids, batch.num_sequences)


def mean_logprobs(logprobs: Tensor, batch: TreeBatch) -> Tensor:
    """log pi(y | x) / |y| of each sequence, [B]."""
    return mean_per_sequence(logprobs, batch.sequence_ids, batch.num_sequences)


def shared_length_sums(values: Tensor, batch: PairBatch, alpha: float) -> tuple[Tensor, Tensor]:
    """Sums of the per-token `values` [M] over the chosen and the rejected reply of each pair, two [P]. Tokens past the
    length of the shorter reply are weighted by `alpha` (LD-DPO: Liu et al., arXiv:2409.06411, section 3)."""
    rows, _ = pad_per_sequence(at_least_float32(values), batch.sequence_ids, batch.num_sequences)
    lengths = sequence_lengths(batch.sequence_ids, batch.num_sequences)
    shared = torch.minimum(lengths[batch.chosen_ids], lengths[batch.rejected_ids])
    counted = torch.arange(rows.shape[1], device=rows.device) < shared[:, None]
    weights = torch.where(counted, 1.0, alpha).to(rows.dtype)
    return (rows[batch.chosen_ids] * weights).sum(1), (rows[batch.rejected_ids] * weights).sum(1)


def expected(loss: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, rejected: Tensor, labels: Tensor) -> Tensor:
    """The expected loss of each pair, [P], if the chosen reply is preferred with probability `labels` ([P], from 0.5 to
    1) and the rejected one otherwise."""
    right = loss(chosen, rejected)
    if bool((labels == 1).all()):
        return right
    labels = labels.to(right.dtype)
    return labels * right + (1 - labels) * loss(rejected, chosen)


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """Base of a loss over pairs. A subclass defines `rewards` and `losses`."""

    coef: float = 1.0
    """Weight in the sum of losses."""
    nll_coef: float = 0.0
    """Weight of the chosen reply's negative log-likelihood per token (RPO: Pang et al., arXiv:2404.19733, eq. 1)."""

    reads: ClassVar[Literal["pairs", "replies"]] = "pairs"
    needs_reference: ClassVar[bool] = True
    needs_mismatched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        bounded = ("nll_coef", "beta", "odds_coef", "label_smoothing")
        refuse_out_of_range(self, *(name for name in bounded if hasattr(self, name)))

    @property
    def uses_margins(self) -> bool:
        """Whether the margins of pairs enter the loss."""
        return bool(getattr(self, "margin_coef", 0.0))

    @property
    def uses_labels(self) -> bool:
        """Whether soft labels enter the loss."""
        return True

    def complete(self, batch: Any, logprobs_of: LogprobsOf) -> Any:
        """The batch unchanged, because each pair is judged on its own."""
        return batch

    def rewards(self, logprobs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The implied rewards of the chosen and rejected replies, two [P], from the policy's log-probabilities [M]."""
        raise NotImplementedError

    def losses(self, chosen: Tensor, rejected: Tensor, batch: Any) -> Tensor:
        """The loss of each pair, [P], from those rewards."""
        raise NotImplementedError

    def weight(self, batch: PairBatch) -> Tensor:
        """The number of pairs."""
        return torch.tensor(len(batch.chosen_ids), dtype=torch.float64)

    def __call__(self, outputs: TokenOutputs, batch: PairBatch) -> tuple[Tensor, Metrics]:
        logprobs = at_least_float32(outputs.logprobs)
        chosen, rejected = self.rewards(logprobs, batch)
        losses = self.losses(chosen, rejected, batch)
        logged = {}
        if self.nll_coef:
            nll = -mean_logprobs(logprobs, batch)[batch.chosen_ids]
            losses = losses + self.nll_coef * nll
            logged["loss/nll"] = nll
        with torch.no_grad():
            whole = reply_logprobs(logprobs, batch)
            right = ((chosen - rejected).sign() + 1) / 2  # a tie is half right
            logged |= {
                "policy/accuracy": right[batch.labels != 0.5],
                "policy/margin": chosen - rejected,
                "policy/chosen_reward": chosen,
                "policy/rejected_reward": rejected,
                "policy/chosen_logprobs": whole[batch.chosen_ids],
                "policy/rejected_logprobs": whole[batch.rejected_ids],
            }
        return losses.sum(), means({"loss/train": losses, **logged})


@dataclass(frozen=True, kw_only=True)
class ReferenceLoss(PairLoss):
    """Base of a pair loss whose implied reward is beta times the log-ratio to the reference."""

    beta: float = 0.1
    """Implied reward for each nat of log-ratio to the reference. With a larger beta the policy stays closer to the
    reference."""

    def rewards(self, logprobs: Tensor, batch: ReferencePairs) -> tuple[Tensor, Tensor]:
        """beta log(pi / pi_ref) of both replies, two [P] (Rafailov et al., arXiv:2305.18290, eq. 5)."""
        ratios = reply_logprobs(logprobs - batch.ref_logprobs, batch)
        return self.beta * ratios[batch.chosen_ids], self.beta * ratios[batch.rejected_ids]
