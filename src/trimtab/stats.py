"""Intervals, win rates and calibration: numbers for people, each with its count and its uncertainty.

Every interval is two-sided. Bootstraps have a seed, so they can be computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # it loads each of its parts when that is first used
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
FEW_DRAWN = 8
"""Fewer values, or groups, are not bootstrapped: no mean of a draw lies beyond them."""


@dataclass(frozen=True)
class Interval:
    """An estimate, the bounds of its confidence interval (nan if it has none) and the number of values behind it."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        bounds = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{bounds}{f' (n={self.count})' if self.count else ''}"

    def named(self, name: str) -> dict[str, float]:
        """`{name, name_low, name_high}`, as summaries store it."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def wilson(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Share of successes in n independent trials with the score interval of Wilson (1927); a tie may count as half.

    With no trials the value is nan and the interval [0, 1].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    z = float(scipy.special.ndtri(0.5 + confidence / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)


def bootstrap_mean(
    values: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    shares: bool = False,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` with a percentile bootstrap interval (Efron, 1979), expanded by `bootstrap_tail`.

    `groups` gives each value's group, for example its prompt id. Whole groups are then drawn, since values that share
    a prompt are not independent. Fewer than `FEW_DRAWN` values (or groups) have Student's interval, of the mean as a
    ratio of sums. With fewer than two the bounds are nan. `shares` says that the values are in [0, 1], and so are the
    bounds: if all values are equal, these would claim certainty, so the interval is Wilson's over the groups (or
    values).
    """
    flat = _vector(values)
    if flat.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    if shares and np.ptp(flat) == 0:
        num = flat.size if groups is None else len(set(groups))
        bounds = wilson(float(flat[0]) * num, num, confidence=confidence)
        return Interval(float(flat[0]), bounds.low, bounds.high, flat.size)
    sums, sizes = _group_sums(flat, groups)
    if sums.size < 2:
        return Interval(float(flat.mean()), math.nan, math.nan, flat.size)
    if sums.size < FEW_DRAWN:
        mean = float(flat.mean())
        parts = (sums - mean * sizes) / float(sizes.mean())
        half = _student(sums.size, confidence) * float(parts.std(ddof=1)) / math.sqrt(sums.size)
        least, most = (0.0, 1.0) if shares else (-math.inf, math.inf)
        return Interval(mean, max(least, mean - half), min(most, mean + half), flat.size)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for i in range(num_resamples):
        drawn = generator.integers(sums.size, size=sums.size)
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    tail = bootstrap_tail(sums.size, confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(flat.mean()), float(low), float(high), flat.size)


def bootstrap_tail(num: int, confidence: float) -> float:
    """The share of the draws of `num` values, at least two, that an interval leaves out at each end.

    Draws spread as the values do, less than their estimate of the deviation, and know nothing of its error; the plain
    percentiles are too narrow for few values. These are the ones that give Student's interval if the means drawn are
    normal (Hesterberg, 2015, "expanded percentiles").
    """
    return float(scipy.special.ndtr(-_student(num, confidence) * math.sqrt(num / (num - 1))))


def _student(num: int, confidence: float) -> float:
    """Standard errors in half an interval of the mean of `num` values."""
    return float(scipy.special.stdtrit(num - 1, 0.5 + confidence / 2))


def paired_difference(values_a: ArrayLike, values_b: ArrayLike, *, groups: Sequence[Any] | None = None) -> Interval:
    """Mean of a - b over items measured under both a and b, with the interval of `bootstrap_mean`."""
    a, b = _vectors(values_a=values_a, values_b=values_b)
    return bootstrap_mean(a - b, groups=groups)


def t_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean over a few independent repetitions (seeds) with Student's t interval; bounds are nan for a single one."""
    flat = _vector(values)
    if flat.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(flat.mean())
    if flat.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, flat.size - 1) * flat.std(ddof=1) / math.sqrt(flat.size))
    return Interval(mean, mean - half, mean + half, flat.size)


def paired_test(gaps: Floats) -> tuple[Interval, float]:
    """Mean of paired differences [N] with Student's t interval, and the p-value that it is 0.

    Without spread t is undefined: the bounds are nan, and the p-value is that of the sign test.
    """
    mean = float(gaps.mean())
    if np.ptp(gaps) < 1e-12:
        return Interval(mean, math.nan, math.nan, gaps.size), 1.0 if abs(mean) < 1e-12 else 2.0 ** (1 - gaps.size)
    error = float(gaps.std(ddof=1)) / math.sqrt(gaps.size)
    return t_interval(gaps), float(2 * scipy.stats.t.sf(abs(mean) / error, gaps.size - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method (1979), in their order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(p_values))):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


