"""How far annotators agree, also beyond chance: coefficients with bootstrap intervals over items.

Every coefficient is a function of a table: how many votes each item has in each category. It is computed on the
distinct rows of that table with weights, so that a bootstrap resample of the items is a row of weights and all
resamples are one product of matrices.

Which of two replies is called A is arbitrary. With `swap`, every item therefore counts once each way round, with half
the weight: chance agreement then does not depend on how the sides of any item were named.

If a coefficient is undefined, the result says why in words: it is never only nan, and never 1 because nothing varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from trimtab.stats import Floats, Interval
from trimtab.votes.table import Ints, VoteTable

Scale = Literal["nominal", "ordinal", "interval", "ratio"]
Weights = Literal["identity", "linear", "quadratic", "ordinal"]
Statistic = Callable[[Floats, Floats], Floats]
"""From distinct rows of counts [U, q] and their weights [B, U] to values [B], nan if undefined."""


class Resampling(TypedDict, total=False):
    """How intervals are found, the same for all coefficients."""

    groups: Ints | None
    """[I], the group of each item. Items of one group are resampled together; None if all are independent."""
    num_resamples: int
    """1000 unless given."""
    seed: int
    """0 unless given."""


_CELLS = 4_000_000
"""Numbers held in memory at once while resampling: 32 MB."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One coefficient with its bootstrap interval, or the reason why there is none."""

    name: str
    interval: Interval
    """`count` is the number of items it is computed from, or of their groups. The value is nan if undefined, the bounds
    are nan if unknown."""
    undefined: str = ""
    """Why there is no value; empty if there is one."""
    note: str = ""
    """What a reader has to know about the value, such as what was left out."""

    @property
    def text(self) -> str:
        """The result as text, such as 0.592 [0.556, 0.630] (n=400)."""
        if self.undefined:
            return f"undefined: {self.undefined}"
        bounds = "" if math.isnan(self.interval.low) else f" [{self.interval.low:.3f}, {self.interval.high:.3f}]"
        return f"{self.interval.value:.3f}{bounds} (n={self.interval.count})"


def raw_agreement(table: Floats, **resampling: Unpack[Resampling]) -> Agreement:
    """How often two randomly chosen annotators of the same item agree, not corrected for chance.

    The mean is over items with two votes or more; `table` [I, q] holds counts of votes. It is the P-bar of Fleiss and
    the observed agreement of Gwet.
    """
    several = table.sum(axis=1) >= 2
    why = "" if several.any() else _no_overlap(table)
    return _with_interval("raw agreement", _raw, table, several, why, **resampling)


def fleiss_kappa(
    table: Floats, *, swap: Ints | None = None, categories: Sequence[str] = (), **resampling: Unpack[Resampling]
) -> Agreement:
    """Fleiss' kappa for items with equally many votes (Fleiss 1971, Psychological Bulletin 76, eq. 7).

        kappa = (P - P_e) / (1 - P_e),   P = mean_i sum_j n_ij (n_ij - 1) / (n (n - 1)),   P_e = sum_j p_j^2

    Only items with the most common number of votes (two or more) count; the note says how many others are left out.
    """
    sizes = table.sum(axis=1)
    several = sizes[sizes >= 2]
    if not several.size:
        return _undefined("Fleiss' kappa", _no_overlap(table))
    found, times = np.unique(several, return_counts=True)
    size = found[np.argmax(times)]
    left_out = int((sizes > 0).sum() - (sizes == size).sum())
    note = f"on the items with exactly {size:.0f} votes; {left_out} others left out" if left_out else ""
    why = _no_variation(table[sizes == size], categories)
    return _with_interval("Fleiss' kappa", _fleiss, table, sizes == size, why, swap=swap, note=note, **resampling)


