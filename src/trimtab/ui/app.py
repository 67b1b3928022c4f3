"""The app of the live view: pages, the stream that keeps them up to date, and the request to stop a run.

Whoever asks must have the key that the server printed when it started, since other people of this machine can reach its
port too. A request to stop must carry a token that only our own pages have.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import trimtab
from trimtab.core.errors import ConfigError
from trimtab.feedback.server.pages import WEB
from trimtab.feedback.server.security import Guard, PostedFields, field, read_form
from trimtab.runs.state import holder_of, is_stepping, is_stopping, stop_holder
from trimtab.ui import pages
from trimtab.ui.library import Library
from trimtab.ui.pipeline_page import pipeline_parts

EVERY_SECONDS = 2.0
"""Between two looks at the files of an open page."""
MOST_STREAMS = 32
"""Open pages that are kept up to date at once."""
THREADS = 4
REQUESTS_PER_MINUTE = 1200
Make = Callable[[], pages.Fragments]


class Watch:
    """What the app keeps while it runs."""

    def __init__(self, root: Path) -> None:
        self.library = Library(root)
        self.key = secrets.token_urlsafe(24)
        """What a browser must show once, in the address that is printed."""
        self.secret = secrets.token_bytes(32)
        self.asked: dict[str, int] = {}
        """The process of each run that was asked to stop here, until it notes that itself. A second signal would stop
        it at once, so there is none."""
        self.one_at_a_time = threading.Lock()
        """Held while a run is asked to stop."""
        self.num_streams = 0
        self.ending: Callable[[], bool] = lambda: False
        """Whether the server is about to end, so that open streams end too."""

    @property
    def csrf(self) -> str:
        """What a form of our own pages carries."""
        return hmac.new(self.secret, b"form", hashlib.sha256).hexdigest()

    def known(self, name: str) -> str:
        """The name, if it is that of a run. Raises HTTPException 404, so that no path leads out of the directory."""
        if name not in self.library.find().runs:
            raise HTTPException(404, "there is no such run here")
        return name

    def known_pipeline(self, name: str) -> str:
        """The name, if it is that of a pipeline. Raises HTTPException 404."""
        if name not in self.library.find().pipelines:
            raise HTTPException(404, "there is no such pipeline here")
        return name

    def stopping(self, name: str) -> bool:
        """Whether the process that writes the run was asked to stop: by this server, an earlier one, or Ctrl-C."""
        holder = holder_of(self.library.root / name)
        asked = name in self.asked and holder == self.asked[name]
        return asked or is_stopping(self.library.root / name, holder)


def watch_of(request: Request) -> Watch:
    """What the app was made with."""
    watch: Watch = request.app.state.watch
    return watch


def cookie_of(request: Request) -> str:
    """The name of the cookie with the key. Browsers give cookies to all ports of a host, and each may have a server."""
    return f"trimtab_ui_{request.url.port or 80}"


async def with_key(request: Request) -> Watch:
    """Raises HTTPException 403 for a browser that has not shown the key."""
    watch = watch_of(request)
    shown = request.cookies.get(cookie_of(request), "").encode("utf-8", "replace")
    if not hmac.compare_digest(shown, watch.key.encode()):
        raise HTTPException(403, "open the address that trimtab ui printed when it started: it holds the key")
    return watch


Watched = Annotated[Watch, Depends(with_key)]
router = APIRouter()


@router.get("/enter")
def enter(request: Request, key: str = "") -> RedirectResponse:
    """Takes the key of the printed address out of it and into a cookie that scripts cannot read."""
    watch = watch_of(request)
    if not hmac.compare_digest(key.encode("utf-8", "replace"), watch.key.encode()):
        raise HTTPException(403, "this is not the key of the server that runs now; open the address that it printed")
    response = RedirectResponse("/", status_code=303)
    response.set_cookie(cookie_of(request), watch.key, httponly=True, samesite="lax")
    return response


@router.get("/")
def runs(watch: Watched) -> HTMLResponse:
    """The list of all runs."""
    return _page("Runs", pages.list_parts(watch.library), "/live")


@router.get("/run")
def run(watch: Watched, name: str) -> HTMLResponse:
    """The page of a run."""
    return _page(watch.known(name), _run(watch, name)(), f"/live/run?{urlencode({'name': name})}")


@router.get("/pipeline")
def pipeline(watch: Watched, name: str) -> HTMLResponse:
    """The page of a pipeline, and of a loop."""
    live = f"/live/pipeline?{urlencode({'name': name})}"
    return _page(watch.known_pipeline(name), _pipeline(watch, name)(), live)


@router.get("/compare")
def compare(watch: Watched, run: Annotated[list[str], Query(default_factory=list)]) -> HTMLResponse:
    """Runs beside one another."""
    names = _chosen(watch, run)
    return _page("Comparison", _comparison(watch, names)(), f"/live/compare?{urlencode({'run': names}, doseq=True)}")


@router.get("/live")
def live_runs(watch: Watched, request: Request) -> StreamingResponse:
    """The list as it changes."""
    return _stream(watch, request, lambda: pages.list_parts(watch.library))


@router.get("/live/run")
def live_run(watch: Watched, request: Request, name: str) -> StreamingResponse:
    """A run as it goes on."""
    watch.known(name)
    return _stream(watch, request, _run(watch, name))


@router.get("/live/pipeline")
def live_pipeline(watch: Watched, request: Request, name: str) -> StreamingResponse:
    """A pipeline as its stages go on."""
    watch.known_pipeline(name)
    return _stream(watch, request, _pipeline(watch, name))


@router.get("/live/compare")
def live_compare(
    watch: Watched, request: Request, run: Annotated[list[str], Query(default_factory=list)]
) -> StreamingResponse:
    """A comparison as its runs go on."""
    return _stream(watch, request, _comparison(watch, _chosen(watch, run)))


@router.post("/stop")
def stop(watch: Watched, request: Request, form: Annotated[PostedFields, Depends(read_form)]) -> RedirectResponse:
    """Asks the process of a run to stop, once. The form says whether its reader knows that it ends at once."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise HTTPException(403, "the form came from another site")
    if not hmac.compare_digest(field(form, "csrf").encode("utf-8", "replace"), watch.csrf.encode()):
        raise HTTPException(403, "the page is too old; go back, reload it and send again")
    name = watch.known(field(form, "name"))
    directory = watch.library.root / name
    with watch.one_at_a_time:  # a button that is pressed twice
        if watch.stopping(name):
            raise HTTPException(409, "it was asked already, and stops after the step at work")
        holder = holder_of(directory)
        if field(form, "process") != str(holder):
            raise HTTPException(409, "the process of that page has ended; reload it")
        if field(form, "at_once") != ("" if is_stepping(directory, holder) else "yes"):
            raise HTTPException(409, "the run has begun or ended its steps since that page; reload it")
        try:
            watch.asked[name] = stop_holder(directory)
        except ConfigError as error:
            raise HTTPException(409, f"{error.problem}; {error.fix}") from error
    return RedirectResponse(f"/run?{urlencode({'name': name})}", status_code=303)


