"""The pages of an annotator: joining, the guideline, one task after the other, undo, own answers, own keys."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from trimtab.core.errors import DataError
from trimtab.core.types import Prompt, from_dict
from trimtab.feedback import people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import MAX_WRITING, SKIP_REASONS, WORDS, agrees, from_form, restored, to_position
from trimtab.feedback.assign import Lease, next_lease, reached_daily_limit
from trimtab.feedback.progress import progress_of
from trimtab.feedback.project import Task
from trimtab.feedback.server.keys import ACTIONS, checked_keys
from trimtab.feedback.server.pages import page, set_cookie, to, written
from trimtab.feedback.server.security import (
    COOKIE,
    AnyVisit,
    PostedFields,
    PostedForm,
    SignedIn,
    Visit,
    field,
    limit_sign_ins,
)
from trimtab.feedback.store import guideline, is_paused
from trimtab.feedback.votes import replaced
from trimtab.feedback.voting import Late, reopen, save_draft, set_opted_out, task_of, undo, vote

router = APIRouter()
_LIMITED = [Depends(limit_sign_ins)]
USUAL_QUESTIONS = {
    "pairs": "Which reply is better?",
    "ranking": "Order the replies from best to worst.",
    "rating": "How good is the reply?",
    "steps": "Is each step right?",
    "demonstration": "Write the reply you would want to get.",
    "edit": "Make the reply as good as you can.",
}
_LONG = 600
"""Letters after which an earlier turn of a conversation is folded."""
_PAGE = 100
"""Answers on one page of a person's own."""


# --- coming and going ---


@router.get("/")
def front(visit: AnyVisit) -> RedirectResponse:
    """Redirects to the page on which the person goes on."""
    if visit.person is None:
        return to("/sign-in")
    return to("/task" if visit.person.role == "annotator" else "/admin")


@router.get("/sign-in")
def sign_in_page(request: Request, visit: AnyVisit) -> HTMLResponse:
    """The form to sign in."""
    return page(request, visit, "sign_in.html", error="", name="")


@router.post("/sign-in", dependencies=_LIMITED)
def sign_in(request: Request, visit: AnyVisit, form: PostedForm) -> Response:
    """Signs in by name and password."""
    person = people.sign_in(visit.store, field(form, "name"), field(form, "password"))
    if person is None:
        error = "Name and password do not belong together."
        return page(request, visit, "sign_in.html", status=422, error=error, name=field(form, "name"))
    return _signed_in(visit, person)


@router.get("/join")
def join_page(request: Request, visit: AnyVisit) -> HTMLResponse:
    """The form to join. The invitation is in the part of the address after #, which browsers do not send."""
    return page(request, visit, "join.html", error="", name="", token="")


@router.post("/join", dependencies=_LIMITED)
def join(request: Request, visit: AnyVisit, form: PostedForm) -> Response:
    """Joins a person with an invitation or a link."""
    token, name = field(form, "token").strip(), field(form, "name")
    try:
        person = people.join(visit.store, token, name, field(form, "password"))
    except DataError as error:
        return page(request, visit, "join.html", status=422, error=_said(error), name=name, token=token)
    return _signed_in(visit, person)


@router.post("/sign-out")
def sign_out(visit: SignedIn, form: PostedForm) -> RedirectResponse:
    """Ends the session."""
    people.end_session(visit.store, visit.token)
    response = to("/sign-in")
    response.delete_cookie(COOKIE)
    return response


def _signed_in(visit: Visit, person: people.Person) -> RedirectResponse:
    token = people.start_session(visit.store, person, hours=visit.store.project.settings.server.session_hours)
    response = to("/task" if person.role == "annotator" else "/admin")
    set_cookie(response, visit, token)  # a new token, so that the old one is useless to others
    return response


@router.get("/session")
def session(visit: SignedIn) -> Response:
    """The token that forms need now, for a page that was opened under another session of the same person."""
    return JSONResponse({"csrf": visit.csrf})


# --- one task after the other ---


@router.get("/task")
def task(request: Request, visit: SignedIn) -> Response:
    """The guideline if it is new, the warning if there is one, and then the current task or the next."""
    store, person = visit.store, visit.someone
    with store.read() as connection:
        current = guideline(connection)
        versions = sa.select(t.readings.c.version).where(t.readings.c.person_id == person.id)
        read = connection.execute(versions).scalars().all()
    if current.version not in read:
        return page(request, visit, "guideline.html", guideline=current, must_confirm=True, changed=bool(read))
    if store.project.settings.task.content_warning and not person.warned:
        return page(request, visit, "warning.html")
    with store.write(durable=False) as connection:
        lease = next_lease(store, connection, person)
    return _task_page(request, visit, lease)


