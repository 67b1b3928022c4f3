"""Figures of single annotators: agreement with the others, lean to the left of the screen, speed, equal answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from trimtab.stats import Floats, Interval, wilson
from trimtab.votes.table import Ints, VoteTable

HASTY_SECONDS = 2.0
"""A vote in less time than this is hasty: nobody reads two replies so fast."""
_RIDGE = 0.01


@dataclass(frozen=True, kw_only=True)
class AnnotatorCard:
    """The votes of one annotator compared with those of the others.

    Shares carry Wilson intervals. If several votes are about one ranking or prompt, they count as the number of
    independent votes that they are worth.
    """

    name: str
    num_votes: int
    agreement: Interval
    """Share of votes that equal the majority of the item's other votes; a tied majority counts in part."""
    left: Interval
    """Share of decided votes for the side shown on the left."""
    left_p_value: float
    """p-value of the share under no lean (binomial test, two-sided); nan without such votes."""
    left_bias: Interval
    """The gamma of `left_bias`, in log-odds: 0 is no lean, 0.2 means 55% left between equal replies."""
    ties: Interval
    """Share of votes that choose neither side."""
    median_seconds: float
    hasty: Interval
    """Share of timed votes faster than reading takes: see `hasty_votes`."""
    consistency: Interval
    """Share of repeated votes on an item that equal the first one."""
    longest_run: int
    """Length of the longest run of equal answers, as seen on the screen if the sides shown are known."""
    run_p_value: float
    """Probability of such a run somewhere in this many votes if each were drawn from everybody's answers; nan if the
    sides shown are not known, because the items' own order can then make runs."""
    flags: tuple[str, ...]
    """What to look at, in words. A flag is a reason to look at the votes, not to drop them."""


def annotator_cards(votes: VoteTable, *, confidence: float = 0.95) -> list[AnnotatorCard]:
    """A card for each annotator, in the order of `votes.annotators`.

    Flags hold at `confidence` for all annotators together (Bonferroni).
    """
    num = len(votes.annotators)
    if not num or not len(votes):
        return []
    bias = left_bias(votes)
    alone = _first_of_groups(votes)
    runs = [_longest_run(_answers(votes)[alone & (votes.annotator == r)]) for r in range(num)]
    everybody = _shares_of_answers(votes)
    strict = 1 - (1 - confidence) / num
    columns = _measured_shares(votes)
    effect = {name: _design_effects(*column, num) for name, column in columns.items()}

    def per(name: str, level: float) -> list[Interval]:
        values, who, _ = columns[name]
        sums, sizes = np.bincount(who, weights=values, minlength=num), np.bincount(who, minlength=num)
        return [_share(s, int(n), worse, level) for s, n, worse in zip(sums, sizes, effect[name], strict=True)]

    shown = {name: per(name, confidence) for name in columns}
    sure = {name: per(name, strict) for name in columns}
    mean_agreement, mean_hasty = (_mean(columns[name][0]) for name in ("agreement", "hasty"))
    left, who_left, _ = columns["left"]
    cards = []
    for r, name in enumerate(votes.annotators):
        mine = votes.annotator == r
        lefts, of = int(left[who_left == r].sum()), int((who_left == r).sum())
        fewer = effect["left"][r]
        p_left = float(scipy.stats.binomtest(round(lefts / fewer), round(of / fewer)).pvalue) if of else math.nan
        p_run = _run_p_value(runs[r], int((mine & alone).sum()), everybody) if of else math.nan
        flags = []
        if sure["agreement"][r].high < mean_agreement:
            flags.append(f"agrees with the others less than usual ({shown['agreement'][r].value:.0%})")
        if p_left < 1 - strict:
            flags.append(f"leans to the {'left' if lefts > of / 2 else 'right'} ({lefts} of {of} votes left)")
        if sure["hasty"][r].count and sure["hasty"][r].low > max(0.1, 2 * mean_hasty):
            flags.append(f"faster than reading takes in {shown['hasty'][r].value:.0%} of votes")
        if p_run < 1 - strict:
            flags.append(f"the same answer {runs[r]} times in a row")
        cards.append(
            AnnotatorCard(
                name=name,
                num_votes=int(mine.sum()),
                left_p_value=p_left,
                left_bias=_widened(bias[r], effect["left"][r]),
                median_seconds=_median(votes.seconds[mine]),
                longest_run=runs[r],
                run_p_value=p_run,
                flags=tuple(flags),
                **{column: intervals[r] for column, intervals in shown.items()},
            )
        )
    return cards


