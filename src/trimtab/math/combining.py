"""Several rewards of a reply as one number: their weighted sum, or a gate between helpfulness and safety."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.metrics import Metrics, Total, mean_of
from trimtab.core.registry import register


class Combination:
    """Base of every way to combine rewards: a function of the scores of each reward by name, and flags for the loop."""

    normalize: Literal["none", "running", "frozen"] = "none"
    """Whether the scores of each reward are brought to mean 0 and deviation 1 before they are combined."""
    whiten: bool = False
    """Whether the combined rewards of a step are scaled to mean 0 and deviation 1."""
    flag: str | None = None
    """The fact of a prompt that `flagged` is read from; None if the combination reads none."""

    def refusal(self, names: Sequence[str]) -> str:
        """Why rewards with these names can not be combined in this way; "" if they can."""
        return ""

    def total(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], flagged: Tensor
    ) -> tuple[Tensor, Metrics]:
        """[B] the combined rewards, and metrics, from the scores [B] of each reward, its weight, and whether the prompt
        of each reply is flagged ([B] bool). Nan if a score that counts is nan."""
        raise NotImplementedError


@register("combination", "sum")
@dataclass(frozen=True, kw_only=True)
class WeightedSum(Combination):
    """The weighted sum. With `normalize`, weights are in deviations of each reward, whatever units it came in."""

    normalize: Literal["none", "running", "frozen"] = "none"
    """Bring each reward to mean 0 and deviation 1 before it is weighed: by all replies seen so far ("running"), or by
    those of the first step ("frozen")."""

    def refusal(self, names: Sequence[str]) -> str:
        if self.normalize != "none" and len(names) < 2:
            return f"combine.normalize = {self.normalize!r} with one reward; set shaping.normalize = true instead"
        return ""

    def total(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], flagged: Tensor
    ) -> tuple[Tensor, Metrics]:
        total = torch.zeros(len(flagged))
        for name, values in scores.items():
            total += weights[name] * values
        return total, {}


@register("combination", "gate")
@dataclass(frozen=True, kw_only=True)
class SafetyGate(Combination):
    """The gate of Llama 2 (Touvron et al., arXiv:2307.09288, section 3.2.3) between two rewards.

        R_c = R_s if the prompt is flagged or sigmoid(R_s) < threshold, else R_h;   R = whiten(R_c)

    Both scores are logits, as a reward model gives them. The paper gates their sigmoids and takes the logit of the
    result, which is the score itself; a sigmoid that rounds to 1 would have no finite logit, so none is taken here.
    Whitening is over the mixed rewards of a step: over each reward alone it would move the threshold. Weights multiply
    the scores before the gate.
    """

    safety: str
    """Name of the reward that says how safe a reply is, as metrics have it; the other one is helpfulness."""
    threshold: float = 0.15
    """A reply counts as unsafe if the sigmoid of its safety score is below this."""
    flag: str | None = None
    """A fact of the prompts: if it is true (or yes, or a number other than 0), safety alone counts. A prompt without it
    is not flagged. None flags no prompt."""
    whiten: bool = True
    """Scale the combined rewards of a step to mean 0 and deviation 1."""

    normalize: ClassVar[Literal["none"]] = "none"  # type: ignore[misc]

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "threshold")

    @property
    def logit(self) -> float:
        """The threshold as a logit, which is what scores are."""
        return math.log(self.threshold / (1 - self.threshold))

    def refusal(self, names: Sequence[str]) -> str:
        if len(names) != 2:
            return f"combine = 'gate' chooses between two rewards, and there are {len(names)}: {', '.join(names)}"
        if self.safety not in names:
            return f"combine.safety = {self.safety!r}, and the rewards are {names[0]} and {names[1]}"
        return ""

    def total(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], flagged: Tensor
    ) -> tuple[Tensor, Metrics]:
        """`reward/gated` counts the replies whose safety score counted, and `reward/flagged_fraction` is the share of
        replies to flagged prompts."""
        (helpful,) = (weights[name] * values for name, values in scores.items() if name != self.safety)
        safe = weights[self.safety] * scores[self.safety]
        # Compared as logits: in float32 the sigmoid of many scores is the same number.
        gated = flagged | (safe < self.logit)
        counted = torch.where(gated, safe, helpful).masked_fill(safe.isnan() | helpful.isnan(), torch.nan)
        metrics: Metrics = {
            "reward/gated": Total(int(gated.sum())),
            "reward/gated_fraction": mean_of(gated.tolist()),
            "reward/flagged_fraction": mean_of(flagged.tolist()),
        }
        return counted, metrics
