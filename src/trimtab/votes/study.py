"""Everything that the votes of a campaign say about their own quality, in one record."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.core.errors import DataError
from trimtab.core.files import finite
from trimtab.core.types import JsonDict
from trimtab.stats import Interval
from trimtab.votes.aggregate import AggregationMethod, aggregate
from trimtab.votes.agreement import (
    Agreement,
    AnnotatorPair,
    annotator_pairs,
    cohen_kappa,
    fleiss_kappa,
    gwet_ac,
    krippendorff_alpha,
    leave_one_out,
    noise_from_agreement,
    raw_agreement,
)
from trimtab.votes.annotators import AnnotatorCard, annotator_cards
from trimtab.votes.ratings import Ratings, Ties, games_of, rate
from trimtab.votes.table import VoteTable

NUM_CONTESTED = 20
"""Items listed as the most contested."""
MIN_DEEP_FRACTION = 0.1
"""Annotator models are fitted if at least this share of the items has three votes or more."""


@dataclass(frozen=True, kw_only=True)
class Skill:
    """Probability that an answer of one annotator is right (MACE: that it is not a guess), by one annotator model."""

    annotator: str
    method: AggregationMethod
    value: float


@dataclass(frozen=True, kw_only=True)
class ContestedItem:
    """An item on which the votes are divided."""

    item: str
    votes: tuple[tuple[str, int], ...]
    """Number of votes for each category that has any, such as (("A", 3), ("B", 2))."""
    entropy: float
    """Entropy of the shares of votes, in nats."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The result of `study`."""

    num_votes: int
    num_items: int
    num_annotators: int
    categories: tuple[str, ...]
    counts: dict[str, int]
    coefficients: tuple[Agreement, ...]
    noise: Agreement | None
    """Accuracy of one vote, from the agreement of votes for a side; None if votes are not between two choices."""
    slices: tuple[tuple[str, Agreement, Agreement], ...]
    """Name, raw agreement and Krippendorff's alpha of each slice."""
    annotators: tuple[AnnotatorCard, ...]
    pairs: tuple[AnnotatorPair, ...]
    skills: tuple[Skill, ...]
    contested: tuple[ContestedItem, ...]
    split: tuple[tuple[float, int], ...]
    """(share, items): how many items with two votes or more give this share of them to their most common choice."""
    ladder: Ratings | None
    """Ratings of the compared models; None if the votes name no models, or no ratings can be fitted."""
    notes: tuple[str, ...]

    def to_dict(self) -> JsonDict:
        """The record as JSON values; a number that is not finite is None."""
        found: JsonDict = finite(self)
        return found


def study(votes: VoteTable, *, as_given: bool = False, num_resamples: int = 1000, seed: int = 0) -> Study:
    """Everything that the votes say about their own quality.

    Agreement is computed from the first vote of each annotator on an item. `as_given` keeps the names of the sides, for
    votes in which A always means the same (a model, not a place); otherwise every item counts both ways round.
    """
    if as_given:
        votes = replace(votes, swap=None)
    first = votes.first_votes()
    options: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}
    notes = []
    if repeats := len(votes) - len(first):
        notes.append(f"{repeats} repeated votes count for consistency only, not for agreement")
    if votes.counts.get("not_counted"):
        notes.append(
            f"{votes.counts['not_counted']} votes are of gold or quiz items, decisions or of banned people, and are "
            "left out"
        )
    if votes.counts.get("not_judged"):
        notes.append(f"{votes.counts['not_judged']} votes were no judgement and are left out")
    if votes.swap is not None:
        notes.append("every item counts both ways round, so that what is called A does not matter")
    alone = np.unique(votes.annotator).size == 1

    def said(found: Agreement) -> Agreement:
        return replace(found, undefined="one annotator: nobody to agree with") if alone else found

    coefficients = [said(found) for found in _coefficients(first, options)]
    decided = _decided(first)
    noise = None
    if decided is not None:
        raw = said(raw_agreement(decided.table(), groups=decided.group, **options))
        if "tie" in first.categories or "both_bad" in first.categories:
            coefficients.insert(1, replace(raw, name="raw agreement without ties"))
        noise = noise_from_agreement(raw)
    shares = aggregate(first)
    return Study(
        num_votes=len(votes),
        num_items=int((first.table().sum(axis=1) > 0).sum()),
        num_annotators=np.unique(votes.annotator).size,
        categories=votes.categories,
        counts=dict(votes.counts),
        coefficients=tuple(coefficients),
        noise=noise,
        slices=tuple(
            (name, said(raw_agreement(part.table(), groups=part.group, **options)), said(_alpha(part, options)))
            for i, name in enumerate(votes.slices)
            for part in [first.chosen(first.slice == i)]
        ),
        annotators=tuple(annotator_cards(votes)),
        pairs=tuple(annotator_pairs(votes, **options)),
        skills=_skills(first, notes),
        contested=_contested(first, shares.entropy),
        split=_split(first),
        ladder=_ladder(votes, options, notes),
        notes=tuple(notes),
    )


def _alpha(votes: VoteTable, options: dict[str, Any]) -> Agreement:
    shared: dict[str, Any] = {"swap": votes.swap, "categories": votes.categories, "groups": votes.group, **options}
    return krippendorff_alpha(votes.table(), **shared)