def _measured_shares(votes: VoteTable) -> dict[str, tuple[Floats, Ints, Ints]]:
    """What each share of a card is the mean of: a value for every vote that counts in it, with the vote's annotator
    and group."""
    first = votes.first_votes()
    neither = np.array([c in ("tie", "both_bad") for c in votes.categories])[votes.choice]
    measured: dict[str, tuple[VoteTable, NDArray[Any], NDArray[np.bool_]]] = {
        "agreement": (first, *_with_the_others(first)),
        "left": (votes, *_left_votes(votes)),
        "ties": (votes, neither, np.full(len(votes), votes.pairwise)),
        "hasty": (votes, hasty_votes(votes), ~np.isnan(votes.seconds)),
        "consistency": (votes, *_repeats(votes)),
    }
    return {
        name: (values[mask].astype(np.float64), table.annotator[mask], table.group_of_votes[mask])
        for name, (table, values, mask) in measured.items()
    }


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


def _median(values: Floats) -> float:
    """Of the values that are known; nan if none is."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


_UNKNOWN = Interval(math.nan, math.nan, math.nan, 0)


def _share(successes: float, n: int, effect: float, level: float) -> Interval:
    """Wilson's interval for as many independent votes as these n votes are worth, n / effect."""
    if not n:
        return _UNKNOWN
    worth = max(1, round(n / effect))
    bounds = wilson(min(float(successes) * worth / n, float(worth)), worth, confidence=level)
    return Interval(float(successes) / n, bounds.low, bounds.high, n)


def _design_effects(values: Floats, who: Ints, groups: Ints, num: int) -> Floats:
    """Design effect of each annotator's share: its variance over that of independent votes (Kish 1965), at least 1.

    The variance is that of a ratio over groups, G / (G - 1) sum_g (s_g - p n_g)² / n². If groups show no variance (one
    group, or all votes alike), a group counts as one vote.
    """
    effects = np.ones(num)
    cells, number = np.unique(np.stack([who, groups], axis=1), axis=0, return_inverse=True)
    if len(cells) == who.size:  # every vote is a group of its own
        return effects
    sums = np.bincount(number.ravel(), weights=values, minlength=len(cells))
    sizes = np.bincount(number.ravel(), minlength=len(cells))
    for r in range(num):
        mine = cells[:, 0] == r
        n, g = sizes[mine].sum(), int(mine.sum())
        if not n:
            continue
        p = sums[mine].sum() / n
        spread = ((sums[mine] - p * sizes[mine]) ** 2).sum()
        known = g > 1 and 0 < p < 1
        effects[r] = max(1.0, g / (g - 1) * spread / (n * p * (1 - p))) if known else n / g
    return effects


def _first_of_groups(votes: VoteTable) -> NDArray[np.bool_]:
    """True for the first vote [V] of each annotator in each group: the pairs of a ranking are one answer, not a run."""
    key = votes.group_of_votes * len(votes.annotators) + votes.annotator
    first = np.zeros(len(votes), dtype=bool)
    again = _repeats(votes)[1] if votes.group is None else np.zeros(len(votes), dtype=bool)
    first[np.unique(key, return_index=True)[1]] = True
    return first | again


def _widened(interval: Interval, effect: float) -> Interval:
    """The interval, symmetric around the estimate, if the variance is `effect` times larger."""
    half = (interval.high - interval.low) / 2 * math.sqrt(effect)
    return Interval(interval.value, interval.value - half, interval.value + half, interval.count)


def left_bias(votes: VoteTable) -> list[Interval]:
    """Each annotator's lean to the left: gamma_r of a logistic regression.

        logit P(left is chosen) = beta x_i s + gamma_r,   s = 1 with side A on the left, -1 on the right

    x_i is the log-odds of side A among the *other* annotators of the item (with half a vote added to each side), so
    that a better reply on the left is no lean. Only votes for a side count. A penalty of 0.01 gamma² / 2 keeps gamma
    finite for an annotator who always chose left. Bounds are 1.96 standard errors away; nan for annotators without
    such votes.
    """
    left, decided = _left_votes(votes)
    num = len(votes.annotators)
    if not decided.any():
        return [_UNKNOWN] * num
    table = votes.table()
    column = {c: i for i, c in enumerate(votes.categories)}
    a, b = column["A"], column["B"]
    who = votes.annotator[decided]
    others_a = _others(votes, decided, table, a)
    others_b = _others(votes, decided, table, b)
    side = np.where(votes.a_left[decided] == 1, 1.0, -1.0)
    x = side * np.log((others_a + 0.5) / (others_b + 0.5))
    y = left[decided]
    beta, gamma = 0.0, np.zeros(num)
    for _ in range(50):
        p = scipy.special.expit(beta * x + gamma[who])
        w = p * (1 - p)
        # one common slope and one intercept for each annotator: the Hessian is an arrow matrix, solved in closed form
        along = np.bincount(who, weights=w, minlength=num) + _RIDGE
        across = np.bincount(who, weights=w * x, minlength=num)
        slope = (w * x * x).sum() + _RIDGE
        g_gamma = np.bincount(who, weights=y - p, minlength=num) - _RIDGE * gamma
        g_beta = ((y - p) * x).sum() - _RIDGE * beta
        rest = slope - (across**2 / along).sum()
        step = (g_beta - (across * g_gamma / along).sum()) / rest
        beta += step
        moved = (g_gamma - across * step) / along
        gamma += moved
        # Where nobody else has voted x is 0 everywhere, and the slope stands still while the intercepts move.
        if max(abs(step), np.abs(moved).max()) < 1e-10:
            break
    error = np.sqrt(1 / along + (across / along) ** 2 / rest)
    z = float(scipy.special.ndtri(0.975))
    sizes = np.bincount(who, minlength=num)
    return [
        Interval(float(g), float(g - z * e), float(g + z * e), int(n)) if n else _UNKNOWN
        for g, e, n in zip(gamma, error, sizes, strict=True)
    ]


