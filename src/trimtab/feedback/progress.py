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
from trimtab.feedback.votes import replaced
from trimtab.feedback.voting import NEW_STREAK_AFTER

_RECENT = 50
"""Answers of which the median time is taken."""


@dataclass(frozen=True)
class Progress:
    """How far one person has come."""

    answered: int
    today: int
    """Those of them that were given, or changed, in the last 24 hours."""
    remaining: int
    """Items that wait for this person."""
    to_go: int
    """Tasks to go, the one in hand among them. In a project with hidden items, which count as answered and never wait,
    it is a round number: an exact count would tell them by standing still."""
    is_round: bool
    """Whether `to_go` is a round number."""
    median_seconds: float | None
    """Median time of the last answers; None if no time is known."""
    working_minutes: float
    """Minutes since the last break; 0 if the person is on a break."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the tasks to go take at this pace; None if the pace is not known."""
        return None if self.median_seconds is None else self.to_go * self.median_seconds

    @property
    def share(self) -> float:
        """Share answered of all tasks of this person."""
        return self.answered / (self.answered + self.to_go)


def progress_of(store: Store, connection: Connection, person: Person) -> Progress:
    """The person's own progress and pace."""
    my_leases, my_votes = t.leases.c.person_id == person.id, t.votes.c.person_id == person.id
    given = (t.leases.c.state == "done") | t.leases.c.standing  # an answer stands until its change is given
    answered = my_leases & given & (t.leases.c.purpose != "quiz")
    of_tasks = t.votes.c.purpose.notin_(("quiz", "adjudication")) & t.votes.c.choice.notin_(("skip", "undone"))
    today = my_votes & of_tasks & ~replaced() & (t.votes.c.created_at > store.now() - 24 * 3600)
    timed = sa.select(t.votes.c.seconds).where(my_votes, t.votes.c.seconds.isnot(None))
    seconds = connection.execute(timed.order_by(t.votes.c.id.desc()).limit(_RECENT)).scalars().all()
    row = connection.execute(sa.select(t.people).where(t.people.c.id == person.id)).one()
    since = row.streak_since
    settings = store.project.settings.assignment
    hidden = settings.gold_rate > 0 or settings.reask_rate > 0
    remaining = num_eligible(store, connection, person)
    resting = row.last_vote_at is None or store.now() - row.last_vote_at > NEW_STREAK_AFTER
    return Progress(
        answered=num_rows(connection, t.leases, answered),
        today=num_rows(connection, t.votes, today),
        remaining=remaining,
        to_go=_round(remaining + 1) if hidden else remaining + 1,
        is_round=hidden,
        median_seconds=statistics.median(seconds) if seconds else None,
        working_minutes=0.0 if resting or since is None else (store.now() - since) / 60,
    )


def _round(num: int) -> int:
    """The number in tens, from 100 on in fifties, from 1000 on in five hundreds and so on; at least 10."""
    step = 10 if num < 100 else 10 ** (len(str(num)) - 1) // 2
    return max(step, round(num / step) * step)


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
    of_tasks = (t.leases.c.purpose == "task") & (t.people.c.state != "banned")
    given = (t.leases.c.state == "done") | t.leases.c.standing  # an answer stands until its change is given
    leases = t.leases.join(t.people)
    return {
        "items": queue[0],
        "items_full": int(queue[1]),
        "answers_wanted": int(queue[2]),
        "open": bool(queue[3]) or queue[0] == 0,
        "answers": num_rows(connection, leases, of_tasks, given),
        "in_hand": num_rows(connection, leases, of_tasks, t.leases.c.state == "open", ~t.leases.c.standing),
        "people": num_rows(connection, t.people),
    }
