"""The rows of a source under the names that items are read by: a file is recognised as the readers of training do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, JsonDict, Message, PreferencePair, Prompt, SteppedResponse
from trimtab.data.columns import CHANGES_A_ROW, KNOWN, plain_name
from trimtab.data.compared import Sides, sides_of
from trimtab.data.layouts import Loaded, OnBadRow, load
from trimtab.data.mistakes import Mistake, filled
from trimtab.data.ranked import REPLY_LISTS
from trimtab.data.recognise import recognise
from trimtab.data.rows import to_conversation, to_demonstration
from trimtab.feedback.project import Kind

_NUM_LOOKED_AT = 1000
"""Rows by which a layout is recognised."""
_JOINED = frozenset(
    {"messages of trees", "trees of messages", "steps of PRM800K", "steps of Math-Shepherd",
     "instructions with instances", "questions of several turns"}
)  # fmt: skip
"""Layouts of which no row is a question with its replies: the readers make records of them first."""
_RECORDS: Mapping[Kind, type] = {
    "pairs": PreferencePair,
    "ranking": PreferencePair,
    "rating": Demonstration,
    "edit": Demonstration,
    "steps": SteppedResponse,
    "demonstration": Prompt,
}
_OF_ITEM = ("slice", "sensitive", "author", "priority")
"""Columns that say something of an item, and not of its prompt alone."""
_NAMES = KNOWN | {*_OF_ITEM, "scores", "gold", "strength", "shown_left", "seconds", "rationale", "model", "model_a",
                  "model_b", "checkpoint", "sampling", "seed", "finish_reason"}  # fmt: skip
"""What `--columns` may name."""
_READ = {"prompt", "completion", "messages", "chosen", "rejected", "response_a", "response_b", "choice",
         "worked_answer"}  # fmt: skip
"""Names of a prompt, of its replies and of the choice between them."""


@dataclass(frozen=True)
class RowNames:
    """How the columns of a file are called here."""

    new: Mapping[str, str] = field(default_factory=dict)
    """For each renamed column, from its name in the file to its name here: for example {"question": "prompt"}."""
    layout: str = ""
    """The layout that was recognised; empty if none was."""

    @property
    def sides(self) -> Sides:
        """How the file names its two replies, which says what its choices mean."""
        return sides_of(self.new)

    @property
    def needs_records(self) -> bool:
        """Whether only the readers can tell what is a question and what are its replies."""
        return self.layout in _JOINED

    def named(self, row: JsonDict) -> JsonDict:
        """The row with the names that are used here. Raises Mistake if two of its columns would have one name."""
        found: JsonDict = {}
        for name, value in row.items():
            new = self.new.get(name, name)
            if filled(found.get(new)) and filled(value):
                fix = f"leave one of the two out with FILE?ignore={name}"
                raise Mistake("two_columns", f"{name!r} is read as {new!r}, and the row has both", fix)
            if new not in found or filled(value):
                found[new] = value
        return _of_prompts_file(found)


def names_in(rows: Sequence[JsonDict], *, where: str) -> RowNames:
    """How the columns of these rows with a prompt, replies and a choice are called here."""
    try:
        reading = recognise(rows[:_NUM_LOOKED_AT], where=where, kind=Prompt)
    except DataError:  # no layout of training, as of rows that only have replies to be compared
        return RowNames()
    names = {old: new for old, new in reading.names.items() if new in _READ}
    # a worked answer is a reply like any other to those who judge it
    names = {old: "completion" if new == "worked_answer" else new for old, new in names.items()}
    return RowNames(names, reading.layout.name)


def _of_prompts_file(row: JsonDict) -> JsonDict:
    """The row with what a file of prompts said of its prompt as an item. `trimtab generate` keeps that among the facts
    of the prompt, where nobody would use it, and from where the name of an author could not be deleted."""
    prompt = row.get("prompt")
    facts = prompt.get("facts") if isinstance(prompt, dict) else None
    said = {name: facts[name] for name in _OF_ITEM if name in facts} if isinstance(facts, dict) else {}
    if not said or facts is None or prompt is None:
        return row
    others = {name: fact for name, fact in facts.items() if name not in said}
    missing = {name: value for name, value in said.items() if not filled(row.get(name))}
    return {**row, **missing, "prompt": {**prompt, "facts": others}}


def records_of(source: str, kind: Kind, *, limit: int | None, on_bad_row: OnBadRow) -> Loaded[Any]:
    """The records of a source from which items of this kind can be made."""
    return load(_RECORDS[kind], source, limit=limit, on_bad_row=on_bad_row)


def questions_of(records: Sequence[Any]) -> list[tuple[Prompt, list[str]]]:
    """Each prompt of these records with all replies to it, or with the steps of one reply, in their order."""
    steps = [(record.prompt, list(record.steps)) for record in records if isinstance(record, SteppedResponse)]
    found: dict[tuple[Message, ...], tuple[Prompt, dict[str, None]]] = {}
    for record in records if not steps else ():
        prompt = record if isinstance(record, Prompt) else record.prompt
        _, texts = found.setdefault(prompt.messages, (prompt, {}))
        if isinstance(record, PreferencePair):
            texts |= dict.fromkeys((record.chosen, record.rejected))
        elif isinstance(record, Demonstration):
            texts[record.response] = None
    return steps or [(prompt, list(texts)) for prompt, texts in found.values()]


# --- one row ---


def refuse_unknown_names(columns: Mapping[str, str], *, where: str) -> None:
    """Raises DataError for a name that is to be given to a column and that nothing here is called."""
    for name in columns:
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, 1)
            raise DataError(
                f"--columns names a column {name!r}, and none is read under that name",
                where=where,
                fix=f"did you mean {close[0]!r}?" if close else "write NAME=COLUMN, such as prompt=question",
            )


def renamed(row: JsonDict, columns: Mapping[str, str]) -> JsonDict:
    """The row with its columns renamed by `columns`; others stay. Raises Mistake for a column that it does not have."""
    named = dict(row)
    for name, source in columns.items():
        parts = source.split("+")
        if absent := [part for part in parts if part not in row]:
            raise Mistake(
                "missing_field",
                f"no column is called {', '.join(map(repr, absent))}; there are {', '.join(row)}",
                "write --columns NAME=COLUMN with columns of the file",
            )
        if len(parts) == 1:
            named[name] = row[parts[0]]
        else:
            named[name] = "\n\n".join(str(row[part]) for part in parts if row[part] not in (None, ""))
    for source in columns.values():
        for part in source.split("+"):
            if part not in columns:  # it is there under its new name
                named.pop(part, None)
    return named


def with_plain_names(row: JsonDict) -> JsonDict:
    """The row with the columns that change what it means under their one name: "system" for "System". Raises Mistake if
    two of its columns are one."""
    named = dict(row)
    for name in row:
        plain = plain_name(name)
        if plain == name or plain not in CHANGES_A_ROW or not filled(row[name]):
            continue
        if filled(named.get(plain)):
            raise Mistake(
                "contradiction", f"{plain!r} and {name!r} are the same column", f"leave one out with FILE?ignore={name}"
            )
        named[plain] = named.pop(name)
    return named


def is_sample(row: JsonDict, kind: Kind) -> bool:
    """Whether a row holds one sampled reply, to be compared with the other replies to its prompt."""
    has_reply = any(row.get(name) is not None for name in ("response", "completion")) or _is_conversation(row)
    others = ("response_a", "responses", "chosen", "completions", "steps", "label")
    return has_reply and kind in ("pairs", "ranking") and not any(row.get(name) is not None for name in others)


def _is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation with its reply in it, if it has one."""
    beside = ("prompt", "completion", "response", *REPLY_LISTS)
    return row.get("messages") is not None and all(row.get(name) is None for name in beside)


def answered(row: JsonDict) -> Demonstration:
    """The prompt and the one reply of a row."""
    return to_conversation(row) if _is_conversation(row) else to_demonstration(row)
