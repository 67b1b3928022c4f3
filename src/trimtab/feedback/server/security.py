"""Who is asking and what they may do: sessions, tokens against forged forms, limits, headers."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPBearer
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.feedback.people import ROLES, Person, PersonRole, person_of_session
from trimtab.feedback.store import Store

COOKIE = "trimtab_session"
MAX_BODY = 1_000_000
"""Bytes of a form or of a JSON body."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cache-Control": "no-store",
}


class SignInFirst(Exception):
    """Raised if nobody is signed in and a page needs somebody; the app answers with the way to sign in."""


class BadForm(HTTPException):
    """Raised for a form that did not come from one of our pages, or came from one that is too old."""

    def __init__(self, problem: str, form: Mapping[str, Sequence[str]]) -> None:
        super().__init__(403, problem)
        self.form = form
        """What was filled in, so that it can be given back."""


@dataclass(frozen=True)
class Visit:
    """One request of a browser: who it is, and the token its forms must carry."""

    store: Store
    person: Person | None
    token: str
    """The session's secret, or that of a visit that is not signed in."""

    @property
    def csrf(self) -> str:
        """Proof that a form came from a page of this session: keyed by the store's secret, told to nobody else."""
        return hmac.new(self.store.secret, b"form/" + self.token.encode(), hashlib.sha256).hexdigest()

    @property
    def someone(self) -> Person:
        """The person. Use it only after a check that there is one."""
        assert self.person is not None
        return self.person


def store_of(request: Request) -> Store:
    """The store that the app was made with."""
    store: Store = request.app.state.store
    return store


def visit_of(request: Request) -> Visit:
    """The visit of a request: who is asking, by the session cookie."""
    store = store_of(request)
    token = request.cookies.get(COOKIE, "")
    if not 20 <= len(token) <= 200 or not token.isascii():
        token = ""
    person = person_of_session(store, token, "browser") if token else None
    if not token:
        token = request.state.fresh_token = secrets.token_urlsafe(32)
    return Visit(store, person, token)


AnyVisit = Annotated[Visit, Depends(visit_of)]
PostedFields = Mapping[str, Sequence[str]]


async def read_form(request: Request) -> PostedFields:
    """The fields of a form, each with all its values. Raises HTTPException for another or too large a body."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise HTTPException(415, "a form is needed")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, "the form is too large")
    try:
        form: PostedFields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=2_000, errors="strict")
    except ValueError:
        raise HTTPException(400, "the form cannot be read") from None
    request.state.form = form  # so that what was written can be given back whatever happens
    return form


async def checked_form(
    request: Request, visit: AnyVisit, form: Annotated[PostedFields, Depends(read_form)]
) -> PostedFields:
    """The form, if it came from one of our own pages. Raises BadForm if not."""
    if not _from_our_pages(request, visit.store):
        raise BadForm("the form came from another site", form)
    if not hmac.compare_digest(field(form, "csrf").encode("utf-8", "replace"), visit.csrf.encode()):
        raise BadForm("the page is too old; go back, reload it and send again", form)
    return form


def _from_our_pages(request: Request, store: Store) -> bool:
    """Whether the browser says that one of our pages sent the form. The form's own token is checked as well."""
    origin = request.headers.get("origin")
    if origin is None:
        return True
    if origin == "null":  # the browser hides the origin, but says whether it was another site
        return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    host = origin.partition("://")[2]
    # A proxy may put its own name into Host; the project's names are then what people see.
    names = store.project.settings.server.names
    return host == request.headers.get("host") or host in names or host.rpartition(":")[0] in names


PostedForm = Annotated[PostedFields, Depends(checked_form)]


def field(form: PostedFields, name: str) -> str:
    """The last value of a field; "" if there is none."""
    return form[name][-1] if form.get(name) else ""


async def signed_in(visit: AnyVisit) -> Visit:
    """A visit of somebody who is signed in. Raises SignInFirst."""
    if visit.person is None:
        raise SignInFirst
    return visit


