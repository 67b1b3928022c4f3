"""Restores a project from a dump, in any file type that a dump is written to."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict
from trimtab.feedback import tables as t
from trimtab.feedback.answers import WORDS
from trimtab.feedback.assign import order_of_given_vote, past_lease
from trimtab.feedback.people import add_person, by_name, change_answered_places, change_places, name_when_deleted
from trimtab.feedback.store import (
    Store,
    add_guideline,
    append_audit,
    guideline,
    num_rows,
    row_digest,
    set_paused,
)
from trimtab.feedback.voting import NewVote, insert_votes


def restore(store: Store, rows: Sequence[JsonDict], *, actor: int | None = None) -> dict[str, int]:
    """Restores a dump into a store without items; returns counts.

    Raises DataError if the store has items, and for a dump that is cut off or names what it does not hold. A dump holds
    no passwords: people come back without one and need a link to set it (`people.make_link`).
    """
    counts = {"rows": len(rows), "items": 0, "votes": 0, "people": 0}
    expected = record_values(rows[0])["records"]
    if expected != len(rows) - 1:
        raise DataError(
            f"{len(rows) - 1} records follow the first row, which announces {expected}",
            where="the dump",
            fix="copy it again whole, or export it again",
        )
    with store.write() as connection:
        if connection.execute(sa.select(t.items.c.id)).first() is not None:
            raise DataError(
                "the store has items already", where="the dump", fix="restore into a new project file and store"
            )
        append_audit(connection, store.now(), actor, "restore", "", {"rows": len(rows)})
        numbers: dict[str, dict[Any, int]] = defaultdict(dict)  # new ones, by what the dump calls the same
        for row in rows:
            values = record_values(row)
            if row["record"] == "guideline":
                number, current = values["version"], guideline(connection)
                is_here = not numbers["guideline version"] and values["text"] == current.text
                numbers["guideline version"][number] = (
                    current.version if is_here else add_guideline(connection, store.now(), actor, values["text"])
                )
            elif row["record"] == "person":
                name = values.pop("name")  # a deleted person of the same name is somebody else
                new_name = name_when_deleted(connection, name) if values["deleted"] else name
                known = by_name(connection, new_name)
                person = known or add_person(connection, values["created_at"], new_name, values["role"])
                if known is not None:  # a dump neither gives nor takes rights here, and a ban holds wherever it stands
                    del values["role"]
                    if values["state"] != "banned":
                        del values["state"]
                numbers["person"][name] = person.id
                connection.execute(t.people.update().where(t.people.c.id == person.id).values(**values))
                counts["people"] += 1
            elif row["record"] == "item":
                queue = values.pop("queue", None)
                values["prompt_id"] = values["prompt"]["id"]
                key = connection.execute(t.items.insert().values(**values)).inserted_primary_key
                assert key is not None
                numbers["item"][values["sha256"]] = key[0]
                if queue:
                    connection.execute(t.queue.insert().values(item_id=key[0], **queue))
                added = connection.execute(sa.select(t.items).where(t.items.c.id == key[0])).one()
                append_audit(connection, store.now(), actor, "item", key[0], {"sha256": row_digest(added)})
                counts["items"] += 1
            elif row["record"] == "vote":
                numbers["earlier vote"][values["key"]] = _restore_vote(store, connection, values, numbers)
                counts["votes"] += 1
        if num_rows(connection, t.queue) and not num_rows(connection, t.queue, t.queue.c.open):
            set_paused(connection, True)  # so that nothing is given out of what is added later either
        banned = sa.select(t.people.c.id).where(t.people.c.state == "banned")
        for person_id in connection.execute(banned).scalars().all():  # whose votes hold no places
            change_answered_places(connection, person_id, -1)
    return counts


_JSON, _NUMBER, _TEXT = sa.Column("", sa.JSON), sa.Column("", sa.Integer), sa.Column("", sa.Text, nullable=False)
_NUMBER_OF_ANOTHER = {"id", "item_id", "person_id", "lease_id", "writing_sha256"}
"""Columns of votes that a dump leaves out, since each store has its own numbers and computes the hash again."""
_NOT_OF_PEOPLE = {"id", "password", "streak_since", "last_vote_at"}
"""Columns of people that a dump leaves out: what the store numbers, what is secret, and when they last worked."""
COLUMNS: Mapping[str, Mapping[str, sa.Column[Any]]] = {
    "dump": {"version": _NUMBER, "records": _NUMBER},
    "guideline": {"version": _NUMBER, "text": _TEXT},
    "person": {c.name: c for c in t.people.c if c.name not in _NOT_OF_PEOPLE},
    "item": {c.name: c for c in t.items.c if c.name not in ("id", "prompt_id")} | {"queue": _JSON},
    "vote": {c.name: c for c in t.votes.c if c.name not in _NUMBER_OF_ANOTHER}
    | {"item": _TEXT, "person": _TEXT, "replaces": sa.Column("", sa.Text)}
    | dict.fromkeys(WORDS, _TEXT),
}
"""The columns of each kind of record in a dump. In a table (CSV, Parquet) every row has the columns of all kinds."""


def record_values(row: Mapping[str, Any]) -> JsonDict:
    """The values of a row of a dump, from any file type: CSV has texts only, Parquet has JSON as text.

    Raises DataError for a row that cannot be read.
    """
    columns = COLUMNS.get(str(row.get("record")))
    if columns is None:
        raise DataError(
            f"a record of the kind {row.get('record')!r}",
            where="the dump",
            fix=f"restore a file that `feedback export --layout dump` wrote, with records {', '.join(COLUMNS)}",
        )
    try:
        return {name: _cell(row.get(name), column) for name, column in columns.items()}
    except ValueError as error:
        raise DataError(
            f"a {row['record']} record that cannot be read: {error}",
            where="the dump",
            fix="export the dump again, as .jsonl",
        ) from None


def _cell(value: Any, column: sa.Column[Any]) -> Any:
    kind = column.type
    if isinstance(value, str) and isinstance(kind, sa.JSON):
        return json.loads(value) if value else None
    if isinstance(value, str) and not isinstance(kind, sa.Text):
        if value == "":
            return None
        if isinstance(kind, sa.Boolean):
            return value.lower() == "true" if value.lower() in ("true", "false") else bool(int(value))
        return int(value) if isinstance(kind, sa.Integer) else float(value)
    if isinstance(kind, sa.Text):
        if not isinstance(value, str | None):  # the readers take a CSV cell such as [7] for a list
            raise ValueError(f"{column.name or 'a text'} is {value!r}")
        return (value or None) if column.nullable else (value or "")
    return value


def _restore_vote(
    store: Store, connection: Connection, values: JsonDict, numbers: Mapping[str, Mapping[Any, int]]
) -> int:
    item_id = _named(numbers, "item", values.pop("item"))
    person_id = _named(numbers, "person", values.pop("person"))
    values["guideline_version"] = _named(numbers, "guideline version", values["guideline_version"])
    words = {name: values.pop(name) for name in WORDS}
    created_at = values.pop("created_at")
    lease = None
    if values["purpose"] != "adjudication":
        state = {"skip": "skipped", "undone": "expired"}.get(values["choice"], "done")
        lease = _done_lease(store, connection, item_id, person_id, values, state)
    replaces = values.pop("replaces")
    replaces = None if replaces is None else _named(numbers, "earlier vote", replaces)
    row = {**values, "item_id": item_id, "person_id": person_id, "lease_id": lease, "replaces": replaces}
    return insert_votes(connection, [NewVote(created_at, row, words)])[0]


def _named(numbers: Mapping[str, Mapping[Any, int]], what: str, name: Any) -> int:
    if name not in numbers[what]:
        raise DataError(
            f"a vote names the {what} {name!r}, which the dump does not hold",
            where="the dump",
            fix="copy it again whole, or export it again",
        )
    return numbers[what][name]


def _done_lease(
    store: Store, connection: Connection, item_id: int, person_id: int, vote: Mapping[str, Any], state: str
) -> int:
    """The id of the lease that a restored vote would have had; it is made or brought up to date."""
    purpose = vote["purpose"]
    here = (t.leases.c.person_id == person_id) & (t.leases.c.item_id == item_id) & (t.leases.c.purpose == purpose)
    known = connection.execute(sa.select(t.leases.c.id, t.leases.c.state).where(here)).first()
    takes, took = state == "done", known is not None and known.state in ("open", "done")
    if purpose == "task" and takes != took:
        change_places(connection, [item_id], 1 if takes else -1)
    position = num_rows(connection, t.leases, t.leases.c.person_id == person_id)
    order = vote["shown_order"]
    if vote["item_b"] and not order:
        order = order_of_given_vote(store, person_id, position, vote["shown_left"])
    values = {"state": state, "shown_order": order}
    if known is not None:
        connection.execute(t.leases.update().where(here).values(**values))
        return int(known.id)
    row = past_lease(store.now(), item_id, person_id, purpose, position=position, **values)
    key = connection.execute(t.leases.insert().values(**row)).inserted_primary_key
    assert key is not None
    return int(key[0])