@router.post("/task/{token}")
def answer(request: Request, visit: SignedIn, token: str, form: PostedForm) -> Response:
    """Stores the answer and goes on. An answer that is sent twice is stored once."""
    store, person = visit.store, visit.someone
    row = task_of(store, person, token)
    kept = written(form)
    if row is None:  # answered in another tab and opened anew since, or somebody else signed in
        if not kept:
            return to("/task")
        text = "This task is not in your hands any more: it was opened anew in another tab, or somebody else signed in."
        return page(request, visit, "notice.html", status=409, title="Not stored", text=text, kept=kept)
    try:
        given = from_form(form, kind=row.kind, order=row.shown_order, task=store.project.settings.task)
        receipt = vote(store, person, token, given)
    except Late as late:
        title = "Too late for this one"
        return page(request, visit, "notice.html", status=409, title=title, text=_said(late), kept=kept)
    except DataError as error:
        save_draft(store, person, token, _draft_of(form))
        with store.write() as connection:
            lease = next_lease(store, connection, person)
        return _task_page(request, visit, lease, status=422, error=_said(error))
    if receipt.differs:
        text = "You answered this one before, in another tab, and that answer stands. Change it under My answers."
        return page(request, visit, "notice.html", status=409, title="Answered already", text=text, kept=kept)
    return to(f"/quiz/{receipt.vote_id}" if receipt.right is not None else "/task")


@router.post("/draft/{token}")
def draft(visit: SignedIn, token: str, form: PostedForm) -> Response:
    """Stores what is filled in so far as a draft."""
    store = visit.store
    row = task_of(store, visit.someone, token)
    if row is None:
        raise HTTPException(404, "no such task")
    if not save_draft(store, visit.someone, token, _draft_of(form)):
        return Response("Others have answered this one meanwhile. What you wrote is kept; copy it.", status_code=409)
    return Response(status_code=204)


def _draft_of(form: PostedFields) -> dict[str, Any]:
    """The draft of what is filled in so far."""
    kept: dict[str, Any] = {name: field(form, name)[:MAX_WRITING] for name in WORDS if field(form, name)}
    kept["flags"] = list(form.get("flag", ()))[:50]
    kept["form"] = {
        name: field(form, name)[:20]
        for name in form
        if name.startswith(("rank_", "step_", "criterion_")) or name in ("rating", "position", "choice", "seconds")
    }
    return kept


@router.post("/undo")
def undo_last(request: Request, visit: SignedIn, form: PostedForm) -> Response:
    """Takes back the last answer and shows its task again."""
    try:
        undo(visit.store, visit.someone)
    except DataError as error:
        return page(request, visit, "notice.html", status=422, title="Nothing to undo", text=_said(error), kept=[])
    return to("/task")


@router.get("/quiz/{vote_id}")
def quiz_answer(request: Request, visit: SignedIn, vote_id: int) -> HTMLResponse:
    """Says whether an answer to the quiz was the expected one, and what was expected."""
    with visit.store.read() as connection:
        row = connection.execute(
            sa.select(t.votes, t.items.c.gold, t.items.c.kind, t.items.c.replies, t.items.c.prompt)
            .join(t.items)
            .where(t.votes.c.id == vote_id, t.votes.c.person_id == visit.someone.id, t.votes.c.purpose == "quiz")
        ).first()
        person = people.by_id(connection, visit.someone.id)
    if row is None:
        raise HTTPException(404, "no such answer")
    right = agrees(restored(row._mapping), row.gold)
    expected = {"A": 0, "B": 1}.get(str(row.gold.get("choice")))
    reply = row.replies[expected]["text"] if expected is not None and row.kind == "pairs" else ""
    return page(
        request,
        visit,
        "quiz.html",
        right=right,
        prompt=from_dict(Prompt, row.prompt),
        expected=reply,
        choice=_expected(row),
        why=str(row.gold.get("why", "")),
        qualified=person.qualified,
    )


