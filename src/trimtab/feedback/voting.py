"""Voting: an answer becomes a row that is never changed. Undo, edits and adjudications add further rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict
from trimtab.feedback import tables as t
from trimtab.feedback.answers import TAXONOMY, WORDS, Answer, agrees, check, restored
from trimtab.feedback.assign import Lease, decided_items, lease_of
from trimtab.feedback.people import AS_ANSWERED, Person, by_id, change_places, give_back
from trimtab.feedback.project import Kind, Task
from trimtab.feedback.store import (
    AuditEntry,
    Store,
    append_audit,
    append_audits,
    guideline,
    num_rows,
    row_digest,
    writing_digest,
)
from trimtab.feedback.webhooks import notify

MAX_UNDO = 20
"""How many of a person's last answers can be taken back."""
NEW_STREAK_AFTER = 600.0
"""Seconds without an answer that count as a break."""
JUDGED = ("A", "B", "tie", "both_bad", "done")
"""Choices that say something about the replies."""


class Late(DataError):
    """Raised for an answer to an item that others have answered since the lease ran out, or that was adjudicated."""


@dataclass(frozen=True)
class Receipt:
    """What became of an answer that was sent."""

    vote_id: int
    duplicate: bool
    """Whether an answer to the same task was stored before; nothing was then added."""
    differs: bool = False
    """Whether the answer stored before is a different one."""
    right: bool | None = None
    """For a quiz question, whether the answer agreed with the expected one."""


def task_of(store: Store, person: Person, token: str) -> Row[Any, Any] | None:
    """The kind of an item that the person was given and the order of its replies; None if the token is not theirs."""
    rows = sa.select(t.leases.c.shown_order, t.items.c.kind).join(t.items)
    with store.read() as connection:
        return connection.execute(rows.where(t.leases.c.token == token, t.leases.c.person_id == person.id)).first()


def vote(store: Store, person: Person, token: str, answer: Answer, *, measured: bool = False) -> Receipt:
    """Stores an answer to the item of a lease. An answer that is sent again is not stored again.

    Its seconds count up to the time since the task was given out, or in full if they were `measured`.

    Raises DataError for an answer that does not fit the question or a lease that is not the person's, and Late.
    """
    task, now = store.project.settings.task, store.now()
    with store.write() as connection:
        if (known := _sent_before(connection, person, token, answer, task)) is not None:
            return known
        _still_takes_part(connection, person)
        found = connection.execute(
            sa.select(t.leases).where(t.leases.c.token == token, t.leases.c.person_id == person.id)
        ).first()
        if found is None:
            raise DataError("this task is not in your hands", where="the answer", fix="go on with the next one")
        lease = lease_of(found)
        item = connection.execute(sa.select(t.items).where(t.items.c.id == lease.item_id)).one()
        answer = check(answer, kind=item.kind, num_replies=len(item.replies), task=task)
        if lease.state == "expired":
            _take_place_again(connection, lease)
        before = latest(connection, person.id, item.id, lease.purpose)
        changes = before is not None and before.choice not in ("undone", "skip")
        if changes and _is_decided(connection, item.id):
            raise Late("your answer before is locked: the item was adjudicated", where="the answer", fix="go on")
        elapsed = max(0.0, now - lease.opened_at)
        seconds = elapsed if answer.seconds is None else answer.seconds if measured else min(answer.seconds, elapsed)
        vote_id = _add(
            store,
            connection,
            person,
            item,
            answer,
            lease_id=lease.id,
            purpose=lease.purpose,
            shown_order=list(lease.shown_order),
            seconds=seconds,
            key=token,
            replaces=before.id if before is not None else None,
            arm=lease.arm,
            propensity=lease.propensity,
        )
        state = "skipped" if answer.choice == "skip" else "done"
        here = t.leases.update().where(t.leases.c.id == lease.id)
        connection.execute(here.values(state=state, standing=False, draft={}))
        if lease.purpose == "task":
            if state == "skipped":
                change_places(connection, [item.id], -1)
            elif not changes:  # a changed answer completes nothing
                _tell_if_done(store, connection, item)
        _count_streak(connection, person, now)
        right = None
        if lease.purpose == "quiz":
            right = agrees(answer, item.gold)
            _decide_quiz(store, connection, person)
        notify(store, connection, "vote", {"vote": vote_id, "item": item.sha256, "person": person.id})
    return Receipt(vote_id, duplicate=False, right=right)