def krippendorff_alpha(
    table: Floats,
    *,
    scale: Scale = "nominal",
    values: Floats | None = None,
    swap: Ints | None = None,
    categories: Sequence[str] = (),
    **resampling: Unpack[Resampling],
) -> Agreement:
    """Krippendorff's alpha: for any number of annotators, with any votes missing (Krippendorff 2004, ch. 11).

        alpha = 1 - D_o / D_e,   o_ck = sum_u n_uc (n_uk - [c = k]) / (m_u - 1),
        D_o = sum_ck o_ck d_ck / n,   D_e = sum_ck n_c n_k d_ck / (n (n - 1))

    d_ck is [c ≠ k] (nominal), (n_c/2 + n_between + n_k/2)² (ordinal, of categories in order), (v_c - v_k)² (interval)
    or ((v_c - v_k) / (v_c + v_k))² (ratio) with the `values` [q] of the categories. Items with one vote do not count.
    """
    if scale in ("interval", "ratio") and values is None:
        raise ValueError(f"a {scale} scale needs the values of its categories")
    several = table.sum(axis=1) >= 2
    why = _no_variation(table[several], categories) if several.any() else _no_overlap(table)
    name = f"Krippendorff's alpha ({scale})"
    return _with_interval(name, _alpha(scale, values), table, several, why, swap=swap, **resampling)


def gwet_ac(
    table: Floats,
    *,
    weights: Weights = "identity",
    values: Floats | None = None,
    swap: Ints | None = None,
    categories: Sequence[str] = (),
    **resampling: Unpack[Resampling],
) -> Agreement:
    """Gwet's AC1, or AC2 with weights, which does not collapse when one category is common (Gwet 2008, BJMSP 61).

        AC = (p_a - p_e) / (1 - p_e),   p_e = sum_kl w_kl / (q (q - 1)) sum_k pi_k (1 - pi_k)

    pi_k is the mean share of category k over items with a vote, p_a the weighted agreement over those with two or
    more, q the number of columns: a category that could be chosen but never was needs a column too.
    """
    name = "Gwet's AC1" if weights == "identity" else f"Gwet's AC2 ({weights})"
    sizes = table.sum(axis=1)
    several = sizes >= 2
    why = "" if several.any() else _no_overlap(table)
    if not why and table.shape[1] < 2:
        why = _no_variation(table, categories)
    groups = resampling.get("groups")
    num_several = int(several.sum()) if groups is None else np.unique(groups[several]).size
    matrix = agreement_weights(table.shape[1], weights, values)
    found = _with_interval(name, _gwet(matrix), table, sizes >= 1, why, swap=swap, **resampling)
    return replace(found, interval=replace(found.interval, count=num_several))


def leave_one_out(table: Floats, **resampling: Unpack[Resampling]) -> Agreement:
    """How often a vote equals the majority of the item's other votes: one person's score, to compare a model with.

    If the others are evenly split, one of their most common choices is drawn (Dubois et al., arXiv:2305.14387). The
    mean is over items with two votes or more.
    """
    several = table.sum(axis=1) >= 2
    why = "" if several.any() else _no_overlap(table)
    name = "one against the majority of the others"
    return _with_interval(name, _leave_one_out, table, several, why, **resampling)


def cohen_kappa(
    first: Ints,
    second: Ints,
    num_categories: int,
    *,
    weights: Weights = "identity",
    values: Floats | None = None,
    swap: Ints | None = None,
    categories: Sequence[str] = (),
    **resampling: Unpack[Resampling],
) -> Agreement:
    """Cohen's kappa of two annotators over the items both judged (Cohen 1960; weighted: Cohen 1968).

        kappa = (p_o - p_e) / (1 - p_e),   p_o = sum_kl w_kl p_kl,   p_e = sum_kl w_kl p_k. p_.l

    `first` and `second` are the category numbers that the two chose for the same items. With `swap`, the table of the
    two is averaged with the table of exchanged sides.
    """
    name = "Cohen's kappa" if weights == "identity" else f"Cohen's kappa ({weights} weights)"
    n = first.size
    if not n:
        return _undefined(name, "no overlap: the two annotators share no item")
    places = first * num_categories + second
    cells = np.bincount(places, minlength=num_categories**2).astype(np.float64)
    used = np.union1d(first, second)
    if used.size == 1:
        return _undefined(name, f"no variation: every vote is {_quoted(categories, int(used[0]))}", n)
    matrix = agreement_weights(num_categories, weights, values)

    def kappa(tables: Floats) -> Floats:
        square = tables.reshape(-1, num_categories, num_categories) / tables.sum(axis=1)[:, None, None]
        if swap is not None:
            square = (square + square[:, swap][:, :, swap]) / 2
        chance = np.einsum("bk,kl,bl->b", square.sum(axis=2), matrix, square.sum(axis=1))
        return _beyond_chance(np.einsum("bkl,kl->b", square, matrix), chance)

    value = float(kappa(cells[None])[0])
    drawn = [kappa(part) for part in _resampled(places, cells.size, **resampling)]
    return _finish(name, value, drawn, n, "", resampling.get("groups"))


