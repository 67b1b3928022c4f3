"""The capability tax: is a model at most a margin worse than its baseline, item by item, on one suite or several?

A suite passes if the lower bound of the difference is above minus the margin, and fails if the model is significantly
worse and the difference is beyond the margin. Otherwise it is inconclusive, with the number of further items that would
settle it. Bounds are at 95%, and over several suites Holm's correction holds their joint error.
"""

from __future__ import annotations

import math
from collections import Counter
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
    """The difference of a figure in [0, 1] between two models on the same items, whose clusters are independent of each
    other."""

    mean: float
    num_items: int
    num_clusters: int
    deviation: float
    """Standard deviation of a cluster's part in the mean, so that the standard error is deviation / sqrt(clusters);
    nan for a single cluster."""
    equal_fraction: float
    """How far clusters differ by one and the same amount, mostly 0: 1 if all do, 0 if no two do."""

    @classmethod
    def of(cls, gaps: Sequence[float], clusters: Sequence[str]) -> PairedGap:
        """The gap of at least one item, from one difference for each. The error is clustered (Miller, arXiv:2411.00640,
        section 3.2)."""
        return cls.of_values([[gap] for gap in gaps], [[0.0]] * len(gaps), clusters)

    @classmethod
    def of_values(
        cls, ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], clusters: Sequence[str]
    ) -> PairedGap:
        """The mean of all values of the model minus that of its baseline, from the values of each item, of which each
        model has at least one.

        The two means may be over different numbers of values, so the difference is one of two ratio estimators; its
        error is that of their linear parts, summed within clusters (Cochran, 1977, sections 6.3 and 9A.3).
        """
        named = [name for name, a, b in zip(clusters, ours, theirs, strict=True) if len(a) or len(b)]
        names = {name: number for number, name in enumerate(dict.fromkeys(named))}
        num = len(names)
        parts: Floats = np.zeros(num)
        means, inside = [], []
        for values in (ours, theirs):
            index = [names[name] for name, row in zip(clusters, values, strict=True) for _ in row]
            flat = np.array([value for row in values for value in row], dtype=np.float64)
            sums, counts = np.bincount(index, flat, num), np.bincount(index, minlength=num)
            means.append(float(flat.mean()))
            inside.append([a / b if b else math.nan for a, b in zip(sums, counts, strict=True)])
            parts = (sums - counts * means[-1]) * num / flat.size - parts
        gaps = Counter(round(a - b, 12) for a, b in zip(*inside, strict=True) if not math.isnan(a - b))
        same = max(gaps.values(), default=1)
        return cls(
            mean=means[0] - means[1],
            num_items=len(named),
            num_clusters=num,
            deviation=float(np.sqrt(np.square(parts).sum() / (num - 1))) if num > 1 else math.nan,
            equal_fraction=(same - 1) / (num - 1) if num > 1 else 0.0,
        )

    def interval(self) -> Interval:
        """The 95% interval: the differences that neither `p_above` nor `p_below` excludes at 2.5%, but for the least
        p-value of few clusters. One cluster has no bounds."""
        if self.num_clusters < 2:
            return Interval(self.mean, math.nan, math.nan, self.num_items)
        return Interval(self.mean, self._low(), -replace(self, mean=-self.mean)._low(), self.num_items)

    def _low(self) -> float:
        """The least difference b with mean - b <= t sqrt(variance(b) / clusters)."""
        t = float(scipy.stats.t.isf(ALPHA, self.num_clusters - 1))
        low = self.mean - t * self.deviation / math.sqrt(self.num_clusters)
        # the floor of the variance, at b = -x: (mean + x)^2 = c x (1 - x)
        c = t**2 * self.equal_fraction / self.num_clusters
        if (inner := c * (c - 4 * self.mean * (1 + self.mean))) >= 0:
            low = min(low, -(c - 2 * self.mean + math.sqrt(inner)) / (2 * (1 + c)))
        return max(-1.0, low)

    def variance(self, bound: float) -> float:
        """The variance of a cluster's part if the true difference is `bound`.

        Right and wrong answers that differ by `bound` on average have a variance of at least |bound| (1 - |bound|),
        however few of them are seen to differ (Tango, 1998). The clusters that differ by the same amount are given it,
        since they show no variance of their own.
        """
        return max(self.deviation**2, self.equal_fraction * abs(bound) * (1 - abs(bound)))

    def p_above(self, bound: float) -> float:
        """The p-value against "the true difference is `bound` or less"; 1 for a single cluster.

        It is not below that of a sign test, 0.5^clusters, so that no conclusion is drawn from fewer than six.
        """
        if self.num_clusters < 2 or self.mean <= bound:
            return 1.0
        least, error = 0.5**self.num_clusters, math.sqrt(self.variance(bound) / self.num_clusters)
        if error < 1e-12:
            return least
        return max(least, float(scipy.stats.t.sf((self.mean - bound) / error, self.num_clusters - 1)))

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
    the mean and the spread stay as they are, and at least what a sign test takes. None for a single cluster, and for a
    difference just at the margin."""
    beyond = gap.mean < -margin
    distance = abs(gap.mean) if beyond else gap.mean + margin
    if gap.num_clusters < 2 or distance < 1e-9:
        return None
    quantiles = float(scipy.special.ndtri(1 - alpha) + scipy.special.ndtri(POWER))
    clusters = max(gap.variance(0.0 if beyond else -margin) * (quantiles / distance) ** 2, -math.log2(alpha))
    return max(1, math.ceil(clusters * gap.num_items / gap.num_clusters) - gap.num_items)
