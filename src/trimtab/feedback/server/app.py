"""The app: its parts put together, and the loop beside it that sends webhooks and takes back late leases."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

import trimtab
from trimtab.core.errors import DataError
from trimtab.feedback.assign import reclaim
from trimtab.feedback.server import admin, annotate, api
from trimtab.feedback.server.pages import WEB, page, to, written
from trimtab.feedback.server.security import (
    BadForm,
    Guard,
    Limiter,
    PostedFields,
    SignInFirst,
    Visit,
    read_form,
    visit_of,
)
from trimtab.feedback.store import Store
from trimtab.feedback.webhooks import deliver_due

CHORES_EVERY = 5.0
"""Seconds between rounds of deliveries and of taking back late leases."""

THREADS = 4
"""Requests handled at once. Python runs one thread at a time: more would only take turns, and all would end later."""


def create_app(store: Store, *, host: str | None = None) -> FastAPI:
    """The web app of a store; `host` is the address it listens on, if that is not the project's."""
    settings = store.project.settings.server

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        stopping = threading.Event()
        chores = asyncio.create_task(_chores(store, stopping))
        yield
        stopping.set()
        chores.cancel()

    app = FastAPI(
        title=f"{store.project.settings.name}: feedback",
        version=trimtab.__version__,
        docs_url=None,  # the usual pages load scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=lifespan,
    )
    app.state.store = store
    app.state.sign_ins = Limiter(settings.sign_ins_per_minute)
    app.mount("/static", StaticFiles(directory=WEB / "static"), name="static")
    for part in (annotate.router, admin.router):
        app.include_router(part, include_in_schema=False)
    app.include_router(api.router)
    app.add_exception_handler(SignInFirst, _sign_in_first)
    app.add_exception_handler(BadForm, _bad_form)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(DataError, _data_error)
    app.add_exception_handler(sa.exc.OperationalError, _store_away)
    for too_large in (OverflowError, sa.exc.DataError):  # a number in an address that no database can hold
        app.add_exception_handler(too_large, _no_such_number)
    names = ["127.0.0.1", "localhost", "[::1]", "testserver", *settings.names]
    for listens in (settings.host, host or settings.host):
        if listens not in ("0.0.0.0", "::"):
            names.append(f"[{listens}]" if ":" in listens else listens)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    app.add_middleware(Guard, requests_per_minute=settings.requests_per_minute)
    return app


async def _chores(store: Store, stopping: threading.Event) -> None:
    """Runs rounds until the server stops. A round that fails is reported, and the next one runs all the same."""
    said = ""
    while True:
        try:
            await asyncio.to_thread(_one_round, store, stopping)
            said = ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if problem != said:
                print(f"taking back leases and sending webhooks failed: {problem}", file=sys.stderr, flush=True)
            said = problem
        await asyncio.sleep(CHORES_EVERY)


def _one_round(store: Store, stopping: threading.Event) -> None:
    with store.write(durable=False) as connection:
        reclaim(store, connection)
    if store.project.settings.webhooks:
        deliver_due(store, stopping=stopping)


async def _sign_in_first(request: Request, _: Exception) -> Response:
    """Sends the visitor to the page to sign in, or gives back what was written in a form, so that it is not lost."""
    if request.method == "GET":
        return to("/sign-in")
    if "hx-request" in request.headers:  # the page stays as it is, and says what to do
        return Response("sign in first", status_code=401)
    form = await _form_of(request)
    if not written(form):
        return to("/sign-in")
    text = "You are not signed in any more. Sign in in another tab, go back and send again."
    return _answer(request, 401, text, {}, kept=form)


def _bad_form(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadForm)
    if "hx-request" in request.headers:
        return Response(str(error.detail), status_code=401)
    return _answer(request, 403, str(error.detail), {}, kept=error.form)


async def _form_of(request: Request) -> PostedFields:
    try:
        return await read_form(request)
    except (StarletteHTTPException, ClientDisconnect):
        return {}


_PAGE_OF = {
    "/task/": "/task",
    "/undo": "/task",
    "/mine/": "/mine",
    "/account/": "/account",
    "/admin/invites": "/admin/people",
    "/admin/people/": "/admin/people",
    "/admin/log/": "/admin/log",
}
"""The page that shows a form, by how the address begins that the form is sent to. After a mistake the browser stands at
that address, and asks for it as a page when it is reloaded."""


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 405 and request.method == "GET" and not request.url.path.startswith("/api/"):
        return to(next((page for sent, page in _PAGE_OF.items() if request.url.path.startswith(sent)), "/"))
    return _answer(request, error.status_code, str(error.detail), dict(error.headers or {}))


def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
    return _answer(request, 422, said, {})


def _data_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DataError)
    return _answer(request, 422, f"{error.problem}; {error.fix}", {})


def _store_away(request: Request, error: Exception) -> Response:
    """The disk is full, or the database is away or busy. Pages with scripts send again by themselves."""
    assert isinstance(error, sa.exc.OperationalError)
    print(f"not stored: {error.orig}", file=sys.stderr, flush=True)
    text = "The server cannot store anything just now. Go back and send it again in a while."
    headers = {"Retry-After": "5"}
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": text}, status_code=503, headers=headers)
    nobody = Visit(request.app.state.store, None, "")  # to see who asks may need the store
    kept = written(getattr(request.state, "form", {}))
    response = page(request, nobody, "error.html", status=503, text=text, kept=kept)
    response.headers.update(headers)
    return response


def _no_such_number(request: Request, _: Exception) -> Response:
    return _answer(request, 404, "there is nothing of that number", {})


def _answer(
    request: Request, status: int, text: str, headers: dict[str, str], *, kept: PostedFields | None = None
) -> Response:
    if request.url.path.startswith("/api/"):
        whole = text.encode("utf-8", "replace").decode()  # a body of JSON may hold half a character
        return JSONResponse({"error": whole}, status_code=status, headers=headers)
    response: Any = page(request, visit_of(request), "error.html", status=status, text=text, kept=written(kept or {}))
    assert isinstance(response, HTMLResponse)
    response.headers.update(headers)
    return response