def agreement_weights(num_categories: int, kind: Weights, values: Floats | None = None) -> Floats:
    """How much a vote for l agrees with one for k, [q, q], 1 on the diagonal (Gwet 2014, ch. 3).

    identity: 0 off the diagonal; linear and quadratic: 1 - |k - l| / range and 1 - (k - l)² / range², of the values
    (without `values`, of the places in the order); ordinal: 1 - C(|k - l| + 1, 2) / C(q, 2), of the places.
    """
    if kind == "identity" or num_categories < 2:
        return np.eye(num_categories)
    places = np.arange(num_categories, dtype=np.float64)
    at = places if values is None or kind == "ordinal" else values
    apart = np.abs(at[:, None] - at[None, :])
    if kind == "ordinal":
        return np.asarray(1 - apart * (apart + 1) / (num_categories * (num_categories - 1)))
    share = apart / np.ptp(at)
    return np.asarray(1 - (share if kind == "linear" else share**2))


def noise_from_agreement(agreement: Agreement) -> Agreement:
    """Probability p that one vote is right, from the agreement a on two choices: p = (1 + sqrt(2a - 1)) / 2.

    This holds if all annotators are equally good and err independently and symmetrically: a = p² + (1 - p)². Then 1 - p
    is the share of wrong labels that a model trained on single votes should expect (its label smoothing).

    p is a reference line, not a ceiling: real items differ in difficulty, so votes do not err independently. If
    agreement is below one half, there is no such p.
    """
    name = "accuracy of one vote"
    estimate = agreement.interval
    if agreement.undefined:
        return _undefined(name, agreement.undefined)
    if estimate.value < 0.5:
        why = f"two annotators agree on {estimate.value:.0%}, less often than two coins"
        return _undefined(name, why, estimate.count)

    def accuracy(a: float) -> float:
        return (1 + math.sqrt(max(2 * a - 1, 0.0))) / 2 if not math.isnan(a) else math.nan

    bounds = Interval(accuracy(estimate.value), accuracy(estimate.low), accuracy(estimate.high), estimate.count)
    return Agreement(name=name, interval=bounds)


@dataclass(frozen=True, kw_only=True)
class AnnotatorPair:
    """How far two annotators agree on the items that both judged."""

    first: str
    second: str
    agreement: Interval
    kappa: Agreement


def annotator_pairs(votes: VoteTable, *, num_resamples: int = 1000, seed: int = 0) -> list[AnnotatorPair]:
    """Every two annotators who share an item, those with the most shared items first."""
    votes = votes.first_votes()
    q = len(votes.categories)
    chosen = np.full((len(votes.annotators), len(votes.items)), -1, dtype=np.int64)
    chosen[votes.annotator, votes.item] = votes.choice
    judged = chosen >= 0
    shared = judged.astype(np.int64) @ judged.T.astype(np.int64)
    pairs = []
    for i, j in zip(*np.nonzero(np.triu(shared, 1)), strict=True):
        both = judged[i] & judged[j]
        first, second = chosen[i, both], chosen[j, both]
        groups = None if votes.group is None else votes.group[both]
        how: Resampling = {"groups": groups, "num_resamples": num_resamples, "seed": seed}
        apart = (first != second).astype(np.int64)
        drawn = [part[:, 0] / part.sum(axis=1) for part in _resampled(apart, 2, **how)]
        raw = _finish("agreement", 1 - float(apart.mean()), drawn, apart.size, "", groups)
        kappa = cohen_kappa(first, second, q, swap=votes.swap, categories=votes.categories, **how)
        pairs.append(
            AnnotatorPair(first=votes.annotators[i], second=votes.annotators[j], agreement=raw.interval, kappa=kappa)
        )
    return sorted(pairs, key=lambda pair: -pair.agreement.count)


