"""The dataset layouts of the ecosystem, recognised by their columns and turned into records."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, cast

from trimtab.data.sources import BadRow, is_world, read_rows, read_world, records_hash
from trimtab.errors import DataError
from trimtab.types import (
    ROLES,
    Comparison,
    Demonstration,
    JsonDict,
    LabelledResponse,
    Message,
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
    """The records of a source (`sources.read_rows`, or "world:…"), whatever layout of those in `LAYOUTS` it has.

    With "stop" the first bad row raises DataError that counts all of them by mistake; with "drop" they are left out
    and counted. `limit` reads only the first so many rows. Raises DataError for a source that cannot be read, a layout
    that is not known or holds no such records, and when no row is left.
    """
    if is_world(source):
        return _load_world(kind, str(source), limit)
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
        except _Mistake as mistake:
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


# ---- one row: its parts -------------------------------------------------------------------------------------------


class _Mistake(Exception):
    """Something wrong with one row; `load` adds where the row is."""

    def __init__(self, kind: str, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.fix = kind, problem, fix


def _wrong_type(name: str, value: Any, wanted: str) -> NoReturn:
    raise _Mistake(
        "wrong_type", f"{name} is {_shown(value)} ({type(value).__name__}); {wanted} is needed", f"make {name} {wanted}"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _field(row: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of `names` that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise _Mistake(
        "missing_field",
        f"no value for {names[0]!r}; the row has {', '.join(k for k, v in row.items() if v is not None) or 'nothing'}",
        f"fill in {names[0]!r}",
    )


def _reply(name: str, value: Any) -> str:
    """A reply: text, or a list with one assistant message."""
    if isinstance(value, list):
        messages = _messages(name, value)
        if len(messages) != 1 or messages[0].role != "assistant":
            turns = ", ".join(m.role for m in messages) or "(none)"
            raise _Mistake(
                "no_assistant_turn",
                f"{name} has the turns {turns} where one assistant turn is needed",
                f"keep only the assistant's reply in {name}",
            )
        return _not_empty(name, messages[0].content)
    if not isinstance(value, str):
        _wrong_type(name, value, "text or a list with one assistant message")
    return _not_empty(name, value)


def _not_empty(name: str, text: str) -> str:
    if not text.strip():
        raise _Mistake("empty_response", f"{name} is empty", f"write a reply in {name}, or remove the row")
    return text


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        _wrong_type(name, value, "a list of messages")
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            _wrong_type(f"{name}[{i}]", turn, 'an object with "role" and "content"')
        if turn["role"] not in ROLES:
            raise _Mistake(
                "unknown_role",
                f"{name}[{i}] has the role {turn['role']!r}; roles are {', '.join(ROLES)}",
                "rename the roles of the file",
            )
        if not isinstance(turn["content"], str):
            _wrong_type(f"{name}[{i}].content", turn["content"], "text")
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages)


def _transcript(name: str, text: str) -> tuple[Message, ...] | None:
    """The turns of "\\n\\nHuman: … \\n\\nAssistant: …" (hh-rlhf), stripped of blanks; None for other text."""
    if not text.startswith("\n\nHuman:") and not (text.startswith("Human:") and "\n\nAssistant:" in text):
        return None
    _, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message("user" if who == "Human" else "assistant", said.strip()) for who, said in turns)


def _joined(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Neighbouring turns of one speaker as one: a few hh-rlhf transcripts have them, and most templates refuse them."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            joined[-1] = Message(message.role, f"{joined[-1].content}\n\n{message.content}")
        else:
            joined.append(message)
    return tuple(joined)


def _prompt(row: Mapping[str, Any], name: str = "prompt", *, facts: JsonDict | None = None) -> Prompt:
    """The prompt under `name`: text, a transcript, messages, or a `Prompt` as `to_dict` writes it."""
    value = _field(row, name)
    if isinstance(value, dict) and "messages" in value:
        messages = _messages(f"{name}.messages", value["messages"])
        return _make_prompt(messages, {**row, **value}, facts)
    if isinstance(value, str):
        turns = _transcript(name, value)
        if turns is None:
            turns = (Message("user", value),)
        elif turns[-1] == Message("assistant", ""):  # "…\n\nAssistant:" only says who speaks next
            turns = turns[:-1]
        messages = _joined(turns)
    elif isinstance(value, list):
        messages = _messages(name, value)
    else:
        _wrong_type(name, value, "text or a list of messages")
    return _make_prompt(messages, row, facts)


def _make_prompt(messages: tuple[Message, ...], row: Mapping[str, Any], facts: JsonDict | None = None) -> Prompt:
    if not messages or messages[-1].role == "assistant" or not any(m.content.strip() for m in messages):
        raise _Mistake(
            "no_prompt",
            "the prompt is empty"
            if not messages or messages[-1].role != "assistant"
            else "the prompt ends with an assistant turn, so it is not the assistant's turn to speak",
            "end the prompt with a user turn that says something",
        )
    given = row.get("facts") or {}
    if not isinstance(given, dict):
        _wrong_type("facts", given, "an object")
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        _wrong_type("id", name, "text or a whole number")
    return Prompt(messages=messages, id="" if name is None else str(name), facts={**(facts or {}), **given})


def _split_reply(name: str, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """A conversation as what comes before its last turn, and that turn, which must be the assistant's."""
    if not messages or messages[-1].role != "assistant":
        raise _Mistake(
            "no_assistant_turn",
            f"{name} ends with {f'a {messages[-1].role} turn' if messages else 'nothing'}: there is no reply",
            f"end {name} with an assistant turn",
        )
    return messages[:-1], _not_empty(name, messages[-1].content)