def _expected(row: Any) -> str:
    """The expected answer to a question of the quiz in words, with the replies as they were shown."""
    if "ranking" in row.gold:
        place = {place: str(i + 1) for i, place in enumerate(row.shown_order)}
        return " > ".join(" = ".join(sorted(place[p] for p in tier)) for tier in row.gold["ranking"])
    if "steps" in row.gold:
        wrong = next((i for i, mark in enumerate(row.gold["steps"], 1) if mark == -1), None)
        return "no step is wrong" if wrong is None else f"step {wrong} is the first wrong one"
    return str(row.gold.get("rating") or row.gold.get("choice", ""))


def _task_page(
    request: Request, visit: Visit, lease: Lease | None, *, status: int = 200, error: str = ""
) -> HTMLResponse:
    store, person = visit.store, visit.someone
    with store.read() as connection:
        progress = progress_of(store, connection, person)
        if lease is None:
            return page(request, visit, "nothing.html", progress=progress, why=_why_nothing(visit, connection))
        item = connection.execute(sa.select(t.items).where(t.items.c.id == lease.item_id)).one()
        current = guideline(connection)
    settings = store.project.settings.task
    texts = [reply["text"] for reply in item.replies]
    prompt = from_dict(Prompt, item.prompt)
    *before, last = prompt.messages
    left = "AB"[lease.shown_order[0]] if item.kind == "pairs" else ""
    stored = lease.draft
    return page(
        request,
        visit,
        f"task_{item.kind}.html",
        status=status,
        error=error,
        lease=lease,
        kind=item.kind,
        question=settings.question or USUAL_QUESTIONS[item.kind],
        before=[(m, len(m.content) > _LONG) for m in before],
        last=last,
        replies=[texts[place] for place in lease.shown_order],
        guideline=current,
        progress=progress,
        actions=ACTIONS,
        skip_reasons=SKIP_REASONS,
        draft=stored,
        form=stored.get("form", {}) | _form_of(stored, lease, item.kind, settings, left),
        sides=("left", "right") if left == "A" else ("right", "left"),
        may_undo=progress.answered > 0,
        tired=settings.break_minutes and progress.working_minutes >= settings.break_minutes,
    )


def _form_of(stored: dict[str, Any], lease: Lease, kind: str, task: Task, left: str) -> dict[str, str]:
    """The fields of a form that show an earlier answer."""
    if "choice" not in stored:
        return {}
    shown: dict[str, str] = {"choice": stored["choice"]}
    if kind == "pairs":
        position = to_position(stored["choice"], stored.get("strength"), task.scale, left)
        shown["position"] = "" if position is None else str(position)
        sides = {left: "left", "tie": "same"}
        said = stored.get("criteria", {})
        shown |= {f"criterion_{i}": sides.get(said[c], "right") for i, c in enumerate(task.criteria) if c in said}
    if kind == "ranking":
        rank = {place: i + 1 for i, tier in enumerate(stored.get("ranking", ())) for place in tier}
        shown |= {f"rank_{i}": str(rank.get(place, "")) for i, place in enumerate(lease.shown_order)}
    if kind == "rating":
        shown["rating"] = str(stored.get("rating", ""))
    if kind == "steps":
        marks = {-1: "wrong", 0: "neutral", 1: "right", None: ""}
        shown |= {f"step_{i}": marks[mark] for i, mark in enumerate(stored.get("steps", ()))}
    return shown


def _why_nothing(visit: Visit, connection: sa.Connection) -> str:
    person, settings = people.by_id(connection, visit.someone.id), visit.store.project.settings
    if person.state == "paused":
        return "Your work is paused. Ask whoever invited you."
    if settings.qualification.questions and person.qualified is False:
        return "Thank you for taking the quiz. Your answers differed too often from the expected ones to go on here."
    if reached_daily_limit(visit.store, connection, person):
        return f"You have answered {settings.assignment.max_per_day} today, which is as much as a day should hold."
    if is_paused(connection):
        return "The project is paused."
    if settings.qualification.questions and person.qualified is None:
        return "There are no questions for you in the quiz yet. Ask whoever invited you."
    return "There is nothing left for you to do. Thank you!"


# --- one's own ---


@router.post("/guideline/read")
def confirm_guideline(visit: SignedIn, form: PostedForm) -> RedirectResponse:
    """Notes that the person has read this version."""
    version = field(form, "version")
    with visit.store.write() as connection:
        current = guideline(connection).version
        known = sa.select(t.readings).where(t.readings.c.person_id == visit.someone.id, t.readings.c.version == current)
        if version == str(current) and connection.execute(known).first() is None:
            row = {"person_id": visit.someone.id, "version": current, "created_at": visit.store.now()}
            connection.execute(t.readings.insert().values(**row))
    return to("/task")