# --- coefficients of weighted rows ---


def _raw(rows: Floats, weights: Floats) -> Floats:
    sizes = rows.sum(axis=1)
    return _ratio(weights @ (_same(rows) / (sizes * (sizes - 1))), weights.sum(axis=1))


def _fleiss(rows: Floats, weights: Floats) -> Floats:
    shares = _ratio(weights @ rows, (weights @ rows.sum(axis=1))[:, None])
    return _beyond_chance(_raw(rows, weights), (shares**2).sum(axis=1))


def _alpha(scale: Scale, values: Floats | None) -> Statistic:
    def alpha(rows: Floats, weights: Floats) -> Floats:
        pairable = rows.sum(axis=1) - 1
        totals = weights @ rows
        n = totals.sum(axis=1)
        apart = _distances(scale, totals, values)
        scaled = rows / pairable[:, None]
        if scale == "ordinal":  # its distances differ by resample, so coincidences are needed
            coincidences = (weights[:, :, None] * scaled[None]).swapaxes(1, 2) @ rows
            observed = (coincidences * apart).sum(axis=(1, 2))
        else:
            observed = weights @ ((scaled @ apart[0]) * rows).sum(axis=1)
        expected = np.einsum("bc,bck,bk->b", totals, np.broadcast_to(apart, (len(n), *apart.shape[1:])), totals)
        return 1 - _ratio(observed * (n - 1), expected)

    return alpha


def _distances(scale: Scale, totals: Floats, values: Floats | None) -> Floats:
    """Squared distances of categories, [B, q, q] (ordinal) or [1, q, q]."""
    q = totals.shape[1]
    if scale == "nominal":
        return 1 - np.eye(q)[None]
    if scale == "ordinal":
        middle = np.cumsum(totals, axis=1) - totals / 2
        return (middle[:, :, None] - middle[:, None, :]) ** 2
    assert values is not None
    apart = values[:, None] - values[None, :]
    if scale == "ratio":
        apart = np.divide(apart, values[:, None] + values[None, :], out=np.zeros((q, q)), where=apart != 0)
    return (apart**2)[None]


def _gwet(matrix: Floats) -> Statistic:
    q = matrix.shape[0]

    def coefficient(rows: Floats, weights: Floats) -> Floats:
        sizes = rows.sum(axis=1)
        several = sizes >= 2
        pairs = np.where(several, sizes * (sizes - 1), 1.0)
        alike = np.where(several, (rows * (rows @ matrix - 1)).sum(axis=1) / pairs, 0.0)
        observed = _ratio(weights @ alike, weights @ several.astype(np.float64))
        shares = _ratio(weights @ (rows / sizes[:, None]), weights.sum(axis=1)[:, None])
        chance = matrix.sum() / (q * (q - 1)) * (shares * (1 - shares)).sum(axis=1)
        return _beyond_chance(observed, chance)

    return coefficient


def _leave_one_out(rows: Floats, weights: Floats) -> Floats:
    others = rows[:, None, :] - np.eye(rows.shape[1])[None]  # [U, vote's category, q]
    favourite = others == others.max(axis=2, keepdims=True)
    right = np.einsum("ukk->uk", favourite) / favourite.sum(axis=2)
    return _ratio(weights @ ((rows * right).sum(axis=1) / rows.sum(axis=1)), weights.sum(axis=1))


def _same(rows: Floats) -> Floats:
    """Number of ordered pairs of equal votes, for each item."""
    return np.asarray((rows * (rows - 1)).sum(axis=1))


def _ratio(above: Floats, below: Floats) -> Floats:
    out = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    return np.asarray(np.divide(above, below, out=out, where=below > 0))


