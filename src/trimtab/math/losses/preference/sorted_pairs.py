"""AOT: preferences as an order between distributions, not within pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.batches.pairs import ReferencePairs, TargetedPairs
from trimtab.core.registry import register
from trimtab.math.losses.preference.common import LogprobsOf, ReferenceLoss, reply_logprobs
from trimtab.math.losses.reward import bradley_terry


def matched(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [P] the entry of `others` [P] with the same rank. In one dimension, optimal transport pairs
    two samples in this way."""
    result = torch.empty_like(others)
    result[values.argsort(stable=True)] = others.sort().values
    return result


@register("preference_loss", "aot")
@dataclass(frozen=True, kw_only=True)
class AOT(ReferenceLoss):
    """Distributional preference alignment by optimal transport (Melnyk et al., arXiv:2406.05882, algorithm 1).

    Paired, the k-th smallest margin log pi(y_c) - log pi(y_r) of the update should exceed the k-th smallest margin of
    the reference. Unpaired, the k-th smallest log-ratio of the chosen replies should exceed that of the rejected ones.
    Either way the loss of a difference d is -log sigmoid(beta d). Sorting needs the whole update, so its
    log-probabilities are computed first, without gradients, and each pair gets its match as a target: a third more
    work.
    """

    paired: bool = True
    """Compare margins with the reference's margins; false compares chosen with rejected replies of all prompts."""
    label_smoothing: float = 0.0
    """Share of the labels assumed to be flipped."""

    @property
    def uses_labels(self) -> bool:
        """False: a vote for the other reply would have another rank, so soft labels cannot be used."""
        return False

    def complete(self, batch: ReferencePairs, logprobs_of: LogprobsOf) -> Any:
        """The batch with targets: see `losses`. Costs a forward pass over the update without gradients."""
        ratios = reply_logprobs(logprobs_of(batch.trees) - batch.ref_logprobs, batch)
        chosen, rejected = ratios[batch.chosen_ids], ratios[batch.rejected_ids]
        if not self.paired:
            return batch.with_targets(matched(chosen, rejected), matched(rejected, chosen))
        ref = reply_logprobs(batch.ref_logprobs, batch)
        ref_margins = ref[batch.chosen_ids] - ref[batch.rejected_ids]
        return batch.with_targets(matched(chosen - rejected + ref_margins, ref_margins) - ref_margins, 0 * rejected)

    def losses(self, chosen: Tensor, rejected: Tensor, batch: TargetedPairs) -> Tensor:
        """The loss of each pair, [P].

        Paired, it is the loss of c - r - t, where t is the matched reference margin minus the pair's own. Unpaired, it
        is that of c - t and of t' - r, where t and t' are the matches of c and r. A match then belongs to two pairs, so
        its loss is counted once, with the chosen reply, while its gradient reaches both replies.
        """
        chosen_targets, rejected_targets = self.beta * batch.chosen_targets, self.beta * batch.rejected_targets
        losses = self._loss(chosen - chosen_targets - (rejected if self.paired else 0))
        if not self.paired:
            of_rejected = self._loss(rejected_targets - rejected)
            losses = losses + of_rejected - of_rejected.detach()
        return losses

    def _loss(self, gap: Tensor) -> Tensor:
        return bradley_terry(gap, torch.zeros_like(gap), label_smoothing=self.label_smoothing)
