"""From files, samples and worlds to items: the same readers as training, then one item for each row, pair or group."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import sqlalchemy as sa
from sqlalchemy import Connection

from trimtab import worlds
from trimtab.data.compared import to_comparison
from trimtab.data.mistakes import Mistake
from trimtab.data.rows import (
    to_conversation_prompt,
    to_demonstration,
    to_explicit_pair,
    to_implicit_pair,
)
from trimtab.data.sources import is_world, read_rows, read_world
from trimtab.errors import DataError
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.ballots import insert_vote
from trimtab.feedback.items import NUM_REPLIES, NewItem, NewReply, Purpose, add_items, item_row, reply_hash
from trimtab.feedback.people import add_person, by_name
from trimtab.feedback.project import Kind
from trimtab.feedback.store import Store, add_guideline, append_audit, guideline, row_digest
from trimtab.types import JsonDict, Prompt

_SOURCE_COLUMNS = ("model", "checkpoint", "sampling", "seed", "finish_reason")
_MOST_MISTAKES = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How rows are read."""

    purpose: Purpose = "task"
    """What the items are for: tasks, hidden gold, or the quiz."""
    slice: str = ""
    """The slice of every row that names none."""
    with_votes: bool = False
    """Take the choices of a comparisons file as votes of the annotators it names."""
    limit: int | None = None
    """Read only the first rows."""
    on_bad_row: str = "stop"
    """Refuse the file at a bad row, or drop and count such rows."""


def import_source(
    store: Store, source: str, options: Options | None = None, *, actor: int | None = None
) -> dict[str, int]:
    """Adds what a source holds; returns counts of rows, items and what was left out.

    A source is a file or hub data set in any layout of `trimtab.data.layouts`, rollouts of `trimtab generate`, rows
    with `prompt` and `responses`, a dump, or a world. Raises DataError with the first mistakes.
    """
    options = options or Options()
    kind = store.project.settings.task.kind
    if is_world(source):
        return add_items(store, _from_world(source, kind), actor=actor)
    found = read_rows(source, limit=options.limit)
    if found.rows and found.rows[0][1].get("record") == "dump":
        return restore(store, [row for _, row in found.rows], actor=actor)
    mistakes = [(bad.where, bad.problem, bad.fix) for bad in found.bad]
    new: list[tuple[str, NewItem]] = []
    votes: list[tuple[str, NewItem, JsonDict]] = []
    samples: dict[str, list[tuple[str, JsonDict, Prompt, NewReply]]] = {}
    for where, row in found.rows:
        try:
            if _is_sample(row, kind):
                demonstration = to_demonstration(row)
                reply = NewReply(text=demonstration.response, source=_source(row))
                samples.setdefault(demonstration.prompt.id, []).append((where, row, demonstration.prompt, reply))
                continue
            for item in items_of_row(row, kind, options):
                item.refuse(where)
                new.append((where, item))
                if options.with_votes and row.get("choice") is not None:
                    votes.append((where, item, row))
        except Mistake as mistake:
            mistakes.append((where, mistake.problem, mistake.fix))
        except DataError as error:
            mistakes.append((where, error.problem, error.fix))
    for group in samples.values():
        where, row, prompt, _ = group[0]
        replies = list({reply.text: reply for _, _, _, reply in group}.values())
        try:
            for item in _of_replies(prompt, replies, row, kind, options):
                item.refuse(where)
                new.append((where, item))
        except (DataError, Mistake) as error:
            mistakes.append((where, error.problem, error.fix))
    if mistakes and (options.on_bad_row == "stop" or not new):
        raise _all_mistakes(mistakes, len(found.rows) + len(found.bad))
    counts = {"rows": len(found.rows) + len(found.bad), "dropped_bad_row": len(mistakes)}
    counts |= add_items(store, new, actor=actor)
    if votes:
        counts["votes"] = _add_votes(store, votes)
    return counts


def _all_mistakes(mistakes: Sequence[tuple[str, str, str]], num_rows: int) -> DataError:
    where, problem, fix = mistakes[0]
    more = "".join(f"\n    {w}: {p}" for w, p, _ in mistakes[1:_MOST_MISTAKES])
    return DataError(
        f"{problem}\n  {len(mistakes)} of {num_rows} rows cannot be used{':' if more else ''}{more}",
        where=where,
        fix=f"{fix}; or leave such rows out with --on-bad-row drop",
    )


