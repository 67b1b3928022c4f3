"""Serves a project: opens the store, imports its own data, prints the first invitation and runs uvicorn."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa
import uvicorn

from trimtab.core.errors import ConfigError
from trimtab.feedback import people
from trimtab.feedback import tables as t
from trimtab.feedback.importing import seed_items
from trimtab.feedback.items import apply_settings
from trimtab.feedback.project import read_guideline
from trimtab.feedback.server.app import create_app
from trimtab.feedback.store import Store, num_rows, open_store


def serve(
    project: Path, *, host: str | None = None, port: int | None = None, show: Callable[[str], None] = print
) -> None:
    """Serves until it is stopped. Raises ConfigError if the port cannot be used, or if another server
    serves the project's SQLite file."""
    store = open_store(project)
    settings = store.project.settings.server
    host, port = host or settings.host, settings.port if port is None else port
    with _alone(store, show), listening(host, port, where=f"{project}, server") as (listener, address):
        _serve(store, host, listener, address, show)
    store.close()


@contextmanager
def _alone(store: Store, show: Callable[[str], None]) -> Iterator[None]:
    """Inside this block no other server serves the project, if its store is SQLite: each would send all webhooks. Where
    files cannot be locked, that is said instead."""
    with store.project.path.open("rb") as held:
        if store.engine.dialect.name == "sqlite":
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fix = "use the one that runs, or stop it first; several servers need a store in PostgreSQL"
                where = str(store.project.path)
                raise ConfigError("another server serves this project already", where=where, fix=fix) from None
            except OSError as error:
                show(f"{store.project.path} cannot be locked ({error.strerror}): see that no second server serves it")
        yield


def _serve(store: Store, host: str, listener: socket.socket, address: str, show: Callable[[str], None]) -> None:
    settings = store.project.settings.server
    imported = seed_items(store)
    if imported:
        show(", ".join(f"{num} {name.replace('_', ' ')}" for name, num in imported.items()))
    apply_settings(store)
    for remark in _missing(store, host):
        show(remark)
    _show_ways_in(store, address, show)
    config = uvicorn.Config(
        create_app(store, host=host), log_level="warning", access_log=False, server_header=False,
        proxy_headers=settings.https, timeout_graceful_shutdown=5,
    )  # fmt: skip
    with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has ended
        show(f"{store.project.settings.name} is at {address} (Ctrl-C stops it; every answer is stored at once)")
        uvicorn.Server(config).run(sockets=[listener])


def _missing(store: Store, host: str) -> Iterator[str]:
    """What the project asks for and does not have, in sentences for whoever serves it."""
    project, settings = store.project, store.project.settings
    with store.read() as connection:
        num = {name: num_rows(connection, t.items, t.items.c.purpose == name) for name in ("task", "gold", "quiz")}
        versions = connection.execute(sa.select(t.guidelines.c.text).order_by(t.guidelines.c.version)).scalars().all()
    add, questions = f"Add some: trimtab feedback import {project.path} FILE", settings.qualification.questions
    if not num["task"]:
        yield f"There is nothing to judge yet. {add}"
    if questions and not num["quiz"]:
        yield f"[qualification] asks {questions} questions first, and there are none: nobody has a task. {add} --quiz"
    elif num["quiz"] < questions:
        yield f"[qualification] asks {questions} questions, and there are {num['quiz']}. {add} --quiz"
    if settings.assignment.gold_rate and not num["gold"]:
        yield f"gold_rate asks hidden items with a known answer, and there are none. {add} --gold"
    for name in sorted({hook.secret_env for hook in settings.webhooks if not os.environ.get(hook.secret_env)}):
        yield f"No webhook that is signed with {name} can be sent: that environment variable is not set."
    if host in ("0.0.0.0", "::") and not settings.server.names:
        yield "[server] names lists no name of this machine, so browsers on others are refused (Invalid host header)."
    file = project.guideline_path
    if file.is_file() and read_guideline(file).strip() not in (text.strip() for text in versions):
        yield f"{file} is no version of the guideline that people read. It becomes the next one with:"
        yield f"  trimtab feedback guideline {project.path} {file}"


@contextmanager
def listening(host: str, port: int, *, where: str) -> Iterator[tuple[socket.socket, str]]:
    """Gives a bound socket and its address for a browser here. Raises ConfigError if the port cannot be used."""
    try:
        # The port is bound here and not by uvicorn, so that one in use gives a short message, and the number that
        # port 0 chose can be shown.
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"the port {port} of {host} cannot be used: {error.strerror or error}",
            where=where,
            fix="stop what uses it, or name another with --port",
        ) from error
    with listener:
        # asyncio sets this only on sockets that it makes; without it a page waits 40 ms for its reader's kernel.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown_host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        shown = f"[{shown_host}]" if ":" in shown_host else shown_host
        yield listener, f"http://{shown}:{listener.getsockname()[1]}"


def _show_ways_in(store: Store, address: str, show: Callable[[str], None]) -> None:
    """Prints the links that the first admin needs, also if people came without passwords: by a dump or imports."""
    with store.read() as connection:
        if people.can_be_administered(connection):
            return
        everyone = people.everyone(connection)
    admins = [p for p in everyone if p.role == "admin" and p.state not in ("banned", "deleted")]
    if admins:
        show(f"No admin has a password yet. With this {admins[0].name!r} sets one:")
        show(f"  {address}/join#{people.make_link(store, admins[0].id)}")
        show("and gives the others links under People, or with: trimtab feedback people PROJECT --links")
        return
    show("No admin has joined yet. Open this as admin:" if everyone else "Nobody has joined yet. Open this as admin:")
    show(f"  {address}/join#{people.make_invite(store, 'admin')}")
    if not everyone:
        show("and send this to annotators (50 can join with it within a week):")
        show(f"  {address}/join#{people.make_invite(store, 'annotator', uses=50)}")
