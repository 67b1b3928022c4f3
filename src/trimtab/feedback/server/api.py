"""The REST interface: what the pages do, for programs. Described at /api/openapi.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from trimtab.core.errors import DataError
from trimtab.data.mistakes import Mistake
from trimtab.feedback import people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer, from_form
from trimtab.feedback.assign import next_lease, set_open
from trimtab.feedback.board import disagreements
from trimtab.feedback.exporting import LAYOUTS, export
from trimtab.feedback.imported_votes import with_choice
from trimtab.feedback.importing import Options, items_of_row
from trimtab.feedback.items import add_items, search_items, set_scores
from trimtab.feedback.labels import LabelSplit
from trimtab.feedback.people import Person
from trimtab.feedback.progress import counts
from trimtab.feedback.server.admin import board_of, item_of, not_oneself
from trimtab.feedback.server.security import api_person, store_of
from trimtab.feedback.source_rows import names_in
from trimtab.feedback.store import audit_head, guideline, verify
from trimtab.feedback.votes import cast_votes, table_row
from trimtab.feedback.voting import adjudicate, task_of, undo, vote
from trimtab.feedback.webhooks import publish_guideline

router = APIRouter(prefix="/api/v1")
Annotator = Annotated[Person, Depends(api_person("annotator"))]
Adjudicator = Annotated[Person, Depends(api_person("adjudicator"))]
Admin = Annotated[Person, Depends(api_person("admin"))]
Page = Annotated[int, Query(ge=1, le=1000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AnswerBody(_Body):
    """An answer as it was given on the screen."""

    fields: dict[str, str | list[str]] = Field(
        description="As the page's form: position (1 to the scale, from the left), choice (tie, both_bad, "
        "cannot_judge, skip), rank_0…, rating, step_0…, text, flag, rationale, reason, seconds"
    )


class ItemsBody(_Body):
    """Rows in the layouts that `trimtab feedback import` reads."""

    rows: list[dict[str, Any]]
    purpose: Literal["task", "gold", "quiz"] = "task"
    slice: str = ""


class ScoresBody(_Body):
    """Reward-model scores by item and model."""

    scores: dict[str, dict[str, list[float]]]


class InviteBody(_Body):
    """An invitation."""

    role: people.PersonRole = "annotator"
    uses: int = Field(1, ge=1, le=1000)
    hours: float = Field(168, gt=0, le=2000)


class RoleBody(_Body):
    """A person's role."""

    role: people.PersonRole


class StateBody(_Body):
    """A person's state."""

    state: people.State


class GuidelineBody(_Body):
    """A new guideline."""

    text: str = Field(min_length=1)


class QueueBody(_Body):
    """Whether tasks are given out."""

    open: bool


class DecisionBody(AnswerBody):
    """An adjudicator's decision; positions and ranks are in the order of the item's replies."""

    taxonomy: str
    reason: str = ""
    key: str = Field(min_length=8, max_length=80, description="The same key again adds nothing")


# --- annotators ---


@router.get("/next")
def next_task(request: Request, person: Annotator) -> dict[str, Any]:
    """The current task or the next one, with its replies in the order to show them; `task` is null if there is none."""
    store = store_of(request)
    with store.write(durable=False) as connection:
        lease = next_lease(store, connection, person)
        if lease is None:
            return {"task": None}
        item = connection.execute(sa.select(t.items).where(t.items.c.id == lease.item_id)).one()
        version = guideline(connection).version
    return {
        "task": {
            "token": lease.token,
            "kind": item.kind,
            "messages": item.prompt["messages"],
            "replies": [item.replies[i]["text"] for i in lease.shown_order],
            "guideline_version": version,
            "draft": lease.draft,
        }
    }


@router.post("/tasks/{token}")
def answer_task(request: Request, person: Annotator, token: str, body: AnswerBody) -> dict[str, Any]:
    """Stores an answer; sending the same token again stores nothing new."""
    store = store_of(request)
    row = task_of(store, person, token)
    if row is None:
        raise HTTPException(404, "no such task")
    answer = from_form(_form(body), kind=row.kind, order=row.shown_order, task=store.project.settings.task)
    receipt = vote(store, person, token, answer)
    return {"vote": receipt.vote_id, "duplicate": receipt.duplicate, "differs": receipt.differs}