def _sent_before(connection: Connection, person: Person, key: str, answer: Answer, task: Task) -> Receipt | None:
    """The receipt of an answer or a decision that this person sent under the same key; None if there is none."""
    known = connection.execute(
        sa.select(t.votes, *(t.writings.c[name] for name in WORDS))
        .outerjoin(t.writings, t.writings.c.vote_id == t.votes.c.id)
        .where(t.votes.c.key == key, t.votes.c.person_id == person.id)
    ).first()
    if known is None:
        return None
    stored = restored(known._mapping)
    item = connection.execute(sa.select(t.items).where(t.items.c.id == known.item_id)).one()
    differs = _is_other(answer, stored, kind=item.kind, num_replies=len(item.replies), task=task)
    return Receipt(known.id, duplicate=True, differs=differs)


def _is_other(answer: Answer, stored: Answer, *, kind: Kind, num_replies: int, task: Task) -> bool:
    """Whether an answer that was sent again is not the one that was stored. It is compared as it would be stored: what
    does not belong to the choice is left out of it."""
    try:
        again = check(answer, kind=kind, num_replies=num_replies, task=task)
    except DataError:
        return True
    return replace(stored, seconds=again.seconds) != again


def save_draft(store: Store, person: Person, token: str, draft: Mapping[str, Any]) -> bool:
    """Keeps an unfinished answer, to be continued anywhere; False if it can no longer be given.

    A person who writes is at work, so the lease begins anew. An expired lease is opened again if the item has a place
    left; if it has none, the draft is kept all the same. So is the draft of somebody who was banned meanwhile. A change
    of an answer needs no place of its own, but cannot be made once the item is adjudicated.
    """
    now, minutes = store.now(), store.project.settings.assignment.lease_minutes
    with store.write(durable=False) as connection:
        here = (t.leases.c.token == token) & (t.leases.c.person_id == person.id)
        if connection.execute(sa.select(t.votes.c.id).where(t.votes.c.key == token)).first() is not None:
            return True  # the answer itself arrived first
        row = connection.execute(sa.select(t.leases).where(here)).first()
        if row is None:  # it was opened anew under another name
            return False
        changes = row.standing or row.state == "done"
        values: dict[str, Any] = {"draft": dict(draft)}
        in_time = _takes_part(connection, person)
        if changes:
            in_time = in_time and not _is_decided(connection, row.item_id)
        elif row.state == "expired" and row.purpose == "task":
            in_time = in_time and _has_place(connection, row.item_id)
        if in_time:
            if row.state == "expired" and row.purpose == "task":
                change_places(connection, [row.item_id], +1)
            values |= {"state": "open", "standing": changes, "expires_at": now + minutes * 60}
        connection.execute(t.leases.update().where(here).values(**values))
        return in_time


def undo(store: Store, person: Person) -> Lease:
    """Takes back the person's last answer and gives its task back to them. Raises DataError if that is impossible."""
    with store.write() as connection:
        _still_takes_part(connection, person)
        mine = sa.select(t.votes).where(t.votes.c.person_id == person.id, t.votes.c.purpose != "adjudication")
        recent = connection.execute(mine.order_by(t.votes.c.id.desc()).limit(2 * MAX_UNDO)).all()
        for row in recent:
            if row.choice == "undone" or latest(connection, person.id, row.item_id, row.purpose).id != row.id:  # type: ignore[union-attr]
                continue
            return _reopen(store, connection, person, row, withdraw=True)
    raise DataError("there is nothing to take back", where="undo", fix="go on with the next task")


