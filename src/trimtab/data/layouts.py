"""The dataset layouts of the ecosystem, recognised by their columns and turned into records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, cast

from trimtab.data.rows import (
    Mistake,
    prompt_alone,
    prompt_of,
    to_comparison,
    to_conversation,
    to_conversation_prompt,
    to_demonstration,
    to_explicit_pair,
    to_implicit_pair,
    to_labelled_response,
    to_question,
    to_question_answer,
    to_stepped_response,
)
from trimtab.data.sources import (
    BadRow,
    is_feedback,
    is_world,
    read_feedback,
    read_rows,
    read_world,
    records_hash,
)
from trimtab.errors import DataError
from trimtab.types import (
    Comparison,
    Demonstration,
    JsonDict,
    LabelledResponse,
    PreferencePair,
    Prompt,
    Record,
    SteppedResponse,
)

NUM_SHOWN = 5
"""How many bad rows an error or a summary quotes; the others are counted."""

# Columns people have under other names, for the message when nothing fits.
_USUAL_NAMES = {
    "instruction": "prompt",
    "input": "prompt",
    "query": "prompt",
    "text": "prompt",
    "output": "completion",
    "answer": "completion",
    "reply": "completion",
    "conversations": "messages",
    "conversation": "messages",
    "output_1": "response_a",
    "output_2": "response_b",
    "winner": "chosen",
    "loser": "rejected",
}


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[Record]):
    """What `load` gives back."""

    records: list[Record]
    layout: str
    """Name of the layout that was recognised."""
    source: str
    sha256: str
    """See `Rows.sha256`; for a world, of the records."""
    counts: dict[str, int]
    """`rows` read, `records` kept, and `dropped_<mistake>` for each mistake that was met."""
    dropped: tuple[str, ...]
    """The first few dropped rows: where, and what was wrong."""


def load(
    kind: type[Record], source: str | Path, *, on_bad_row: Literal["stop", "drop"] = "stop", limit: int | None = None
) -> Loaded[Record]:
    """The records of a source (`sources.read_rows`, "world:…" or "feedback:…"), in whatever layout of `LAYOUTS` it has.

    With "stop" the first bad row raises DataError that counts all of them by mistake; with "drop" they are left out
    and counted. `limit` reads only the first so many rows. Raises DataError for a source that cannot be read, a layout
    that is not known or holds no such records, and when no row is left.
    """
    if is_world(source):
        return _load_world(kind, str(source), limit)
    if is_feedback(source):
        return _load_feedback(kind, str(source), limit)
    rows = read_rows(source, limit=limit)
    layout = recognise([row for _, row in rows.rows], where=rows.source) if rows.rows else None
    if layout is not None and kind not in layout.converters:
        raise DataError(
            f"the file holds {layout.name} ({layout.columns}), which give "
            f"{' and '.join(c.__name__ for c in layout.converters)}, not {kind.__name__}",
            where=rows.source,
            fix=layout.instead.get(kind, f"name a file in a layout that gives {kind.__name__}: {_layouts_for(kind)}"),
        )
    records: list[Record] = []
    bad = list(rows.bad)
    for where, row in rows.rows:
        assert layout is not None
        try:
            records.append(layout.converters[kind](row))
        except Mistake as mistake:
            bad.append(BadRow(where, mistake.kind, mistake.problem, mistake.fix))
    num_rows = len(rows.rows) + len(rows.bad)
    kinds = Counter(row.kind for row in bad)
    if bad and (on_bad_row == "stop" or not records):
        raise _all_mistakes(bad, kinds, num_rows)
    return Loaded(
        records=records,
        layout=layout.name if layout else "",
        source=rows.source,
        sha256=rows.sha256,
        counts={"rows": num_rows, "records": len(records)} | {f"dropped_{k}": n for k, n in sorted(kinds.items())},
        dropped=tuple(f"{row.where}: {row.problem}" for row in bad[:NUM_SHOWN]),
    )


def _load_world(kind: type[Record], source: str, limit: int | None) -> Loaded[Record]:
    if kind not in (Prompt, Demonstration):
        raise DataError(
            f"a world gives Prompt and Demonstration, not {kind.__name__}",
            where=source,
            fix="make comparisons with the compare stage, which asks the world's annotators",
        )
    records = cast("list[Record]", read_world(source, demonstrations=cast(type, kind) is Demonstration))[:limit]
    counts = {"rows": len(records), "records": len(records)}
    return Loaded(
        records=records, layout="a world", source=source, sha256=records_hash(records), counts=counts, dropped=()
    )


def _load_feedback(kind: type[Record], source: str, limit: int | None) -> Loaded[Record]:
    found, sha256, counts = read_feedback(kind, source)
    records = cast("list[Record]", found)[:limit]
    return Loaded(
        records=records,
        layout="a feedback project",
        source=source,
        sha256=sha256,
        counts=counts | {"records": len(records)},
        dropped=(),
    )


def _all_mistakes(bad: list[BadRow], kinds: Counter[str], num_rows: int) -> DataError:
    summary = ", ".join(f"{num} {kind}" for kind, num in kinds.most_common())
    quoted = [f"\n    {row.where}: {row.problem}" for row in bad[1:NUM_SHOWN]]
    more = [f"\n    and {len(bad) - NUM_SHOWN} more"] if len(bad) > NUM_SHOWN else []
    droppable = '; or leave such rows out with on_bad_row = "drop"' if len(bad) < num_rows else ""
    return DataError(
        f"{bad[0].problem}\n  {len(bad)} of {num_rows} rows cannot be used: {summary}" + "".join(quoted + more),
        where=bad[0].where,
        fix=f"{bad[0].fix}{droppable}",
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which files are laid out: how it is recognised and the records it can give."""

    name: str
    columns: str
    """As people are told."""
    matches: Callable[[frozenset[str], Mapping[str, Any]], bool]
    """Of the columns that most rows fill in, and one value of each."""
    converters: Mapping[type, Callable[[JsonDict], Any]]
    """The first is what the layout is for."""
    instead: Mapping[type, str] = field(default_factory=dict)
    """What to do when it is asked for a record that it looks like but does not hold."""


