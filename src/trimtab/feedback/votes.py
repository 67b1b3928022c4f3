"""Reads votes: the newest row of each person and item, without undone answers and without banned people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from trimtab.core.types import JsonDict
from trimtab.feedback import tables as t
from trimtab.feedback.answers import WORDS, Answer, restored
from trimtab.feedback.project import Task
from trimtab.feedback.store import digest, open_store
from trimtab.feedback.voting import JUDGED
from trimtab.votes.table import VoteTable, votes_from_rows

_FEW = 1000
"""Up to this many items are asked for by id; for more, all items are read."""


@dataclass(frozen=True, kw_only=True)
class CountedVote:
    """A vote that counts (the newest of its person on its item), with the item and who gave it."""

    id: int
    item_id: int
    item_sha256: str
    item_purpose: str
    """task, gold or quiz."""
    kind: str
    purpose: str
    prompt_id: str
    prompt: JsonDict
    replies: list[JsonDict]
    gold: JsonDict
    slice: str
    person_id: int
    annotator: str
    annotator_place: float
    """In [0, 1), of the name they joined with, which stays when they are deleted: whether their votes are held out."""
    banned: bool
    """Whether the annotator is banned, so that the vote counts nowhere."""
    answer: Answer
    shown_left: str | None
    shown_order: tuple[int, ...]
    guideline_version: int
    arm: str | None
    propensity: float | None
    created_at: float


def cast_votes(
    connection: Connection,
    *,
    purposes: Sequence[str] = ("task",),
    banned: bool = False,
    items: Sequence[int] | None = None,
    after: int = 0,
    limit: int | None = None,
) -> Iterator[CountedVote]:
    """The votes that count, in the order they were given.

    `banned` includes those of banned people, `items` keeps the votes on items of these numbers, and `after` (a
    vote's id) and `limit` read one page.
    """
    rows = (
        sa.select(t.votes, t.people.c.name, t.people.c.place, t.people.c.state, *(t.writings.c[name] for name in WORDS))
        .join(t.people, t.people.c.id == t.votes.c.person_id)
        .outerjoin(t.writings, t.writings.c.vote_id == t.votes.c.id)
        .where(t.votes.c.purpose.in_(purposes), t.votes.c.choice.notin_(("undone", "skip")), ~replaced())
        .order_by(t.votes.c.id)
        .limit(limit)
    )
    if not banned:
        rows = rows.where(t.people.c.state != "banned")
    if items is not None:
        rows = rows.where(t.votes.c.item_id.in_(items))
    if after:
        rows = rows.where(t.votes.c.id > after)
    found = connection.execute(rows).all()
    known = _items(connection, {row.item_id for row in found})
    for row in found:
        item = known[row.item_id]
        yield CountedVote(
            id=row.id,
            item_id=row.item_id,
            item_sha256=item.sha256,
            item_purpose=item.purpose,
            kind=item.kind,
            purpose=row.purpose,
            prompt_id=item.prompt_id,
            prompt=item.prompt,
            replies=item.replies,
            gold=item.gold,
            slice=item.slice,
            person_id=row.person_id,
            annotator=row.name,
            annotator_place=row.place,
            banned=row.state == "banned",
            answer=restored(row._mapping),
            shown_left=row.shown_left,
            shown_order=tuple(row.shown_order),
            guideline_version=row.guideline_version,
            arm=row.arm,
            propensity=row.propensity,
            created_at=row.created_at,
        )


def replaced() -> sa.Exists:
    """The condition that a newer row of the same person on the same item counts in place of a vote."""
    later = t.votes.alias("later")
    return sa.exists().where(
        later.c.person_id == t.votes.c.person_id,
        later.c.item_id == t.votes.c.item_id,
        later.c.purpose == t.votes.c.purpose,
        later.c.id > t.votes.c.id,
    )


def _items(connection: Connection, wanted: set[int]) -> dict[int, Row[Any]]:
    """The items by id. Each is read once, not once for each of its votes."""
    rows = sa.select(t.items)
    if len(wanted) <= _FEW:
        rows = rows.where(t.items.c.id.in_(wanted))
    return {row.id: row for row in connection.execute(rows)}


def table_row(cast: CountedVote) -> JsonDict:
    """A vote as a row of the vote table that `trimtab feedback agreement` reads, with everything else it says.

    The `choice` of a rating is its number, that of a ranking its best place or "tie", and that of steps the number of
    the first wrong one, or 0.
    """
    answer = cast.answer
    models = [str(reply["source"].get("model", "")) for reply in cast.replies] if cast.kind == "pairs" else []
    row: JsonDict = {
        "item": cast.item_sha256,
        "annotator": cast.annotator,
        "choice": _category(cast),
        "shown_left": cast.shown_left,
        "seconds": answer.seconds,
        "slice": cast.slice,
        "strength": answer.strength,
        "kind": cast.kind,
        "purpose": cast.purpose,
        "banned": cast.banned,
        "prompt_id": cast.prompt_id,
        "group": group_of(cast),
        "shown_order": list(cast.shown_order),
        "guideline_version": cast.guideline_version,
        "arm": cast.arm,
        "propensity": cast.propensity,
        "created_at": cast.created_at,
        "rationale": answer.rationale,
        "reason": answer.reason,
        "text": answer.text,
        **answer.stored(),
    }
    if all(models):
        row |= dict(zip(("model_a", "model_b"), models, strict=False))
    return row


def group_of(cast: CountedVote) -> str:
    """A name made of the prompt's messages: judgements about one prompt are not independent, and form one group."""
    return digest([[m["role"], m["content"]] for m in cast.prompt["messages"]])[:16]


def _category(cast: CountedVote) -> str:
    answer = cast.answer
    if answer.choice != "done":
        return answer.choice
    if cast.kind == "rating":
        return str(answer.rating)
    if cast.kind == "ranking":
        return str(answer.ranking[0][0]) if len(answer.ranking[0]) == 1 else "tie"
    if cast.kind == "steps":
        return str(next((i + 1 for i, mark in enumerate(answer.steps) if mark == -1), 0))
    return "done"


def votes_as_table(connection: Connection, task: Task) -> VoteTable:
    """The votes as a table for the statistics. A ranking counts as one vote for each of its pairs.

    First votes come before those of items asked again, also if they were changed later, because agreement rests on the
    first vote of an annotator on an item. A vote when asked again whose first vote is gone says nothing. A rating has
    all points of the scale as categories, whether or not somebody gave them.
    """
    casts = list(cast_votes(connection))
    first = {(cast.item_id, cast.person_id) for cast in casts if cast.answer.choice in JUDGED}
    again = cast_votes(connection, purposes=("reask",))
    casts += [cast for cast in again if (cast.item_id, cast.person_id) in first]
    points = max([task.rating_scale, *(cast.answer.rating or 0 for cast in casts)])
    order = [str(point) for point in range(1, points + 1)] if task.kind == "rating" else []
    return votes_from_rows(_rows(casts), order=order)


def _rows(casts: Iterable[CountedVote]) -> Iterator[tuple[str, JsonDict]]:
    columns = (
        "item", "annotator", "choice", "shown_left", "seconds", "slice", "strength", "model_a", "model_b", "group",
        "ranking", "shown_order",
    )  # fmt: skip
    for cast in casts:
        where = f"vote {cast.id}"
        if cast.kind in ("pairs", "ranking", "rating", "steps"):
            row = {name: value for name, value in table_row(cast).items() if name in columns and value is not None}
            if cast.kind == "pairs":
                row["prompt"] = cast.prompt
                row |= {f"response_{side}": r["text"] for side, r in zip("ab", cast.replies, strict=True)}
            yield where, row


def votes_of(project: str | Path) -> VoteTable:
    """The votes of a project as a table. Raises ConfigError if it has no store."""
    with closing(open_store(project, must_exist=True)) as store, store.read() as connection:
        return votes_as_table(connection, store.project.settings.task)