def reopen(store: Store, person: Person, vote_id: int) -> Lease:
    """Opens a person's own answer to change it; it stands until the new one is given. Raises DataError if it cannot."""
    with store.write() as connection:
        _still_takes_part(connection, person)
        row = connection.execute(
            sa.select(t.votes).where(t.votes.c.id == vote_id, t.votes.c.person_id == person.id)
        ).first()
        newest = None if row is None else latest(connection, person.id, row.item_id, row.purpose)
        if row is None or newest is None or newest.id != row.id or row.choice == "undone":
            raise DataError("this answer cannot be changed", where="your answers", fix="open its newest version")
        return _reopen(store, connection, person, row, withdraw=False)


def set_opted_out(store: Store, person: Person, out: bool) -> None:
    """Notes whether the person does not want sensitive items. Who opts out gives back those in hand, and may with that
    have answered every question of the quiz."""
    with store.write() as connection:
        connection.execute(t.people.update().where(t.people.c.id == person.id).values(opted_out=out))
        if out:
            sensitive = sa.select(t.items.c.id).where(t.items.c.sensitive)
            give_back(connection, (t.leases.c.person_id == person.id) & t.leases.c.item_id.in_(sensitive))
            if by_id(connection, person.id).qualified is None and store.project.settings.qualification.questions:
                _decide_quiz(store, connection, person)


def adjudicate(store: Store, person: Person, item_id: int, answer: Answer, *, key: str) -> Receipt:
    """Stores a decision about an item beside its votes, which stay as they are.

    From then on the votes cannot be edited, and the item is given to nobody else. The choice "cannot_judge" leaves the
    item out of all labels. A decision that the same person sends again with the same `key` adds nothing.
    """
    key = f"decision-{person.id}-{item_id}-{key}"
    task = replace(store.project.settings.task, cannot_judge=True)
    with store.write() as connection:
        if (known := _sent_before(connection, person, key, answer, task)) is not None:
            return known
        _still_takes_part(connection, person)
        item = connection.execute(sa.select(t.items).where(t.items.c.id == item_id)).first()
        if item is None:
            raise DataError(f"there is no item {item_id}", where="the adjudication", fix="choose one from the queue")
        if answer.taxonomy not in TAXONOMY:
            raise DataError("no cause was chosen", where="the adjudication", fix=f"choose {', '.join(TAXONOMY)}")
        if answer.choice == "skip":
            raise DataError("an adjudication decides", where="the adjudication", fix="choose an answer")
        answer = check(answer, kind=item.kind, num_replies=len(item.replies), task=task)
        before = latest(connection, person.id, item.id, "adjudication")
        vote_id = _add(
            store,
            connection,
            person,
            item,
            answer,
            purpose="adjudication",
            shown_order=[],
            seconds=answer.seconds,
            key=key,
            replaces=before.id if before is not None else None,
        )
        changing = t.leases.update().where(t.leases.c.item_id == item.id, t.leases.c.standing)
        connection.execute(changing.values(state="done", standing=False))
        notify(store, connection, "adjudicated", {"vote": vote_id, "item": item.sha256})
    return Receipt(vote_id, duplicate=False)


def latest(connection: Connection, person_id: int, item_id: int, purpose: str) -> Row[Any] | None:
    """The newest row of a person on an item, which is the one that counts; None if there is none."""
    return connection.execute(
        sa.select(t.votes)
        .where(t.votes.c.person_id == person_id, t.votes.c.item_id == item_id, t.votes.c.purpose == purpose)
        .order_by(t.votes.c.id.desc())
        .limit(1)
    ).first()


@dataclass(frozen=True)
class NewVote:
    """A new row of the votes, with what the person wrote in words."""

    at: float
    values: Mapping[str, Any]
    words: Mapping[str, str] = field(default_factory=dict)
    """The texts of `WORDS` that are not empty."""


