"""The live board: how far a project has come and what its votes are worth so far."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy import Connection

from trimtab.core.errors import DataError
from trimtab.core.files import finite
from trimtab.core.types import JsonDict
from trimtab.feedback import tables as t
from trimtab.feedback.answers import agrees
from trimtab.feedback.assign import decided_items
from trimtab.feedback.people import everyone
from trimtab.feedback.progress import counts
from trimtab.feedback.store import Store, canonical
from trimtab.feedback.votes import CountedVote, cast_votes, replaced, votes_as_table
from trimtab.stats import Interval, wilson
from trimtab.votes.annotators import AnnotatorCard, annotator_cards
from trimtab.votes.study import Study, study

KEPT_SECONDS = 10.0
"""How long a computed board is shown before it is computed anew."""
LIVE_RESAMPLES = 200
"""Resamples for intervals on the page, few as it is often computed; `feedback status` uses as many as `agreement`."""


@dataclass(frozen=True, kw_only=True)
class BoardRow:
    """One annotator on the board."""

    person_id: int
    name: str
    state: str
    votes: int
    gold: Interval
    """Share of gold items answered as expected."""
    card: AnnotatorCard | None
    skips: int
    flags: tuple[str, ...]
    """Reasons to look at their votes."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """What the board shows."""

    at: float
    counts: dict[str, Any]
    study: Study | None
    rows: list[BoardRow]
    throughput: list[tuple[float, int]]
    """Start of each stretch of time (seconds since 1970) and the number of answers in it."""
    stretch_seconds: float
    gold: Interval
    left: Interval
    ties: Interval
    median_seconds: float | None
    arms: dict[str, int]
    """Items begun by each arm of the selection."""

    def to_dict(self) -> JsonDict:
        """The board as JSON values."""
        values: JsonDict = {
            "at": self.at,
            **self.counts,
            "agreement": self.study.coefficients if self.study is not None else [],
            "slices": self.study.slices if self.study is not None else [],
            "gold_accuracy": self.gold,
            "left": self.left,
            "ties": self.ties,
            "median_seconds": self.median_seconds,
            "arms": self.arms,
            "annotators": [
                {
                    "id": row.person_id,
                    "name": row.name,
                    "state": row.state,
                    "votes": row.votes,
                    "skips": row.skips,
                    "gold_accuracy": row.gold,
                    "left": row.card.left if row.card else None,
                    "agreement": row.card.agreement if row.card else None,
                    "median_seconds": row.card.median_seconds if row.card else None,
                    "longest_run": row.card.longest_run if row.card else None,
                    "flags": row.flags,
                }
                for row in self.rows
            ],
        }
        board: JsonDict = finite(values)
        return board


def make_board(store: Store, *, num_resamples: int = LIVE_RESAMPLES) -> Board:
    """The board as of now."""
    with store.read() as connection:
        votes = votes_as_table(connection, store.project.settings.task)
        gold = _gold(connection)
        people = everyone(connection)
        skips = _skips(connection)
        total = counts(connection)
        moments = sorted(cast.created_at for cast in cast_votes(connection, purposes=("task", "gold", "reask")))
        arms: dict[str, int] = dict(
            connection.execute(
                sa.select(t.queue.c.arm, sa.func.count()).where(t.queue.c.arm.isnot(None)).group_by(t.queue.c.arm)
            ).all()
        )
    try:
        found = study(votes, num_resamples=num_resamples) if len(votes) else None
    except DataError:
        found = None
    cards = {card.name: card for card in (annotator_cards(votes) if len(votes) else [])}
    rows = [
        BoardRow(
            person_id=p.id,
            name=p.name,
            state=p.state,
            votes=cards[p.name].num_votes if p.name in cards else 0,
            gold=wilson(*gold[p.id]) if p.id in gold else wilson(0, 0),
            card=cards.get(p.name),
            skips=skips.get(p.id, 0),
            flags=_flags(cards.get(p.name), gold.get(p.id)),
        )
        for p in people
        if p.name in cards or p.role == "annotator"
    ]
    stretch, bins = _throughput(moments, store.now())
    right, asked = (sum(pair[i] for pair in gold.values()) for i in (0, 1))
    decided = ~np.isnan(votes.a_left) & _sided(votes)
    chose_a = np.array([c == "A" for c in votes.categories])[votes.choice] if len(votes) else np.zeros(0, dtype=bool)
    left = int((chose_a == (votes.a_left == 1))[decided].sum()) if len(votes) else 0
    ties = int(np.isin(votes.choice, [i for i, c in enumerate(votes.categories) if c in ("tie", "both_bad")]).sum())
    seconds = votes.seconds[~np.isnan(votes.seconds)]
    return Board(
        at=store.now(),
        counts=total,
        study=found,
        rows=rows,
        throughput=bins,
        stretch_seconds=stretch,
        gold=wilson(right, asked),
        left=wilson(left, int(decided.sum())),
        ties=wilson(ties, len(votes)),
        median_seconds=float(np.median(seconds)) if seconds.size else None,
        arms=arms,
    )


@dataclass
class BoardCache:
    """The last board, computed anew when it is older than `KEPT_SECONDS`: many viewers cost as much as one."""

    store: Store
    _board: Board | None = None
    _at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> Board:
        """A board that is recent enough."""
        with self._lock:
            if self._board is None or time.monotonic() - self._at > KEPT_SECONDS:
                self._board = make_board(self.store)
                self._at = time.monotonic()
            return self._board

    def forget(self) -> None:
        """Forgets the board, because something it shows has just changed; the next `get` computes it anew."""
        with self._lock:
            self._board = None


Order = Callable[[CountedVote], Sequence[int]]
"""The order in which a page shows the replies of a vote's item, such as (1, 0)."""


