"""Simulated annotators: they prefer replies by gold and by biases, with noise, each by a stated amount."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

import numpy as np
import scipy

from trimtab.core.errors import DataError
from trimtab.core.types import Prompt
from trimtab.worlds.world import World

Pair = tuple[Prompt, str, str]
"""A prompt and two replies to it."""

ATTENTION = 10.0
"""Annotators notice at most this many units of a feature: a hundred words, or ten phrases."""
_STEEPEST = 1e4


@dataclass(frozen=True)
class Annotators:
    """People who prefer by one shared utility and answer each comparison with independent noise.

        u(x, y) = scale * (gold(x, y) + sum_k biases_k * min(feature_k(y), ATTENTION))
        P(a preferred to b | x) = sigmoid(u(x, a) - u(x, b))          (Bradley and Terry, 1952)

    Biases are in units of gold, so `scale` changes how noisy people are and never what they like. Asked one of the
    world's own questions, they go by its answer instead of gold.
    """

    world: World
    biases: Mapping[str, float]
    scale: float = 1.0
    question: str | None = None
    """One of the world's questions; None asks which reply has more gold."""
    _liking: dict[tuple[str, str], float] = field(default_factory=dict, repr=False, compare=False)
    """The utility at scale 1 of replies seen before: a reply is read once, however many comparisons it is in."""

    def utility(self, prompt: Prompt, response: str) -> float:
        """How much the reply is liked. Raises DataError for a bias the world has no feature for."""
        key = (prompt.id, response)
        if key not in self._liking:
            self._liking[key] = self._read(prompt, response)
        return self.scale * self._liking[key]

    def _read(self, prompt: Prompt, response: str) -> float:
        features = self.world.features(response)
        unknown = self.biases.keys() - features.keys()
        if unknown:
            raise DataError(
                f"annotators are biased by {', '.join(sorted(unknown))}, which the world does not measure",
                where=f"biases of the annotators of world {self.world.name}",
                fix=f"use {', '.join(sorted(features))}",
            )
        bias = sum(amount * min(features[name], ATTENTION) for name, amount in self.biases.items())
        if self.question is not None:
            return self.world.answer(prompt, response, self.question) + bias
        return self.world.gold(prompt, response).total + bias

    def preference_probability(self, prompt: Prompt, a: str, b: str) -> float:
        """The probability that reply `a` is preferred to reply `b`."""
        return _sigmoid(self.utility(prompt, a) - self.utility(prompt, b))

    def vote(self, prompt: Prompt, a: str, b: str, *, annotator: int, seed: int = 0) -> Literal["A", "B"]:
        """One annotator's choice. Asked again, in either order, the same person chooses the same reply."""
        first, second = sorted((a, b))
        key = json.dumps([seed, annotator, prompt.id, first, second])
        draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        preferred = first if draw < self.preference_probability(prompt, first, second) else second
        return "A" if preferred == a else "B"

    def bayes_accuracy(self, pairs: Sequence[Pair]) -> float:
        """The accuracy on single votes of a reward model that knows the utility: mean max(p, 1 - p). No reward model
        can do better."""
        return fmean([max(p, 1 - p) for p in self._probabilities(pairs)])

    def expected_agreement(self, pairs: Sequence[Pair]) -> float:
        """The share of pairs on which two annotators choose alike: mean p^2 + (1 - p)^2."""
        return fmean([p * p + (1 - p) * (1 - p) for p in self._probabilities(pairs)])

    def _probabilities(self, pairs: Sequence[Pair]) -> list[float]:
        return [self.preference_probability(prompt, a, b) for prompt, a, b in pairs]


def calibrate(
    world: World,
    biases: Mapping[str, float],
    pairs: Sequence[Pair],
    agreement: float = 0.70,
    question: str | None = None,
) -> Annotators:
    """Annotators with the noise for which their expected agreement on `pairs` is `agreement`.

    `scale` is found by bisection, since agreement grows with it. Raises DataError if no scale gives this agreement.
    """
    plain = Annotators(world, biases, question=question)
    gaps = np.array([plain.utility(prompt, a) - plain.utility(prompt, b) for prompt, a, b in pairs])
    if not len(gaps):
        raise DataError(
            "there are no pairs to calibrate annotators on", where=f"world {world.name}", fix="give a few hundred pairs"
        )

    def agreement_at(scale: float) -> float:
        chances = scipy.special.expit(scale * gaps)
        return float(np.mean(chances**2 + (1 - chances) ** 2))

    most = agreement_at(_STEEPEST)
    if not 0.5 < agreement < most:
        raise DataError(
            f"no noise makes annotators agree on {agreement:.3f} of these {len(gaps)} pairs",
            where=f"world {world.name}",
            fix=f"ask for more than 0.5 (pure noise) and less than {most:.3f} (no noise; equal replies are guessed), "
            "or give pairs that differ more; people agree on 0.65 to 0.75",
        )
    low, high = 0.0, _STEEPEST
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if agreement_at(middle) < agreement else (low, middle)
    return replace(plain, scale=(low + high) / 2)


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))
