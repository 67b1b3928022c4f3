"""Win rates of models against a baseline, from verdicts: raw, by order of display, and one model against another.

The verdicts on one prompt are not independent (orders, judges), so they are averaged first, and every interval is over
prompts: the prompts are the clusters. The two orders of display weigh the same in the average of a prompt, however
often each was judged; otherwise a judge that likes what is shown first would decide it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from trimtab.evals.verdicts import PairVerdict, Side
from trimtab.stats import Floats, Interval, bootstrap_mean, holm, paired_test, wilson

Matchup = tuple[str, str]
"""A model and its baseline."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often a model is preferred to its baseline. Intervals are 95% bootstraps over prompts."""

    model: str
    baseline: str
    rate: Interval
    """Mean verdict, each prompt counted once and each of its orders half; `count` is the number of prompts. A tie is
    half a win."""
    discrete: Interval
    """The same with each verdict rounded to a win, a loss or a tie (exactly 0.5)."""
    weighted: Interval | None
    """Mean over all verdicts with each counted as often as its weight says: the score of Arena-Hard. `count` is the
    number of prompts. None if all weights are 1."""
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
    num_unbalanced: int
    """Prompts judged in both orders, and in one of them more often; each order counts half nevertheless."""
    prompts_for_width: int
    """Prompts that an interval of the wanted half-width takes, with verdicts that vary as these do; see
    `likely_deviation`."""


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


def by_prompt(verdicts: Sequence[PairVerdict]) -> dict[str, list[PairVerdict]]:
    """The verdicts on each prompt, in order of first appearance."""
    found: dict[str, list[PairVerdict]] = defaultdict(list)
    for verdict in verdicts:
        found[verdict.prompt].append(verdict)
    return dict(found)


def mean_over_orders(verdicts: Sequence[PairVerdict], value: Callable[[PairVerdict], float]) -> float:
    """The mean value of the verdicts on one prompt. If both orders of display are among them, the mean in each order
    is taken first, and the two weigh the same; verdicts in no known order keep their share of the whole."""
    orders: dict[Side | None, list[float]] = defaultdict(list)
    for verdict in verdicts:
        orders[verdict.shown_first].append(value(verdict))
    unknown = orders.pop(None, [])
    known = sum(map(len, orders.values()))
    total = known * sum(sum(row) / len(row) for row in orders.values()) / max(len(orders), 1) + sum(unknown)
    return total / (known + len(unknown))


def per_prompt(
    verdicts: Sequence[PairVerdict], value: Callable[[PairVerdict], float] = lambda verdict: verdict.verdict
) -> dict[str, float]:
    """The mean verdict of each prompt, or the mean of another value of its verdicts; see `mean_over_orders`."""
    return {prompt: mean_over_orders(rows, value) for prompt, rows in by_prompt(verdicts).items()}


def win_rate_of(verdicts: Sequence[PairVerdict], *, half_width: float = 0.03, seed: int = 0) -> WinRate:
    """The win rate of one model against one baseline, from at least one verdict."""
    means = np.array(list(per_prompt(verdicts).values()))
    rounded = per_prompt(verdicts, lambda verdict: _rounded(verdict.verdict))
    orders: list[dict[Side, list[float]]] = []
    for rows in by_prompt(verdicts).values():
        own: dict[Side, list[float]] = defaultdict(list)
        for verdict in rows:
            if verdict.shown_first is not None:
                own[verdict.shown_first].append(verdict.verdict)
        orders.append(own)
    judged_twice = [order for order in orders if len(order) == 2]
    both = np.array([[np.mean(order["model"]), np.mean(order["baseline"])] for order in judged_twice]).reshape(-1, 2)
    wins = [_rounded(verdict.verdict) for verdict in verdicts]
    first = (both[:, 0] + 1 - both[:, 1]) / 2
    flips = [_rounded(a) != _rounded(b) for a, b in both]
    return WinRate(
        model=verdicts[0].model,
        baseline=verdicts[0].baseline,
        rate=bootstrap_mean(means, shares=True, seed=seed),
        discrete=bootstrap_mean(list(rounded.values()), shares=True, seed=seed),
        weighted=_weighted(verdicts, seed=seed) if any(verdict.weight != 1 for verdict in verdicts) else None,
        num_verdicts=len(verdicts),
        num_wins=wins.count(1.0),
        num_losses=wins.count(0.0),
        num_ties=wins.count(0.5),
        first_shown=bootstrap_mean(first, shares=True, seed=seed) if len(both) else None,
        flip_fraction=float(np.mean(flips)) if flips else math.nan,
        num_one_order=sum(len(order) == 1 for order in orders),
        num_unbalanced=sum(len(order["model"]) != len(order["baseline"]) for order in judged_twice),
        prompts_for_width=prompts_for(half_width, deviation=likely_deviation(means)),
    )


def _weighted(verdicts: Sequence[PairVerdict], *, seed: int) -> Interval:
    """See `WinRate.weighted`. Arena-Hard draws single verdicts anew for its interval; here it is whole prompts."""
    repeated = [verdict for verdict in verdicts for _ in range(verdict.weight)]
    prompts = [verdict.prompt for verdict in repeated]
    found = bootstrap_mean([verdict.verdict for verdict in repeated], groups=prompts, shares=True, seed=seed)
    return replace(found, count=len(set(prompts)))


def differences(verdicts: Mapping[Matchup, Sequence[PairVerdict]]) -> list[Difference]:
    """Every two models with one baseline, paired by prompt."""
    means = {matchup: per_prompt(rows) for matchup, rows in verdicts.items()}
    found = []
    for (first, a), (second, b) in itertools.combinations(means.items(), 2):
        shared = [prompt for prompt in a if prompt in b]
        if first[1] != second[1] or not shared:
            continue
        gaps = np.array([a[prompt] - b[prompt] for prompt in shared])
        found.append((first[0], second[0], first[1], *paired_test(gaps)))
    corrected = holm([row[4] for row in found])
    return [
        Difference(model=model, other=other, baseline=baseline, difference=gap, p_value=p, p_holm=p_holm)
        for (model, other, baseline, gap, p), p_holm in zip(found, corrected, strict=True)
    ]


def likely_deviation(means: Floats) -> float:
    """The standard deviation that the verdicts of further prompts may have, from the mean verdicts [P] of these.

    It is that of verdicts such as these with a share u of the opposite verdict, 0 or 1, whichever is further from the
    mean m. u is the largest share of which P prompts may well show nothing: the upper bound of Wilson's 95% interval of
    0 in P, and at most a half.

        s'^2 = (1 - u) s^2 + u (1 - u) max(m, 1 - m)^2

    For many prompts that vary it is their own deviation s; for a few that agree it is not 0, which would claim that two
    further prompts settle everything. Never more than 0.5, the largest deviation in [0, 1].
    """
    if means.size < 2:
        return 0.5
    unseen = min(0.5, wilson(0, means.size).high)
    mean = float(means.mean())
    variance = (1 - unseen) * float(means.var(ddof=1)) + unseen * (1 - unseen) * max(mean, 1 - mean) ** 2
    return min(0.5, math.sqrt(variance))


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