def disagreements(connection: Connection, *, limit: int = 200, order: Order | None = None) -> list[dict[str, Any]]:
    """Items that an adjudicator should see: flagged ones first, then the most divided.

    Within each group they are ordered by (1 - share of the most common answer) * (1 + the item's score by the policy).
    Adjudicated items are left out. Answers are said as a page with this `order` shows them (left, right); without one,
    as they are stored (A, B).
    """
    done = set(connection.execute(decided_items()).scalars())
    score = dict(connection.execute(sa.select(t.queue.c.item_id, t.queue.c.score)).all())
    rows = sa.select(t.votes.c.item_id, t.votes.c.choice, t.votes.c.answer).join(
        t.people, t.people.c.id == t.votes.c.person_id
    )
    counted = (t.votes.c.purpose == "task") & (t.votes.c.choice != "undone") & (t.people.c.state != "banned")
    alike: dict[int, Counter[str]] = defaultdict(Counter)
    flagged = set()
    for row in connection.execute(rows.where(counted, ~replaced()).order_by(t.votes.c.id)):
        if row.item_id not in done:
            alike[row.item_id][_same(row.choice, row.answer)] += row.choice != "skip"
            flagged |= {row.item_id} if row.answer.get("flags") else set()
    split = {item: 1 - max(equal.values()) / equal.total() if equal.total() else 0.0 for item, equal in alike.items()}
    rank = {item: (item in flagged, split[item] * (1 + max(0.0, score.get(item, 0.0)))) for item in split}
    shown = [item for item in split if split[item] > 0 or item in flagged]
    first = sorted(shown, key=lambda item: rank[item], reverse=True)[:limit]
    said: dict[int, Counter[str]] = defaultdict(Counter)
    for cast in cast_votes(connection, items=first):
        said[cast.item_id][said_of(cast, order)] += 1
    prompts = dict(connection.execute(sa.select(t.items.c.id, t.items.c.prompt).where(t.items.c.id.in_(first))).all())
    return [
        {
            "item_id": item,
            "prompt": prompts[item]["messages"][-1]["content"],
            "votes": alike[item].total(),
            "said": dict(said[item]),
            "disagreement": split[item],
            "flagged": item in flagged,
            "rank": rank[item],
        }
        for item in first
    ]


def _same(choice: str, answer: JsonDict) -> str:
    """What two equal answers have in common."""
    ranking = [sorted(tier) for tier in answer.get("ranking", ())]
    return choice if choice != "done" else canonical([ranking, answer.get("rating"), answer.get("steps")])


def said_of(cast: CountedVote, order: Order | None = None) -> str:
    """An answer in words, such as "left", "4", "2 > 1 = 3" or "+ 0 −"."""
    answer = cast.answer
    if answer.choice in ("A", "B") and order is not None:
        return "left" if "AB".index(answer.choice) == order(cast)[0] else "right"
    if answer.ranking:
        place = {place: str(i + 1) for i, place in enumerate(order(cast) if order else range(len(cast.replies)))}
        return " > ".join(" = ".join(sorted(place[p] for p in tier)) for tier in answer.ranking)
    if answer.steps:
        return " ".join({-1: "−", 0: "0", 1: "+", None: "·"}[mark] for mark in answer.steps)
    return answer.choice if answer.choice != "done" else str(answer.rating or "written")


def _gold(connection: Connection) -> dict[int, tuple[int, int]]:
    """For each person, the number of gold items answered as expected, and of all that they answered."""
    tally: dict[int, tuple[int, int]] = {}
    for cast in cast_votes(connection, purposes=("gold",)):
        right, asked = tally.get(cast.person_id, (0, 0))
        tally[cast.person_id] = (right + agrees(cast.answer, cast.gold), asked + 1)
    return tally


def _skips(connection: Connection) -> dict[int, int]:
    rows = sa.select(t.votes.c.person_id, sa.func.count()).where(t.votes.c.choice == "skip")
    return dict(connection.execute(rows.group_by(t.votes.c.person_id)).all())


def _flags(card: AnnotatorCard | None, gold: tuple[int, int] | None) -> tuple[str, ...]:
    flags = card.flags if card else ()
    if gold is not None and gold[1] >= 5 and wilson(*gold).high < 0.7:
        flags = (*flags, f"gold items right only {gold[0]} of {gold[1]} times")
    return flags


def _throughput(moments: list[float], now: float) -> tuple[float, list[tuple[float, int]]]:
    """The length of a stretch of time (a minute, an hour or a day, by the age of the project) and answers in each."""
    if not moments:
        return 60.0, []
    span = now - moments[0]
    stretch = 60.0 if span < 3600 else 3600.0 if span < 72 * 3600 else 86400.0
    start = moments[0] - moments[0] % stretch
    tally = Counter(int((moment - start) // stretch) for moment in moments)
    return stretch, [(start + i * stretch, tally.get(i, 0)) for i in range(int((now - start) // stretch) + 1)][-200:]


def _sided(votes: Any) -> Any:
    return np.isin(votes.choice, [i for i, c in enumerate(votes.categories) if c in ("A", "B")])
