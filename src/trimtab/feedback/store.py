"""The store: SQLite beside the project or PostgreSQL by URL, one writer at a time, an audit log chained by hashes."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Row, event

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import replacing, writing
from trimtab.feedback import tables as t
from trimtab.feedback.project import Project, load_project

_WRITER = 7_318_349_394_477_056  # the key of PostgreSQL's advisory lock: "trimtab" as a number
PAUSED = "paused"
"""The fact that the whole queue is paused."""
BUSY_SECONDS = 30.0
"""How long a connection to SQLite waits for a lock."""


@dataclass
class Store:
    """An open store. Any number may read; `write` lets in one writer at a time, across threads and processes.

    With a single writer, "is there a place left?" and "take it" are one step, which is what makes the caps hard.
    """

    project: Project
    engine: Engine
    clock: Any = time.time
    """Seconds since 1970; tests set their own."""
    durable: bool = True
    """If false, no write waits for the disk, as for votes that can be simulated again."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the store."""
        with _telling_damage(self.project), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":  # whose statements see a state each by default; SQLite's do not
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Connection]:
        """A connection that is the only writer. Everything done with it is kept, or nothing if the block raises.

        A write that is not `durable` survives a killed process but perhaps not a power cut: leases and drafts need not
        wait for the disk. A durable write after it makes it durable too.
        """
        # the lock is fair among threads, SQLite's is not
        with self._lock, _telling_damage(self.project), self.engine.connect() as connection:
            connection = connection.execution_options(writer="FULL" if durable and self.durable else "NORMAL")
            with connection.begin():
                if self.engine.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITER)))
                yield connection

    def now(self) -> float:
        """Seconds since 1970, UTC."""
        return float(self.clock())

    def fact(self, name: str) -> str:
        """The value that the store keeps about itself under this name."""
        with self.read() as connection:
            return str(connection.execute(sa.select(t.facts.c.value).where(t.facts.c.name == name)).scalar_one())

    @cached_property
    def secret(self) -> bytes:
        """The key with which the server signs."""
        return bytes.fromhex(self.fact("secret"))

    def clear_log(self) -> None:
        """Empties SQLite's write-ahead log into the file, so that what was deleted is not in the log any more."""
        if self.engine.dialect.name == "sqlite":
            with closing(self.engine.raw_connection()) as raw:
                raw.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]

    def close(self) -> None:
        """Closes every connection."""
        self.engine.dispose()


_DAMAGED = ("malformed", "not a database", "database corruption")


@contextmanager
def _telling_damage(project: Project) -> Iterator[None]:
    """Inside this block SQLite's errors about a damaged file become a DataError."""
    try:
        yield
    except sa.exc.DatabaseError as error:
        if not any(word in str(error.orig) for word in _DAMAGED):
            raise
        raise _damage(project, error.orig) from error


def _damage(project: Project, said: object) -> DataError:
    return DataError(
        f"the store is damaged: {said}",
        where=f"{project.path}, store",
        fix="stop the server, move the store away, also the files with -wal and -shm behind its name, and put a copy "
        "that `trimtab feedback backup` wrote in its place",
    )


