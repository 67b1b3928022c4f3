"""Imports votes given elsewhere: the choices of a comparisons file, checked with its rows and then stored once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict
from trimtab.data.compared import Sides, to_judged
from trimtab.data.mistakes import Mistake
from trimtab.feedback import tables as t
from trimtab.feedback.answers import MAX_WRITING, Answer
from trimtab.feedback.assign import order_of_given_vote, past_lease
from trimtab.feedback.items import CHUNK, NewItem, item_row, reply_hash
from trimtab.feedback.people import DELETED, Person, add_person, by_name, change_places, plain_name
from trimtab.feedback.project import Task
from trimtab.feedback.store import Store, checked_text, digest, guideline
from trimtab.feedback.voting import NewVote, insert_votes, vote_row
from trimtab.votes.table import text_of

_CHOICES = ("A", "B", "tie", "both_bad", "cannot_judge")
_BOTH_BAD = ("both bad", "tie (bothbad)", "tie bothbad", "tie (both bad)", "neither")
_OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True, kw_only=True)
class GivenVote:
    """The vote of one row. Its side A is the reply with the hash `a`, whichever place that has in the store."""

    item_sha256: str
    a: str
    annotator: str
    choice: str
    strength: int | None
    shown_left: str | None
    seconds: float | None
    rationale: str


def with_choice(row: JsonDict, sides: Sides) -> JsonDict:
    """The row with its choice as it is called here: A for "model_a", "[[A]]", or the name of the model that wrote the
    reply A. A choice that cannot be read stays, and is refused where votes are made."""
    said = row.get("choice")
    if row.get("response_a") is None or said in (*_CHOICES, "skip"):
        return row
    if said in (None, "") and row.get("winner_model_a") is None:
        return row
    if isinstance(said, str) and said.strip().strip("[]").lower().replace("_", " ") in _BOTH_BAD:
        return {**row, "choice": "both_bad"}
    try:
        share = to_judged(row, sides).share
    except Mistake:
        return row
    return {**row, "choice": {1.0: "A", 0.5: "tie", 0.0: "B"}.get(share, said)}


def vote_of_row(row: Mapping[str, Any], items: Sequence[NewItem], task: Task) -> GivenVote | None:
    """The vote of a row; None for a row that was not judged. Raises Mistake for one that cannot be read."""
    if row.get("response_a") is None or "choice" not in row or len(items) != 1:
        raise Mistake(
            "no_vote",
            f"no vote over two replies (its columns: {', '.join(row)})",
            "give prompt, response_a, response_b, choice and annotator, name them with --columns, or leave "
            "--with-votes away",
        )
    choice = row["choice"]
    if choice in (None, "", "skip"):
        return None
    if choice not in _CHOICES:
        raise Mistake("wrong_choice", f"the choice {choice!r}", f"use {', '.join(_CHOICES)}, or nothing if not judged")
    left = row.get("shown_left") or None
    if left not in (None, "A", "B"):
        raise Mistake("wrong_side", f"shown_left is {left!r}", "name the side on the left, A or B, or leave it empty")
    rationale = str(row.get("rationale") or "")
    annotator = plain_name(text_of(row.get("annotator"))) or "imported"  # as people write it who sign in
    try:
        checked_text(rationale + annotator, where="")
    except DataError as error:
        raise Mistake("broken_text", error.problem, error.fix) from None
    if annotator.startswith(DELETED):
        raise Mistake("wrong_name", f"the annotator {annotator!r}", f"call nobody {DELETED}…: deleted people are")
    if len(rationale) > MAX_WRITING:
        raise Mistake("long_text", f"rationale has {len(rationale)} letters", f"use at most {MAX_WRITING}")
    seconds = _number(row, "seconds")
    item = items[0]
    return GivenVote(
        item_sha256=str(item_row(item, 0.0)["sha256"]),
        a=reply_hash(item.replies[0].text),
        annotator=annotator,
        choice=choice,
        strength=_strength(row, task) if choice in ("A", "B") else None,
        shown_left=left,
        seconds=seconds,
        rationale=rationale,
    )


def _strength(row: Mapping[str, Any], task: Task) -> int:
    strength, strongest = _number(row, "strength"), max(1, task.scale // 2)
    if strength is None:
        return 1
    if not strength.is_integer() or not 1 <= strength <= strongest:
        raise Mistake(
            "wrong_strength",
            f"strength is {row['strength']!r}; a scale of {task.scale} has the strengths 1 to {strongest}",
            "set [task] scale to twice the largest strength of the file, or leave the column out",
        )
    return int(strength)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value in (None, "") or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise Mistake("wrong_number", f"{name} is {value!r}", "give a number that is not negative, or nothing")
    return number


def add_votes(store: Store, votes: Sequence[GivenVote]) -> dict[str, int]:
    """Stores votes whose items are in the store; returns counts.

    Importing the same file again adds nothing. An annotator's second vote on an item is stored with the purpose
    "reask", which measures consistency and adds no label; further votes are left out and counted.
    """
    counts = {"votes": 0, "repeated_votes": 0, "dropped_known_vote": 0, "dropped_repeated_vote": 0}
    seen: Counter[str] = Counter()
    keyed = []
    for vote in votes:
        content = digest([vote.item_sha256, vote.a, vote.annotator, vote.choice, vote.strength, vote.shown_left,
                          vote.seconds, vote.rationale])  # fmt: skip
        seen[content] += 1
        keyed.append((f"import-{content}-{seen[content]}", vote))
    for start in range(0, len(keyed), CHUNK):
        with store.write() as connection:
            _Chunk(store, connection, keyed[start : start + CHUNK], counts).add()
    return counts


def _here(row: Any) -> tuple[int, int, str]:
    return row.item_id, row.person_id, row.purpose


class _Chunk:
    """The votes of one transaction, and what the store knows of their items and people, read once for all of them."""

    def __init__(
        self, store: Store, connection: Connection, keyed: Sequence[tuple[str, GivenVote]], counts: dict[str, int]
    ) -> None:
        self.store, self.connection, self.keyed, self.counts = store, connection, keyed, counts
        self.now = store.now()
        keys = [key for key, _ in keyed]
        self.known = set(connection.execute(sa.select(t.votes.c.key).where(t.votes.c.key.in_(keys))).scalars())
        # whoever gave nothing but known votes may have been deleted since, and is not made anew
        names = dict.fromkeys(vote.annotator for key, vote in keyed if key not in self.known)
        found = {name: self._person(name) for name in names}
        self.people = {name: person.id for name, person in found.items()}
        self.banned = {person.id for person in found.values() if person.state == "banned"}
        wanted = {vote.item_sha256 for _, vote in keyed}
        asked = sa.select(t.items.c.id, t.items.c.sha256, t.items.c.kind, t.items.c.replies)
        rows = asked.where(t.items.c.sha256.in_(wanted))
        self.items = {row.sha256: row for row in connection.execute(rows)}
        ids, persons = [row.id for row in self.items.values()], list(self.people.values())
        met = t.leases.c.item_id.in_(ids) & t.leases.c.person_id.in_(persons)
        self.leases = {_here(row): row for row in connection.execute(sa.select(t.leases).where(met))}
        given = t.votes.c.item_id.in_(ids) & t.votes.c.person_id.in_(persons)
        columns = (t.votes.c.id, t.votes.c.item_id, t.votes.c.person_id, t.votes.c.purpose, t.votes.c.choice)
        newest = sa.select(*columns).where(given).order_by(t.votes.c.id)
        self.newest = {_here(row): row for row in connection.execute(newest)}
        counted = sa.select(t.leases.c.person_id, sa.func.count()).where(t.leases.c.person_id.in_(persons))
        self.positions: Counter[int] = Counter(dict(connection.execute(counted.group_by(t.leases.c.person_id)).all()))

    def _person(self, name: str) -> Person:
        return by_name(self.connection, name) or add_person(self.connection, self.now, name, "annotator")

    def add(self) -> None:
        version = guideline(self.connection).version
        rows, leases, places = [], [], Counter[int]()
        answered: set[tuple[int, int, str]] = set()
        for key, vote in self.keyed:
            if key in self.known:
                self.counts["dropped_known_vote"] += 1
                continue
            item, person_id = self.items[vote.item_sha256], self.people[vote.annotator]

            def free(purpose: str, item_id: int = item.id, person_id: int = person_id) -> bool:
                before = self.newest.get((item_id, person_id, purpose))
                stands = before is not None and before.choice not in ("undone", "skip")
                return not stands and (item_id, person_id, purpose) not in answered

            purpose = "task" if free("task") else "reask"
            if not free(purpose):
                self.counts["dropped_repeated_vote"] += 1
                continue
            self.counts["votes"] += 1
            self.counts["repeated_votes"] += purpose == "reask"
            here = (item.id, person_id, purpose)
            answered.add(here)
            before = self.newest.get(here)
            values = self._values(key, vote, item, here, version, before)
            lease = self.leases.get(here)
            if purpose == "task" and (lease is None or lease.state not in ("open", "done")):
                places[item.id] += person_id not in self.banned  # whose answers hold no places
            if lease is None:
                leases.append(self._new_lease(here, values["shown_left"]))
            else:
                done = t.leases.update().where(t.leases.c.id == lease.id)
                self.connection.execute(done.values(state="done", standing=False, draft={}))
            rows.append((here, NewVote(self.now, values, {"rationale": vote.rationale})))
        if leases:
            self.connection.execute(t.leases.insert(), leases)
        for num in set(places.values()):
            change_places(self.connection, [item_id for item_id, times in places.items() if times == num], num)
        insert_votes(self.connection, self._with_leases(rows))

    def _values(
        self, key: str, vote: GivenVote, item: Any, here: tuple[int, int, str], version: int, before: Any
    ) -> JsonDict:
        turned = vote.a != item.replies[0]["sha256"]  # the store had the same two replies the other way round
        choice = _OTHER.get(vote.choice, vote.choice) if turned else vote.choice
        left = _OTHER.get(vote.shown_left or "") if turned else vote.shown_left
        answer = Answer(choice=choice, strength=vote.strength, rationale=vote.rationale)
        given: JsonDict = {"purpose": here[2], "shown_left": left, "shown_order": []}
        given |= {"seconds": vote.seconds, "key": key}
        replaces = None if before is None else before.id
        return vote_row(item, here[1], answer, version, replaces=replaces, **given)

    def _new_lease(self, here: tuple[int, int, str], shown_left: str | None) -> JsonDict:
        """The lease that a vote given elsewhere would have had."""
        item_id, person_id, purpose = here
        position = self.positions[person_id]
        self.positions[person_id] += 1
        order = order_of_given_vote(self.store, person_id, position, shown_left)
        return past_lease(self.now, item_id, person_id, purpose, state="done", position=position, shown_order=order)

    def _with_leases(self, rows: Sequence[tuple[tuple[int, int, str], NewVote]]) -> list[NewVote]:
        ids = {here[0] for here, _ in rows}
        persons = list(self.people.values())
        met = t.leases.c.item_id.in_(ids) & t.leases.c.person_id.in_(persons)
        columns = (t.leases.c.id, t.leases.c.item_id, t.leases.c.person_id, t.leases.c.purpose)
        found = {_here(row): row.id for row in self.connection.execute(sa.select(*columns).where(met))}
        return [replace(vote, values={**vote.values, "lease_id": found[here]}) for here, vote in rows]
