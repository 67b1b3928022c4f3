"""Who gets which item next: leases with hard caps, and policies that record the probability of each choice.

Every function here works on the connection of the store's only writer, so what it reads stays true until it writes.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from trimtab.core import seeds
from trimtab.core.types import JsonDict
from trimtab.feedback import tables as t
from trimtab.feedback.answers import WORDS
from trimtab.feedback.people import Person, by_id, change_places, give_back
from trimtab.feedback.store import Store, append_audit, is_paused, num_rows, set_paused

_BLOCK = 8
"""Consecutive pairs in which each side is on the left equally often."""
REASK_AFTER = 10
"""Least number of answers before an item is asked again with its sides swapped."""
_LOOKED_AT = 20
"""Number of most recently expired leases that are searched for an answer that was begun."""


@dataclass(frozen=True)
class Lease:
    """An item given to one person for a while: `person_id` may answer `item_id` until `expires_at`."""

    id: int
    token: str
    item_id: int
    person_id: int
    purpose: str
    state: str
    standing: bool
    """Whether it was opened to change an answer that stands until then. A done lease stays so if a change was begun."""
    shown_order: tuple[int, ...]
    """Places of the replies in the order on the screen."""
    arm: str | None
    propensity: float | None
    """Probability with which the item was chosen; None if that was not by a policy."""
    draft: dict[str, Any]
    opened_at: float
    expires_at: float


def lease_of(row: Row[Any]) -> Lease:
    """The lease in a row of the table."""
    return Lease(
        row.id, row.token, row.item_id, row.person_id, row.purpose, row.state, row.standing, tuple(row.shown_order),
        row.arm, row.propensity, dict(row.draft), row.opened_at, row.expires_at,
    )  # fmt: skip


def next_lease(store: Store, connection: Connection, person: Person) -> Lease | None:
    """The open lease of the person, or a new one; None if there is nothing for them now.

    In this order: what they have open, the quiz until it is decided, a task that they had begun, and then at random a
    gold item, an earlier item again, or an item that still needs answers.
    """
    settings, now = store.project.settings, store.now()
    person = by_id(connection, person.id)  # they may have been banned since the request was let in
    reclaim(store, connection)
    open_one = connection.execute(
        sa.select(t.leases)
        .where(t.leases.c.person_id == person.id, t.leases.c.state == "open")
        .order_by(t.leases.c.opened_at.desc(), t.leases.c.id)
    ).first()  # several only after an undo, which puts the current task aside
    if open_one is not None:
        kept = settings.assignment.lease_minutes * 60
        if open_one.expires_at < now + kept / 2:  # renewed in its second half only: not every look is a write
            connection.execute(t.leases.update().where(t.leases.c.id == open_one.id).values(expires_at=now + kept))
        return lease_of(open_one)
    if person.state != "active" or reached_daily_limit(store, connection, person):
        return None
    position = num_rows(connection, t.leases, t.leases.c.person_id == person.id)
    random = seeds.generator(settings.assignment.seed, "assign", person.id, position)
    if settings.qualification.questions and person.qualified is not True:
        if person.qualified is False or is_paused(connection):
            return None
        quiz = _unseen(connection, person, "quiz", random)
        return _lease(store, connection, person, quiz, "quiz", position) if quiz is not None else None
    begun = _begun(store, connection, person)
    if begun is not None or is_paused(connection):
        return begun
    draw = random.random()
    rates = settings.assignment
    if draw < rates.gold_rate:
        gold = _unseen(connection, person, "gold", random)
        if gold is not None:
            return _lease(store, connection, person, gold, "gold", position)
    elif draw < rates.gold_rate + rates.reask_rate:
        again = _earlier(connection, person, random)
        if again is not None:
            return _lease(store, connection, person, again, "reask", position)
    return _from_queue(store, connection, person, position, random)


def _begun(store: Store, connection: Connection, person: Person) -> Lease | None:
    """The last task or change whose lease ran out while the person was writing, opened again; None if there is none."""
    now, minutes = store.now(), store.project.settings.assignment.lease_minutes
    late = sa.select(t.leases, t.items.c.sensitive).join(t.items).where(
        t.leases.c.person_id == person.id, t.leases.c.purpose != "quiz",
        (t.leases.c.state == "expired") | ((t.leases.c.state == "done") & t.leases.c.standing),
    )  # fmt: skip
    rows = connection.execute(late.order_by(t.leases.c.expires_at.desc()).limit(_LOOKED_AT)).all()
    for row in rows:
        if not any(row.draft.get(name) for name in WORDS) or (person.opted_out and row.sensitive):
            continue
        if row.purpose == "task" and not row.standing:
            wanted = eligible(store, person).where(t.queue.c.item_id == row.item_id)
            if connection.execute(wanted).first() is None:
                continue
            change_places(connection, [row.item_id], +1)
        again = {"state": "open", "opened_at": now, "expires_at": now + minutes * 60}
        connection.execute(t.leases.update().where(t.leases.c.id == row.id).values(**again))
        return lease_of(connection.execute(sa.select(t.leases).where(t.leases.c.id == row.id)).one())
    return None


def reclaim(store: Store, connection: Connection) -> int:
    """Takes back expired leases; returns how many. If one was opened to change an answer, that answer stands."""
    return give_back(connection, t.leases.c.expires_at < store.now())


def eligible(store: Store, person: Person) -> sa.Select[Any]:
    """A query of the queue's items that this person can be given."""
    met = sa.select(t.leases.c.id).where(
        t.leases.c.person_id == person.id, t.leases.c.item_id == t.queue.c.item_id, t.leases.c.purpose == "task",
        t.leases.c.state != "expired",
    )  # fmt: skip
    rows = sa.select(t.queue.c.item_id, t.queue.c.score, t.queue.c.taken, t.queue.c.arm).where(
        _waiting(), ~met.exists()
    )
    if person.opted_out:
        rows = rows.join(t.items, t.items.c.id == t.queue.c.item_id).where(~t.items.c.sensitive)
    if not store.project.settings.assignment.own_prompts:
        rows = rows.where(t.queue.c.author != person.name)
    return rows