@router.post("/undo")
def undo_last(request: Request, person: Annotator) -> dict[str, Any]:
    """Takes back the last answer; `next` then gives its task again."""
    return {"token": undo(store_of(request), person).token}


@router.get("/guideline")
def current_guideline(request: Request, person: Annotator) -> dict[str, Any]:
    """The newest guideline."""
    with store_of(request).read() as connection:
        row = guideline(connection)
    return {"version": row.version, "text": row.text}


# --- adjudicators ---


@router.get("/board")
def board(request: Request, person: Adjudicator) -> dict[str, Any]:
    """The live board as numbers."""
    return board_of(request).get().to_dict()


@router.get("/disagreements")
def disagreement_list(request: Request, person: Adjudicator, limit: Page = 100) -> list[dict[str, Any]]:
    """Items on which people differ, the most divided first."""
    with store_of(request).read() as connection:
        return [{k: v for k, v in item.items() if k != "rank"} for item in disagreements(connection, limit=limit)]


@router.post("/items/{item_id}/decision")
def decide(request: Request, person: Adjudicator, item_id: int, body: DecisionBody) -> dict[str, Any]:
    """Stores a decision beside the votes."""
    store = store_of(request)
    item = item_of(store, item_id)
    order = list(range(len(item.replies))) or [0]
    answer: Answer = from_form(_form(body), kind=item.kind, order=order, task=store.project.settings.task)
    answer = replace(answer, taxonomy=body.taxonomy, reason=body.reason)
    receipt = adjudicate(store, person, item_id, answer, key=body.key)
    return {"vote": receipt.vote_id, "duplicate": receipt.duplicate, "differs": receipt.differs}


# --- admins ---


@router.get("/status")
def status(request: Request, person: Adjudicator) -> dict[str, Any]:
    """Counts of items, answers and people."""
    with store_of(request).read() as connection:
        return counts(connection)


@router.post("/items", status_code=201)
def import_items(request: Request, person: Admin, body: ItemsBody) -> dict[str, int]:
    """Adds items."""
    store = store_of(request)
    options = Options(purpose=body.purpose, slice=body.slice)
    new, names = [], names_in(body.rows, where="the rows")
    for number, given in enumerate(body.rows, 1):
        where = f"row {number}"
        try:
            row = names.named(given)
            row = row if body.purpose == "task" else with_choice(row, names.sides)
            new += [(where, item) for item in items_of_row(row, store.project.settings.task, options)]
        except Mistake as mistake:
            raise DataError(mistake.problem, where=where, fix=mistake.fix) from None
    return add_items(store, new, actor=person.id)


@router.get("/items")
def list_items(request: Request, person: Admin, limit: Page = 100, offset: int = 0) -> list[dict[str, Any]]:
    """Items with their replies, where those came from, and how many places are taken."""
    names = ("id", "sha256", "kind", "purpose", "prompt", "replies", "gold", "slice", "cap", "taken", "open")
    with store_of(request).read() as connection:
        rows = search_items(connection, limit=limit, offset=max(0, offset))
        return [{name: row._mapping[name] for name in names} for row in rows]


@router.put("/scores")
def put_scores(request: Request, person: Admin, body: ScoresBody) -> dict[str, int]:
    """Sets the reward-model scores that the policy chooses by."""
    return {"items": set_scores(store_of(request), body.scores, actor=person.id)}


@router.get("/votes")
def list_votes(request: Request, person: Admin, after: int = 0, limit: Page = 1000) -> list[dict[str, Any]]:
    """Votes that count, in the order they were given, after the one with the id `after`."""
    with store_of(request).read() as connection:
        purposes = ("task", "gold", "reask", "adjudication")
        casts = cast_votes(connection, purposes=purposes, after=after, limit=limit)
        return [{"id": cast.id, **table_row(cast)} for cast in casts]


@router.get("/people")
def list_people(request: Request, person: Admin) -> list[dict[str, Any]]:
    """Everyone with role and state."""
    with store_of(request).read() as connection:
        everyone = people.everyone(connection)
    names = ("id", "name", "role", "state", "qualified", "has_password")
    return [{name: getattr(p, name) for name in names} for p in everyone]


