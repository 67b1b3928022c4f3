"""Webhooks tell other systems what happens. Deliveries are stored with the change they report, signed and retried."""

from __future__ import annotations

import hashlib
import hmac
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from trimtab.core.errors import ConfigError
from trimtab.feedback import tables as t
from trimtab.feedback.project import Event, secret
from trimtab.feedback.store import Store, add_guideline, canonical, guideline

RETRY_SECONDS = (5, 30, 120, 600, 3600, 6 * 3600, 24 * 3600)
"""Waits between attempts; a delivery that fails after the last is given up."""
TIMEOUT_SECONDS = 10.0
Post = Callable[[str, bytes, Mapping[str, str]], int]


def notify(store: Store, connection: Connection, event: Event, body: Mapping[str, Any]) -> None:
    """Stores a delivery for every webhook that wants the event, in the transaction of the change itself."""
    for hook in store.project.settings.webhooks:
        if event in hook.events:
            connection.execute(
                t.deliveries.insert().values(
                    url=hook.url,
                    event=event,
                    body={"event": event, "project": store.project.settings.name, "at": store.now(), **body},
                    next_at=store.now(),
                    created_at=store.now(),
                )
            )


def publish_guideline(store: Store, connection: Connection, actor: int | None, text: str) -> int:
    """Adds a version of the guideline and notifies webhooks; returns its number. An equal text adds no new version."""
    current = guideline(connection)
    if text == current.text:
        return int(current.version)
    version = add_guideline(connection, store.now(), actor, text)
    notify(store, connection, "guideline", {"version": version})
    return version


def deliver_due(store: Store, post: Post | None = None, *, stopping: threading.Event | None = None) -> int:
    """Tries every delivery whose time has come; returns how many arrived.

    A delivery that fails does not affect the others: its error is noted, and it is tried again later. An address that
    did not answer is tried only once in a round. Nothing more is sent once `stopping` is set.
    """
    with store.read() as connection:
        due = connection.execute(sa.select(t.deliveries).where(t.deliveries.c.next_at <= store.now())).all()
    num = 0
    hooks = {hook.url: hook for hook in store.project.settings.webhooks}
    silent: set[str] = set()
    for row in due:
        if stopping is not None and stopping.is_set():
            break
        if row.url in silent:
            continue
        problem = ""
        hook = hooks.get(row.url)
        if hook is None:
            problem = "the project names this address no longer"
        else:
            body = canonical({**row.body, "delivery": row.id}).encode()
            try:
                key = secret(f"env:{hook.secret_env}", where=f"{store.project.path}, webhooks").encode()
                headers = {"Content-Type": "application/json", "X-Trimtab-Signature": signature(key, body)}
                status = (post or _post)(row.url, body, headers)
                problem = "" if 200 <= status < 300 else f"status {status}"
            except (OSError, HTTPException, ValueError, ConfigError) as error:
                # refused, no such host, timed out, TLS; an answer that is no HTTP; a bad address; no secret
                problem = f"{type(error).__name__}: {error}"[:300]
                silent.add(row.url)
        if not problem:
            values: dict[str, Any] = {"delivered_at": store.now(), "next_at": None}
            num += 1
        elif hook is None or row.attempts >= len(RETRY_SECONDS):
            values = {"next_at": None}
        else:
            values = {"next_at": store.now() + RETRY_SECONDS[row.attempts]}
        with store.write() as connection:
            connection.execute(
                t.deliveries.update()
                .where(t.deliveries.c.id == row.id)
                .values(attempts=row.attempts + 1, last_error=problem, **values)
            )
    return num


def signature(key: bytes, body: bytes) -> str:
    """`sha256=` and the HMAC of the body: what the receiver computes and compares."""
    return "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follows no redirect: a signed body goes only to the address in the project."""


def _post(url: str, body: bytes, headers: Mapping[str, str]) -> int:
    request = urllib.request.Request(url, data=body, headers=dict(headers), method="POST")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_SECONDS) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
