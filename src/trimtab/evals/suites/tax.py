"""The capability tax: is a model at most a margin worse than its baseline, item by item, on one suite or several?

A suite passes if the lower bound of the difference is above minus the margin, and fails if the model is significantly
worse and the difference is beyond the margin. Otherwise it is inconclusive, with the number of further items that would
settle it. Bounds are at 95%, and over several suites Holm's correction holds their joint error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy

from trimtab.stats import Floats, Interval, holm

ALPHA = 0.025
"""The error of one side of a 95% interval."""
POWER = 0.8
"""The chance of a conclusion that the number of further items aims at."""


@dataclass(frozen=True, kw_only=True)
class PairedGap:
    """The mean difference of two models on the same items, whose clusters are independent of each other."""

    mean: float
    num_items: int
    num_clusters: int
    deviation: float
    """Standard deviation of a cluster's part in the mean, so that the standard error is deviation / sqrt(clusters);
    nan for a single cluster."""
    is_ternary: bool
    """Whether every difference is -1, 0 or 1, as of right and wrong answers."""

    @classmethod
    def of(cls, gaps: Sequence[float], clusters: Sequence[str]) -> PairedGap:
        """The gap of at least one item. The error is clustered (Miller, arXiv:2411.00640, section 3.2)."""
        values = np.asarray(gaps, dtype=np.float64)
        mean = float(values.mean())
        names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
        index = np.array([names[name] for name in clusters])
        parts: Floats = np.bincount(index, weights=values - mean) * len(names) / values.size
        return cls(
            mean=mean,
            num_items=values.size,
            num_clusters=len(names),
            deviation=float(np.sqrt(np.square(parts).sum() / (len(names) - 1))) if len(names) > 1 else math.nan,
            is_ternary=bool(np.isin(values, (-1.0, 0.0, 1.0)).all()),
        )

    def interval(self) -> Interval:
        """The 95% interval by Student's t over clusters.

        If all items differ equally there is no spread; then it holds the differences that so many equal clusters do not
        exclude: one in which a share of 1 - 0.025^(1 / clusters) of them would differ by 1. One cluster has no bounds.
        """
        if self.num_clusters < 2:
            return Interval(self.mean, math.nan, math.nan, self.num_items)
        half = float(scipy.stats.t.isf(ALPHA, self.num_clusters - 1)) * self.deviation / math.sqrt(self.num_clusters)
        if self.deviation < 1e-12:
            half = 1 - ALPHA ** (1 / self.num_clusters)
        return Interval(self.mean, max(-1.0, self.mean - half), min(1.0, self.mean + half), self.num_items)

    def variance(self, bound: float) -> float:
        """The variance of a cluster's part if the true difference is `bound`. Right and wrong answers that differ by
        `bound` on average have a variance of at least |bound| (1 - |bound|), however few of them are seen to differ
        (Tango, 1998)."""
        least = abs(bound) * (1 - abs(bound)) if self.is_ternary or self.deviation < 1e-12 else 0.0
        return max(self.deviation**2, least)

    def p_above(self, bound: float) -> float:
        """The p-value against "the true difference is `bound` or less"; 1 for a single cluster. Without any spread it
        is that of a sign test."""
        if self.num_clusters < 2 or self.mean <= bound:
            return 1.0
        error = math.sqrt(self.variance(bound) / self.num_clusters)
        if error == 0:
            return 0.5**self.num_clusters
        return float(scipy.stats.t.sf((self.mean - bound) / error, self.num_clusters - 1))

    def p_below(self, bound: float) -> float:
        """The p-value against "the true difference is `bound` or more"."""
        return replace(self, mean=-self.mean).p_above(-bound)


@dataclass(frozen=True, kw_only=True)
class TaxVerdict:
    """What a comparison says about one suite."""

    suite: str
    metric: str
    difference: Interval
    """Model minus baseline, in the direction in which more is better; `count` is the number of items."""
    verdict: Literal["pass", "fail", "inconclusive"]
    p_pass: float
    """Against "worse by the margin or more", with Holm's correction."""
    p_fail: float
    """Against "not worse at all", with Holm's correction."""
    num_more: int | None
    """Further items for a conclusion at 80% power if the difference stays as it is; None with a conclusion, and where
    no number of items would do."""

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.verdict != "inconclusive":
            return self.verdict
        if self.num_more is None:
            return "inconclusive, and more items of this kind would not settle it"
        return f"inconclusive, about {self.num_more} more items needed"


def tax_verdicts(gaps: Mapping[tuple[str, str], PairedGap], *, margin: float) -> list[TaxVerdict]:
    """The verdict on each suite and metric, corrected for their number. Raises ValueError for a margin outside (0, 1).

    A gap is in the direction in which more is better.
    """
    if not 0 < margin < 1:
        raise ValueError(f"a margin of {margin}; it is above 0 and below 1")
    passes = [gap.p_above(-margin) for gap in gaps.values()]
    fails = [gap.p_below(0.0) for gap in gaps.values()]
    found = []
    for (suite, metric), gap, p_pass, p_fail in zip(gaps, gaps.values(), holm(passes), holm(fails), strict=True):
        verdict: Literal["pass", "fail", "inconclusive"] = "inconclusive"
        if p_pass < ALPHA:
            verdict = "pass"
        elif p_fail < ALPHA and gap.mean < -margin:
            verdict = "fail"
        found.append(
            TaxVerdict(
                suite=suite,
                metric=metric,
                difference=gap.interval(),
                verdict=verdict,
                p_pass=p_pass,
                p_fail=p_fail,
                num_more=num_more(gap, margin, ALPHA / len(gaps)) if verdict == "inconclusive" else None,
            )
        )
    return found


def num_more(gap: PairedGap, margin: float, alpha: float = ALPHA) -> int | None:
    """Further items for a pass (or, if the difference is beyond the margin, for a significant loss) with 80% power, if
    the mean and the spread stay as they are. None for a single cluster, and for a difference just at the margin."""
    beyond = gap.mean < -margin
    distance = abs(gap.mean) if beyond else gap.mean + margin
    if gap.num_clusters < 2 or distance < 1e-9:
        return None
    quantiles = float(scipy.special.ndtri(1 - alpha) + scipy.special.ndtri(POWER))
    clusters = gap.variance(0.0 if beyond else -margin) * (quantiles / distance) ** 2
    return max(1, math.ceil(clusters * gap.num_items / gap.num_clusters) - gap.num_items)
