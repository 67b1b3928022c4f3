"""Exports what people said: every layout that trainers read, the vote table, Potato, and a dump without loss."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

import trimtab
from trimtab.core.errors import DataError
from trimtab.core.files import json_lines, replacing, write_whole, writing
from trimtab.core.types import JsonDict, Prompt
from trimtab.data.compared import to_comparison
from trimtab.data.files import NEEDS_APOSTROPHE
from trimtab.data.mistakes import Mistake
from trimtab.data.rows import to_explicit_pair, to_labelled_response
from trimtab.data.stepped import to_stepped_response
from trimtab.feedback import labels
from trimtab.feedback import tables as t
from trimtab.feedback.answers import WORDS
from trimtab.feedback.project import Project
from trimtab.feedback.restoring import COLUMNS
from trimtab.feedback.store import Store, digest, guideline, last_entry
from trimtab.feedback.votes import cast_votes, table_row

ExportLayout = Literal[
    "preference", "conversational", "implicit", "unpaired", "stepwise", "sft", "groups", "comparisons", "votes",
    "potato", "dump",
]  # fmt: skip
LAYOUTS: dict[ExportLayout, str] = {
    "preference": "prompt, chosen, rejected as text, with the soft label and the margin (TRL, explicit prompt)",
    "conversational": "the same with message lists",
    "implicit": "chosen and rejected as whole conversations (TRL, implicit prompt)",
    "unpaired": "prompt, completion, label true or false (KTO)",
    "stepwise": "prompt, completions, labels (process rewards)",
    "sft": "messages: what people wrote and edited",
    "groups": "prompt, responses and every ranking (K-wise)",
    "comparisons": "one vote a row: prompt, response_a, response_b, choice, annotator",
    "votes": "one vote a row with all that is known of it, gold, quiz, decisions and banned people too: studies",
    "potato": "Potato's instances with their label annotations",
    "dump": "guidelines, people without passwords, items and votes, to make the project again",
}


@dataclass(frozen=True)
class Exported:
    """Rows of a layout, and the card that says where they come from."""

    rows: list[JsonDict]
    card: JsonDict


def export(store: Store, layout: ExportLayout, *, split: labels.LabelSplit = "all") -> Exported:
    """The rows of a layout and their card. Raises DataError for a layout that the project cannot give."""
    settings = store.project.settings
    with store.read() as connection:
        rows, counts = _rows(store.project, connection, layout, split)
        version = guideline(connection).version
        _, head = last_entry(connection)
    card = {
        "project": settings.name,
        "layout": layout,
        "split": split,
        "counts": counts | {"rows": len(rows)},
        "labels": json.loads(json.dumps(dataclasses.asdict(settings.labels))),
        "settings_sha256": store.project.sha256,
        "guideline_version": version,
        "audit_head": head,
        "rows_sha256": digest(rows),
        "trimtab": trimtab.__version__,
    }
    return Exported(rows, card)


def write_export(store: Store, layout: ExportLayout, out: Path, *, split: labels.LabelSplit = "all") -> JsonDict:
    """Writes the rows in the format of `out` (.jsonl, .csv or .parquet) and the card beside them; returns the card."""
    exported = export(store, layout, split=split)
    content = to_bytes(exported.rows, out.name)
    with writing(str(out), out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as aside:
            aside.write_bytes(content)
        write_whole(out.with_name(out.name + ".card.json"), json.dumps(exported.card, indent=2) + "\n")
    return exported.card


def to_bytes(rows: Sequence[JsonDict], name: str) -> bytes:
    """The rows as the content of a file, in the format that its name ends with. Raises DataError for another ending."""
    writers: dict[str, Callable[[Sequence[JsonDict]], bytes]] = {
        ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet
    }  # fmt: skip
    for ending, write in writers.items():
        if name.endswith(ending):
            return write(rows)
    raise DataError(f"{name!r} is of no known type", where="the export", fix=f"end it with {', '.join(writers)}")


def _jsonl(rows: Sequence[JsonDict]) -> bytes:
    return json_lines(rows).encode()


def _csv(rows: Sequence[JsonDict]) -> bytes:
    """The rows as CSV. A cell that a spreadsheet would take for a formula begins with an apostrophe, which spreadsheets
    do not show and the data readers remove."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_cell(name) for name in names])
    writer.writerows([[_cell(row.get(name)) for name in names] for row in rows])
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    return "'" + text if NEEDS_APOSTROPHE.match(text) else text