def _is_sample(row: JsonDict, kind: Kind) -> bool:
    """One reply a row, of which those to the same prompt are compared."""
    has_reply = any(row.get(name) is not None for name in ("response", "completion"))
    others = ("response_a", "responses", "chosen", "completions", "steps", "label")
    return has_reply and kind in ("pairs", "ranking") and not any(row.get(name) is not None for name in others)


def items_of_row(row: JsonDict, kind: Kind, options: Options) -> Iterator[NewItem]:
    """The items of one row of any layout that holds its replies together. Raises Mistake."""
    if row.get("response_a") is not None:
        comparison = to_comparison({**row, "choice": row["choice"] if row.get("choice") in ("A", "B") else "tie"})
        replies = [
            NewReply(text=text, source=_source(row) | _model(row, f"model_{side}"))
            for side, text in (("a", comparison.response_a), ("b", comparison.response_b))
        ]
        yield from _of_replies(comparison.prompt, replies, row, kind, options)
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        pair = to_explicit_pair(row) if row.get("prompt") is not None else to_implicit_pair(row)
        # Which of the two is A must not say which was chosen.
        texts = sorted((pair.chosen, pair.rejected), key=reply_hash)
        gold = {"choice": "A" if texts[0] == pair.chosen else "B"} if options.purpose != "task" else {}
        replies = [NewReply(text=text, source=_source(row)) for text in texts]
        yield from _of_replies(pair.prompt, replies, {**row, **({"gold": gold} if gold else {})}, kind, options)
    elif isinstance(row.get("responses"), list):
        prompt = _prompt(row)
        replies = [_reply(value, row) for value in row["responses"]]
        yield from _of_replies(prompt, replies, row, kind, options)
    elif kind == "steps":
        steps = row.get("completions") or row.get("steps")
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise Mistake("missing_field", "no steps", "give a list of texts in 'steps'")
        yield _item(kind, _prompt(row), [NewReply(text=s, source=_source(row)) for s in steps], row, options)
    elif kind == "demonstration":
        yield _item(kind, _prompt(row), [], row, options)
    else:
        demonstration = to_demonstration(row)
        reply = NewReply(text=demonstration.response, source=_source(row))
        yield from _of_replies(demonstration.prompt, [reply], row, kind, options)


def _of_replies(
    prompt: Prompt, replies: Sequence[NewReply], row: JsonDict, kind: Kind, options: Options
) -> Iterator[NewItem]:
    """Pairs of every two replies, a ranking of all, or an item for each, as the project asks."""
    fewest, most = NUM_REPLIES[kind]
    if kind == "demonstration":
        yield _item(kind, prompt, [], row, options)
    elif kind == "pairs" and len(replies) > 2:
        for pair in combinations(replies, 2):
            yield _item(kind, prompt, pair, {**row, "scores": None}, options)
    elif most == 1:
        for reply in replies:
            yield _item(kind, prompt, [reply], row, options)
    elif len(replies) < fewest:
        raise Mistake("too_few_replies", f"{len(replies)} different replies", f"give at least {fewest} of each prompt")
    else:
        yield _item(kind, prompt, replies, row, options)


def _item(kind: Kind, prompt: Prompt, replies: Sequence[NewReply], row: Mapping[str, Any], options: Options) -> NewItem:
    return NewItem(
        kind=kind,
        prompt=prompt,
        replies=tuple(replies),
        purpose=options.purpose,
        gold=row.get("gold") or {},
        slice=str(row.get("slice") or options.slice),
        sensitive=bool(row.get("sensitive", False)),
        author=str(row.get("author") or ""),
        scores=row.get("scores") or {},
        given=float(row.get("priority") or 0.0),
    )


def _prompt(row: JsonDict) -> Prompt:
    """The prompt of a row that has no reply beside it."""
    if isinstance(row.get("messages"), list):
        return to_conversation_prompt(row)
    return to_demonstration({**row, "completion": "-"}).prompt


def _reply(value: Any, row: JsonDict) -> NewReply:
    if isinstance(value, str):
        return NewReply(text=value, source=_source(row))
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return NewReply(text=value["text"], source=_source(row) | {k: v for k, v in value.items() if k != "text"})
    raise Mistake("wrong_type", f"a reply is {value!r}", 'give texts, or objects such as {"text": …, "model": …}')


