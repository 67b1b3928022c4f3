"""The app: its parts put together, and the loop beside it that sends webhooks and takes back late leases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import trimtab
from trimtab.errors import DataError
from trimtab.feedback.assign import reclaim
from trimtab.feedback.server import admin, annotate, api
from trimtab.feedback.server.pages import WEB, page, to
from trimtab.feedback.server.security import Guard, Limiter, SignInFirst, visit_of
from trimtab.feedback.store import Store
from trimtab.feedback.webhooks import deliver_due

CHORES_EVERY = 5.0
"""Seconds between rounds of deliveries and of taking back late leases."""

THREADS = 4
"""Requests at work at once. Python runs one at a time: more would only share its turns, and all end late."""


def create_app(store: Store) -> FastAPI:
    """The web app of a store."""
    settings = store.project.settings.server

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        chores = asyncio.create_task(_chores(store))
        yield
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
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(DataError, _data_error)
    names = ["127.0.0.1", "localhost", "[::1]", "testserver", *settings.names]
    if settings.host not in ("0.0.0.0", "::"):
        names.append(settings.host)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    app.add_middleware(Guard, requests_per_minute=settings.requests_per_minute)
    return app


async def _chores(store: Store) -> None:
    while True:
        await asyncio.to_thread(_one_round, store)
        await asyncio.sleep(CHORES_EVERY)


def _one_round(store: Store) -> None:
    with store.write(durable=False) as connection:
        reclaim(store, connection)
    if store.project.settings.webhooks:
        deliver_due(store)


def _sign_in_first(request: Request, _: Exception) -> Response:
    return to("/sign-in")


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _answer(request, error.status_code, str(error.detail), dict(error.headers or {}))


def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
    return _answer(request, 422, said, {})


def _data_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DataError)
    return _answer(request, 422, f"{error.problem}; {error.fix}", {})


def _answer(request: Request, status: int, text: str, headers: dict[str, str]) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": text}, status_code=status, headers=headers)
    response: Any = page(request, visit_of(request), "error.html", status=status, text=text)
    assert isinstance(response, HTMLResponse)
    response.headers.update(headers)
    return response