def insert_votes(connection: Connection, new: Sequence[NewVote]) -> list[int]:
    """Adds rows to the votes with what was written, and logs their hashes; returns their ids."""
    if not new:
        return []
    written = [{name: vote.words.get(name, "") for name in WORDS} for vote in new]
    rows = [
        {
            **vote.values,
            "writing_sha256": writing_digest(**words) if any(words.values()) else None,
            "created_at": vote.at,
        }
        for vote, words in zip(new, written, strict=True)
    ]
    connection.execute(t.votes.insert(), rows)
    found = connection.execute(sa.select(t.votes).where(t.votes.c.key.in_([row["key"] for row in rows]))).all()
    by_key = {row.key: row for row in found}
    added = [by_key[row["key"]] for row in rows]
    writings = [{"vote_id": row.id, **words} for row, words in zip(added, written, strict=True) if any(words.values())]
    if writings:
        connection.execute(t.writings.insert(), writings)
    logged = zip(added, new, strict=True)
    entries = [AuditEntry(vote.at, row.person_id, "vote", row.id, {"sha256": row_digest(row)}) for row, vote in logged]
    append_audits(connection, entries)
    return [int(row.id) for row in added]


def vote_row(item: Row[Any], person_id: int, answer: Answer, guideline_version: int, **more: Any) -> JsonDict:
    """The columns of a vote that follow from its item and its answer, and `more` columns."""
    replies = [reply["sha256"] for reply in item.replies]
    return {
        "item_id": item.id,
        "person_id": person_id,
        "choice": answer.choice,
        "strength": answer.strength,
        "item_a": replies[0] if replies else "",
        "item_b": replies[1] if item.kind == "pairs" else "",
        "answer": answer.stored(),
        "guideline_version": guideline_version,
        **more,
    }


def _add(store: Store, connection: Connection, person: Person, item: Row[Any], answer: Answer, **more: Any) -> int:
    """The id of a new row about an item. `more` are its columns that do not follow from the item and the answer."""
    order = more["shown_order"]
    left = "AB"[order[0]] if item.kind == "pairs" and order else None
    values = vote_row(item, person.id, answer, guideline(connection).version, shown_left=left, **more)
    words = {name: getattr(answer, name) for name in WORDS}
    return insert_votes(connection, [NewVote(store.now(), values, words)])[0]


def _reopen(store: Store, connection: Connection, person: Person, row: Row[Any], *, withdraw: bool) -> Lease:
    import secrets

    if row.purpose == "quiz":
        raise DataError("quiz answers cannot be changed", where="your answers", fix="go on with the next task")
    if _is_decided(connection, row.item_id):
        raise DataError("this answer is locked: the item was adjudicated", where="your answers", fix="go on")
    if row.choice == "skip" and row.purpose == "task" and not _has_place(connection, row.item_id):
        raise DataError("others have answered it meanwhile", where="your answers", fix="go on with the next task")
    if row.choice == "skip" and row.purpose == "task":
        change_places(connection, [row.item_id], +1)
    item = connection.execute(sa.select(t.items).where(t.items.c.id == row.item_id)).one()
    lease = connection.execute(sa.select(t.leases).where(t.leases.c.id == row.lease_id)).one()
    written = connection.execute(sa.select(t.writings).where(t.writings.c.vote_id == row.id)).first()
    answer = restored({**row._mapping, **(written._mapping if written is not None else {})})
    if withdraw:
        _add(
            store,
            connection,
            person,
            item,
            Answer(choice="undone"),
            lease_id=lease.id,
            purpose=row.purpose,
            shown_order=list(lease.shown_order),
            seconds=None,
            key=f"undo-{row.id}",
            replaces=row.id,
        )
    now = store.now()
    stands = not withdraw and row.choice != "skip"
    begun = lease.standing and AS_ANSWERED not in lease.draft  # a change of it that was not finished
    values = {
        "token": lease.token if begun else secrets.token_urlsafe(18),
        "state": "open",
        "standing": stands,
        "draft": lease.draft if begun else draft_of(answer) | ({AS_ANSWERED: True} if stands else {}),
        "opened_at": now,
        "expires_at": now + store.project.settings.assignment.lease_minutes * 60,
    }
    connection.execute(t.leases.update().where(t.leases.c.id == lease.id).values(**values))
    return lease_of(connection.execute(sa.select(t.leases).where(t.leases.c.id == lease.id)).one())