@router.get("/static/page.css")
def page_css() -> FileResponse:
    """The style of reports."""
    return FileResponse(pages.REPORTS / "page.css")


@router.get("/static/icon.svg")
def icon() -> FileResponse:
    """The icon of the annotation app."""
    return FileResponse(WEB / "static" / "icon.svg")


def create_app(root: Path) -> FastAPI:
    """The app over the runs below a directory."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    app = FastAPI(
        title="trimtab ui",
        version=trimtab.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.state.watch = Watch(root)
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=pages.HERE / "static"), name="static")
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"], www_redirect=False)
    app.add_middleware(Guard, requests_per_minute=REQUESTS_PER_MINUTE)
    return app


def _run(watch: Watch, name: str) -> Make:
    return lambda: pages.run_parts(watch.library, name, csrf=watch.csrf, stopping=watch.stopping(name))


def _pipeline(watch: Watch, name: str) -> Make:
    return lambda: pipeline_parts(watch.library, name, csrf=watch.csrf, stopping=watch.stopping)


def _comparison(watch: Watch, names: list[str]) -> Make:
    return lambda: pages.comparison_parts(watch.library, names)


def _chosen(watch: Watch, names: list[str]) -> list[str]:
    """The names, each once. Raises HTTPException for too many, or for one that is no run."""
    chosen = list(dict.fromkeys(names))
    if len(chosen) > pages.MOST_COMPARED:
        raise HTTPException(400, f"{len(chosen)} runs are chosen; a page compares {pages.MOST_COMPARED} at most")
    return [watch.known(name) for name in chosen]


def _page(title: str, parts: pages.Fragments, live: str, status: int = 200) -> HTMLResponse:
    return HTMLResponse(pages.render("base.html", title=title, parts=parts, live=live), status)


async def _http_error(_: Request, error: Exception) -> HTMLResponse:
    assert isinstance(error, StarletteHTTPException)
    parts = {"error": pages.render("error.html", text=str(error.detail))}
    return _page("That did not work", parts, "", error.status_code)


def _stream(watch: Watch, request: Request, make: Make) -> StreamingResponse:
    """Server-sent events, each with the parts of a page that have changed. Raises HTTPException 503 for too many."""
    if watch.num_streams >= MOST_STREAMS:
        raise HTTPException(503, f"{MOST_STREAMS} pages are open; close one")
    return StreamingResponse(_events(watch, request, make), media_type="text/event-stream")


async def _events(watch: Watch, request: Request, make: Make) -> AsyncIterator[str]:
    sent: dict[str, Any] = {}
    watch.num_streams += 1
    try:
        while True:
            parts = await anyio.to_thread.run_sync(make)
            changed = {name: str(part) for name, part in parts.items() if sent.get(name) != part}
            sent |= changed
            # a comment keeps the connection, and is how a browser that has left is noticed
            yield f"data: {json.dumps(changed)}\n\n" if changed else ": the same\n\n"
            for _ in range(round(EVERY_SECONDS / 0.25)):
                if watch.ending() or await request.is_disconnected():
                    return
                await asyncio.sleep(0.25)
    finally:
        watch.num_streams -= 1
