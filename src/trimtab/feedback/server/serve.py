"""Serving a project: the store opened, its own data imported, the first invitation printed, then uvicorn."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from trimtab.errors import ConfigError
from trimtab.feedback import people
from trimtab.feedback.importing import seed_items
from trimtab.feedback.items import apply_settings
from trimtab.feedback.people import everyone
from trimtab.feedback.server.app import create_app
from trimtab.feedback.store import open_store


def serve(
    project: Path, *, host: str | None = None, port: int | None = None, show: Callable[[str], None] = print
) -> None:
    """Serves until it is stopped. Raises ConfigError where the port is taken."""
    store = open_store(project)
    settings = store.project.settings.server
    host, port = host or settings.host, settings.port if port is None else port
    try:
        # Bound here and not by uvicorn, so that a port that is taken is one sentence and port 0 can be told.
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"the port {port} of {host} cannot be used: {error.strerror or error}",
            where=f"{project}, server",
            fix="stop what uses it, or name another with --port",
        ) from error
    # asyncio sets this only on sockets of its own making; without it a page waits 40 ms for its reader's kernel.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    imported = seed_items(store)
    if imported:
        show(", ".join(f"{num} {name.replace('_', ' ')}" for name, num in imported.items()))
    apply_settings(store)
    shown_host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://{f'[{shown_host}]' if ':' in shown_host else shown_host}:{listener.getsockname()[1]}"
    with store.read() as connection:
        first = not everyone(connection)
    if first:
        show("Nobody has joined yet. Open this as admin:")
        show(f"  {address}/join#{people.make_invite(store, 'admin')}")
        show("and send this to annotators (50 can join with it within a week):")
        show(f"  {address}/join#{people.make_invite(store, 'annotator', uses=50)}")
    show(f"{store.project.settings.name} is at {address} (Ctrl-C stops it; every answer is stored at once)")
    config = uvicorn.Config(
        create_app(store), log_level="warning", access_log=False, server_header=False, proxy_headers=settings.https,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
    store.close()