def _flags(name: str, value: Any) -> tuple[bool, ...]:
    if not isinstance(value, list) or not all(isinstance(v, bool) for v in value):
        _wrong_type(name, value, "a list of true and false")
    return tuple(value)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _wrong_type(name, value, "a finite number")
    return float(value)


# ---- one row: its record ------------------------------------------------------------------------------------------


def _pair(row: JsonDict, prompt: Prompt, chosen: str, rejected: str) -> PreferencePair:
    if chosen == rejected:
        raise _Mistake(
            "identical_pair", f"chosen and rejected are the same: {_shown(chosen)}", "remove the row: it says nothing"
        )
    # Only a fraction is a probability: an integer label is some code of its source.
    label = _number(row, "label") if isinstance(row.get("label"), float) else 1.0
    assert label is not None
    if not 0.5 <= label <= 1:
        raise _Mistake(
            "label_out_of_range",
            f"label is {label}, but the probability that chosen is preferred is from 0.5 to 1",
            "swap chosen and rejected where it is below 0.5, and give a probability, not a score",
        )
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=_number(row, "margin"), label=label)


def _explicit_pair(row: JsonDict) -> PreferencePair:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1:
        # Some files repeat the prompt inside both conversations, sometimes after a system turn that it lacks.
        whole = _implicit_pair(row)
        stated = _prompt(row)
        if stated.messages != whole.prompt.messages[-len(stated.messages) :]:
            raise _Mistake(
                "no_shared_prompt",
                f"chosen and rejected begin with another conversation than prompt ({_shown(stated.text)})",
                "keep only the reply in chosen and rejected, or make the prompt the same",
            )
        return replace(whole, prompt=_make_prompt(whole.prompt.messages, row, dict(stated.facts)))
    return _pair(row, _prompt(row), _reply("chosen", chosen), _reply("rejected", rejected))


def _implicit_pair(row: JsonDict) -> PreferencePair:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns, other_turns = _transcript("chosen", chosen), _transcript("rejected", rejected)
        if turns is None or other_turns is None:
            return _plain_text_pair(row, chosen, rejected)
    else:
        turns, other_turns = _messages("chosen", chosen), _messages("rejected", rejected)
    before, reply = _split_reply("chosen", turns)
    other_before, other_reply = _split_reply("rejected", other_turns)
    if before != other_before:
        at = _num_shared(before, other_before)
        raise _Mistake(
            "no_shared_prompt",
            f"chosen and rejected part at turn {at + 1}, before the last reply "
            f"(they have {len(turns)} and {len(other_turns)} turns)",
            "give both the same conversation up to the last reply, or remove the row",
        )
    messages = _joined(before) if isinstance(chosen, str) else before
    return _pair(row, _make_prompt(messages, row), reply, other_reply)


def _num_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _plain_text_pair(row: JsonDict, chosen: str, rejected: str) -> PreferencePair:
    """Two texts that begin alike: the prompt is what they share, up to the last blank so that no word is cut."""
    if chosen == rejected:
        return _pair(row, Prompt(messages=()), chosen, rejected)
    shared = chosen[: _num_shared(chosen, rejected)]
    cut = max((m.end() for m in re.finditer(r"\s+", shared)), default=0)
    if not shared[:cut].strip():
        raise _Mistake(
            "no_shared_prompt",
            "chosen and rejected do not begin alike, and there is no prompt",
            "add a column 'prompt', or let both begin with it",
        )
    prompt = _make_prompt((Message("user", shared[:cut].rstrip()),), row)
    return _pair(row, prompt, _not_empty("chosen", chosen[cut:]), _not_empty("rejected", rejected[cut:]))


def _demonstration(row: JsonDict) -> Demonstration:
    return Demonstration(prompt=_prompt(row), response=_reply("completion", _field(row, "completion", "response")))


def _question_answer(row: JsonDict) -> Demonstration:
    return Demonstration(
        prompt=_prompt(row, "question", facts=_answer(row)), response=_reply("answer", _field(row, "answer"))
    )


def _answer(row: JsonDict) -> JsonDict:
    """The final answer, for a verifier: what follows the last "####" (gsm8k), or else all of it."""
    return {"answer": str(_field(row, "answer")).rpartition("####")[2].strip()}


def _conversation(row: JsonDict) -> Demonstration:
    messages, reply = _split_reply("messages", _messages("messages", _field(row, "messages")))
    return Demonstration(prompt=_make_prompt(messages, row), response=reply)