def win_rate(
    scores_a: ArrayLike, scores_b: ArrayLike, *, groups: Sequence[Any] | None = None, num_resamples: int = 1000
) -> Interval:
    """Share of items on which a scores above b, ties counting half.

    Without `groups` the items count as independent (Wilson). With prompt ids as `groups`, whole prompts are resampled.
    If every item has the same outcome, a bootstrap would claim certainty, so Wilson over the prompts is used instead.
    """
    a, b = _vectors(scores_a=scores_a, scores_b=scores_b)
    wins = (a > b) + 0.5 * (a == b)
    if groups is None:
        return wilson(float(wins.sum()), wins.size)
    return bootstrap_mean(wins, groups=groups, shares=True, num_resamples=num_resamples)


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Predictions of similar probability and how often they came true."""

    low: float
    """Smallest probability in the bin."""
    high: float
    """Largest probability in the bin."""
    mean_probability: float
    accuracy: float
    """Share of outcomes that came true."""
    accuracy_low: float
    accuracy_high: float
    count: int


def reliability_bins(
    probabilities: ArrayLike, outcomes: ArrayLike, *, num_bins: int = 15
) -> tuple[ReliabilityBin, ...]:
    """Equal-mass bins of the predictions in rising order, each with its Wilson interval; no bin is empty.

    Outcomes are 0 or 1, or a known probability in between. For comparisons, put the two replies of each pair in random
    order first: with the chosen reply always first, every outcome is 1 and the curve shows nothing.
    """
    p, y = _vectors(probabilities=probabilities, outcomes=outcomes)
    order = np.argsort(p, kind="stable")
    bins = []
    for members in np.array_split(order, min(num_bins, max(p.size, 1))):
        if members.size:
            share = wilson(float(y[members].sum()), members.size)
            bins.append(
                ReliabilityBin(
                    low=float(p[members[0]]),
                    high=float(p[members[-1]]),
                    mean_probability=float(p[members].mean()),
                    accuracy=share.value,
                    accuracy_low=share.low,
                    accuracy_high=share.high,
                    count=members.size,
                )
            )
    return tuple(bins)


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, *, num_bins: int = 15) -> float:
    """Mean |share that came true - mean probability| over equal-mass bins, weighted by count (Naeini et al., 2015).

    Biased upwards for few outcomes: even a perfect forecaster with n per bin scores about 0.4 / sqrt(n).
    """
    bins = reliability_bins(probabilities, outcomes, num_bins=num_bins)
    if not bins:
        return math.nan
    return sum(b.count * abs(b.accuracy - b.mean_probability) for b in bins) / sum(b.count for b in bins)


def brier_score(probabilities: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean squared difference of probabilities and outcomes (Brier, 1950); nan if there are none. Always saying a half
    scores 0.25 where outcomes are 0 or 1."""
    p, y = _vectors(probabilities=probabilities, outcomes=outcomes)
    return float(np.square(p - y).mean()) if p.size else math.nan


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a random positive scores above a random negative, ties counting half (area under the ROC curve).

    It is nan unless both labels occur.
    """
    s, y = _vectors(scores=scores, labels=labels)
    positive = y > 0.5
    num_positive = int(positive.sum())
    num_negative = s.size - num_positive
    if not num_positive or not num_negative:
        return math.nan
    ranks = scipy.stats.rankdata(s)
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation with mean ranks for ties; nan if either side does not vary."""
    x, y = (scipy.stats.rankdata(row) for row in _vectors(a=a, b=b))
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def fit_temperature(logits: ArrayLike, outcomes: ArrayLike) -> float:
    """The T in [0.001, 1000] that minimises the log loss of sigmoid(logits / T) (Guo et al., arXiv:1706.04599).

    The loss is convex in 1 / T. T is 1000 if the logits carry no information or are opposite to the outcomes.
    """
    z, y = _vectors(logits=logits, outcomes=outcomes)

    def loss(log_scale: float) -> float:
        scaled = z * math.exp(log_scale)
        return float(np.mean(np.logaddexp(0.0, scaled) - y * scaled))

    bound = math.log(1000.0)
    found = scipy.optimize.minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-8})
    return math.exp(-float(found.x))


def moving_mean(values: ArrayLike, window: int) -> Floats:
    """Centred mean over up to `window` neighbours, fewer at the ends. nan values are left out of the mean.

    The result is nan if a window holds nothing else. Raises ValueError if there are no values.
    """
    row = _vector(values)
    known = ~np.isnan(row)
    covered = slice(window // 2, window // 2 + row.size)
    sums = np.convolve(np.where(known, row, 0.0), np.ones(window))[covered]
    counts = np.convolve(known, np.ones(window))[covered]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _group_sums(values: Floats, groups: Sequence[Any] | None) -> tuple[Floats, Floats]:
    """Sum and size of each group, in order of first appearance, so that the draws depend on the seed alone."""
    if groups is None:
        return values, np.ones_like(values)
    if len(groups) != values.size:
        raise ValueError(f"{len(groups)} groups for {values.size} values")
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)


def _vector(values: ArrayLike) -> Floats:
    flat = np.asarray(values, dtype=np.float64)
    if flat.ndim != 1:
        raise ValueError(f"expected one row of values, got shape {flat.shape}")
    return flat


def _vectors(**values: ArrayLike) -> list[Floats]:
    """Rows of one length, one value for each item in each. Raises ValueError if the lengths differ."""
    arrays = {name: _vector(given) for name, given in values.items()}
    if len({a.size for a in arrays.values()}) > 1:
        raise ValueError("lengths differ: " + ", ".join(f"{name} {a.size}" for name, a in arrays.items()))
    return list(arrays.values())