def _coefficients(votes: VoteTable, options: dict[str, Any]) -> list[Agreement]:
    table = votes.table()
    shared: dict[str, Any] = {"swap": votes.swap, "categories": votes.categories, "groups": votes.group, **options}
    found = [
        raw_agreement(table, groups=votes.group, **options),
        leave_one_out(table, groups=votes.group, **options),
        krippendorff_alpha(table, **shared),
        fleiss_kappa(table, **shared),
        gwet_ac(table, **shared),
        _cohen(votes, shared),
    ]
    scale = votes.bad_as_ties()
    if scale.ordered and len(scale.categories) > 2:
        shared |= {"swap": scale.swap, "categories": scale.categories}
        weighted = {**shared, "weights": "quadratic", "values": scale.values}
        table = scale.table()
        on_scale = [krippendorff_alpha(table, scale="ordinal", **shared), gwet_ac(table, **weighted)]
        if scale.values is not None:
            on_scale.append(krippendorff_alpha(table, scale="interval", values=scale.values, **shared))
        if len(scale.annotators) == 2:
            on_scale.append(_cohen(scale, weighted))
        order = " < ".join(scale.categories if len(scale.categories) < 9 else (scale.categories[0], "…"))
        found += [replace(one, note="; ".join(filter(None, [one.note, f"taking {order}"]))) for one in on_scale]
    graded = votes.graded()
    if graded is not None:
        shared |= {"swap": graded.swap, "categories": graded.categories}
        alpha = krippendorff_alpha(graded.table(), scale="ordinal", **shared)
        found.append(replace(alpha, name="Krippendorff's alpha (ordinal, strength)"))
    return found


def _cohen(votes: VoteTable, shared: dict[str, Any]) -> Agreement:
    """Cohen's kappa of exactly two annotators; for any other number, the reason why it is undefined."""
    q, num = len(votes.categories), len(votes.annotators)
    if num != 2:
        why = f"it compares two annotators; these are {num}" + (", see the table of pairs" if num > 2 else "")
        return Agreement(name="Cohen's kappa", interval=Interval(math.nan, math.nan, math.nan, 0), undefined=why)
    chosen = np.full((2, len(votes.items)), -1, dtype=np.int64)
    chosen[votes.annotator, votes.item] = votes.choice
    both = (chosen >= 0).all(axis=0)
    if votes.group is not None:
        shared = {**shared, "groups": votes.group[both]}
    return cohen_kappa(chosen[0, both], chosen[1, both], q, **shared)


def _decided(votes: VoteTable) -> VoteTable | None:
    """The votes between two choices: those for a side, or all if there are two categories; None otherwise."""
    if votes.pairwise:
        return votes.chosen(np.isin(np.array(votes.categories)[votes.choice], ("A", "B")))
    return votes if len(votes.categories) == 2 else None


def _skills(votes: VoteTable, notes: list[str]) -> tuple[Skill, ...]:
    sizes = votes.table().sum(axis=1)
    deep = float((sizes[sizes > 0] >= 3).mean()) if (sizes > 0).any() else 0.0
    if deep < MIN_DEEP_FRACTION or len(votes.categories) < 2:
        notes.append(f"no model of annotators is fitted: {deep:.0%} of the items have three votes or more")
        return ()
    found = []
    for method in ("one_coin", "dawid_skene", "mace"):
        labels = aggregate(votes, method, max_iterations=500)
        if not labels.converged:
            notes.append(f"{method} did not converge in {labels.num_iterations} iterations")
        assert labels.skills is not None
        found += [
            Skill(annotator=name, method=method, value=float(value))
            for name, value in zip(votes.annotators, labels.skills, strict=True)
        ]
    return tuple(found)


def _contested(votes: VoteTable, entropy: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[ContestedItem, ...]:
    table = votes.table()
    order = np.argsort(-np.nan_to_num(entropy, nan=-1.0), kind="stable")[:NUM_CONTESTED]
    return tuple(
        ContestedItem(
            item=votes.items[i],
            votes=tuple((name, int(n)) for name, n in zip(votes.categories, table[i], strict=True) if n),
            entropy=float(entropy[i]),
        )
        for i in order
        if entropy[i] > 0
    )


def _split(votes: VoteTable) -> tuple[tuple[float, int], ...]:
    table = votes.table()
    table = table[table.sum(axis=1) >= 2]
    share, count = np.unique(np.round(table.max(axis=1, initial=0) / table.sum(axis=1), 3), return_counts=True)
    return tuple((float(s), int(n)) for s, n in zip(share, count, strict=True))


def _ladder(votes: VoteTable, options: dict[str, Any], notes: list[str]) -> Ratings | None:
    if votes.models is None or not votes.pairwise or all(a == b for a, b in votes.models):
        return None
    games = games_of(votes)
    drawn = (games.outcome == 0.5)[games.first != games.second]
    kinds: tuple[Ties, ...] = ("davidson", "half") if 0 < drawn.sum() < drawn.size else ("half",)
    for ties in kinds:
        try:
            found = rate(games, ties=ties, style=games.style is not None, **options)
        except DataError as error:
            notes.append(f"ratings with ties as {'halves' if ties == 'half' else 'a third outcome'}: {error.problem}")
            continue
        if games.style is not None:
            notes.append("ratings are for replies of equal style: " + ", ".join(games.style_names))
        notes += found.notes
        return found
    return None