def open_store(project: Project | str | Path, *, must_exist: bool = False) -> Store:
    """The store of a project, made or brought up to date if needed.

    Raises ConfigError if the database cannot be reached, if its tables are of another version of trimtab, or with
    `must_exist` if there is none.
    """
    if not isinstance(project, Project):
        project = load_project(project)
    url = project.store_url
    file = Path(url.removeprefix("sqlite:///"))
    if must_exist and url.startswith("sqlite") and not (file.is_file() and file.stat().st_size):
        raise ConfigError(
            f"the project {project.settings.name!r} has no store yet",
            where=str(project.path),
            fix=f"trimtab feedback serve {project.path}, or import items first",
        )
    engine = _engine(url)
    store = Store(project, engine)
    try:
        _bring_up_to_date(store)
    except BaseException as error:
        engine.dispose()
        if not isinstance(error, sa.exc.OperationalError):
            raise
        raise ConfigError(
            f"the store cannot be opened: {error.orig}",
            where=f"{project.path}, store",
            fix="check that the folder can be written or the database server runs and the user may use it",
        ) from None
    return store


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return sa.create_engine(url, pool_size=10, max_overflow=40, pool_pre_ping=True, json_serializer=canonical)
    engine = sa.create_engine(
        url, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None}, json_serializer=canonical
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # what is deleted is overwritten, since people are told that their words are gone
        for pragma in ("journal_mode = WAL", "foreign_keys = ON", "secure_delete = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writer = connection.get_execution_options().get("writer")
        if writer:
            connection.exec_driver_sql(f"PRAGMA synchronous = {writer}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")  # the lock now, not at the first change

    return engine


def _bring_up_to_date(store: Store) -> None:
    """Runs the migrations that a store has not had. A new store also gets its secret and first guideline."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    script = ScriptDirectory.from_config(config)
    with store.read() as connection:
        revision = MigrationContext.configure(connection).get_current_revision()
    if revision == script.get_current_head():
        return
    known = [step.revision for step in script.walk_revisions()]
    if revision is not None and revision not in known:
        raise ConfigError(
            f"the store was made by another version of trimtab: its tables are of the revision {revision!r}, and this "
            f"version knows {', '.join(known)}",
            where=f"{store.project.path}, store",
            fix="open it with the version that made it; or export a dump with that version (--layout dump), name a new "
            "store in the project, and import the dump with this one",
        )
    with store.write() as connection:
        steps = EnvironmentContext(config, script, fn=lambda at, _: script._upgrade_revs("head", at))
        with steps:
            steps.configure(connection=connection, target_metadata=t.metadata)
            steps.run_migrations()
        if connection.execute(sa.select(t.facts.c.name)).first() is None:
            connection.execute(t.facts.insert().values(name="secret", value=secrets.token_hex(32)))
            append_audit(connection, store.now(), None, "store_made", "", {"settings": store.project.sha256})
            add_guideline(connection, store.now(), None, store.project.guideline_text())


def num_rows(connection: Connection, rows: sa.FromClause, *where: sa.ColumnElement[bool]) -> int:
    """How many rows of a table, a join or a subquery fulfil these conditions."""
    return int(connection.execute(sa.select(sa.func.count()).select_from(rows).where(*where)).scalar_one())


# --- the audit log ---


@dataclass(frozen=True)
class AuditEntry:
    """Something to log: who did what to what, such as AuditEntry(at, 3, "vote", 17, {"sha256": …})."""

    at: float
    actor: int | None
    action: str
    subject: object
    detail: Mapping[str, Any]


def append_audit(
    connection: Connection, at: float, actor: int | None, action: str, subject: object, detail: Mapping[str, Any]
) -> None:
    """Adds an entry whose hash covers the one before it. Only the writer may do this."""
    append_audits(connection, [AuditEntry(at, actor, action, subject, detail)])


def append_audits(connection: Connection, entries: Sequence[AuditEntry]) -> None:
    """Adds entries in order, each with the hash of the one before it. Only the writer may do this."""
    if not entries:
        return
    seq, previous = last_entry(connection)
    rows = []
    for new in entries:
        seq += 1
        entry = {
            "seq": seq,
            "at": new.at,
            "actor": new.actor,
            "action": new.action,
            "subject": str(new.subject),
            "detail": dict(new.detail),
            "previous": previous,
        }
        previous = digest(entry)
        rows.append({**entry, "sha256": previous})
    connection.execute(t.audit.insert(), rows)


def verify(store: Store, *, head: str | None = None) -> list[str]:
    """What is wrong with the store, one text for each problem; empty if nothing is.

    The audit log must be one chain and hold the entry with the hash `head`, if one was noted earlier: without such a
    note, a log that was cut off at its end looks whole. Every vote, item and guideline must match the hash that was
    logged when it was added, with none missing and none unlogged; a written text must match the hash in its vote. The
    places taken of every item must match its leases.
    """
    problems: list[str] = []
    with store.read() as connection:
        logged: dict[tuple[str, str], str] = {}
        previous, seq, heads = "", 0, set()
        for row in connection.execute(sa.select(t.audit).order_by(t.audit.c.seq)):
            entry = dict(row._mapping)
            sha256 = entry.pop("sha256")
            seq += 1
            if entry["seq"] != seq or entry["previous"] != previous or digest(entry) != sha256:
                problems.append(f"audit entry {entry['seq']}: the chain is broken here")
                seq = entry["seq"]
            previous = sha256
            heads.add(sha256)
            if entry["action"] in ("vote", "item", "guideline"):
                logged[entry["action"], entry["subject"]] = entry["detail"]["sha256"]
        if head is not None and head not in heads:
            problems.append(f"no audit entry has the hash {head}: the log was cut off or written anew")
        for action, table, key in (
            ("vote", t.votes, "id"),
            ("item", t.items, "id"),
            ("guideline", t.guidelines, "version"),
        ):
            seen = set()
            for row in connection.execute(sa.select(table)):
                name = str(row._mapping[key])
                seen.add(name)
                if logged.get((action, name)) is None:
                    problems.append(f"{action} {name}: not in the audit log")
                elif logged[action, name] != row_digest(row):
                    problems.append(f"{action} {name}: changed since it was added")
            problems += [f"{action} {name}: missing" for kind, name in logged if kind == action and name not in seen]
        for row in connection.execute(sa.select(t.writings, t.votes.c.writing_sha256).join(t.votes)):
            if writing_digest(row.rationale, row.reason, row.text) != row.writing_sha256:
                problems.append(f"vote {row.vote_id}: what was written has changed")
        problems += [f"item {item}: {a} places taken, {b} leases" for item, a, b in _miscounted(connection)]
    return problems


def _miscounted(connection: Connection) -> Iterator[tuple[int, int, int]]:
    held = (
        sa.select(t.leases.c.item_id, sa.func.count().label("num"))
        .join(t.people)
        .where(t.leases.c.purpose == "task", t.leases.c.state.in_(("open", "done")), t.people.c.state != "banned")
        .group_by(t.leases.c.item_id)
        .subquery()
    )
    num = sa.func.coalesce(held.c.num, 0)
    rows = sa.select(t.queue.c.item_id, t.queue.c.taken, num).outerjoin(held, held.c.item_id == t.queue.c.item_id)
    yield from (tuple(row) for row in connection.execute(rows.where(t.queue.c.taken != num)))


def audit_head(store: Store) -> tuple[int, str]:
    """Number and hash of the last audit entry: noted elsewhere, it shows later that nothing before it was changed."""
    with store.read() as connection:
        return last_entry(connection)


def last_entry(connection: Connection) -> tuple[int, str]:
    """Number and hash of the last audit entry; 0 and "" if there is none."""
    last = sa.select(t.audit.c.seq, t.audit.c.sha256).order_by(t.audit.c.seq.desc()).limit(1)
    row = connection.execute(last).first()
    return (row.seq, row.sha256) if row else (0, "")


# --- guidelines ---


def add_guideline(connection: Connection, at: float, actor: int | None, text: str) -> int:
    """The number of a new guideline version. Everyone reads it before their next task."""
    text = checked_text(text, where="the guideline")
    version = (connection.execute(sa.select(sa.func.max(t.guidelines.c.version))).scalar() or 0) + 1
    row = {"version": version, "text": text, "sha256": hashlib.sha256(text.encode()).hexdigest(), "created_at": at}
    connection.execute(t.guidelines.insert().values(**row))
    append_audit(connection, at, actor, "guideline", version, {"sha256": digest(row)})
    return version


def is_paused(connection: Connection) -> bool:
    """Whether the whole queue is paused, so that nobody is given anything new."""
    return connection.execute(sa.select(t.facts.c.value).where(t.facts.c.name == PAUSED)).scalar() is not None


def set_paused(connection: Connection, paused: bool) -> None:
    """Notes that the whole queue is paused, or that it is not."""
    connection.execute(t.facts.delete().where(t.facts.c.name == PAUSED))
    if paused:
        connection.execute(t.facts.insert().values(name=PAUSED, value="yes"))


def guideline(connection: Connection) -> Row[Any]:
    """The newest guideline."""
    return connection.execute(sa.select(t.guidelines).order_by(t.guidelines.c.version.desc()).limit(1)).one()


# --- copies ---


def backup(store: Store, out: Path) -> None:
    """Writes a whole copy of a SQLite store while it is in use. Raises DataError for another database, or a damaged
    store."""
    if store.engine.dialect.name != "sqlite":
        raise DataError("the store is not SQLite", where=str(store.project.path), fix="use pg_dump for PostgreSQL")
    if out.exists():
        raise DataError(f"{str(out)!r} exists", where="the backup", fix="name a new file")
    with writing("the backup", out, kept="the store is as it was"):
        out.parent.mkdir(parents=True, exist_ok=True)
        raw = store.engine.raw_connection()
        with replacing(out) as aside, closing(raw), closing(sqlite3.connect(aside)) as copy:
            raw.driver_connection.backup(copy)  # type: ignore[union-attr]
            said = copy.execute("PRAGMA quick_check(1)").fetchone()[0]  # a damaged store is copied as it is
            if said != "ok":
                raise _damage(store.project, said)


# --- hashes ---


def canonical(value: object) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def row_digest(row: Row[Any]) -> str:
    """SHA-256 of a whole row."""
    return digest(dict(row._mapping))


def writing_digest(rationale: str, reason: str, text: str) -> str:
    """SHA-256 of what a person wrote with a vote."""
    return digest([rationale, reason, text])


def checked_text(text: str, *, where: str) -> str:
    """The text, if every database can hold it. Raises DataError for a null character or half of a surrogate pair."""
    bad = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        raise DataError(
            f"the character U+{ord(bad):04X} is in the text, which is no text",
            where=where,
            fix="remove it; it usually comes from a broken download or a wrong encoding",
        )
    return text


def checked_values(value: Any, *, where: str) -> None:
    """Raises DataError for a value that JSON or the database cannot hold, at any depth: a number that is not finite,
    half of a surrogate pair, a date, bytes."""
    if isinstance(value, str):
        checked_text(value, where=where)
    elif isinstance(value, Mapping):
        for name, member in value.items():
            checked_values(name, where=where)
            checked_values(member, where=where)
    elif isinstance(value, list | tuple):
        for member in value:
            checked_values(member, where=where)
    elif not (value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        raise DataError(f"the value {value!r}", where=where, fix="write texts, finite numbers, true, false or null")