def _waiting() -> sa.ColumnElement[bool]:
    """The condition that an item of the queue is open, has a place left and was not decided by an adjudicator."""
    return t.queue.c.open & (t.queue.c.taken < t.queue.c.cap) & t.queue.c.item_id.notin_(decided_items())


def decided_items() -> sa.Select[Any]:
    """A query of the ids of the items that an adjudicator who is not banned has decided."""
    decisions = sa.select(t.votes.c.item_id).join(t.people, t.people.c.id == t.votes.c.person_id)
    return decisions.where(t.votes.c.purpose == "adjudication", t.people.c.state != "banned")


def num_eligible(store: Store, connection: Connection, person: Person) -> int:
    """How many items this person can be given."""
    if person.opted_out or not store.project.settings.assignment.own_prompts:
        return num_rows(connection, eligible(store, person).subquery())
    # Everyone can be given the same items but those they have met: two counts by index, and no look at every item.
    waiting = _waiting()
    in_queue = t.leases.join(t.queue, t.queue.c.item_id == t.leases.c.item_id)
    mine = (t.leases.c.person_id == person.id) & (t.leases.c.purpose == "task") & (t.leases.c.state != "expired")
    return num_rows(connection, t.queue, waiting) - num_rows(connection, in_queue, mine, waiting)


def reached_daily_limit(store: Store, connection: Connection, person: Person) -> bool:
    """Whether the person has answered as often as a day allows."""
    limit = store.project.settings.assignment.max_per_day
    if not limit:
        return False
    since = store.now() - 24 * 3600
    mine = sa.select(t.votes.c.item_id, t.votes.c.purpose).where(t.votes.c.person_id == person.id)
    given = mine.where(t.votes.c.created_at > since, ~t.votes.c.choice.in_(("skip", "undone"))).distinct().subquery()
    return num_rows(connection, given) >= limit  # a changed answer is one


def _from_queue(
    store: Store, connection: Connection, person: Person, position: int, random: np.random.Generator
) -> Lease | None:
    settings = store.project.settings.assignment
    waiting = eligible(store, person)
    row = _one_of(connection, waiting.where(t.queue.c.taken > 0), random) if settings.finish_started else None
    if row is not None:
        arm, propensity = row.arm, None  # the choice of the item was made when it was begun
    elif settings.policy == "random":
        row = _one_of(connection, waiting, random)
        if row is None:
            return None
        arm, propensity = "random", 1 / row.num
    else:
        rows = connection.execute(waiting.order_by(t.queue.c.item_id)).all()
        if not rows:
            return None
        chosen, arm, propensity = choose(
            np.array([row.score for row in rows]),
            random,
            random_arm=settings.random_arm,
            temperature=settings.temperature,
        )
        row = rows[chosen]
    first = {"arm": arm, "propensity": propensity} if row.arm is None else {}
    connection.execute(
        t.queue.update().where(t.queue.c.item_id == row.item_id).values(taken=t.queue.c.taken + 1, **first)
    )
    return _lease(store, connection, person, row.item_id, "task", position, arm=arm, propensity=propensity)


def _one_of(connection: Connection, rows: sa.Select[Any], random: np.random.Generator) -> Row[Any] | None:
    """One of the rows, each equally likely, with their number as `num`; None if there are none."""
    num = num_rows(connection, rows.subquery())
    if num == 0:
        return None
    counted = rows.add_columns(sa.literal(num).label("num")).order_by(t.queue.c.item_id)
    return connection.execute(counted.offset(int(random.integers(num))).limit(1)).one()


def choose(
    scores: np.ndarray[Any, np.dtype[np.float64]],
    random: np.random.Generator,
    *,
    random_arm: float,
    temperature: float,
) -> tuple[int, str, float]:
    """The index of the chosen item, the arm that chose it, and the probability of this choice.

    The choice is a mixture: with probability `random_arm` it is uniform, otherwise it is proportional to
    exp(score / temperature). The probability is that of the mixture, so that estimates weighted by its inverse are
    unbiased whichever arm chose.
    """
    uniform = np.full(scores.size, 1 / scores.size)
    weights = np.exp((scores - scores.max()) / temperature)
    wanted = weights / weights.sum()
    arm = "random" if random.random() < random_arm else "active"
    chosen = int(random.choice(scores.size, p=uniform if arm == "random" else wanted))
    return chosen, arm, float(random_arm * uniform[chosen] + (1 - random_arm) * wanted[chosen])