async def adjudicating(visit: Annotated[Visit, Depends(signed_in)]) -> Visit:
    """A visit of an adjudicator or admin. Raises HTTPException 403."""
    if not visit.someone.may_adjudicate:
        raise HTTPException(403, "this page is for adjudicators and admins")
    return visit


async def administering(visit: Annotated[Visit, Depends(signed_in)]) -> Visit:
    """A visit of an admin. Raises HTTPException 403."""
    if visit.someone.role != "admin":
        raise HTTPException(403, "this page is for admins")
    return visit


SignedIn = Annotated[Visit, Depends(signed_in)]
Adjudicating = Annotated[Visit, Depends(adjudicating)]
Administering = Annotated[Visit, Depends(administering)]


# --- the REST interface: a token in the Authorization header, no cookies, so nothing to forge ---

_bearer = HTTPBearer(auto_error=False, description="A token of `trimtab feedback token NAME`")


def api_person(role: PersonRole) -> Callable[..., Person]:
    """A dependency that gives the person of the token, who must have this role or a higher one."""

    def check(request: Request, credentials: Annotated[Any, Depends(_bearer)]) -> Person:
        token = credentials.credentials if credentials is not None else ""
        person = person_of_session(store_of(request), token, "api") if token else None
        if person is None:
            raise HTTPException(401, "a valid token is needed", headers={"WWW-Authenticate": "Bearer"})
        if ROLES.index(person.role) < ROLES.index(role):
            raise HTTPException(403, f"the role {role} is needed")
        return person

    return check


# --- limits ---


class Limiter:
    """Counts events by name in a bucket that refills steadily."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allows(self, name: str, now: float | None = None) -> bool:
        """Whether one more is within the limit, counting it."""
        now = time.monotonic() if now is None else now
        with self._lock:
            if len(self._buckets) > 10_000:  # full buckets hold no information and are dropped
                self._buckets = {k: b for k, b in self._buckets.items() if now - b[1] < 60}
            level, at = self._buckets.get(name, (float(self.per_minute), now))
            level = min(self.per_minute, level + (now - at) * self.per_minute / 60)
            allowed = level >= 1
            self._buckets[name] = (level - 1 if allowed else level, now)
        return allowed


async def limit_sign_ins(request: Request) -> None:
    """Raises HTTPException 429 for too many attempts from one address."""
    address = request.client.host if request.client else ""
    if not request.app.state.sign_ins.allows(address):
        raise HTTPException(429, "too many attempts; wait a minute")


_SESSIONS_PER_ADDRESS = 20
"""One address may make as many requests as this many sessions together."""


class Guard:
    """Wraps the app: limits for each session, the size of bodies, and the headers of every answer."""

    def __init__(self, app: ASGIApp, *, requests_per_minute: int) -> None:
        self.app = app
        self.requests = Limiter(requests_per_minute)
        self.addresses = Limiter(requests_per_minute * _SESSIONS_PER_ADDRESS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with 413 or 429."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {
            name: value for name, value in scope["headers"] if name in (b"cookie", b"authorization", b"content-length")
        }
        address = (scope.get("client") or ("",))[0]
        who = headers.get(b"authorization") or headers.get(b"cookie") or address.encode()
        static = scope["path"].startswith("/static/")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                sent.update(HEADERS | {"Cache-Control": "no-cache"} if static else HEADERS)
            await send(message)

        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= MAX_BODY else {"type": "http.disconnect"}

        allowed = static or (self.addresses.allows(address) and self.requests.allows(hashlib.sha256(who).hexdigest()))
        retry = {"Retry-After": "60"}
        if not allowed:
            await PlainTextResponse("too many requests; wait a minute", 429, retry)(scope, receive, with_headers)
        elif int(headers.get(b"content-length", b"0").decode() or 0) > MAX_BODY:
            await PlainTextResponse("the request is too large", 413, retry)(scope, receive, with_headers)
        else:
            await self.app(scope, limited, with_headers)