def _source(row: Mapping[str, Any]) -> JsonDict:
    return {name: row[name] for name in _SOURCE_COLUMNS if row.get(name) is not None}


def _model(row: Mapping[str, Any], name: str) -> JsonDict:
    return {"model": row[name]} if row.get(name) is not None else {}


def _from_world(source: str, kind: Kind) -> Iterator[tuple[str, NewItem]]:
    """Prompts of a world with replies of its grammar."""
    prompts = cast("list[Prompt]", read_world(source, demonstrations=False))
    name, _, query = source.removeprefix("world:").partition("?")
    seed = int(dict(parse_qsl(query)).get("seed", "0"))
    world = worlds.load(name)
    made_by = {"model": f"world:{name}", "seed": seed}
    fewest, most = NUM_REPLIES[kind]
    for i, prompt in enumerate(prompts):
        texts = list(dict.fromkeys(world.replies(prompt, 16, seed=seed)))
        if kind == "steps":
            texts = [f"{part.strip()}." for part in texts[0].split(".") if part.strip()]
        replies = tuple(NewReply(text=text, source=made_by) for text in texts[: 4 if kind == "ranking" else most])
        if len(replies) >= fewest:
            yield f"{source}, prompt {i + 1}", NewItem(kind=kind, prompt=prompt, replies=replies)


# --- votes given elsewhere ---


