"""Recognises the layout of a file by its columns, and refuses files that would be read wrongly without a warning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, JsonDict, LabelledResponse, PreferencePair, Prompt, RatedResponse
from trimtab.data.columns import (
    CHANGES_A_ROW,
    COMPLETION,
    LABEL,
    PART_OF_PROMPT,
    PROMPT,
    RATING,
    SIDES,
    is_option,
    judges_replies,
    names_of,
    plain_name,
    tells_background,
    tells_judge,
    tells_reasoning,
    tells_system,
    thumb,
)
from trimtab.data.compared import sides_of
from trimtab.data.formats import LAYOUTS, Layout, LayoutReading
from trimtab.data.messages import conversation_in
from trimtab.data.mistakes import Mistake, filled, shown
from trimtab.data.transcripts import transcript

_NUM_COMPARED = 50
"""How many rows are searched for a column that may hold the prompt, and for replies that repeat it."""
_NUM_WORDS = 4
"""The least words of a text that a question may be about."""
_ADDRESSES = re.compile(r"\s*(?:You are|You're|Act as|Your task is|As an AI)\b")
"""How a system turn begins, whatever its column is called."""
_SIDE_NAMES = frozenset(name for pair in SIDES for name in pair)
_ABOUT = frozenset(
    {"id", "source", "dataset", "category", "subset", "split", "type", "task", "topic", "domain", "language", "lang",
     "model", "url", "tags", "tag", "author", "license", "label", "margin", "annotator", "timestamp", "date"}
)  # fmt: skip
"""Columns of text that are about a row and not part of its content."""


def recognise(rows: Sequence[JsonDict], *, where: str, kind: type | None = None) -> LayoutReading:
    """The first of `LAYOUTS` that fits the columns filled in by at least half of the rows, read as records of `kind`.

    Half is enough, so that a row that lacks a value is reported as that row's mistake. Without a kind, the kind that
    the layout is for is taken. Raises DataError if no layout fits (with the columns seen and the layouts known), if
    the layout does not give this kind (with what it gives), or if a column would change what the rows mean.
    """
    filled_in = Counter(name for row in rows for name, value in row.items() if value is not None)
    columns = frozenset(name for name, num in filled_in.items() if 2 * num >= len(rows))
    sample = {name: _first_value(rows, name) for name in columns}
    names = names_of(columns, sample, frozenset(filled_in) - columns)
    plain = {names.get(name, name): _value(value) for name, value in sample.items()}
    layout = _layout(frozenset(plain), plain, kind)
    if layout is None:
        raise _unknown(columns, sorted(filled_in), where)
    kind = kind or next(iter(layout.converters))
    if kind not in layout.converters:
        raise _other_kind(layout, kind, names, plain, where)
    convert = layout.converters[kind]
    if layout.takes_sides:
        sides, told = sides_of(names), convert
        convert = lambda row: told(row, sides)  # noqa: E731
    uses = _used_by(layout, kind, frozenset(plain))
    seen = frozenset(name for row in rows for name, value in row.items() if filled(value))
    reading = LayoutReading(layout=layout, kind=kind, names=names, convert=convert, uses=uses, seen=seen)
    for problem, fix in () if kind is Prompt else _misread(reading, rows, columns, plain):
        raise DataError(problem, where=where, fix=named(fix, where, names))
    return reading


def with_new_columns(reading: LayoutReading, row: JsonDict, *, where: str, source: str) -> LayoutReading:
    """The reading after a row that is the first to fill in a column. Raises DataError if this column would have been
    refused among the rows that showed the layout: what judges replies, or may be a second prompt or reply."""
    new = frozenset(name for name in row.keys() - reading.seen if filled(row[name]))
    if not new:
        return reading
    spelled = {name: plain_name(name) for name in new}
    names = {name: plain for name, plain in spelled.items() if plain != name and plain in CHANGES_A_ROW}
    reading = replace(reading, names={**names, **reading.names}, seen=reading.seen | new)
    left = {name: plain for name, plain in spelled.items() if name not in reading.used}
    for problem, fix in () if reading.kind is Prompt else _misread_columns(reading, [row], left):
        raise DataError(problem, where=where, fix=named(fix, source, reading.names))
    return reading


def _first_value(rows: Sequence[JsonDict], name: str) -> Any:
    """The first value of a column that is not empty, or an empty one if there is no other."""
    given = [row[name] for row in rows if row.get(name) is not None]
    return next(filter(filled, given), given[0])


def _used_by(layout: Layout, kind: type, columns: frozenset[str]) -> frozenset[str]:
    """The columns that become part of the records. If a row is read for its prompt alone, its replies do not."""
    always = {"id", "facts", *PART_OF_PROMPT}
    if "trees" in layout.name:  # a row that was joined from several has no other columns
        return layout.uses | always | {"prompt", "message_tree_id"}
    asked = {"messages"} if layout.name == "conversations" or "prompt" not in columns else {"prompt"}
    if kind is not Prompt:
        return layout.uses | always | asked
    hidden = set() if "prompt" in columns or "messages" in columns else {"chosen", "rejected"}
    return frozenset(always | asked | hidden)


def named(fix: str, source: str, names: Mapping[str, str]) -> str:
    """The fix with `source` in place of FILE, and with columns by the names that they have in the file."""
    old = {new: name for name, new in names.items()}
    before, mark, rest = fix.partition("FILE?ignore=")
    if mark:
        end = next((i for i, c in enumerate(rest) if c in " ;)"), len(rest))
        end = end - 1 if rest[:end].endswith(",") else end
        columns = ",".join(old.get(name, name) for name in rest[:end].split(","))
        fix = f"{before}FILE?ignore={columns}{rest[end:]}"
    place = source.partition(", row ")[0]
    return fix.replace("FILE?", place + ("&" if "?" in place else "?"))


def _value(value: Any) -> Any:
    try:
        return conversation_in(value, value) if isinstance(value, str) else value
    except Mistake:
        return value


def _layout(columns: frozenset[str], sample: Mapping[str, Any], kind: type | None) -> Layout | None:
    fitting = [layout for layout in LAYOUTS if layout.matches(columns, sample)]
    if kind is Demonstration and "messages" in columns and PreferencePair in (fitting or LAYOUTS)[0].converters:
        fitting = [layout for layout in fitting if layout.name == "conversations"]  # beside chosen and rejected
    if kind is RatedResponse:  # the same file may be demonstrations
        fitting = [layout for layout in fitting if kind in layout.converters] or fitting
    return fitting[0] if fitting else None


# ---- refusals -------------------------------------------------------------------------------------------------------


def _unknown(columns: frozenset[str], seen: Sequence[str], where: str) -> DataError:
    known = "; ".join(layout.columns for layout in LAYOUTS)
    if "text" in columns:
        fix = "plain text is for the pretrain stage; other stages need prompts and replies "
        fix += "(FILE?columns=text:prompt reads every text as a prompt)"
    elif "turns" in columns:
        fix = (
            "turns holds what a person says turn after turn, and the replies between are not in the file; as questions "
        )
        fix += (
            "such rows have a question_id, or write the first turn as the prompt: jq -c '.prompt = .turns[0]' (behind "
        )
        fix += "zcat for a .gz file)"
    elif any(name.startswith("{") or len(name) > 40 for name in columns) or ".csv" in where or ".tsv" in where:
        fix = (
            "make the first line of the file the names of its columns, such as prompt,chosen,rejected; a column under "
        )
        fix += "another name is named with FILE?columns=NAME:prompt"
    else:
        fix = "say which column is which, for instance FILE?columns=NAME:prompt,OTHER:completion"
    return DataError(
        f"no known layout has the columns {', '.join(seen) or '(none)'}; known are: {known}",
        where=where,
        fix=named(fix, where, {}),
    )


def _other_kind(
    layout: Layout, kind: type, names: Mapping[str, str], sample: Mapping[str, Any], where: str
) -> DataError:
    old = {new: name for name, new in names.items()}
    given = " and ".join(c.__name__ for c in layout.converters)
    fitting = "; ".join(layout.columns for layout in LAYOUTS if kind in layout.converters) or "none does"
    fix = layout.instead.get(kind, f"name a file in a layout that gives {kind.__name__}: {fitting}")
    label = old.get("label", "label")
    judged = next(
        (name for name in ("label", *RATING, *filter(judges_replies, sorted(sample))) if name in sample), None
    )
    if kind in (LabelledResponse, PreferencePair) and layout.name == "prompts with completions" and judged is not None:
        fix = (
            f"if {old.get(judged, judged)} ({shown(sample[judged])}) judges the replies, write true for a good one and "
        )
        fix += "false for a bad one in a column 'label', which losses of single replies (such as 'kto') learn from"
    if kind is PreferencePair and "response_b" in sample:
        fix = "say which reply was preferred: a column 'choice' with A, B or tie"
    if layout.name == "prompts" and kind is Demonstration:
        for name in ("answer", "chosen"):
            if name in sample:
                fix = f"if {name} holds the reply to imitate, say so: FILE?columns={name}:completion"
    return DataError(
        f"the file holds {layout.name} ({layout.columns}), which give {given}, not {kind.__name__}",
        where=where,
        fix=named(fix.replace("{label}", label), where, {}),
    )


def _misread(
    reading: LayoutReading, rows: Sequence[JsonDict], columns: frozenset[str], sample: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The problems that would make the file be read wrongly without a warning, each with its fix."""
    # From all rows: a thumb, a rating or a question that only few rows have still says something of those.
    left = {name: plain_name(name) for row in rows for name in row if name not in reading.used}
    first = rows[:_NUM_COMPARED]
    if reading.layout.name.startswith("preference pairs"):
        common = {name: plain for name, plain in left.items() if name in columns}
        yield from _hidden_prompts(reading, first, common, sample)
    yield from _misread_columns(reading, rows, left)
    if reading.layout.name in ("preference pairs", "prompts with completions"):
        yield from _repeated_prompts(reading, first)


