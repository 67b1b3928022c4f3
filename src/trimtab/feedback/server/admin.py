"""The pages of adjudicators and admins: the board, disagreements, people, export, guideline, audit log."""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import sqlalchemy as sa
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from trimtab.core import seeds
from trimtab.core.errors import DataError
from trimtab.core.types import Prompt, from_dict
from trimtab.feedback import people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import TAXONOMY, from_form
from trimtab.feedback.assign import set_open
from trimtab.feedback.board import BoardCache, disagreements
from trimtab.feedback.exporting import LAYOUTS, export, to_bytes
from trimtab.feedback.labels import LabelSplit
from trimtab.feedback.server.pages import page, to
from trimtab.feedback.server.security import Adjudicating, Administering, PostedForm, Visit, field
from trimtab.feedback.store import Store, audit_head, guideline, num_rows, verify
from trimtab.feedback.votes import cast_votes
from trimtab.feedback.voting import adjudicate
from trimtab.feedback.webhooks import publish_guideline
from trimtab.reports.charts import BLUE, Chart, columns, dots
from trimtab.stats import Interval

router = APIRouter(prefix="/admin")
_TYPES = {"jsonl": "application/x-ndjson", "csv": "text/csv", "parquet": "application/octet-stream"}


# --- the board ---


@router.get("")
def board(request: Request, visit: Adjudicating) -> HTMLResponse:
    """How far the project has come and what the votes are worth."""
    return page(request, visit, "board.html", **_board_values(request))


@router.get("/board")
def board_part(request: Request, visit: Adjudicating) -> HTMLResponse:
    """The part of the board that changes."""
    return page(request, visit, "board_part.html", **_board_values(request))


def board_of(request: Request) -> BoardCache:
    """The app's one cache of the board."""
    state = request.app.state
    if not hasattr(state, "board"):
        state.board = BoardCache(state.store)
    cache: BoardCache = state.board
    return cache


def _board_values(request: Request) -> dict[str, Any]:
    found = board_of(request).get()
    form = "%H:%M" if found.stretch_seconds < 86400 else "%d %b"
    labels = [datetime.datetime.fromtimestamp(at, datetime.UTC).strftime(form) for at, _ in found.throughput]
    stretch = {60.0: "minute", 3600.0: "hour"}.get(found.stretch_seconds, "day")
    cards = [(row.name, row.card) for row in found.rows if row.card is not None]
    study = found.study

    def rows(values: Sequence[tuple[str, Interval]], title: str, line: float | None = None) -> Chart:
        return dots([(name, value, BLUE) for name, value in values][:40], title, line=line, low=0.0, high=1.0)

    counts = [num for _, num in found.throughput]
    charts = {
        f"Answers in each {stretch}": columns(range(len(counts)), counts, "", "answers", labels=labels),
        "Agreement with the others": rows([(name, card.agreement) for name, card in cards], "share"),
        "Chose the left side": rows([(name, card.left) for name, card in cards], "share of answers", 0.5),
        "Gold items as expected": rows([(row.name, row.gold) for row in found.rows], "share"),
        "Ties": rows([(name, card.ties) for name, card in cards], "share of answers"),
        "Agreement by slice": rows([(name, raw.interval) for name, raw, _ in study.slices] if study else [], "share"),
    }
    return {"board": found, "charts": charts, "webhooks": request.app.state.store.project.settings.webhooks}


@router.post("/queue")
def queue(request: Request, visit: Administering, form: PostedForm) -> Response:
    """Opens or pauses the project."""
    board_of(request).forget()
    set_open(visit.store, field(form, "open") == "1", actor=visit.someone.id)
    return to("/admin")


# --- disagreements ---


@router.get("/adjudicate")
def disagreement_list(request: Request, visit: Adjudicating) -> HTMLResponse:
    """Items on which people differ, the most divided first."""
    with visit.store.read() as connection:
        found = disagreements(connection, order=lambda cast: _order(visit, cast.item_id, len(cast.replies), cast.kind))
    return page(request, visit, "adjudicate.html", items=found)


@router.get("/adjudicate/{item_id}")
def disagreement(request: Request, visit: Adjudicating, item_id: int) -> HTMLResponse:
    """One item with the form to decide. Its votes are folded until they are opened."""
    return _adjudication(request, visit, item_id)