def draft_of(answer: Answer) -> dict[str, Any]:
    """An answer as a draft, which the page of its task then shows."""
    return {k: v for k, v in asdict(answer).items() if v not in (None, "", (), {}) and k != "seconds"}


def _takes_part(connection: Connection, person: Person) -> bool:
    return by_id(connection, person.id).state not in ("banned", "deleted")


def _still_takes_part(connection: Connection, person: Person) -> None:
    """Raises DataError for somebody who was banned just after their request was let in."""
    if not _takes_part(connection, person):
        raise DataError("you no longer take part in this project", where="your answers", fix="ask who invited you")


def _take_place_again(connection: Connection, lease: Lease) -> None:
    if lease.purpose != "task":
        return
    if not _has_place(connection, lease.item_id):
        raise Late(
            "this one took longer than it is kept for, and others have answered it meanwhile",
            where="the answer",
            fix="go on with the next one",
        )
    change_places(connection, [lease.item_id], +1)


def _is_decided(connection: Connection, item_id: int) -> bool:
    return connection.execute(decided_items().where(t.votes.c.item_id == item_id)).first() is not None


def _has_place(connection: Connection, item_id: int) -> bool:
    row = connection.execute(sa.select(t.queue).where(t.queue.c.item_id == item_id)).one()
    return bool(row.taken < row.cap)


def _tell_if_done(store: Store, connection: Connection, item: Row[Any]) -> None:
    state = connection.execute(sa.select(t.queue).where(t.queue.c.item_id == item.id)).one()
    done = (t.leases.c.item_id == item.id) & (t.leases.c.purpose == "task") & (t.leases.c.state == "done")
    if num_rows(connection, t.leases.join(t.people), done, t.people.c.state != "banned") == state.cap:
        notify(store, connection, "item_done", {"item": item.sha256, "answers": state.cap})


def _count_streak(connection: Connection, person: Person, now: float) -> None:
    row = connection.execute(sa.select(t.people).where(t.people.c.id == person.id)).one()
    rested = row.last_vote_at is None or now - row.last_vote_at > NEW_STREAK_AFTER
    values = {"last_vote_at": now, "streak_since": now if rested else row.streak_since}
    connection.execute(t.people.update().where(t.people.c.id == person.id).values(**values))


def _decide_quiz(store: Store, connection: Connection, person: Person) -> None:
    """Passes or fails the person once every question of the quiz is answered."""
    settings = store.project.settings.qualification
    rows = connection.execute(
        sa.select(t.votes, t.items.c.gold)
        .join(t.items)
        .where(t.votes.c.person_id == person.id, t.votes.c.purpose == "quiz")
    ).all()
    questions = sa.select(sa.func.count()).select_from(t.items).where(t.items.c.purpose == "quiz")
    if by_id(connection, person.id).opted_out:
        questions = questions.where(~t.items.c.sensitive)
    needed = min(settings.questions, connection.execute(questions).scalar_one())
    if not rows or len(rows) < needed:
        return
    right = sum(agrees(restored(row._mapping), row.gold) for row in rows)
    passed = right / len(rows) >= settings.pass_mark
    connection.execute(t.people.update().where(t.people.c.id == person.id).values(qualified=passed))
    detail = {"right": right, "questions": len(rows), "passed": passed}
    append_audit(connection, store.now(), person.id, "quiz", person.id, detail)