def _misread_columns(
    reading: LayoutReading, rows: Sequence[JsonDict], left: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """The problems of columns that are not used, `left`, each with its fix."""
    if reading.kind is Demonstration:
        yield from _judged(left, rows)
    if reading.kind in (Demonstration, LabelledResponse, RatedResponse):
        for name, plain in left.items():
            if plain in COMPLETION[:4] and any(_is_other_text(reading, row, name) for row in rows):
                yield (
                    f"two columns may be the reply: {name!r} is filled in too",
                    f"leave one of them out, for instance FILE?ignore={name}",
                )
    if reading.kind is PreferencePair and reading.layout.name.startswith("preference pairs"):
        sides = [name for name, plain in left.items() if plain in _SIDE_NAMES]
        for name in (name for name in sides if any(_is_other_text(reading, row, name) for row in rows)):
            yield (
                f"beside chosen and rejected, {name} may be one of the replies: it is filled in too",
                "if chosen and rejected only name a reply, write which one in a column 'choice' and remove them; if "
                f"they hold the replies, leave the others out with FILE?ignore={','.join(sides)}",
            )
            break
    if reading.kind in (Demonstration, LabelledResponse, RatedResponse):
        yield from _reasoning(reading, rows, left)
    yield from _second_questions(reading, rows, left)
    yield from _other_systems(reading, rows, left)


def _reasoning(reading: LayoutReading, rows: Sequence[JsonDict], left: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in filter(tells_reasoning, left):
        if row := _first_unstated(reading, rows, name):
            yield (
                f"{name} holds {shown(row[name])}, reasoning apart from the reply, which would not be learnt",
                "write it into the reply as the model's chat template does, for instance <think>…</think> before the "
                f"answer, or leave it out with FILE?ignore={name}",
            )


def _other_systems(
    reading: LayoutReading, rows: Sequence[JsonDict], left: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for name in left:
        row = _first_unstated(reading, rows, name) if not tells_judge(name) else None
        if row is not None and (tells_system(name) or _ADDRESSES.match(str(row[name]))):
            yield (
                f"{name} holds {shown(row[name])}, which may be the system turn, and would not be used",
                f"say so with FILE?columns={name}:system, or leave it out with FILE?ignore={name}",
            )


def _first_unstated(reading: LayoutReading, rows: Sequence[JsonDict], name: str) -> JsonDict | None:
    """The first row in which a column holds a text of several words that no text that is used states; None without
    one."""
    for row in (row for row in rows if filled(row.get(name))):
        texts = [text.strip() for text in _texts(row[name]) if len(text.split()) >= _NUM_WORDS]
        said = _used_texts(reading, row) if texts else []
        if any(not any(text in one for one in said) for text in texts):
            return row
    return None


def _is_other_text(reading: LayoutReading, row: JsonDict, name: str) -> bool:
    """Whether a column holds something that is none of the texts that are used."""
    texts = list(_texts(_value(row.get(name))))
    said = {text.strip() for text in _used_texts(reading, row)}
    return not said.issuperset(text.strip() for text in texts) if texts else filled(row.get(name))


def _judged(left: Mapping[str, str], rows: Sequence[JsonDict]) -> Iterator[tuple[str, str]]:
    """Columns that label or rate the replies: they say that not all replies are to be imitated."""
    found = [name for name, plain in left.items() if plain in LABEL]
    found = [name for name in found if left[name] in LABEL[:2] or _judges(rows, name)]
    rated = [name for name, plain in left.items() if plain in RATING or (plain not in LABEL and judges_replies(name))]
    found += [name for name in rated if _judges(rows, name)]
    for name in found:
        value = next(_values(rows, name), None)
        if value is not None and _judges(rows, name):
            yield (
                f"{name} is {shown(value)}: it judges the replies, and all of them would be imitated",
                f"keep only the rows whose replies are good enough, and leave the column out with FILE?ignore={name}",
            )
        elif value is not None:
            yield (
                f"{name} is {shown(value)}: if it judges the replies, not all of them are to be imitated",
                f"leave it out with FILE?ignore={name} if it is about something else; if not, keep only the rows whose "
                f"replies are good enough and then leave it out",
            )


_GRADE = re.compile(r"[A-F][-+]?")
_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)(e[-+]?\d+)? *(/ *\d+|%|stars?)?", re.IGNORECASE)
_VERDICTS = frozenset({"poor", "fair", "average", "mediocre", "excellent", "great", "perfect", "terrible", "low",
                       "medium", "high", "very good", "very bad", "very poor", "weak", "strong", "acceptable",
                       "unacceptable", "helpful", "unhelpful", "not helpful", "harmful", "harmless", "safe", "unsafe",
                       "toxic", "pass", "passed", "fail", "failed", "valid", "invalid"})  # fmt: skip
"""Words that judge a reply, besides thumbs."""
_VERDICT_FIELDS = ("value", "rating", "score", "label")
"""Fields of an object that hold a judgement: {"user_id": "ann", "value": 4}."""
_NO_VALUE = frozenset({"", "n/a", "na", "nan", "none", "null", "unknown"})


def _judges(rows: Sequence[JsonDict], name: str) -> bool:
    """Whether at least half of the values of a column are numbers ("4", "4/5", "4 stars"), thumbs or words such as
    "poor"; in a column called "grade" also letters ("B+")."""
    graded = plain_name(name) == "grade"
    values = list(_values(rows, name))
    found = [_is_judgement(v) or (graded and bool(_GRADE.fullmatch(str(v).strip()))) for v in values]
    return bool(found) and 2 * sum(found) >= len(found)


def _values(rows: Sequence[JsonDict], name: str) -> Iterator[Any]:
    """The values of a column that are not missing, empty, or a word such as "N/A", one by one if several people judged:
    [{"user_id": "ann", "value": 4}, {"user_id": "bob", "value": 5}] holds 4 and 5."""
    for value in chain.from_iterable(_judgements(row[name]) for row in rows if filled(row.get(name))):
        if not isinstance(value, str) or value.strip().lower() not in _NO_VALUE:
            yield value


def _judgements(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from chain.from_iterable(map(_judgements, value))
    elif isinstance(value, dict):
        fields = () if "role" in value or "from" in value else _VERDICT_FIELDS
        yield from (value[field] for field in fields if filled(value.get(field)))
    else:
        yield value


def _is_judgement(value: Any) -> bool:
    if isinstance(value, str):
        word = value.strip()
        return thumb(word) is not None or word.lower() in _VERDICTS or bool(_NUMBER.fullmatch(word))
    return isinstance(value, int | float)


def _second_questions(
    reading: LayoutReading, rows: Sequence[JsonDict], left: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for name in left:
        asked = [row for row in rows if any(map(str.strip, _asks(name, row.get(name))))]
        missing = [row for row in asked if is_unstated(name, row[name], _used_texts(reading, row))]
        if missing and 2 * len(missing) >= len(asked):
            alike = [other for other in left if is_option(other)] if is_option(name) else [name]
            yield (
                f"{name} holds {shown(missing[0][name])}, which is no part of the prompt, and would not be used",
                f"leave it out with FILE?ignore={','.join(alike)}, or put it into the prompt"
                + (f": FILE?columns={name}:context" if tells_background(name) else ""),
            )


def is_unstated(name: str, value: Any, said: Sequence[str]) -> bool:
    """Whether a column holds a question, or options of one, that none of the texts `said` states whole. A column `text`
    may hold prompt and reply together."""
    asked = _asks(name, value)
    if plain_name(name) == "text":
        asked = [text for text in asked if sum(one.strip() in text for one in said if one.strip()) < 2]
    return any(not any(text.strip() in one for one in said) for text in asked)


def _asks(name: str, value: Any) -> list[str]:
    """The texts of a column if its name is that of a question, of its options, or of a text that it may be about; else
    none. A short text such as a title or the name of a file is no text that a question is about."""
    if tells_background(name):
        return [text for text in _texts(value) if len(text.split()) >= _NUM_WORDS]
    if is_option(name):
        return list(_texts(value))
    plain = plain_name(name)
    return [value] if isinstance(value, str) and plain in PROMPT and plain not in PART_OF_PROMPT else []


def _used_texts(reading: LayoutReading, row: JsonDict) -> list[str]:
    return [said for name, value in row.items() if name in reading.used for said in _texts(_value(value))]


def _texts(value: Any) -> Iterator[str]:
    """The texts that a value is or holds, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _hidden_prompts(
    reading: LayoutReading, rows: Sequence[JsonDict], left: Mapping[str, str], sample: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Columns that may hold the prompt of two plain texts, whose common beginning would be taken for the prompt."""
    if "prompt" in sample or not isinstance(sample.get("chosen"), str) or _is_transcript(sample["chosen"]):
        return
    for name, plain in left.items():
        texts = [row[name] for row in rows if isinstance(row.get(name), str)]
        about = plain in _ABOUT or plain.endswith(("_id", "_model", "_source")) or plain.startswith(("model", "source"))
        if texts and not about and sum(" " in text.strip() for text in texts) * 2 >= len(texts):
            yield (
                f"there is no column 'prompt', and {name} holds text ({shown(texts[0])}) that may be it",
                f"say so with FILE?columns={name}:prompt, or leave it out with FILE?ignore={name}",
            )


def _is_transcript(text: str) -> bool:
    try:
        return transcript("chosen", text) is not None
    except Mistake:
        return True


def _repeated_prompts(reading: LayoutReading, rows: Sequence[JsonDict]) -> Iterator[tuple[str, str]]:
    """Replies that begin with the whole prompt: the prompt would be learnt too."""
    plain = [reading.plain(row) for row in rows]
    names = ("chosen", "rejected") if reading.kind is PreferencePair else ("completion",)
    texts = [row for row in plain if all(isinstance(row.get(name), str) for name in ("prompt", *names))]
    texts = [row for row in texts if " " in row["prompt"].strip() and not _is_transcript(row["prompt"])]
    repeated = [row for row in texts if all(row[name].startswith(row["prompt"].strip()) for name in names)]
    if repeated and 2 * len(repeated) >= len(plain):
        yield (
            f"{' and '.join(names)} begin with the prompt ({shown(repeated[0]['prompt'])}), which would be learnt too",
            "leave the column out, so that what both begin with is the prompt: FILE?ignore=prompt"
            if len(names) == 2
            else "take the prompt off the beginning of the completions",
        )
