"""Reward models from judgements of single replies: process and outcome models (cross-entropy), and ratings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.batches.outputs import ScoreOutputs
from trimtab.batches.replies import GradedReplies
from trimtab.core.metrics import Metrics
from trimtab.core.registry import register
from trimtab.core.types import LabelledResponse, RatedResponse, SteppedResponse
from trimtab.math.losses.aggregation import means
from trimtab.math.masking import at_least_float32
from trimtab.math.steps import StepAggregate

LabelsFrom = Literal["people", "rollouts"]
"""Who labelled steps: people (or a judge) who read them, or completions that were sampled behind each step."""


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each label in nats, with the shape of `logits`; a label is the probability of "right".

        L = -y log sigmoid(z) - (1 - y) log(1 - sigmoid(z)) = log(1 + exp(z)) - y z

    It is the cross-entropy over two classes of a head with two outputs, as published process reward models have, whose
    difference is z.
    """
    logits = at_least_float32(logits)
    return softplus(logits) - labels.to(logits.dtype) * logits


def graded_scores(outputs: ScoreOutputs, batch: GradedReplies) -> tuple[Tensor, Tensor]:
    """The model's scores at all labelled tokens of the batch, and the labels of these tokens."""
    last = batch.last_labels.isfinite()
    scores = torch.cat([at_least_float32(outputs.values), at_least_float32(outputs.scores)[last]])
    return scores, torch.cat([batch.labels, batch.last_labels[last]])


@dataclass(frozen=True, kw_only=True)
class _OfSingleReplies:
    """What the losses over graded replies have in common."""

    coef: float = 1.0
    """Weight in the sum of losses."""

    needs_ranking: ClassVar[bool] = False
    gives: ClassVar[Literal["scores", "both"]] = "both"
    """The outputs of the model that are read: at the last token, or at others too."""

    def weight(self, batch: GradedReplies) -> Tensor:
        """The number of labels."""
        return torch.tensor(batch.num_labels, dtype=torch.float64)

    def _cross_entropy(self, outputs: ScoreOutputs, batch: GradedReplies) -> tuple[Tensor, Metrics]:
        scores, labels = graded_scores(outputs, batch)
        losses = binary_cross_entropy(scores, labels)
        decided = labels != 0.5  # an even label has no right side
        right = (scores > 0) == (labels > 0.5)
        return losses.sum(), means({"loss/train": losses, "reward/accuracy": right[decided].double()})


@register("reward_loss", "process")
@dataclass(frozen=True, kw_only=True)
class ProcessLoss(_OfSingleReplies):
    """Cross-entropy at the last token of each judged step (Lightman et al., arXiv:2305.20050; Wang et al.,
    arXiv:2312.08935, eq. 3). Every step counts the same."""

    separator: str = "\n"
    """The text between steps: it joins labelled steps, and later shows where the steps of a reply end."""
    labels_from: LabelsFrom | None = None
    """Who labelled the steps: "people" or "rollouts". None takes it from the layout: PRM800K and a feedback project are
    of people, Math-Shepherd is of rollouts; any other data has to be told."""
    aggregate: StepAggregate | None = None
    """How the steps' probabilities become one reward where the model is used and nothing else is said: "last", "min",
    "product" or "mean". None is "last" for labels from rollouts, "min" for those of people."""

    learns_from: ClassVar[type[Any]] = SteppedResponse

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("separator is empty; name the text that stands between steps")

    def __call__(self, outputs: ScoreOutputs, batch: GradedReplies) -> tuple[Tensor, Metrics]:
        return self._cross_entropy(outputs, batch)


@register("reward_loss", "outcome")
@dataclass(frozen=True, kw_only=True)
class OutcomeLoss(_OfSingleReplies):
    """Cross-entropy with the label of the whole reply at each of its tokens (Cobbe et al., arXiv:2110.14168, section
    4.2): an outcome reward model. Every token counts the same."""

    tokens: Literal["all", "last"] = "all"
    """Learn at every token, as a verifier that also says how the rest will go and overfits less (Cobbe et al., figure
    6), or at the last token alone. Either way the reward is read at the last token."""

    learns_from: ClassVar[type[Any]] = LabelledResponse

    def __call__(self, outputs: ScoreOutputs, batch: GradedReplies) -> tuple[Tensor, Metrics]:
        return self._cross_entropy(outputs, batch)


@register("reward_loss", "regression")
@dataclass(frozen=True, kw_only=True)
class RegressionLoss(_OfSingleReplies):
    """Squared error of the score at the last token against a rating. The score is in the ratings' units."""

    learns_from: ClassVar[type[Any]] = RatedResponse
    gives: ClassVar[Literal["scores", "both"]] = "scores"

    def __call__(self, outputs: ScoreOutputs, batch: GradedReplies) -> tuple[Tensor, Metrics]:
        errors = at_least_float32(outputs.scores) - batch.last_labels
        losses = errors.square()
        return losses.sum(), means({"loss/train": losses, "reward/absolute_error": errors.abs()})