def _adjudication(request: Request, visit: Visit, item_id: int, *, status: int = 200, error: str = "") -> HTMLResponse:
    item = item_of(visit.store, item_id)
    with visit.store.read() as connection:
        votes = list(cast_votes(connection, banned=True, items=[item_id]))
        decisions = list(cast_votes(connection, purposes=("adjudication",), items=[item_id]))
        current = guideline(connection)
    order = _order(visit, item_id, len(item.replies), item.kind)
    return page(
        request,
        visit,
        "adjudicate_one.html",
        status=status,
        error=error,
        item=item,
        kind=item.kind,
        prompt=from_dict(Prompt, item.prompt),
        replies=[item.replies[i]["text"] for i in order],
        left="AB"[order[0]] if item.kind == "pairs" else "",
        order=order,
        votes=votes,
        decisions=decisions,
        taxonomy=TAXONOMY,
        key=secrets.token_urlsafe(18),
        guideline=current,
    )


def item_of(store: Store, item_id: int) -> sa.Row[Any]:
    """The item of this number. Raises HTTPException 404 if there is none."""
    with store.read() as connection:
        item = connection.execute(sa.select(t.items).where(t.items.c.id == item_id)).first()
    if item is None:
        raise HTTPException(404, "no such item")
    return item


def _order(visit: Visit, item_id: int, num: int, kind: str) -> list[int]:
    """The order of the replies for one adjudicator, always the same."""
    if kind not in ("pairs", "ranking"):
        return list(range(num))
    generator = seeds.generator(visit.store.project.settings.assignment.seed, "adjudicate", visit.someone.id, item_id)
    return [int(i) for i in generator.permutation(num)]


@router.post("/adjudicate/{item_id}")
def decide(request: Request, visit: Adjudicating, item_id: int, form: PostedForm) -> Response:
    """Stores a decision beside the votes."""
    store = visit.store
    item = item_of(store, item_id)
    order = _order(visit, item_id, len(item.replies), item.kind)
    try:
        answer = from_form(form, kind=item.kind, order=order, task=store.project.settings.task)
        answer = replace(answer, taxonomy=field(form, "taxonomy"), reason=field(form, "reason").strip())
        receipt = adjudicate(store, visit.someone, item_id, answer, key=field(form, "key")[:64])
    except DataError as error:
        return _adjudication(request, visit, item_id, status=422, error=f"{error.problem}: {error.fix}")
    if receipt.differs:
        said = "this form has decided the item in another way before: what it says now is a new decision if sent again"
        return _adjudication(request, visit, item_id, status=409, error=said)
    return to("/admin/adjudicate")


# --- people ---


@router.get("/people")
def people_page(request: Request, visit: Administering) -> HTMLResponse:
    """Everyone, and the form to invite more."""
    return _people(request, visit)


def _people(request: Request, visit: Visit, *, link: str = "", status: int = 200) -> HTMLResponse:
    with visit.store.read() as connection:
        everyone = people.everyone(connection)
    invites = people.open_invites(visit.store)
    return page(request, visit, "people.html", everyone=everyone, invites=invites, link=link, status=status)


@router.post("/invites")
def invite(request: Request, visit: Administering, form: PostedForm) -> HTMLResponse:
    """Makes an invitation and shows its link this once."""
    uses, hours = field(form, "uses"), field(form, "hours")
    numbers = all(text.isdecimal() and len(text) <= 4 for text in (uses, hours))
    if not numbers or not 1 <= int(uses) <= 1000 or not 1 <= int(hours) <= 2000:
        raise HTTPException(422, "uses are 1 to 1000 and hours 1 to 2000")
    role = cast(people.PersonRole, field(form, "role"))
    token = people.make_invite(visit.store, role, uses=int(uses), hours=float(hours), actor=visit.someone.id)
    return _people(request, visit, link=_link(request, token))


def _link(request: Request, token: str) -> str:
    return f"{request.url.scheme}://{request.url.netloc}/join#{token}"


@router.post("/invites/{invite_id}/revoke")
def revoke_invite(visit: Administering, invite_id: int, form: PostedForm) -> Response:
    """Makes an invitation useless."""
    people.revoke_invite(visit.store, invite_id, actor=visit.someone.id)
    return to("/admin/people")


@router.post("/people/{person_id}/link")
def password_link(request: Request, visit: Administering, person_id: int, form: PostedForm) -> HTMLResponse:
    """Makes a link that sets somebody's new password and shows it this once."""
    token = people.make_link(visit.store, person_id, actor=visit.someone.id)
    return _people(request, visit, link=_link(request, token))