def _beyond_chance(observed: Floats, chance: Floats) -> Floats:
    room = 1 - chance
    return _ratio(observed - chance, np.where(room > 1e-12, room, 0.0))


# --- intervals and words ---


def _with_interval(
    name: str,
    statistic: Statistic,
    table: Floats,
    counted: NDArray[np.bool_],
    why: str,
    *,
    swap: Ints | None = None,
    note: str = "",
    **resampling: Unpack[Resampling],
) -> Agreement:
    """The statistic of the counted rows [I] of a table, with a percentile bootstrap over items, or groups of them."""
    rated, groups = table[counted], resampling.get("groups")
    if groups is not None:
        groups = resampling["groups"] = groups[counted]
    n = len(rated)
    if why:
        return _undefined(name, why, n)
    rows, kinds, times = np.unique(rated, axis=0, return_inverse=True, return_counts=True)
    both = rows if swap is None else np.concatenate([rows, rows[:, swap]])

    def of(weights: Floats) -> Floats:
        return statistic(both, weights if swap is None else np.concatenate([weights, weights], axis=1) / 2)

    value = float(of(times[None].astype(np.float64))[0])
    drawn = [of(part) for part in _resampled(kinds.ravel(), len(rows), cells=both.size, **resampling)]
    return _finish(name, value, drawn, n, note, groups)


def _resampled(
    kinds: Ints, num_kinds: int, *, cells: int = 1, groups: Ints | None = None, num_resamples: int = 1000, seed: int = 0
) -> Iterator[Floats]:
    """How often each kind of item is in each resample, [B, kinds], in blocks that fit into memory.

    Items are drawn one by one, or in whole groups if `groups` are given: votes about one ranking or one prompt share
    its difficulty, so drawing them one by one would give intervals that are too narrow.
    """
    if groups is None:
        profiles, times = None, np.bincount(kinds, minlength=num_kinds)
    else:
        of, number = np.unique(groups, return_inverse=True)
        counts = np.bincount(number * num_kinds + kinds, minlength=of.size * num_kinds).reshape(-1, num_kinds)
        profiles, times = np.unique(counts, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    total = int(times.sum())
    block = max(1, _CELLS // max(1, cells, times.size))
    for done in range(0, num_resamples, block):
        drawn = generator.multinomial(total, times / total, size=min(block, num_resamples - done)).astype(np.float64)
        yield drawn if profiles is None else drawn @ profiles


def _finish(
    name: str, value: float, parts: Sequence[Floats], n: int, note: str, groups: Ints | None = None
) -> Agreement:
    """The result. `parts` are blocks of resampled values. With groups, their number is n: groups are independent."""
    drawn = np.concatenate(parts) if parts else np.empty(0)
    one = "one item: no interval"
    if groups is not None:
        items, n = n, np.unique(groups).size
        note = "; ".join(filter(None, [note, f"{items} pairs of {n} rankings or prompts, resampled whole"]))
        one = "one ranking or prompt: no interval"
    if n < 2:
        return Agreement(
            name=name, interval=Interval(value, math.nan, math.nan, n), note="; ".join(filter(None, [note, one]))
        )
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if known.size else (math.nan, math.nan)
    if known.size < drawn.size:
        gone = f"undefined in {1 - known.size / drawn.size:.1%} of the resamples, which the interval leaves out"
        note = "; ".join(filter(None, [note, gone]))
    return Agreement(name=name, interval=Interval(value, float(low), float(high), n), note=note)


def _undefined(name: str, why: str, n: int = 0) -> Agreement:
    return Agreement(name=name, interval=Interval(math.nan, math.nan, math.nan, n), undefined=why)


def _no_overlap(table: Floats) -> str:
    return "no overlap: no item has two votes" if table.sum() else "no votes"


def _no_variation(rated: Floats, categories: Sequence[str]) -> str:
    used = np.flatnonzero(rated.sum(axis=0))
    return f"no variation: every vote is {_quoted(categories, int(used[0]))}" if used.size == 1 else ""


def _quoted(categories: Sequence[str], number: int) -> str:
    return repr(categories[number]) if categories else f"of category {number}"