def _parquet(rows: Sequence[JsonDict]) -> bytes:
    """The rows as Parquet, with every column that any row has. A column whose values have one shape (texts, numbers,
    lists of messages) keeps it; one whose objects differ from row to row, as answers and facts do, holds JSON text."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _of_one_shape([row.get(name) for row in rows]) for name in names}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _of_one_shape(values: list[Any]) -> list[Any]:
    shape: Any = None
    try:
        for value in values:
            shape = _common(shape, _shape(value))
    except ValueError:
        return [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
    return values


def _shape(value: Any) -> Any:
    """The shape of a value; None for a null. Raises ValueError for an object or list that Parquet cannot hold, or only
    by adding to it."""
    if isinstance(value, dict):
        if not value:
            raise ValueError
        return {name: _shape(member) for name, member in value.items()}
    if isinstance(value, list):
        shape: Any = None
        for member in value:
            shape = _common(shape, _shape(member))
        return [shape]
    return None if value is None else type(value)


def _common(a: Any, b: Any) -> Any:
    if a is None or b is None or a == b:
        return b if a is None else a
    if isinstance(a, list) and isinstance(b, list):
        return [_common(a[0], b[0])]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {name: _common(a[name], b[name]) for name in a}
    if isinstance(a, type) and isinstance(b, type) and {a, b} == {int, float}:
        return float
    raise ValueError


def _rows(
    project: Project, connection: Connection, layout: ExportLayout, split: labels.LabelSplit
) -> tuple[list[JsonDict], dict[str, int]]:
    settings = project.settings
    if layout in ("preference", "conversational", "implicit"):
        pairs, counts = labels.preference_pairs(connection, settings.labels, split)
        margins = bool(settings.labels.margins)
        rows = [_pair_row(pair, layout, margins) for pair in pairs]
        repeated = any(p.chosen.startswith(_text(p.prompt)) and p.rejected.startswith(_text(p.prompt)) for p in pairs)
        read = layout != "preference" or _read_back(rows, pairs, to_explicit_pair, "chosen", "rejected")
        if layout == "preference" and (repeated or not read):  # replies that begin with the prompt are refused as text
            rows = [_pair_row(pair, "conversational", margins) for pair in pairs]
        return rows, counts
    if layout == "unpaired":
        found, counts = labels.labelled_responses(connection, settings.labels, settings.task.rating_scale, split)
        rows = [{"prompt": _text(r.prompt), "completion": r.response, "label": r.label} for r in found]
        if not _read_back(rows, found, to_labelled_response, "response"):
            rows = [{"prompt": _messages(r.prompt), "completion": _said(r.response), "label": r.label} for r in found]
        return rows, counts
    if layout == "stepwise":
        stepped, counts = labels.stepped_responses(connection, settings.labels, split)
        rows = [{"prompt": _text(r.prompt), "completions": list(r.steps), "labels": list(r.labels)} for r in stepped]
        if not _read_back(rows, stepped, to_stepped_response):
            rows = [row | {"prompt": _messages(r.prompt)} for row, r in zip(rows, stepped, strict=True)]
        return rows, counts
    if layout == "sft":
        written, counts = labels.demonstrations(connection, settings.labels, split)
        rows = [{"messages": [*_messages(d.prompt), {"role": "assistant", "content": d.response}]} for d in written]
        return rows, counts
    if layout == "groups":
        return labels.groups(connection, settings.labels, split)
    if layout == "comparisons":
        compared, counts = labels.comparisons(connection, settings.labels, split)
        rows = [
            {
                "prompt": _messages(c.prompt),
                "id": c.prompt.id,
                "response_a": c.response_a,
                "response_b": c.response_b,
                "choice": c.choice,
                "annotator": c.annotator,
            }
            for c in compared
        ]
        if not _read_back(rows, compared, to_comparison, "response_a", "response_b"):
            sides = ("response_a", "response_b")
            rows = [
                row | {side: _said(getattr(c, side)) for side in sides} for row, c in zip(rows, compared, strict=True)
            ]
        return rows, counts
    if split != "all":
        raise DataError(f"the layout {layout!r} has no splits", where="the export", fix="export all of it")
    if layout == "votes":
        purposes = ("task", "gold", "quiz", "reask", "adjudication")
        return [table_row(c) for c in cast_votes(connection, purposes=purposes, banned=True)], {}
    if layout == "potato":
        return list(_potato(connection, settings.task.question)), {}
    return dump(connection), {}


def _pair_row(pair: Any, layout: str, with_margin: bool) -> JsonDict:
    chosen, rejected = _said(pair.chosen), _said(pair.rejected)
    row: JsonDict
    if layout == "preference":
        row = {"prompt": _text(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}
    elif layout == "conversational":
        row = {"prompt": _messages(pair.prompt), "chosen": chosen, "rejected": rejected}
    else:
        row = {"chosen": _messages(pair.prompt) + chosen, "rejected": _messages(pair.prompt) + rejected}
    row |= {"label": pair.label, "id": pair.prompt.id}
    return row | {"margin": pair.margin} if with_margin else row


def _messages(prompt: Prompt) -> list[JsonDict]:
    return [{"role": m.role, "content": m.content} for m in prompt.messages]


def _said(reply: str) -> list[JsonDict]:
    return [{"role": "assistant", "content": reply}]


def _text(prompt: Prompt) -> str:
    """A single question as it is; a conversation as a Human/Assistant transcript, which the readers know."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    names = {"user": "Human", "assistant": "Assistant"}
    turns = "".join(f"\n\n{names.get(m.role, m.role)}: {m.content}" for m in prompt.messages)
    return turns + "\n\nAssistant:"


