"""Win rates of models against a baseline, from verdicts: raw, by order of display, and one model against another.

The verdicts on one prompt are not independent (orders, judges), so they are averaged first, and every interval is over
prompts: the prompts are the clusters.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from trimtab.evals.verdicts import PairVerdict
from trimtab.stats import Floats, Interval, bootstrap_share, t_interval

Matchup = tuple[str, str]
"""A model and its baseline."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often a model is preferred to its baseline. Intervals are 95% bootstraps over prompts."""

    model: str
    baseline: str
    rate: Interval
    """Mean verdict, each prompt counted once; `count` is the number of prompts. A tie is half a win."""
    discrete: Interval
    """The same with each verdict rounded to a win, a loss or a tie (exactly 0.5)."""
    num_verdicts: int
    num_wins: int
    num_losses: int
    num_ties: int
    first_shown: Interval | None
    """How often the reply shown first is preferred, on the prompts that were judged in both orders: 0.5 without
    position bias. None if there are no such prompts."""
    flip_fraction: float
    """Share of those prompts on which the two orders have different winners; nan if there are none."""
    num_one_order: int
    """Prompts judged in one known order only, so that a position bias is in their verdicts."""
    prompts_for_width: int
    """Prompts that an interval of the wanted half-width takes, with verdicts that vary as these do."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The win rates of two models against one baseline, compared on the prompts that both were judged on."""

    model: str
    other: str
    baseline: str
    difference: Interval
    """Rate of `model` minus that of `other` with Student's t interval over prompts; `count` is the number of prompts.
    The bounds are nan if the difference is the same on every prompt."""
    p_value: float
    """Of the paired t test that both win equally often, or of the sign test if no two prompts differ."""
    p_holm: float
    """The same, corrected for all pairs of models that are compared with it (Holm 1979)."""


def by_matchup(verdicts: Sequence[PairVerdict]) -> dict[Matchup, list[PairVerdict]]:
    """The verdicts of each model and baseline, in order of first appearance."""
    found: dict[Matchup, list[PairVerdict]] = defaultdict(list)
    for verdict in verdicts:
        found[verdict.model, verdict.baseline].append(verdict)
    return dict(found)


def per_prompt(verdicts: Sequence[PairVerdict]) -> dict[str, float]:
    """The mean verdict of each prompt."""
    values: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        values[verdict.prompt].append(verdict.verdict)
    return {prompt: sum(row) / len(row) for prompt, row in values.items()}


def win_rate_of(verdicts: Sequence[PairVerdict], *, half_width: float = 0.03, seed: int = 0) -> WinRate:
    """The win rate of one model against one baseline, from at least one verdict."""
    means = np.array(list(per_prompt(verdicts).values()))
    rounded: dict[str, list[float]] = defaultdict(list)
    orders: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for verdict in verdicts:
        rounded[verdict.prompt].append(_rounded(verdict.verdict))
        if verdict.shown_first is not None:
            orders[verdict.prompt][verdict.shown_first].append(verdict.verdict)
    both = np.array(
        [[np.mean(order["model"]), np.mean(order["baseline"])] for order in orders.values() if len(order) == 2]
    ).reshape(-1, 2)
    wins = [_rounded(verdict.verdict) for verdict in verdicts]
    first = (both[:, 0] + 1 - both[:, 1]) / 2
    flips = [_rounded(a) != _rounded(b) for a, b in both]
    return WinRate(
        model=verdicts[0].model,
        baseline=verdicts[0].baseline,
        rate=bootstrap_share(means, seed=seed),
        discrete=bootstrap_share([np.mean(row) for row in rounded.values()], seed=seed),
        num_verdicts=len(verdicts),
        num_wins=wins.count(1.0),
        num_losses=wins.count(0.0),
        num_ties=wins.count(0.5),
        first_shown=bootstrap_share(first, seed=seed) if len(both) else None,
        flip_fraction=float(np.mean(flips)) if flips else math.nan,
        num_one_order=sum(len(order) == 1 for order in orders.values()),
        prompts_for_width=prompts_for(half_width, deviation=float(means.std(ddof=1)) if len(means) > 1 else 0.5),
    )


def differences(verdicts: Mapping[Matchup, Sequence[PairVerdict]]) -> list[Difference]:
    """Every two models with one baseline, paired by prompt."""
    means = {matchup: per_prompt(rows) for matchup, rows in verdicts.items()}
    found = []
    for (first, a), (second, b) in itertools.combinations(means.items(), 2):
        shared = [prompt for prompt in a if prompt in b]
        if first[1] != second[1] or not shared:
            continue
        gaps = np.array([a[prompt] - b[prompt] for prompt in shared])
        found.append((first[0], second[0], first[1], *_tested(gaps)))
    corrected = holm([row[4] for row in found])
    return [
        Difference(model=model, other=other, baseline=baseline, difference=gap, p_value=p, p_holm=p_holm)
        for (model, other, baseline, gap, p), p_holm in zip(found, corrected, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method (1979), in their order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(p_values))):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


def prompts_for(half_width: float, *, deviation: float = 0.5, confidence: float = 0.95) -> int:
    """Prompts that an interval of this half-width takes, if their mean verdicts have this standard deviation.

    The deviation of wins and losses at 50% is 0.5, which is the largest. Raises ValueError for a width not above 0.
    """
    if not half_width > 0:
        raise ValueError(f"a half-width of {half_width}")
    z = float(scipy.special.ndtri(0.5 + confidence / 2))
    return max(2, math.ceil((z * deviation / half_width) ** 2))


def _rounded(verdict: float) -> float:
    return 0.5 if verdict == 0.5 else float(verdict > 0.5)


def _tested(gaps: Floats) -> tuple[Interval, float]:
    """Mean of paired differences with Student's t interval, and the p-value that it is 0.

    Without spread t is undefined: the bounds are nan, and the p-value is that of the sign test.
    """
    mean = float(gaps.mean())
    if np.ptp(gaps) < 1e-12:
        return Interval(mean, math.nan, math.nan, gaps.size), 1.0 if abs(mean) < 1e-12 else 2.0 ** (1 - gaps.size)
    error = float(gaps.std(ddof=1)) / math.sqrt(gaps.size)
    return t_interval(gaps), float(2 * scipy.stats.t.sf(abs(mean) / error, gaps.size - 1))
