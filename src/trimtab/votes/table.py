"""Votes as columns: who chose what about which item, and what was shown on the left."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict
from trimtab.stats import Floats

Ints = NDArray[np.int64]

WORTH = {"A": 1.0, "tie": 0.5, "both_bad": 0.5, "B": 0.0}
"""The share of preference for side A that each choice between two replies stands for."""
PAIRWISE = tuple(WORTH)
"""Choices between two replies, in the order of a scale. They name sides of the item, never of the screen."""
NOT_JUDGED = ("", "cannot_judge", "skip")
"""Choices that are no judgement. They are counted and left out."""
COLUMNS = ("item", "annotator", "choice", "shown_left", "seconds", "slice", "strength", "model_a", "model_b", "group")
STYLE = ("words", "headers", "list items", "bold spans")
"""What `style_of` counts, in this order."""
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_MISTAKES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class VoteTable:
    """Columns of V votes about I items by R annotators, in q categories. Votes are in the order they were given.

    For example, vote v is the choice `categories[choice[v]]` of `annotators[annotator[v]]` about `items[item[v]]`.
    """

    items: tuple[str, ...]
    annotators: tuple[str, ...]
    categories: tuple[str, ...]
    """In the order of their scale, if they have one."""
    item: Ints
    """[V], index into `items`; so are `annotator` into `annotators` and `choice` into `categories`."""
    annotator: Ints
    choice: Ints
    swap: Ints | None = None
    """[q], the category that each becomes when the sides of an item are exchanged; None if there are no sides, or if
    their names have a meaning."""
    ordered: bool = False
    """Whether the order of the categories has a meaning."""
    a_left: Floats
    """[V], 1 if side A was shown on the left, 0 if on the right, nan if that is not known."""
    seconds: Floats
    """[V], time taken; nan if not known."""
    strength: Floats
    """[V], how much better the chosen side is; nan if not asked."""
    slices: tuple[str, ...] = ()
    slice: Ints
    """[V], an index into `slices`; -1 for none."""
    characters: Floats
    """[I], characters of both replies together; nan if the replies are not known."""
    models: tuple[tuple[str, str], ...] | None = None
    """[I], the models that wrote sides A and B; None if not known."""
    group: Ints | None = None
    """[I], group of each item. Items of one group are resampled together because they are not independent: the pairs
    of one ranking or of one prompt. None if all items are independent."""
    style: Floats | None = None
    """[I, 4], `style_difference` of side A from side B; None if the replies are not known."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of what was read and left out, such as {"rows": 12, "votes": 10, "not_judged": 2}."""

    def __len__(self) -> int:
        return self.item.size

    @property
    def pairwise(self) -> bool:
        """Whether the votes choose between two sides, A and B."""
        return {"A", "B"} <= set(self.categories) <= set(PAIRWISE)

    @property
    def group_of_votes(self) -> Ints:
        """[V], the unit within which votes are not independent: the group of the item, or the item itself."""
        return self.item if self.group is None else self.group[self.item]

    @property
    def values(self) -> Floats | None:
        """The categories as numbers [q]; None if they are not numbers."""
        numbers = [_number(category) for category in self.categories]
        return None if not numbers or any(map(math.isnan, numbers)) else np.array(numbers)

    def chosen(self, mask: NDArray[np.bool_]) -> VoteTable:
        """A table of the votes under the mask [V]. Items, annotators and categories keep their numbers."""
        columns = ("item", "annotator", "choice", "a_left", "seconds", "strength", "slice")
        return replace(self, **{name: getattr(self, name)[mask] for name in columns})

    def first_votes(self) -> VoteTable:
        """A table without repeated votes of an annotator on an item: those measure consistency and not agreement."""
        key = self.item * max(len(self.annotators), 1) + self.annotator
        first = np.zeros(len(self), dtype=bool)
        first[np.unique(key, return_index=True)[1]] = True
        return self.chosen(first)

    def table(self) -> Floats:
        """How many votes each item has in each category, [I, q]."""
        shape = (len(self.items), len(self.categories))
        flat = self.item * shape[1] + self.choice
        return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)

    def bad_as_ties(self) -> VoteTable:
        """A table in which "both bad" counts as a tie, so that A, tie, B are one scale."""
        if "both_bad" not in self.categories:
            return self
        to = {name: i for i, name in enumerate(("A", "tie", "B"))}
        recode = np.array([to.get(category, to["tie"]) for category in self.categories], dtype=np.int64)
        return replace(
            self,
            categories=("A", "tie", "B"),
            choice=recode[self.choice],
            swap=None if self.swap is None else np.array([2, 1, 0]),
            ordered=True,
        )

    def graded(self) -> VoteTable | None:
        """A table of the strengths as a scale: side B much better is most negative, a tie is 0, side A is positive.

        None if no vote has a strength. Votes for a side that lack one are left out.
        """
        if not self.pairwise or np.all(np.isnan(self.strength)):
            return None
        side = np.array([{"A": 1.0, "B": -1.0}.get(category, 0.0) for category in self.categories])[self.choice]
        known = (side == 0) | ~np.isnan(self.strength)
        grades = np.where(side == 0, 0.0, side * np.where(known, self.strength, 0.0))[known]
        size = np.unique(np.abs(grades))
        scale = np.unique(np.concatenate([-size, size])) + 0.0  # no negative zero
        votes = self.chosen(known)
        return replace(
            votes,
            categories=tuple(f"{grade:g}" for grade in scale),
            choice=np.searchsorted(scale, grades),
            swap=None if self.swap is None else np.arange(scale.size)[::-1].copy(),
            ordered=True,
        )