def _labelled(row: JsonDict) -> LabelledResponse:
    label = _field(row, "label")
    if not isinstance(label, bool):
        _wrong_type("label", label, "true or false")
    reply = _reply("completion", _field(row, "completion", "response"))
    return LabelledResponse(prompt=_prompt(row), response=reply, label=label)


def _stepped(row: JsonDict) -> SteppedResponse:
    steps = _field(row, "completions", "steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        _wrong_type("completions", steps, "a list of texts")
    labels = _flags("labels", _field(row, "labels"))
    if not steps or not all(step.strip() for step in steps):
        raise _Mistake("empty_response", "there is no step, or an empty one", "write every step, or remove the row")
    if len(steps) != len(labels):
        raise _Mistake(
            "wrong_number_of_labels", f"{len(steps)} steps with {len(labels)} labels", "give each step one label"
        )
    return SteppedResponse(prompt=_prompt(row), steps=tuple(steps), labels=labels)


def _comparison(row: JsonDict) -> Comparison:
    choice = _field(row, "choice")
    if choice not in ("A", "B", "tie"):
        raise _Mistake(
            "unknown_choice", f"a comparison labelled {choice!r}; labels are 'A', 'B' and 'tie'", "correct the label"
        )
    response_a = _reply("response_a", _field(row, "response_a"))
    response_b = _reply("response_b", _field(row, "response_b"))
    if response_a == response_b and choice != "tie":
        raise _Mistake("identical_pair", f"{choice} is preferred, but both replies are the same", "remove the row")
    annotator = str(row["annotator"]) if row.get("annotator") is not None else ""
    return Comparison(
        prompt=_prompt(row), response_a=response_a, response_b=response_b, choice=choice, annotator=annotator
    )


def _prompt_of(convert: Callable[[JsonDict], Any]) -> Callable[[JsonDict], Prompt]:
    return lambda row: cast(Prompt, convert(row).prompt)


def _prompt_alone(name: str) -> Callable[[JsonDict], Prompt]:
    """The prompt under `name`; every other column of the file becomes one of its facts, for verifiers."""

    def convert(row: JsonDict) -> Prompt:
        others = {k: v for k, v in row.items() if k not in (name, "id", "facts") and v is not None}
        facts: JsonDict = json.loads(json.dumps(others, default=str))
        return _prompt(row, name, facts=facts)

    return convert


def _question(row: JsonDict) -> Prompt:
    prompt = _prompt_alone("question")(row)
    return replace(prompt, facts={**prompt.facts, **_answer(row)})


def _conversation_prompt(row: JsonDict) -> Prompt:
    """A conversation up to the last turn that is not the assistant's: a reply at the end is not part of the prompt."""
    messages = _messages("messages", _field(row, "messages"))
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    others = {k: v for k, v in row.items() if k not in ("messages", "id", "facts") and v is not None}
    facts: JsonDict = json.loads(json.dumps(others, default=str))
    return _make_prompt(messages, row, facts)


# ---- the table ----------------------------------------------------------------------------------------------------


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
        converters={Comparison: _comparison, Prompt: _prompt_of(_comparison)},
        instead={PreferencePair: "turn the votes into pairs first: trimtab.data.preferences.to_pairs"},
    ),
    Layout(
        name="stepwise replies",
        columns="prompt, completions, labels",
        matches=lambda columns, _: columns >= {"prompt", "labels"} and bool(columns & {"completions", "steps"}),
        converters={SteppedResponse: _stepped, Prompt: _prompt_of(_stepped)},
    ),
    Layout(
        name="preference pairs",
        columns="prompt, chosen, rejected",
        matches=_has("prompt", "chosen", "rejected"),
        converters={PreferencePair: _explicit_pair, Prompt: _prompt_of(_explicit_pair)},
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="preference pairs with an implicit prompt",
        columns="chosen, rejected that begin alike: texts, message lists or Human/Assistant transcripts",
        matches=_has("chosen", "rejected"),
        converters={PreferencePair: _implicit_pair, Prompt: _prompt_of(_implicit_pair)},
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="replies with thumbs up or down",
        columns="prompt, completion, label (true or false)",
        matches=lambda columns, sample: _is_reply(columns) and isinstance(sample.get("label"), bool),
        converters={LabelledResponse: _labelled, Prompt: _prompt_of(_labelled)},
        instead={Demonstration: "keep only the rows with label true and remove the column"},
    ),
    Layout(
        name="prompts with completions",
        columns="prompt, completion (or response)",
        matches=lambda columns, _: _is_reply(columns),
        converters={Demonstration: _demonstration, Prompt: _prompt_of(_demonstration)},
    ),
    Layout(
        name="conversations",
        columns="messages",
        matches=_has("messages"),
        converters={Demonstration: _conversation, Prompt: _conversation_prompt},
    ),
    Layout(
        name="questions with answers",
        columns="question, answer",
        matches=_has("question", "answer"),
        converters={Demonstration: _question_answer, Prompt: _question},
    ),
    Layout(
        name="prompts",
        columns="prompt",
        matches=_has("prompt"),
        converters={Prompt: _prompt_alone("prompt")},
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
