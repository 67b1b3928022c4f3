"""People: roles, invitations, passwords, sessions. Only hashes of secrets are stored."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from trimtab.core.errors import DataError
from trimtab.data.split import place_of_name
from trimtab.feedback import tables as t
from trimtab.feedback.store import Store, append_audit, checked_text
from trimtab.feedback.webhooks import notify
from trimtab.reports.markup import visible

PersonRole = Literal["annotator", "adjudicator", "admin"]
ROLES: tuple[PersonRole, ...] = ("annotator", "adjudicator", "admin")
"""In the order of what they may do: each may do what those before it may."""
State = Literal["active", "paused", "banned"]
STATES: tuple[State, ...] = ("active", "paused", "banned")
DELETED = "deleted-"
"""How the names of deleted people begin."""
AS_ANSWERED = "as_answered"
"""Marks the draft of a lease that shows the answer given before and holds no change of it."""
MIN_PASSWORD = 10
# 32 MiB and about a tenth of a second for each guess (RFC 7914; OWASP's figures for scrypt).
_SCRYPT = {"n": 2**15, "r": 8, "p": 1, "maxmem": 2**26}


@dataclass(frozen=True)
class Person:
    """One person of a project: an annotator, an adjudicator or an admin."""

    id: int
    name: str
    role: PersonRole
    state: str
    """active, paused, banned or deleted."""
    qualified: bool | None
    """Whether they passed the quiz; None until that is decided."""
    opted_out: bool
    """Whether they do not want sensitive items."""
    warned: bool
    """Whether they have seen the content warning."""
    keys: dict[str, str]
    """Their own keys, such as {"tie": "x"}."""
    view: dict[str, Any]
    has_password: bool = True

    @property
    def may_adjudicate(self) -> bool:
        """Whether the person may see the board and decide about items, as adjudicators and admins may."""
        return self.role in ("adjudicator", "admin")


def person_of(row: Any) -> Person:
    """The person in a row of the table."""
    return Person(
        row.id, row.name, row.role, "deleted" if row.deleted else row.state, row.qualified, row.opted_out, row.warned,
        dict(row.keys_), dict(row.view), bool(row.password),
    )  # fmt: skip


_PERSON = [c.label("keys_") if c.name == "keys" else c for c in t.people.c]  # a Row has a method `keys`


# --- joining ---


def make_invite(
    store: Store, role: PersonRole, *, uses: int = 1, hours: float = 168.0, actor: int | None = None
) -> str:
    """The token of a new invitation. It is shown only once; the store has its hash."""
    if role not in ROLES:
        raise DataError(f"no role is called {role!r}", where="the invitation", fix=f"use {', '.join(ROLES)}")
    if uses < 1:
        raise DataError(f"an invitation for {uses} people", where="the invitation", fix="give at least 1 use")
    _refuse_no_time(hours, where="the invitation")
    token, now = secrets.token_urlsafe(24), store.now()
    with store.write() as connection:
        row = {"token_sha256": _hash(token), "role": role, "uses_left": uses, "created_at": now}
        key = connection.execute(t.invites.insert().values(**row, expires_at=now + hours * 3600)).inserted_primary_key
        append_audit(connection, now, actor, "invite", key[0] if key else "", {"role": role, "uses": uses})
    return token


def make_link(store: Store, person_id: int, *, hours: float = 168.0, actor: int | None = None) -> str:
    """The token of a link with which a known person sets a new password: one who forgot theirs, or who came with a dump
    or with imported votes. Raises DataError for somebody who may not sign in."""
    token, now = secrets.token_urlsafe(24), store.now()
    with store.write() as connection:
        person = by_id(connection, person_id)
        if person.state in ("banned", "deleted"):
            raise DataError(
                f"{person.name!r} is {person.state}", where="the link", fix="let them in first: --state active"
            )
        row = {"token_sha256": _hash(token), "role": person.role, "person_id": person_id, "uses_left": 1}
        connection.execute(t.invites.insert().values(**row, created_at=now, expires_at=now + hours * 3600))
        append_audit(connection, now, actor, "password_link", person_id, {})
    return token


def revoke_invite(store: Store, invite_id: int, *, actor: int | None = None) -> None:
    """Revokes an invitation or link. Raises DataError if no open one has that number."""
    with store.write() as connection:
        here = t.invites.update().where(t.invites.c.id == invite_id, t.invites.c.uses_left > 0)
        if not connection.execute(here.values(uses_left=0)).rowcount:
            raise DataError(f"no open invitation {invite_id}", where="the invitations", fix="see the list of them")
        append_audit(connection, store.now(), actor, "invite_revoked", invite_id, {})


def open_invites(store: Store) -> list[Any]:
    """Rows of invitations and links that can still be used, with the name of the person if there is one."""
    rows = sa.select(t.invites, t.people.c.name).outerjoin(t.people, t.people.c.id == t.invites.c.person_id)
    still = rows.where(t.invites.c.uses_left > 0, t.invites.c.expires_at > store.now()).order_by(t.invites.c.id)
    with store.read() as connection:
        return list(connection.execute(still))


def can_be_administered(connection: Connection) -> bool:
    """Whether there is an admin who can sign in."""
    able = sa.select(t.people.c.id).where(
        t.people.c.role == "admin", t.people.c.password != "", t.people.c.state != "banned", ~t.people.c.deleted
    )
    return connection.execute(able).first() is not None


def join(store: Store, token: str, name: str, password: str) -> Person:
    """The person who joins: new by an invitation, known by a link. Raises DataError that says what to correct."""
    name = plain_name(checked_text(name, where="the name"))
    if len(password) < MIN_PASSWORD or len(password) > 1000:
        raise DataError(
            f"the password needs at least {MIN_PASSWORD} letters", where="joining", fix="a few words in a row do well"
        )
    hashed, now = hash_password(password), store.now()
    with store.write() as connection:
        invite = connection.execute(sa.select(t.invites).where(t.invites.c.token_sha256 == _hash(token))).first()
        if invite is None or invite.uses_left < 1 or invite.expires_at < now:
            raise DataError(
                "the invitation is not known, used up or too old", where="joining", fix="ask for a new invitation"
            )
        row = connection.execute(_typed(name)).first()
        known = None if row is None else person_of(row)
        if invite.person_id is None and (not 1 <= len(name) <= 60 or name.startswith(DELETED)):
            raise DataError("the name needs 1 to 60 letters", where="joining", fix="choose another name")
        if invite.person_id is None:
            _refuse_unseen(name)
        if invite.person_id is not None and (known is None or known.id != invite.person_id):
            raise DataError(
                "this link is for another name", where="joining", fix="write the name under which you took part before"
            )
        if invite.person_id is None and known is not None:
            fix = (
                "sign in; if it is you and you have no password, ask an admin for a link to set one; or choose another"
            )
            raise DataError("somebody has this name already", where="joining", fix=fix)
        connection.execute(t.invites.update().where(t.invites.c.id == invite.id).values(uses_left=invite.uses_left - 1))
        if known is not None:
            _set_password(connection, now, known.id, hashed)
            return by_id(connection, known.id)
        person = add_person(connection, now, name, invite.role, password=hashed)
        notify(store, connection, "person_joined", {"person": person.id, "role": person.role})
        return person


def plain_name(name: str) -> str:
    """The name as it is stored: blanks in a row are one, and a letter with its mark is one character.
    Keyboards differ in what they write for it."""
    return " ".join(unicodedata.normalize("NFC", name).split())


_JOINERS = "\u200c\u200d"
"""Invisible characters that words of some scripts need."""


def _typed(name: str) -> sa.Select[Any]:
    """A query of whoever has a name that somebody typed, the exact one first. Stored names may be in either form, since
    a dump brings them as they are."""
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    return sa.select(*_PERSON).where(t.people.c.name.in_(forms)).order_by(t.people.c.name != name)


def _refuse_unseen(name: str) -> None:
    """Raises DataError if a part of a name cannot be seen: such a name looks like another one, reverses the line
    that it stands in, or steers a terminal."""
    seen = all(c in _JOINERS or c.isprintable() for c in name) and visible(name) == name
    if not seen or not name.strip(_JOINERS):
        raise DataError("the name has characters that cannot be seen", where="joining", fix="type it anew")


def add_person(
    connection: Connection, at: float, name: str, role: PersonRole, *, password: str = "", actor: int | None = None
) -> Person:
    """A new person. Without a password they cannot sign in, such as simulated annotators or those of imported votes."""
    place = math.floor(place_of_name(name) * 1000) / 1000  # too coarse to tell a name by, once it is deleted
    row = {"name": name, "role": role, "password": password, "place": place, "created_at": at}
    key = connection.execute(t.people.insert().values(**row)).inserted_primary_key
    assert key is not None
    append_audit(connection, at, actor, "person", key[0], {"role": role})
    return by_id(connection, key[0])


# --- signing in ---


def sign_in(store: Store, name: str, password: str) -> Person | None:
    """The person, if the password is theirs and they may sign in. It takes as long for names that do not exist."""
    with store.read() as connection:
        row = connection.execute(_typed(plain_name(name))).first()
    known = row is not None and bool(row.password)
    matches = check_password(password, row.password if row is not None and known else _NOBODY)
    if not known or not matches or row is None or row.state == "banned" or row.deleted:
        return None
    return person_of(row)


def start_session(
    store: Store, person: Person, *, hours: float, kind: Literal["browser", "api"] = "browser", name: str = ""
) -> str:
    """The token of a new session. It is shown only once; the store has its hash."""
    _refuse_no_time(hours, where="the session")
    token, now = secrets.token_urlsafe(32), store.now()
    row = {"token_sha256": _hash(token), "person_id": person.id, "kind": kind, "name": name}
    with store.write() as connection:
        connection.execute(t.sessions.delete().where(t.sessions.c.expires_at < now))
        connection.execute(
            t.sessions.insert().values(**row, created_at=now, seen_at=now, expires_at=now + hours * 3600)
        )
        append_audit(connection, now, person.id, "signed_in" if kind == "browser" else "api_token", person.id, {})
    return token


def _refuse_no_time(hours: float, *, where: str) -> None:
    """Raises DataError for a time of no hours, or of more than a hundred years; nan is neither."""
    if not 0 < hours <= 100 * 366 * 24:
        raise DataError(f"it would be good for {hours:g} hours", where=where, fix="give a time above 0")


def person_of_session(store: Store, token: str, kind: Literal["browser", "api"]) -> Person | None:
    """The person of a session; None if it is unknown or over, or if the person may not sign in any more."""
    now = store.now()
    idle = store.project.settings.server.idle_hours * 3600
    with store.read() as connection:
        row = connection.execute(
            sa.select(*_PERSON, t.sessions.c.seen_at, t.sessions.c.expires_at)
            .join(t.sessions)
            .where(t.sessions.c.token_sha256 == _hash(token), t.sessions.c.kind == kind)
        ).first()
    if row is None or row.expires_at < now or row.state == "banned" or row.deleted:
        return None
    if kind == "browser" and row.seen_at + idle < now:
        return None
    if row.seen_at + 60 < now:  # once a minute is enough to know who is idle
        with store.write(durable=False) as connection:
            seen = t.sessions.update().where(t.sessions.c.token_sha256 == _hash(token)).values(seen_at=now)
            connection.execute(seen)
    return person_of(row)


def end_session(store: Store, token: str) -> None:
    """Ends a session: signs its browser out."""
    with store.write() as connection:
        connection.execute(t.sessions.delete().where(t.sessions.c.token_sha256 == _hash(token)))


def change_password(store: Store, person: Person, old: str, new: str) -> None:
    """Sets a new password and ends every session and token. Raises DataError for a wrong or a short one."""
    if len(new) < MIN_PASSWORD or len(new) > 1000:
        raise DataError(f"a password of {len(new)} letters", where="the account", fix=f"use at least {MIN_PASSWORD}")
    with store.read() as connection:
        row = connection.execute(sa.select(t.people.c.password).where(t.people.c.id == person.id)).one()
    if row.password and not check_password(old, row.password):
        fix = "try again, or ask an admin for a link that sets a new one"
        raise DataError("the old password is not right", where="the account", fix=fix)
    hashed = hash_password(new)
    with store.write() as connection:
        _set_password(connection, store.now(), person.id, hashed)


def _set_password(connection: Connection, at: float, person_id: int, hashed: str) -> None:
    """Sets the hash of a password and ends every session and token."""
    connection.execute(t.people.update().where(t.people.c.id == person_id).values(password=hashed))
    connection.execute(t.sessions.delete().where(t.sessions.c.person_id == person_id))
    append_audit(connection, at, person_id, "password", person_id, {})


def end_sessions(store: Store, person_id: int, *, actor: int | None = None) -> int:
    """Signs somebody out everywhere and makes their tokens of the REST interface useless; returns how many."""
    with store.write() as connection:
        num = connection.execute(t.sessions.delete().where(t.sessions.c.person_id == person_id)).rowcount
        append_audit(connection, store.now(), actor, "sessions_ended", person_id, {"sessions": num})
    return num


# --- states ---


def set_state(store: Store, person_id: int, state: State, *, actor: int | None = None) -> None:
    """Pauses, bans or readmits a person. A banned person's votes stay in the store but no longer count; their places on
    items become free for others."""
    if state not in STATES:
        raise DataError(f"no state is called {state!r}", where=f"person {person_id}", fix=f"use {', '.join(STATES)}")
    with store.write() as connection:
        person = by_id(connection, person_id)
        if person.state == "deleted" or person.state == state:
            return
        if (person.state == "banned") != (state == "banned"):
            if state == "banned":  # what is open is given back first; after that only answers hold places
                give_back(connection, t.leases.c.person_id == person_id)
            change_answered_places(connection, person_id, -1 if state == "banned" else 1)
        connection.execute(t.people.update().where(t.people.c.id == person_id).values(state=state))
        if state == "banned":
            connection.execute(t.sessions.delete().where(t.sessions.c.person_id == person_id))
        append_audit(connection, store.now(), actor, "person_state", person_id, {"from": person.state, "to": state})
        notify(store, connection, "person_state", {"person": person_id, "state": state})


def set_role(store: Store, person_id: int, role: PersonRole, *, actor: int | None = None) -> None:
    """Gives somebody another role. Raises DataError for the last admin who can sign in."""
    if role not in ROLES:
        raise DataError(f"no role is called {role!r}", where=f"person {person_id}", fix=f"use {', '.join(ROLES)}")
    with store.write() as connection:
        person = by_id(connection, person_id)
        if person.role == role:
            return
        before = can_be_administered(connection)
        connection.execute(t.people.update().where(t.people.c.id == person_id).values(role=role))
        if before and not can_be_administered(connection):
            raise DataError(
                f"{person.name!r} is the last admin", where="the role", fix="make somebody else an admin first"
            )
        append_audit(connection, store.now(), actor, "role", person_id, {"from": person.role, "to": role})


def delete_person(store: Store, person_id: int, *, actor: int | None = None) -> None:
    """Deletes the name, the password and everything the person wrote in their own words.

    Their choices stay under "deleted-<number>", so that labels and statistics derived from them can still be checked;
    the log's hashes of the deleted words stay too, and reveal nothing.
    """
    with store.write() as connection:
        person = by_id(connection, person_id)
        if person.state == "deleted":
            return
        give_back(connection, t.leases.c.person_id == person_id)
        mine = sa.select(t.votes.c.id).where(t.votes.c.person_id == person_id)
        connection.execute(t.writings.delete().where(t.writings.c.vote_id.in_(mine)))
        connection.execute(t.sessions.delete().where(t.sessions.c.person_id == person_id))
        connection.execute(t.leases.update().where(t.leases.c.person_id == person_id).values(draft={}, standing=False))
        name = name_when_deleted(connection, f"{DELETED}{person_id}")
        connection.execute(t.queue.update().where(t.queue.c.author == person.name).values(author=name))
        values: dict[str, Any] = {"name": name, "password": "", "deleted": True, "keys": {}, "view": {}}
        connection.execute(t.people.update().where(t.people.c.id == person_id).values(**values))
        append_audit(connection, store.now(), actor, "person_deleted", person_id, {})
    store.clear_log()


def change_places(connection: Connection, items: Sequence[int] | sa.Select[Any], change: int) -> None:
    """Adds `change` to the places taken of these items, such as -1 for one that becomes free."""
    here = t.queue.update().where(t.queue.c.item_id.in_(items))
    connection.execute(here.values(taken=t.queue.c.taken + change))


def change_answered_places(connection: Connection, person_id: int, change: int) -> None:
    """Adds `change` to the places taken of the tasks that a person answered: the answers of the banned hold none."""
    answered = sa.select(t.leases.c.item_id).where(
        t.leases.c.person_id == person_id, t.leases.c.purpose == "task", t.leases.c.state == "done"
    )
    change_places(connection, answered, change)


def name_when_deleted(connection: Connection, wanted: str) -> str:
    """The wanted name, such as "deleted-7", or the first free one if a dump brought somebody of that name."""
    names = chain([wanted], (f"{DELETED}{number}" for number in count(1)))
    return next(name for name in names if by_name(connection, name) is None)


def give_back(connection: Connection, which: sa.ColumnElement[bool]) -> int:
    """Takes back those of these leases that are open and frees their places; returns how many that were.

    A lease that was opened to change an answer frees no place, because that answer stands. It stays marked if a change
    was begun, which can then be taken up again.
    """
    leases = t.leases.update().where(t.leases.c.state == "open", which)
    changing = sa.select(t.leases.c.id, t.leases.c.draft).where(t.leases.c.state == "open", t.leases.c.standing, which)
    for row in connection.execute(changing).all():
        begun = AS_ANSWERED not in row.draft
        connection.execute(leases.where(t.leases.c.id == row.id).values(state="done", standing=begun))
    expired = leases.values(state="expired").returning(t.leases.c.item_id, t.leases.c.purpose)
    rows = connection.execute(expired).all()
    for row in rows:
        if row.purpose == "task":
            change_places(connection, [row.item_id], -1)
    return len(rows)


def update_person(store: Store, person_id: int, **values: Any) -> None:
    """Sets a person's own preferences: `warned`, `keys`, `view`."""
    assert values.keys() <= {"warned", "keys", "view"}
    with store.write() as connection:
        connection.execute(t.people.update().where(t.people.c.id == person_id).values(**values))