def votes_from_rows(
    rows: Iterable[tuple[str, JsonDict]], *, missing: Sequence[str] = (), order: Sequence[str] = ()
) -> VoteTable:
    """The table of votes in rows that each come with their origin, such as ("votes.csv, row 3", {"item": …}).

    A row has the columns item, annotator, choice and, if they are known, shown_left (the side, A or B, that was on the
    left), seconds, slice, strength, model_a, model_b and group (items of one ranking or prompt, whose votes depend on
    each other); or it has the comparisons layout (prompt, response_a, response_b, choice, annotator), in which
    votes over the same two replies count as one item, whichever was A. A row with a ranking, such as [[2], [0, 1]]:
    places from best to worst, is one vote for each of its pairs. `missing` are further choices that are no
    judgement, `order` are the categories from low to high. Raises DataError with the first mistakes.
    """
    reader = _Reader((*NOT_JUDGED, *missing))
    for where, row in rows:
        reader.add(where, row)
    return reader.votes(order)


def ranked_pairs(ranking: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, str]]:
    """Every two places (a < b) of a ranking and which of them is better: A (place a), B (place b) or tie."""
    rank = {place: i for i, tier in enumerate(ranking) for place in tier}
    for a, b in combinations(sorted(rank), 2):
        yield a, b, "A" if rank[a] < rank[b] else "B" if rank[b] < rank[a] else "tie"


def _ranking_of(row: JsonDict) -> list[list[int]]:
    """The ranking of a row, a list or its JSON text; empty if it has none. Raises ValueError unless it names each place
    from 0 up once."""
    value = row.get("ranking")
    if isinstance(value, str) and value.lstrip().startswith("[["):
        value = json.loads(value)
    if not isinstance(value, list) or not value or not isinstance(value[0], list):
        return []  # a column of another meaning
    tiers = [tier if isinstance(tier, list) else [None] for tier in value]
    places: list[Any] = [place for tier in tiers for place in tier]
    if any(type(place) is not int for place in places) or sorted(places) != list(range(len(places))):
        raise ValueError("it does not name each place from 0 up once")
    return value


def _pairs_of_ranking(row: JsonDict, ranking: Sequence[Sequence[int]]) -> Iterator[JsonDict]:
    """A vote for each two places of a row's ranking."""
    shown = row.get("shown_order") or []
    if isinstance(shown, str):
        shown = json.loads(shown)
    for a, b, choice in ranked_pairs(ranking):
        vote = {"item": f"{row['item']}/{a}-{b}", "choice": choice}
        vote |= {name: row[name] for name in ("annotator", "group", "slice") if name in row}
        if a in shown and b in shown:
            vote["shown_left"] = "A" if shown.index(a) < shown.index(b) else "B"
        yield vote