def _add_votes(store: Store, votes: Iterable[tuple[str, NewItem, JsonDict]]) -> int:
    """Stores the choices of a file as votes; the same file again adds none."""
    num = 0
    task = store.project.settings.task
    with store.write() as connection:
        version = guideline(connection).version
        for where, item, row in votes:
            name = str(row.get("annotator") or "imported")
            person = by_name(connection, name) or add_person(connection, store.now(), name, "annotator")
            sha256 = item_row(item, 0.0)["sha256"]
            item_id = connection.execute(sa.select(t.items.c.id).where(t.items.c.sha256 == sha256)).scalar_one()
            key = f"import-{hashlib.sha256(f'{sha256}/{name}'.encode()).hexdigest()}"
            if connection.execute(sa.select(t.votes.c.id).where(t.votes.c.key == key)).first():
                continue
            choice = str(row["choice"])
            if choice not in ("A", "B", "tie", "both_bad", "cannot_judge"):
                raise DataError(f"the choice {choice!r}", where=where, fix="use A, B, tie, both_bad or cannot_judge")
            strength = min(int(row.get("strength") or 1), max(1, task.scale // 2)) if choice in ("A", "B") else None
            answer = Answer(choice=choice, strength=strength, rationale=str(row.get("rationale") or ""))
            left = row.get("shown_left")
            values = {
                "item_id": item_id,
                "person_id": person.id,
                "lease_id": _done_lease(store, connection, item_id, person.id, "task", []),
                "purpose": "task",
                "choice": choice,
                "strength": strength,
                "item_a": reply_hash(item.replies[0].text),
                "item_b": reply_hash(item.replies[1].text),
                "shown_left": left if left in ("A", "B") else None,
                "shown_order": [],
                "answer": answer.stored(),
                "seconds": float(row["seconds"]) if row.get("seconds") is not None else None,
                "guideline_version": version,
                "key": key,
                "replaces": None,
            }
            insert_vote(connection, store.now(), values, rationale=answer.rationale)
            num += 1
    return num


def _done_lease(
    store: Store,
    connection: Connection,
    item_id: int,
    person_id: int,
    purpose: str,
    order: list[int],
    state: str = "done",
) -> int:
    """The lease that a vote given elsewhere would have had."""
    here = (t.leases.c.person_id == person_id) & (t.leases.c.item_id == item_id) & (t.leases.c.purpose == purpose)
    known = connection.execute(sa.select(t.leases.c.id, t.leases.c.state).where(here)).first()
    takes, took = state == "done", known is not None and known.state in ("open", "done")
    if purpose == "task" and takes != took:
        change = 1 if takes else -1
        connection.execute(t.queue.update().where(t.queue.c.item_id == item_id).values(taken=t.queue.c.taken + change))
    if known is not None:
        connection.execute(t.leases.update().where(here).values(state=state, shown_order=order))
        return int(known.id)
    now = store.now()
    position = connection.execute(
        sa.select(sa.func.count()).select_from(t.leases).where(t.leases.c.person_id == person_id)
    ).scalar_one()
    key = connection.execute(
        t.leases.insert().values(
            token=secrets.token_urlsafe(18),
            item_id=item_id,
            person_id=person_id,
            purpose=purpose,
            state=state,
            standing=False,
            position=position,
            shown_order=order,
            draft={},
            created_at=now,
            opened_at=now,
            expires_at=now,
        )
    ).inserted_primary_key
    assert key is not None
    return int(key[0])


# --- a dump made anew ---


def restore(store: Store, rows: Sequence[JsonDict], *, actor: int | None = None) -> dict[str, int]:
    """Makes the project of a dump in a store without items. Raises DataError where there are some."""
    counts = {"rows": len(rows), "items": 0, "votes": 0, "people": 0}
    with store.write() as connection:
        if connection.execute(sa.select(t.items.c.id)).first() is not None:
            raise DataError(
                "the store has items already", where="the dump", fix="restore into a new project file and store"
            )
        append_audit(connection, store.now(), actor, "restore", "", {"rows": len(rows)})
        people: dict[str, int] = {}
        items: dict[str, int] = {}
        votes: dict[str, int] = {}
        versions = 0
        for row in rows:
            values = {k: v for k, v in row.items() if k != "record"}
            if row["record"] == "guideline":
                versions += 1
                if versions > 1 or values["text"] != guideline(connection).text:
                    add_guideline(connection, store.now(), actor, values["text"])
            elif row["record"] == "person":
                known = by_name(connection, values["name"])
                person = known or add_person(connection, values["created_at"], values["name"], values["role"])
                people[values["name"]] = person.id
                kept = {k: values[k] for k in ("state", "qualified", "opted_out")}
                connection.execute(t.people.update().where(t.people.c.id == person.id).values(**kept))
                counts["people"] += 1
            elif row["record"] == "item":
                queue = values.pop("queue", None)
                values["prompt_id"] = values["prompt"]["id"]
                key = connection.execute(t.items.insert().values(**values)).inserted_primary_key
                assert key is not None
                items[values["sha256"]] = key[0]
                if queue is not None:
                    connection.execute(t.queue.insert().values(item_id=key[0], taken=0, **queue))
                added = connection.execute(sa.select(t.items).where(t.items.c.id == key[0])).one()
                append_audit(connection, store.now(), actor, "item", key[0], {"sha256": row_digest(added)})
                counts["items"] += 1
            elif row["record"] == "vote":
                votes[values["key"]] = _restore_vote(store, connection, values, items, people, votes)
                counts["votes"] += 1
        for person_id in (
            connection.execute(sa.select(t.people.c.id).where(t.people.c.state == "banned")).scalars().all()
        ):
            done = sa.select(t.leases.c.item_id).where(
                t.leases.c.person_id == person_id, t.leases.c.purpose == "task", t.leases.c.state == "done"
            )
            connection.execute(t.queue.update().where(t.queue.c.item_id.in_(done)).values(taken=t.queue.c.taken - 1))
    return counts


def _restore_vote(
    store: Store,
    connection: Connection,
    values: JsonDict,
    items: Mapping[str, int],
    people: Mapping[str, int],
    votes: Mapping[str, int],
) -> int:
    item_id, person_id = items[values.pop("item")], people[values.pop("person")]
    rationale, text = values.pop("rationale", ""), values.pop("text", "")
    created_at = values.pop("created_at")
    lease = None
    if values["purpose"] != "adjudication":
        state = {"skip": "skipped", "undone": "expired"}.get(values["choice"], "done")
        lease = _done_lease(store, connection, item_id, person_id, values["purpose"], values["shown_order"], state)
    replaces = votes[values.pop("replaces")] if values.get("replaces") is not None else values.pop("replaces", None)
    row = {**values, "item_id": item_id, "person_id": person_id, "lease_id": lease, "replaces": replaces}
    return insert_vote(connection, created_at, row, rationale=rationale, text=text)


def seed_items(store: Store) -> dict[str, int]:
    """Imports the project's own `data` where the store has no items yet; counts of all of it."""
    with store.read() as connection:
        if connection.execute(sa.select(t.items.c.id)).first() is not None:
            return {}
    total: dict[str, int] = {}
    for source in store.project.settings.data:
        here = store.project.directory / source
        named = str(here) if not is_world(source) and not Path(source).is_absolute() and here.is_file() else source
        for name, num in import_source(store, named).items():
            total[name] = total.get(name, 0) + num
    return total