def by_id(connection: Connection, person_id: int) -> Person:
    """The person with this id. Raises DataError if there is none."""
    row = connection.execute(sa.select(*_PERSON).where(t.people.c.id == person_id)).first()
    if row is None:
        raise DataError(f"there is no person {person_id}", where="the store", fix="see trimtab feedback people")
    return person_of(row)


def by_name(connection: Connection, name: str) -> Person | None:
    """The person of that name; None if there is none."""
    row = connection.execute(sa.select(*_PERSON).where(t.people.c.name == name)).first()
    return None if row is None else person_of(row)


def everyone(connection: Connection) -> list[Person]:
    """All people, in the order in which they joined."""
    return [person_of(row) for row in connection.execute(sa.select(*_PERSON).order_by(t.people.c.id))]


# --- secrets ---


def hash_password(password: str) -> str:
    """`salt$hash` in hex, by scrypt."""
    salt = secrets.token_bytes(16)
    return f"{salt.hex()}${hashlib.scrypt(password.encode('utf-8', 'surrogatepass'), salt=salt, **_SCRYPT).hex()}"


def check_password(password: str, hashed: str) -> bool:
    """Whether the hash is of this password."""
    salt, _, wanted = hashed.partition("$")
    if len(password) > 1000:
        return False
    got = hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=bytes.fromhex(salt), **_SCRYPT)
    return hmac.compare_digest(got.hex(), wanted)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


_NOBODY = "00" * 16 + "$" + "00" * 64
"""The hash that passwords of unknown people are checked against, so that the check takes as long."""