def _has(*names: str) -> Callable[[frozenset[str], Mapping[str, Any]], bool]:
    return lambda columns, _: columns.issuperset(names)


def _is_reply(columns: frozenset[str]) -> bool:
    return "prompt" in columns and bool(columns & {"completion", "response"})


_CHOSEN_IS_NO_DEMONSTRATION = (
    "the better of two replies need not be a good one; to imitate the chosen ones anyway, "
    "write a file with prompt and completion"
)

# The more specific comes first.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="comparisons",
        columns="prompt, response_a, response_b, choice",
        matches=_has("prompt", "response_a", "response_b", "choice"),
        converters={Comparison: to_comparison, Prompt: prompt_of(to_comparison)},
        instead={PreferencePair: "turn the votes into pairs first: trimtab.data.preferences.to_pairs"},
    ),
    Layout(
        name="stepwise replies",
        columns="prompt, completions, labels",
        matches=lambda columns, _: columns >= {"prompt", "labels"} and bool(columns & {"completions", "steps"}),
        converters={SteppedResponse: to_stepped_response, Prompt: prompt_of(to_stepped_response)},
    ),
    Layout(
        name="preference pairs",
        columns="prompt, chosen, rejected",
        matches=_has("prompt", "chosen", "rejected"),
        converters={PreferencePair: to_explicit_pair, Prompt: prompt_of(to_explicit_pair)},
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="preference pairs with an implicit prompt",
        columns="chosen, rejected that begin alike: texts, message lists or Human/Assistant transcripts",
        matches=_has("chosen", "rejected"),
        converters={PreferencePair: to_implicit_pair, Prompt: prompt_of(to_implicit_pair)},
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="replies with thumbs up or down",
        columns="prompt, completion, label (true or false)",
        matches=lambda columns, sample: _is_reply(columns) and isinstance(sample.get("label"), bool),
        converters={LabelledResponse: to_labelled_response, Prompt: prompt_of(to_labelled_response)},
        instead={Demonstration: "keep only the rows with label true and remove the column"},
    ),
    Layout(
        name="prompts with completions",
        columns="prompt, completion (or response)",
        matches=lambda columns, _: _is_reply(columns),
        converters={Demonstration: to_demonstration, Prompt: prompt_of(to_demonstration)},
    ),
    Layout(
        name="conversations",
        columns="messages",
        matches=_has("messages"),
        converters={Demonstration: to_conversation, Prompt: to_conversation_prompt},
    ),
    Layout(
        name="questions with answers",
        columns="question, answer",
        matches=_has("question", "answer"),
        converters={Demonstration: to_question_answer, Prompt: to_question},
    ),
    Layout(
        name="prompts",
        columns="prompt",
        matches=_has("prompt"),
        converters={Prompt: prompt_alone("prompt")},
        instead={Demonstration: "add a column 'completion' with the replies to imitate"},
    ),
)


def recognise(rows: list[JsonDict], *, where: str) -> Layout:
    """The first of `LAYOUTS` that fits the columns filled in by at least half of the rows.

    Half, so that a row that lacks something is reported as that row's mistake. Raises DataError that names the columns
    seen and the layouts known.
    """
    filled = Counter(name for row in rows for name, value in row.items() if value is not None)
    columns = frozenset(name for name, num in filled.items() if 2 * num >= len(rows))
    sample = {name: next(row[name] for row in rows if row.get(name) is not None) for name in columns}
    for layout in LAYOUTS:
        if layout.matches(columns, sample):
            return layout
    known = "; ".join(layout.columns for layout in LAYOUTS)
    renames = [f"{seen} to {name}" for seen, name in _USUAL_NAMES.items() if seen in columns]
    if any(name.startswith("{") or len(name) > 40 for name in columns) or where.endswith((".csv", ".csv.gz")):
        renames.append("(for a CSV file) the first line to the names of the columns")
    raise DataError(
        f"no known layout has the columns {', '.join(sorted(filled)) or '(none)'}; known are: {known}",
        where=where,
        fix=f"rename columns: {', '.join(renames)}" if renames else "rename the columns to those of a known layout",
    )


def _layouts_for(kind: type) -> str:
    return "; ".join(layout.columns for layout in LAYOUTS if kind in layout.converters) or "none does"