def hasty_votes(votes: VoteTable) -> NDArray[np.bool_]:
    """True for votes [V] in less time than max(2 s, the time to read the replies at the speed of the fastest fifth).

    If the replies are not known, the limit is 2 s. A vote whose time is not known is not hasty.
    """
    limit = np.full(len(votes), HASTY_SECONDS)
    if votes.characters.size:
        characters = votes.characters[votes.item]
        with np.errstate(divide="ignore", invalid="ignore"):
            speed = characters / votes.seconds
        known = np.isfinite(speed)
        if known.any():
            fastest = np.quantile(speed[known], 0.8)
            limit[known] = np.maximum(HASTY_SECONDS, characters[known] / fastest)
    return np.asarray(votes.seconds < limit)


def _left_votes(votes: VoteTable) -> tuple[Floats, NDArray[np.bool_]]:
    """Whether the left side was chosen, 1 or 0 [V], and which votes [V] chose a side whose place is known."""
    if not votes.pairwise:
        return np.zeros(len(votes)), np.zeros(len(votes), dtype=bool)
    names = np.array(votes.categories)[votes.choice]
    decided = np.isin(names, ("A", "B")) & ~np.isnan(votes.a_left)
    return ((names == "A") == (votes.a_left == 1)).astype(np.float64), decided


def _others(votes: VoteTable, mask: NDArray[np.bool_], table: Floats, category: int) -> Floats:
    """For each vote under the mask, how many votes of other annotators its item has for the category."""
    key = votes.item * len(votes.annotators) + votes.annotator
    mine = votes.choice == category
    _, index = np.unique(key, return_inverse=True)
    own = np.bincount(index, weights=mine)[index]
    return np.asarray(table[votes.item, category] - own)[mask]


def _with_the_others(votes: VoteTable) -> tuple[Floats, NDArray[np.bool_]]:
    """How far each vote [V] equals the majority of the item's other votes, in [0, 1], and which votes have others."""
    others = votes.table()[votes.item]
    others[np.arange(len(votes)), votes.choice] -= 1
    favourite = others == others.max(axis=1, keepdims=True)
    return favourite[np.arange(len(votes)), votes.choice] / favourite.sum(axis=1), others.sum(axis=1) > 0


def _repeats(votes: VoteTable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each vote [V] equals the annotator's first on the item, and which votes [V] repeat one."""
    key = votes.item * len(votes.annotators) + votes.annotator
    _, first, index = np.unique(key, return_index=True, return_inverse=True)
    again = first[index] != np.arange(len(votes))
    return votes.choice == votes.choice[first][index], again


def _answers(votes: VoteTable) -> Ints:
    """The answers as seen on the screen: left or right for a vote for a side if that is known, else the category."""
    left, decided = _left_votes(votes)
    return np.where(decided, len(votes.categories) + left.astype(np.int64), votes.choice)


def _shares_of_answers(votes: VoteTable) -> Floats:
    """How common each value of `_answers` is among all annotators; left and right count as equally likely."""
    q = len(votes.categories)
    shares = np.bincount(_answers(votes), minlength=q + 2) / len(votes)
    shares[q:] = shares[q:].mean()
    return shares


def _longest_run(answers: Ints) -> int:
    return max((len(list(run)) for _, run in groupby(answers.tolist())), default=0)


def _run_p_value(length: int, num: int, shares: Floats) -> float:
    """1 - exp(-expected number of runs of at least `length`) in `num` independent draws (Poisson clumping).

    A run begins after a different answer, so for an answer of share p there are p^L (1 + (n - L) (1 - p)) of them.
    """
    expected = (shares**length * (1 + max(num - length, 0) * (1 - shares))).sum()
    return float(-np.expm1(-expected))