def _read_back(
    rows: Sequence[JsonDict], records: Sequence[Any], convert: Callable[[JsonDict], Any], *replies: str
) -> bool:
    """Whether the data readers find in these rows the records that they were written from. A transcript cannot hold a
    system turn, nor a text with blanks around it or a speaker's name in it; all rows are then written as messages."""
    try:
        found = [convert(row) for row in rows]
    except Mistake:
        return False
    return all(
        here.prompt.messages == record.prompt.messages
        and all(getattr(here, name) == getattr(record, name) for name in replies)
        for here, record in zip(found, records, strict=True)
    )


def _potato(connection: Connection, question: str) -> Iterable[JsonDict]:
    """Rows as Potato writes them: the instance, then for each annotator the labels of each schema."""
    by_item: dict[str, JsonDict] = {}
    for cast in cast_votes(connection):
        row = by_item.setdefault(
            cast.item_sha256,
            {
                "id": cast.item_sha256,
                "text": [reply["text"] for reply in cast.replies] or cast.prompt["messages"][-1]["content"],
                "context": cast.prompt["messages"],
                "label_annotations": {},
            },
        )
        answer = table_row(cast)
        schema: JsonDict = {cast.kind: {str(answer["choice"]): cast.answer.strength or True}}
        if cast.answer.rationale:
            schema["rationale"] = {"text": cast.answer.rationale}
        row["label_annotations"][cast.annotator] = schema
    yield from by_item.values()


# --- without loss ---


def dump(connection: Connection) -> list[JsonDict]:
    """How many records there are, and every guideline, person (without password), item and vote;
    `restoring.restore` makes a project of them."""
    records = list(_records(connection))
    return [{"record": "dump", "version": 1, "records": len(records)}, *records]


def _records(connection: Connection) -> Iterator[JsonDict]:
    for row in connection.execute(sa.select(t.guidelines).order_by(t.guidelines.c.version)):
        yield {"record": "guideline", "version": row.version, "text": row.text}
    names = {}
    for row in connection.execute(sa.select(t.people).order_by(t.people.c.id)):
        names[row.id] = row.name
        yield {"record": "person", **{name: row._mapping[name] for name in COLUMNS["person"]}}
    hashes = {}
    queue = {row.item_id: row for row in connection.execute(sa.select(t.queue))}
    for row in connection.execute(sa.select(t.items).order_by(t.items.c.id)):
        hashes[row.id] = row.sha256
        item = {k: v for k, v in row._mapping.items() if k not in ("id", "prompt_id")}
        state = queue.get(row.id)
        if state is not None:
            item["queue"] = {k: v for k, v in state._mapping.items() if k not in ("item_id", "taken")}
        yield {"record": "item", **item}
    keys = {}
    written = {row.vote_id: row for row in connection.execute(sa.select(t.writings))}
    for row in connection.execute(sa.select(t.votes).order_by(t.votes.c.id)):
        keys[row.id] = row.key
        vote = {
            k: v
            for k, v in row._mapping.items()
            if k not in ("id", "item_id", "person_id", "lease_id", "replaces", "writing_sha256")
        }
        vote |= {"item": hashes[row.item_id], "person": names[row.person_id], "replaces": keys.get(row.replaces)}
        if row.id in written:
            vote |= {name: written[row.id]._mapping[name] for name in WORDS}
        yield {"record": "vote", **vote}