@router.post("/invites", status_code=201)
def make_invite(request: Request, person: Admin, body: InviteBody) -> dict[str, str]:
    """Makes an invitation; its token is shown only this once."""
    store = store_of(request)
    token = people.make_invite(store, body.role, uses=body.uses, hours=body.hours, actor=person.id)
    return {"token": token}


@router.put("/people/{person_id}/state")
def set_state(request: Request, person: Admin, person_id: int, body: StateBody) -> dict[str, Any]:
    """Pauses, bans or lets somebody back in."""
    not_oneself(person, person_id)
    people.set_state(store_of(request), person_id, body.state, actor=person.id)
    return {"id": person_id, "state": body.state}


@router.put("/people/{person_id}/role")
def set_role(request: Request, person: Admin, person_id: int, body: RoleBody) -> dict[str, Any]:
    """Gives somebody another role."""
    not_oneself(person, person_id)
    people.set_role(store_of(request), person_id, body.role, actor=person.id)
    return {"id": person_id, "role": body.role}


@router.post("/people/{person_id}/link", status_code=201)
def password_link(request: Request, person: Admin, person_id: int) -> dict[str, str]:
    """The token of a link that sets somebody's new password; it is shown only this once."""
    return {"token": people.make_link(store_of(request), person_id, actor=person.id)}


@router.delete("/people/{person_id}/sessions")
def end_sessions(request: Request, person: Admin, person_id: int) -> dict[str, int]:
    """Signs somebody out everywhere and makes their tokens useless."""
    return {"sessions": people.end_sessions(store_of(request), person_id, actor=person.id)}


@router.get("/invites")
def list_invites(request: Request, person: Admin) -> list[dict[str, Any]]:
    """Invitations and links that can still be used."""
    names = ("id", "role", "name", "uses_left", "expires_at")
    return [{name: row._mapping[name] for name in names} for row in people.open_invites(store_of(request))]


@router.delete("/invites/{invite_id}", status_code=204, response_class=Response)
def revoke_invite(request: Request, person: Admin, invite_id: int) -> None:
    """Makes an invitation or link useless."""
    people.revoke_invite(store_of(request), invite_id, actor=person.id)


@router.delete("/people/{person_id}", status_code=204, response_class=Response)
def delete_person(request: Request, person: Admin, person_id: int) -> None:
    """Deletes the name and the words of somebody; their choices stay without a name."""
    not_oneself(person, person_id)
    people.delete_person(store_of(request), person_id, actor=person.id)


@router.put("/guideline")
def put_guideline(request: Request, person: Admin, body: GuidelineBody) -> dict[str, int]:
    """Makes a new version of the guideline."""
    store = store_of(request)
    with store.write() as connection:
        return {"version": publish_guideline(store, connection, person.id, body.text)}


@router.put("/queue")
def put_queue(request: Request, person: Admin, body: QueueBody) -> dict[str, bool]:
    """Opens or pauses the project."""
    set_open(store_of(request), body.open, actor=person.id)
    return {"open": body.open}


@router.get("/export/{layout}")
def export_rows(request: Request, person: Admin, layout: str, split: LabelSplit = "all") -> dict[str, Any]:
    """The rows of a layout with their card."""
    if layout not in LAYOUTS:
        raise HTTPException(404, f"layouts are {', '.join(LAYOUTS)}")
    exported = export(store_of(request), layout, split=split)
    return {"rows": exported.rows, "card": exported.card}


@router.get("/audit")
def audit(request: Request, person: Admin, after: int = 0, limit: Page = 1000) -> list[dict[str, Any]]:
    """Entries of the audit log after the one with the number `after`."""
    with store_of(request).read() as connection:
        rows = sa.select(t.audit).where(t.audit.c.seq > after).order_by(t.audit.c.seq).limit(limit)
        return [dict(row._mapping) for row in connection.execute(rows)]


@router.post("/audit/verify")
def verify_audit(request: Request, person: Admin, head: str | None = None) -> dict[str, Any]:
    """Computes every hash again and says what is wrong."""
    store = store_of(request)
    problems = verify(store, head=head)
    seq, sha256 = audit_head(store)
    return {"problems": problems, "entries": seq, "head": sha256}


def _form(body: AnswerBody) -> dict[str, list[str]]:
    return {name: value if isinstance(value, list) else [value] for name, value in body.fields.items()}