@router.get("/guideline")
def guideline_page(request: Request, visit: SignedIn) -> HTMLResponse:
    """The guideline by itself."""
    with visit.store.read() as connection:
        current = guideline(connection)
    return page(request, visit, "guideline.html", guideline=current, must_confirm=False, changed=False)


@router.post("/warned")
def warned(visit: SignedIn, form: PostedForm) -> RedirectResponse:
    """Notes that the warning was read, and whether the person wants sensitive items."""
    people.update_person(visit.store, visit.someone.id, warned=True)
    set_opted_out(visit.store, visit.someone, field(form, "choice") == "out")
    return to("/task")


@router.get("/mine")
def mine(request: Request, visit: SignedIn, before: int = 0) -> HTMLResponse:
    """A hundred of the person's answers, the newest first, to look at and change; older ones before an answer."""
    with visit.store.read() as connection:
        rows = connection.execute(
            sa.select(t.votes, t.items.c.prompt, t.items.c.kind)
            .join(t.items)
            .where(
                t.votes.c.person_id == visit.someone.id,
                t.votes.c.purpose.notin_(("quiz", "adjudication")),
                t.votes.c.choice != "undone",
                ~replaced(),
                t.votes.c.id < before if before else sa.true(),
            )
            .order_by(t.votes.c.id.desc())
            .limit(_PAGE)
        ).all()
        progress = progress_of(visit.store, connection, visit.someone)
    answers = [
        {"id": r.id, "prompt": from_dict(Prompt, r.prompt).text[:140], "said": said_on_screen(r), "at": r.created_at}
        for r in rows
    ]
    return page(request, visit, "mine.html", answers=answers, progress=progress, more=len(answers) == _PAGE)


def said_on_screen(row: Any) -> str:
    """An answer in words, with the sides as the screen showed them."""
    if row.choice in ("A", "B"):
        if row.shown_left is None:  # of a vote given elsewhere; the letters are not of the screen either
            return f"one of the two, strength {row.strength}"
        side = "left" if row.choice == row.shown_left else "right"
        return f"{side}, strength {row.strength}"
    if row.choice == "done":
        answer = restored(row._mapping)
        if answer.rating is not None:
            return f"rated {answer.rating}"
        if answer.ranking:
            place = {p: i + 1 for i, p in enumerate(row.shown_order)}
            return " > ".join(" = ".join(str(place[p]) for p in tier) for tier in answer.ranking)
        return "marked" if answer.steps else "written"
    return str(row.choice).replace("_", " ")


@router.post("/mine/{vote_id}")
def edit(request: Request, visit: SignedIn, vote_id: int, form: PostedForm) -> Response:
    """Opens one of the person's own answers again."""
    try:
        reopen(visit.store, visit.someone, vote_id)
    except DataError as error:
        return page(
            request, visit, "notice.html", status=422, title="This cannot be changed", text=_said(error), kept=[]
        )
    return to("/task")


@router.get("/account")
def account(request: Request, visit: SignedIn) -> HTMLResponse:
    """The person's own keys, password and choices."""
    return page(request, visit, "account.html", actions=ACTIONS, error="", done="")


@router.post("/account/{part}")
def change_account(request: Request, visit: SignedIn, part: str, form: PostedForm) -> Response:
    """Sets the person's keys, password or what they are shown."""
    store, person = visit.store, visit.someone
    try:
        if part == "keys":
            reset = field(form, "reset") == "1"
            wanted = {} if reset else {name: field(form, name) for name in form if name not in ("csrf", "reset")}
            people.update_person(store, person.id, keys=checked_keys(wanted))
        elif part == "sensitive":
            set_opted_out(store, person, field(form, "out") == "1")
        elif part == "view":
            known = {name: field(form, name) == "1" for name in ("stacked", "diff", "source") if name in form}
            people.update_person(store, person.id, view=person.view | known)
            return Response(status_code=204)
        elif part == "password":
            people.change_password(store, person, field(form, "old"), field(form, "new"))
            return to("/sign-in")
        else:
            raise HTTPException(404, "no such part")
    except DataError as error:
        return page(request, visit, "account.html", status=422, actions=ACTIONS, error=_said(error), done="")
    return to("/account")


def _said(error: DataError) -> str:
    return f"{error.problem[:1].upper()}{error.problem[1:]}: {error.fix}."