def style_of(text: str) -> Floats:
    """Counts of `STYLE`: words, Markdown headers, list items and bold spans. The last three are counted outside fenced
    blocks of code, in which the same characters are comments, subtractions and powers."""
    num_words, text = len(text.split()), _CODE.sub("", text)
    lines = [line.lstrip() for line in text.splitlines()]
    headers = sum(line.startswith("#") and line.lstrip("#").startswith(" ") for line in lines)
    items = sum(
        line.startswith(("- ", "* ", "+ ")) or (line.partition(".")[0].isdigit() and ". " in line[:5]) for line in lines
    )
    return np.array([num_words, headers, items, text.count("**") // 2], dtype=np.float64)


def style_difference(style_a: Floats, style_b: Floats) -> Floats:
    """(a - b) / (a + b + 1) for counts: in (-1, 1), with the opposite sign if the sides are exchanged."""
    return (style_a - style_b) / (style_a + style_b + 1)


def in_root_mean_squares(style: Floats) -> Floats:
    """Differences in style [n, S] in units of the root mean square of each column; a column of zeros stays as it is.
    Unlike a deviation, this unit does not depend on which side of a comparison is named first."""
    spread = np.sqrt((style**2).mean(axis=0))
    return np.asarray(np.divide(style, spread, out=np.zeros_like(style), where=spread > 0))


class _Reader:
    """Collects rows into columns."""

    def __init__(self, missing: Sequence[str]) -> None:
        self._missing = frozenset(missing)
        self._items: dict[str, int] = {}
        self._annotators: dict[str, int] = {}
        self._slices: dict[str, int] = {}
        self._votes: list[tuple[int, int, str, float, float, float, int]] = []
        self._facts: list[tuple[tuple[str, str] | None, tuple[str, str] | None]] = []
        """Models and replies of each item."""
        self._groups: list[str | None] = []
        """The group of each item."""
        self._mistakes: list[tuple[str, str]] = []
        self._num_rows = self._num_not_judged = 0

    def add(self, where: str, row: JsonDict) -> None:
        """Adds the votes of a row: one, or one for each pair of its ranking."""
        self._num_rows += 1
        absent = [name for name in ("annotator", "choice") if name not in row]
        texts = _replies(row)
        if texts is None and text_of(row.get("item")) == "":
            absent.insert(0, "item")
        if absent:
            self._mistakes.append((where, f"no {' and no '.join(absent)} (its columns: {', '.join(row)})"))
            return
        choice = category_of(row["choice"])
        if choice in self._missing:
            self._num_not_judged += 1
            return
        try:
            ranking = [] if texts is not None else _ranking_of(row)
            votes = list(_pairs_of_ranking(row, ranking))
        except ValueError as error:
            self._mistakes.append(
                (where, f"ranking is {row['ranking']!r}, which is no ranking such as [[2], [0, 1]]: {error}")
            )
            return
        if not ranking:
            self._add_vote(where, row, choice, texts)
        for vote in votes:
            self._add_vote(where, vote, vote["choice"], None)

    def _add_vote(self, where: str, row: JsonDict, choice: str, texts: tuple[str, str] | None) -> None:
        shown = text_of(row.get("shown_left")).upper()
        if shown not in ("", "A", "B"):
            self._mistakes.append((where, f"shown_left is {row['shown_left']!r}; it names a side, A or B"))
            return
        a_left = {"": math.nan, "A": 1.0, "B": 0.0}[shown]
        models = (text_of(row.get("model_a")), text_of(row.get("model_b")))
        name = text_of(row.get("item"))
        if texts is not None:  # one orientation for all votes over the same two replies
            if texts[1] < texts[0]:
                texts, models, a_left = (texts[1], texts[0]), (models[1], models[0]), 1 - a_left
                choice = {"A": "B", "B": "A"}.get(choice, choice)
            name = name or _item_name(row["prompt"], texts)
        known_models = models if all(models) else None
        number = self._items.setdefault(name, len(self._items))
        if number == len(self._facts):
            self._facts.append((known_models, texts))
            asked = None if texts is None else _item_name(row["prompt"], ())
            self._groups.append(text_of(row.get("group")) or asked)
        elif self._facts[number] != (known_models, texts):
            self._mistakes.append((where, f"item {name!r} had other replies or models in an earlier row"))
            return
        part = text_of(row.get("slice"))
        self._votes.append(
            (
                number,
                self._annotators.setdefault(text_of(row["annotator"]) or "(unnamed)", len(self._annotators)),
                choice,
                a_left,
                self._measure(where, row, "seconds"),
                self._measure(where, row, "strength"),
                self._slices.setdefault(part, len(self._slices)) if part else -1,
            )
        )

    def _measure(self, where: str, row: JsonDict, name: str) -> float:
        """A cell that holds a number from 0 up; nan if it is empty. Any other value is noted as a mistake."""
        text = text_of(row.get(name))
        value = _number(text) if text else math.nan
        if text and not 0 <= value < math.inf:
            self._mistakes.append((where, f"{name} is {row[name]!r}; it is a number from 0 up, or empty"))
        return value

    def votes(self, order: Sequence[str]) -> VoteTable:
        if self._mistakes:
            refuse_rows(
                self._mistakes,
                "give the file the columns item, annotator, choice (or prompt, response_a, response_b, choice, "
                "annotator), or say which columns they are: --columns item=…,annotator=…,choice=…",
            )
        seen = {vote[2] for vote in self._votes}
        pairwise = bool(seen) and seen <= set(PAIRWISE) and bool(seen & {"A", "B"})
        categories, ordered = _scale(seen, order, pairwise)
        place = {category: i for i, category in enumerate(categories)}
        numbers = list(zip(*self._votes, strict=True)) or [()] * 7
        replies = [texts for _, texts in self._facts]
        models = [found for found, _ in self._facts]
        return VoteTable(
            items=tuple(self._items),
            annotators=tuple(self._annotators),
            categories=categories,
            item=np.array(numbers[0], dtype=np.int64),
            annotator=np.array(numbers[1], dtype=np.int64),
            choice=np.array([place[choice] for choice in numbers[2]], dtype=np.int64),
            swap=np.array([place[_OTHER_SIDE.get(c, c)] for c in categories]) if pairwise else None,
            ordered=ordered,
            a_left=np.array(numbers[3], dtype=np.float64),
            seconds=np.array(numbers[4], dtype=np.float64),
            strength=np.array(numbers[5], dtype=np.float64),
            slices=tuple(self._slices),
            slice=np.array(numbers[6], dtype=np.int64),
            characters=np.array([math.nan if t is None else float(len(t[0]) + len(t[1])) for t in replies]),
            models=tuple(m for m in models if m) if models and all(models) else None,
            group=_numbered(self._groups),
            style=_styles(replies),
            counts={"rows": self._num_rows, "votes": len(self._votes), "not_judged": self._num_not_judged},
        )


_OTHER_SIDE = {"A": "B", "B": "A"}


def refuse_rows(mistakes: Sequence[tuple[str, str]], fix: str) -> None:
    """Raises DataError with the first of these mistakes (where, problem) and the number of the others."""
    more = len(mistakes) - _MISTAKES_SHOWN
    lines = [problem if i == 0 else f"{where}: {problem}" for i, (where, problem) in enumerate(mistakes)]
    shown = "\n  and:   ".join(lines[:_MISTAKES_SHOWN])
    raise DataError(shown + (f"\n  and {more} more such rows" if more > 0 else ""), where=mistakes[0][0], fix=fix)


def _scale(seen: set[str], order: Sequence[str], pairwise: bool) -> tuple[tuple[str, ...], bool]:
    """The categories in order, and whether that order has a meaning."""
    if order:
        if strange := sorted(seen - set(order)):
            raise DataError(
                f"the choice {strange[0]!r} has no place in the order {', '.join(order)}",
                where="--order",
                fix="name every choice of the table, from low to high",
            )
        return tuple(order), True
    if pairwise:
        categories = tuple(c for c in PAIRWISE if c in seen or c in ("A", "B"))
        return categories, "tie" in categories and "both_bad" not in categories
    numbers = sorted((_number(c), c) for c in seen)
    if any(math.isnan(number) for number, _ in numbers):
        return tuple(sorted(seen)), False
    return tuple(c for _, c in numbers), len(numbers) > 2


def _replies(row: JsonDict) -> tuple[str, str] | None:
    a, b = _reply(row.get("response_a")), _reply(row.get("response_b"))
    return (a, b) if a is not None and b is not None and "prompt" in row else None


def _reply(value: Any) -> str | None:
    """The text of a reply, which may be a list of one message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) else None


def _numbered(groups: Sequence[str | None]) -> Ints | None:
    """A group number for each item; an item without a group has its own. None if no two items share a group."""
    numbers: dict[object, int] = {}
    found = [numbers.setdefault((i,) if name is None else name, len(numbers)) for i, name in enumerate(groups)]
    return np.array(found, dtype=np.int64) if len(numbers) < len(groups) else None


def _item_name(prompt: Any, replies: Sequence[str]) -> str:
    """Sixteen hex digits of the SHA-256 of a prompt and its replies."""
    text = json.dumps([prompt, *replies], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _styles(replies: Sequence[tuple[str, str] | None]) -> Floats | None:
    known = [texts for texts in replies if texts is not None]
    if not known or len(known) < len(replies):
        return None
    return np.array([style_difference(style_of(a), style_of(b)) for a, b in known])


def category_of(value: Any) -> str:
    """A choice as text. Whole numbers of a CSV file have a decimal point as soon as their column has an empty cell."""
    text = text_of(value)
    return text.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0+", text) else text


def text_of(value: Any) -> str:
    """A cell as text: empty for null and nan, and whole numbers without a decimal point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
