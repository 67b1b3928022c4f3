"""How far one person, and the whole project, has come."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from trimtab.feedback import tables as t
from trimtab.feedback.assign import num_eligible
from trimtab.feedback.people import Person
from trimtab.feedback.store import Store, num_rows
from trimtab.feedback.voting import NEW_STREAK_AFTER

_RECENT = 50
"""Answers of which the median time is taken."""


@dataclass(frozen=True)
class Progress:
    """How far one person has come."""

    answered: int
    today: int
    remaining: int
    """Items that wait for this person."""
    median_seconds: float | None
    """Median time of the last answers; None if no time is known."""
    working_minutes: float
    """Minutes since the last break; 0 if the person is on a break."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining items take at this pace; None if the pace is not known."""
        return None if self.median_seconds is None else self.remaining * self.median_seconds

    @property
    def share(self) -> float:
        """Share answered of all items that this person can answer."""
        return self.answered / (self.answered + self.remaining) if self.answered else 0.0


def progress_of(store: Store, connection: Connection, person: Person) -> Progress:
    """The person's own progress and pace."""
    my_leases, my_votes = t.leases.c.person_id == person.id, t.votes.c.person_id == person.id
    answered = my_leases & (t.leases.c.state == "done") & (t.leases.c.purpose != "quiz")
    today = my_votes & (t.votes.c.created_at > store.now() - 24 * 3600) & (t.votes.c.choice != "undone")
    timed = sa.select(t.votes.c.seconds).where(my_votes, t.votes.c.seconds.isnot(None))
    seconds = connection.execute(timed.order_by(t.votes.c.id.desc()).limit(_RECENT)).scalars().all()
    row = connection.execute(sa.select(t.people).where(t.people.c.id == person.id)).one()
    since = row.streak_since
    resting = row.last_vote_at is None or store.now() - row.last_vote_at > NEW_STREAK_AFTER
    return Progress(
        answered=num_rows(connection, t.leases, answered),
        today=num_rows(connection, t.votes, today),
        remaining=num_eligible(store, connection, person),
        median_seconds=statistics.median(seconds) if seconds else None,
        working_minutes=0.0 if resting or since is None else (store.now() - since) / 60,
    )


def counts(connection: Connection) -> dict[str, Any]:
    """Counts of the whole project: items, those with all their answers, answers given and wanted, people."""
    queue = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(sa.case((t.queue.c.taken >= t.queue.c.cap, 1), else_=0)), 0),
            sa.func.coalesce(sa.func.sum(t.queue.c.cap), 0),
            sa.func.coalesce(sa.func.sum(sa.case((t.queue.c.open, 1), else_=0)), 0),
        )
    ).one()
    leases: dict[str, int] = dict(
        connection.execute(
            sa.select(t.leases.c.state, sa.func.count())
            .join(t.people)
            .where(t.leases.c.purpose == "task", t.people.c.state != "banned")
            .group_by(t.leases.c.state)
        ).all()
    )
    return {
        "items": queue[0],
        "items_full": int(queue[1]),
        "answers_wanted": int(queue[2]),
        "open": bool(queue[3]) or queue[0] == 0,
        "answers": leases.get("done", 0),
        "in_hand": leases.get("open", 0),
        "people": num_rows(connection, t.people),
    }
