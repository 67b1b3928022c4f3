"""Scores of multiple choice by log-probability. Ties are shared, so that equal log-probabilities score as guessing."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from trimtab.core import seeds


def picked_right(logprobs: Sequence[float], right: Collection[int]) -> float:
    """1 if the likeliest option is one of `right`, 0 if not; if several are likeliest, the share of them that is
    right. Raises ValueError if one is nan."""
    if any(map(math.isnan, logprobs)):
        raise ValueError(f"log-probabilities {list(logprobs)}; nan is no number")
    best = max(logprobs)
    likeliest = [i for i, value in enumerate(logprobs) if value == best]
    return sum(i in right for i in likeliest) / len(likeliest)


def right_mass(logprobs: Sequence[float], right: Collection[int]) -> float:
    """The probability of the options in `right` among all options, sum_right exp(l) / sum_all exp(l).

    It is computed by differences of logarithms: for long answers the probabilities themselves underflow to 0 / 0.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    shares = np.exp(values - values.max())
    return float(shares[sorted(right)].sum() / shares.sum())


def shuffled(count: int, *name: str) -> list[int]:
    """The order in which options are shown: a permutation of range(count) that depends on the name alone."""
    return [int(i) for i in seeds.generator(0, "options", *name).permutation(count)]


def letters(options: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Options as lines "(A) …", and the replies "(A)", "(B)" … that choose them. Raises ValueError for more than 26."""
    if len(options) > 26:
        raise ValueError(f"{len(options)} options; there are 26 letters")
    marks = tuple(f"({chr(ord('A') + i)})" for i in range(len(options)))
    return "\n".join(f"{mark} {option}" for mark, option in zip(marks, options, strict=True)), marks