def _unseen(connection: Connection, person: Person, purpose: str, random: np.random.Generator) -> int | None:
    met = sa.select(t.leases.c.item_id).where(t.leases.c.person_id == person.id, t.leases.c.state != "expired")
    rows = sa.select(t.items.c.id).where(t.items.c.purpose == purpose, ~t.items.c.id.in_(met)).order_by(t.items.c.id)
    if person.opted_out:
        rows = rows.where(~t.items.c.sensitive)
    found = connection.execute(rows).scalars().all()
    return found[int(random.integers(len(found)))] if found else None


def _earlier(connection: Connection, person: Person, random: np.random.Generator) -> int | None:
    """A random pair that the person judged a while ago and has not been asked again; None if there is none."""
    mine = sa.select(t.leases.c.item_id).where(t.leases.c.person_id == person.id)
    again = mine.where(t.leases.c.purpose == "reask")
    rows = (
        mine.join(t.items)
        .where(t.leases.c.purpose == "task", t.leases.c.state == "done", t.items.c.kind == "pairs")
        .order_by(t.leases.c.position.desc())
        .offset(REASK_AFTER)
    )
    if person.opted_out:
        rows = rows.where(~t.items.c.sensitive)
    found = [i for i in connection.execute(rows).scalars() if i not in set(connection.execute(again).scalars())]
    return found[int(random.integers(len(found)))] if found else None


def _lease(
    store: Store,
    connection: Connection,
    person: Person,
    item_id: int,
    purpose: str,
    position: int,
    *,
    arm: str | None = None,
    propensity: float | None = None,
) -> Lease:
    now, settings = store.now(), store.project.settings.assignment
    item = connection.execute(sa.select(t.items.c.replies, t.items.c.kind).where(t.items.c.id == item_id)).one()
    if purpose == "reask":
        before = sa.select(t.leases.c.shown_order).where(
            t.leases.c.person_id == person.id, t.leases.c.item_id == item_id, t.leases.c.purpose == "task"
        )
        order = list(reversed(connection.execute(before).scalar_one()))
    else:
        order = shown_order(settings.seed, person.id, position, len(item.replies), item.kind)
    values = {
        "token": secrets.token_urlsafe(18),
        "purpose": purpose,
        "state": "open",
        "standing": False,
        "position": position,
        "shown_order": order,
        "arm": arm,
        "propensity": propensity,
        "draft": {},
        "opened_at": now,
        "expires_at": now + settings.lease_minutes * 60,
    }
    # An expired lease is used again: there is one lease for each person, item and purpose.
    here = (t.leases.c.person_id == person.id) & (t.leases.c.item_id == item_id) & (t.leases.c.purpose == purpose)
    if connection.execute(t.leases.update().where(here).values(**values)).rowcount == 0:
        connection.execute(t.leases.insert().values(item_id=item_id, person_id=person.id, created_at=now, **values))
    return lease_of(connection.execute(sa.select(t.leases).where(here)).one())


def past_lease(at: float, item_id: int, person_id: int, purpose: str, **more: Any) -> JsonDict:
    """The row of a lease for an answer that was given elsewhere and is stored now; `more` are its other columns."""
    row = {"token": secrets.token_urlsafe(18), "item_id": item_id, "person_id": person_id, "purpose": purpose}
    return {**row, "created_at": at, "opened_at": at, "expires_at": at, **more}


def order_of_given_vote(store: Store, person_id: int, position: int, shown_left: str | None) -> list[int]:
    """The order for the lease of a vote over a pair that was given elsewhere: as it was shown there, or one as for a
    new task if that is not known. The vote itself does not claim to know it."""
    if shown_left is not None:
        return [0, 1] if shown_left == "A" else [1, 0]
    return shown_order(store.project.settings.assignment.seed, person_id, position, 2, "pairs")


def shown_order(seed: int, person_id: int, position: int, num: int, kind: str) -> list[int]:
    """The places of the replies in the order in which this person sees them.

    Of every eight consecutive pairs, four are shown each way round, in an order that nobody can guess. Rankings are
    shuffled; the steps of a reply keep their order.
    """
    if kind == "pairs":
        sides = np.array([0, 1] * (_BLOCK // 2))
        seeds.generator(seed, "sides", person_id, position // _BLOCK).shuffle(sides)
        first = int(sides[position % _BLOCK])
        return [first, 1 - first]
    if kind == "ranking":
        return [int(i) for i in seeds.generator(seed, "order", person_id, position).permutation(num)]
    return list(range(num))


def set_open(store: Store, is_open: bool, *, actor: int | None = None) -> None:
    """Opens or pauses the whole queue. People may finish the tasks that they have."""
    with store.write() as connection:
        connection.execute(t.queue.update().values(open=is_open))
        set_paused(connection, not is_open)
        append_audit(connection, store.now(), actor, "queue", "", {"open": is_open})