@router.post("/people/{person_id}/role")
def set_role(visit: Administering, person_id: int, form: PostedForm) -> Response:
    """Gives somebody another role."""
    not_oneself(visit.someone, person_id)
    people.set_role(visit.store, person_id, cast(people.PersonRole, field(form, "role")), actor=visit.someone.id)
    return to("/admin/people")


@router.post("/people/{person_id}/sign-out")
def sign_out_everywhere(visit: Administering, person_id: int, form: PostedForm) -> Response:
    """Ends the sessions and tokens of somebody."""
    people.end_sessions(visit.store, person_id, actor=visit.someone.id)
    return to("/admin/people")


@router.post("/people/{person_id}/state")
def set_state(request: Request, visit: Administering, person_id: int, form: PostedForm) -> Response:
    """Pauses, bans or lets somebody back in."""
    board_of(request).forget()
    not_oneself(visit.someone, person_id)
    people.set_state(visit.store, person_id, cast(people.State, field(form, "state")), actor=visit.someone.id)
    return to("/admin/people")


@router.post("/people/{person_id}/delete")
def delete(visit: Administering, person_id: int, form: PostedForm) -> Response:
    """Deletes the name and the words of somebody, after their name was typed."""
    not_oneself(visit.someone, person_id)
    with visit.store.read() as connection:
        person = people.by_id(connection, person_id)
    if field(form, "name") != person.name:
        raise HTTPException(422, "type the name to confirm")
    people.delete_person(visit.store, person_id, actor=visit.someone.id)
    return to("/admin/people")


def not_oneself(person: people.Person, person_id: int) -> None:
    """Raises HTTPException 422 if an admin is about to change themselves."""
    if person_id == person.id:
        raise HTTPException(422, "this would lock you out; ask another admin")


# --- export, guideline, log ---


@router.get("/export")
def export_page(request: Request, visit: Administering) -> HTMLResponse:
    """The layouts to choose from."""
    return page(request, visit, "export.html", layouts=LAYOUTS)


@router.get("/export/file")
def export_file(visit: Administering, layout: str, type: str = "jsonl", split: str = "all") -> Response:
    """A file of one layout."""
    if layout not in LAYOUTS or type not in _TYPES or split not in ("all", "train", "held_out"):
        raise HTTPException(422, "no such layout, type or split")
    exported = export(visit.store, layout, split=cast(LabelSplit, split))
    name = f"{layout}-{split}.{type}"
    return Response(
        to_bytes(exported.rows, name),
        media_type=_TYPES[type],
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "X-Trimtab-Card": json.dumps(exported.card, ensure_ascii=True),
        },
    )


@router.get("/guideline")
def guideline_page(request: Request, visit: Administering) -> HTMLResponse:
    """The guideline to edit."""
    with visit.store.read() as connection:
        current = guideline(connection)
        touched = num_rows(connection, t.votes, t.votes.c.guideline_version == current.version)
    return page(request, visit, "guideline_edit.html", guideline=current, touched=touched)


@router.post("/guideline")
def new_guideline(visit: Administering, form: PostedForm) -> Response:
    """Makes a new version; everyone reads it before their next task."""
    text = field(form, "text").replace("\r\n", "\n").strip()
    if not text:
        raise HTTPException(422, "the guideline is empty")
    with visit.store.write() as connection:
        publish_guideline(visit.store, connection, visit.someone.id, text)
    return to("/admin/guideline")


@router.get("/log")
def log(request: Request, visit: Administering, before: int = 0) -> HTMLResponse:
    """The audit log, newest entries first."""
    return _log(request, visit, before=before)


@router.post("/log/verify")
def verify_log(request: Request, visit: Administering, form: PostedForm) -> HTMLResponse:
    """Computes every hash again and shows what is wrong."""
    return _log(request, visit, problems=verify(visit.store))


def _log(request: Request, visit: Visit, *, before: int = 0, problems: list[str] | None = None) -> HTMLResponse:
    with visit.store.read() as connection:
        rows = sa.select(t.audit).order_by(t.audit.c.seq.desc()).limit(100)
        entries = connection.execute(rows.where(t.audit.c.seq < before) if before else rows).all()
        names = {p.id: p.name for p in people.everyone(connection)}
        deliveries = connection.execute(sa.select(t.deliveries).order_by(t.deliveries.c.id.desc()).limit(50)).all()
    return page(
        request,
        visit,
        "log.html",
        entries=entries,
        names=names,
        deliveries=deliveries,
        problems=problems,
        head=audit_head(visit.store),
    )
