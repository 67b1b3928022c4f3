"""Templates: one environment that escapes everything, and the values that every page gets."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse

from trimtab.feedback.server.keys import keys_for
from trimtab.feedback.server.rendering import render
from trimtab.feedback.server.security import COOKIE, Visit
from trimtab.reports.markup import templates, visible

WEB = Path(__file__).parents[1] / "web"


def _day(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{share:.0%}"


def _span(seconds: float | None) -> str:
    """A length of time as text, such as 45 s, 12 min or 1.5 h."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


ENVIRONMENT = templates(WEB / "templates", all_visible=False)
ENVIRONMENT.filters |= {"rendered": render, "visible": visible, "day": _day, "percent": _percent, "span": _span}


def page(request: Request, visit: Visit, template: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from a template."""
    settings = visit.store.project.settings
    text = ENVIRONMENT.get_template(template).render(
        project=settings,
        person=visit.person,
        csrf=visit.csrf,
        keys=keys_for(visit.person.keys if visit.person else {}),
        path=request.url.path,
        **values,
    )
    return keep_cookie(request, visit, HTMLResponse(text, status_code=status))


def keep_cookie(request: Request, visit: Visit, response: HTMLResponse) -> HTMLResponse:
    """The response, with a cookie for the token of the visit if the browser came without one.

    The cookie is set only on a GET request: a form sent by another site comes without the cookie, and an answer that
    set a fresh one would sign the browser out.
    """
    fresh = getattr(request.state, "fresh_token", None)
    if fresh is not None and request.method == "GET":
        set_cookie(response, visit, fresh)
    return response


def set_cookie(response: HTMLResponse | RedirectResponse, visit: Visit, token: str) -> None:
    """Gives the browser a session token that scripts cannot read.

    The browser sends it along with a link on another site ("lax"), so that people who follow a link stay signed in;
    it does not send it along with a form there.
    """
    server = visit.store.project.settings.server
    response.set_cookie(
        COOKIE,
        token,
        max_age=int(server.session_hours * 3600),
        httponly=True,
        samesite="lax",
        secure=server.https,
    )


def written(form: Mapping[str, Sequence[str]]) -> list[str]:
    """What a person wrote in words in a form that could not be accepted, to give it back to them."""
    texts = [form[name][-1] for name in ("text", "rationale", "reason") if form.get(name)]
    return [text for text in texts if text.strip()]


def to(path: str) -> RedirectResponse:
    """A redirect to another page."""
    return RedirectResponse(path, status_code=303)
