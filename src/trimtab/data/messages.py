"""Turns the conversations of files, with any of the usual names of roles and fields, into `Message`s."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from trimtab.core.types import Message, MessageRole
from trimtab.data.columns import (
    CALLS,
    LABEL,
    PART_OF_PROMPT,
    RATING,
    REASONING,
    SYSTEM,
    UNREAD,
    WEIGHT,
    is_by_field,
    plain_name,
    thumb,
)
from trimtab.data.mistakes import Mistake, filled, shown, wrong_type

ROLE_NAMES: Mapping[str, MessageRole] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "chatbot", "bot", "model", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
"""The role for each name that files use."""
_ROLE_FIELDS = ("role", "from")
_CONTENT_FIELDS = ("content", "value", "text", "parts")
_CALL_ROLES = frozenset({"function_call", "tool_call"})
_CHANGES_A_MESSAGE = frozenset({*REASONING, *WEIGHT, *UNREAD, "refusal", "attachments"})
"""Fields of a message that change what it means and are not read."""
_TRAINED_FIELDS = ("weight", "train", "loss", "trainable", "training", "train_on", "loss_mask")
"""Fields with a number or boolean that says whether a turn is to be learnt from."""
READ_FIELDS = frozenset({*_ROLE_FIELDS, *_CONTENT_FIELDS, *_TRAINED_FIELDS})
"""Fields of a message that are read. Other fields are refused if they would change its meaning, else not used."""


_REQUEST_FIELDS = frozenset({"messages", "id", "facts", *PART_OF_PROMPT})
"""Fields of an object with messages that are read."""
READ_IN_PARTS = frozenset({"type", "text"})
"""Fields of a part of a content that are read."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_EXCHANGES = (
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("human", "gpt"),
    ("human", "bot"),
    ("question", "answer"),
    ("prompt", "response"),
)
"""Fields of an object that holds what a person says and the reply to it: an entry of a conversation, as in Capybara."""
_NAMES_SPEAKER = re.compile(r"\s*(?:human|user|assistant|system|gpt|ai|bot)\s*:", re.IGNORECASE)


def messages_of(name: str, value: Any) -> tuple[Message, ...]:
    """The turns of a list of messages (or of the JSON text of one). Raises Mistake."""
    if isinstance(value, str):
        value = conversation_in(value, value)
    value = listed(value)
    if not isinstance(value, list):
        wrong_type(name, value, "a list of messages")
    found: list[Message] = []
    for i, turn in enumerate(value):
        if (fields := _exchange(turn)) is None:
            found.append(_message(name, i, turn))
        else:
            found += _asked_and_replied(f"{name}[{i}]", turn, fields)
    return tuple(found)


def listed(value: Any) -> Any:
    """The list of messages that one message is, or messages field by field; any other value as it is."""
    if is_by_field(value):
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return [value] if isinstance(value, dict) and ("role" in value or "from" in value) else value


def _exchange(turn: Any) -> tuple[str, str] | None:
    """The fields with what was said and replied, in an object that holds both and no role."""
    if not isinstance(turn, dict) or "role" in turn or "from" in turn:
        return None
    return next((pair for pair in _EXCHANGES if all(isinstance(turn.get(field), str) for field in pair)), None)


def _asked_and_replied(place: str, turn: Mapping[str, Any], fields: tuple[str, str]) -> Iterator[Message]:
    refuse_fields(place, turn, frozenset({*fields, *SYSTEM}))
    for name in SYSTEM:
        if filled(turn.get(name)):
            yield _message(place, 0, {"role": "system", "content": turn[name]})
    yield Message("user", turn[fields[0]])
    yield Message("assistant", turn[fields[1]])


def texts_as_turns(name: str, value: Any) -> Any:
    """The messages of a conversation that is a list of texts, in which user and assistant take turns, as in LIMA; any
    other value as it is. Raises Mistake for texts that name their speaker."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        return value
    if named := next(filter(_NAMES_SPEAKER.match, value), None):
        raise Mistake(
            "odd_transcript",
            f"{name} is a list of texts that name their speaker: {shown(named)}",
            'write each turn as an object with "role" and "content"',
        )
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]


def _message(name: str, i: int, turn: Any) -> Message:
    if isinstance(turn, dict):
        given, content = turn.get("role"), turn.get("content")
        if len(turn) > 2 or given is None or content is None:
            refuse_fields(f"{name}[{i}]", turn, READ_FIELDS)
            given = _first(turn, _ROLE_FIELDS)
            content = _only_content(f"{name}[{i}]", turn)
    else:
        given = content = None
    if given is None or (content is None and not any(field in turn for field in _CONTENT_FIELDS)):
        wrong_type(f"{name}[{i}]", turn, 'an object with "role" and "content" (or "from" and "value")')
    role = (ROLE_NAMES.get(given) if isinstance(given, str) else None) or ROLE_NAMES.get(str(given).strip().lower())
    if role is None:
        if str(given).lower() in _CALL_ROLES:
            _refuse_call(f"{name}[{i}]", given)
        raise Mistake(
            "unknown_role",
            f"{name}[{i}] has the role {given!r}; roles are {', '.join(ROLE_NAMES)}",
            "rename the roles of the file",
        )
    if not isinstance(content, str):
        content = _text_of_parts(f"{name}[{i}].content", content)
    return Message(role, content)


def _first(turn: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _only_content(place: str, turn: Mapping[str, Any]) -> Any:
    """The content of a message, which may stand twice. Raises Mistake if two fields hold different contents."""
    given = [field for field in _CONTENT_FIELDS if filled(turn.get(field))]
    if len(given) > 1:
        said = [turn[f] if isinstance(turn[f], str) else _text_of_parts(f"{place}.{f}", turn[f]) for f in given]
        if any(text != said[0] for text in said):
            raise Mistake(
                "two_contents",
                f"{place} has the contents {given[0]} ({shown(said[0])}) and {given[1]} ({shown(said[1])})",
                f"leave one of them out, for instance with FILE?ignore={given[1]}",
            )
    return _first(turn, _CONTENT_FIELDS)


def refuse_fields(place: str, fields: Mapping[str, Any], read: frozenset[str]) -> None:
    """Raises Mistake for a field of a message, reply or content part, other than those that are `read`, that would
    change what it means."""
    for field, value in fields.items():
        if field in read or not filled(value):
            continue
        plain = plain_name(field)
        if plain in CALLS:
            _refuse_call(place, value)
        if plain == "channel" and value != "final":
            raise Mistake(
                "reasoning",
                f"{place}.channel is {shown(value)}: the turn is no reply, and its channel is not read",
                "write such a turn into the reply behind it as the model's chat template does, or leave such rows out "
                'with on_bad_row = "drop"',
            )
        if plain == "recipient" and value != "all":
            _refuse_call(place, value)
        if plain == "mask":
            raise Mistake(
                "weight",
                f"{place}.mask is {shown(value)}, and nothing says whether such turns are to be learnt from",
                "write a weight of 1 (learnt) or 0 (not learnt) instead, or leave it out with FILE?ignore=mask",
            )
        if plain in _CHANGES_A_MESSAGE:
            refuse_field(f"{place}.{field}", value, field)


def refuse_field(place: str, value: Any, field: str) -> None:
    """Raises Mistake for a column or field that changes what it stands in, unless it is a weight of 1."""
    plain = plain_name(field)
    if plain in WEIGHT:
        _refuse_weight(place, value, field)
    elif plain in REASONING:
        _refuse_reasoning(place, value, field)
    elif UNREAD.get(plain) == "tools":
        _refuse_tools(place, value, field)
    else:
        _refuse_other_forms(place, value, field)


def _refuse_tools(place: str, value: Any, field: str) -> None:
    """Raises Mistake, because only the chat template knows how a model is told of tools."""
    raise Mistake(
        "tools",
        f"{place} holds {shown(value)}: tools that the model is told of, which are not read",
        "write them into the system turn as the model's chat template does, and leave the column out with "
        f'FILE?ignore={field}; or leave such rows out with on_bad_row = "drop"',
    )


def _refuse_weight(place: str, value: Any, field: str) -> None:
    """Raises Mistake for a weight other than 1 of something that is learnt from whole."""
    if value not in (1, "1", "1.0"):
        raise Mistake(
            "weight",
            f"{place} is {shown(value)}; every row is learnt from alike",
            f"remove rows that are not to be learnt from, and leave the column out with FILE?ignore={field}",
        )


def _refuse_call(place: str, value: Any) -> None:
    raise Mistake(
        "tool_calls",
        f"{place} calls a tool ({shown(value)}), which is not read: only what is written as text is learnt",
        "write the call into the content of the turn as the model's chat template does and remove the field, or leave "
        'such rows out with on_bad_row = "drop"',
    )


def _refuse_reasoning(place: str, value: Any, field: str) -> None:
    """Raises Mistake, because only the chat template knows how reasoning is written into a reply."""
    raise Mistake(
        "reasoning",
        f"{place} holds reasoning ({shown(value)}) apart from the reply, which is not read",
        f"write it into the reply as the model's chat template does, for instance <think>…</think> before the answer, "
        f"or leave it out of the data with FILE?ignore={field}",
    )


def _refuse_other_forms(place: str, value: Any, field: str) -> None:
    """Raises Mistake, because images, audio and video are not read."""
    raise Mistake(
        "not_text",
        f"{place} holds {shown(value)}; only text is read",
        f'leave such rows out with on_bad_row = "drop", or the field with FILE?ignore={field}',
    )


def system_text(place: str, value: Any) -> str:
    """The text of a system turn, given as text, as parts of text, or as one message of the system. Raises Mistake."""
    if isinstance(value, dict) and "text" not in value:
        if ROLE_NAMES.get(str(value.get("role", "system")).lower()) != "system":
            wrong_type(place, value, "text")
        refuse_fields(place, value, READ_FIELDS)
        value = _only_content(place, value)
    return value if isinstance(value, str) else _text_of_parts(place, value)


def _text_of_parts(place: str, content: Any) -> str:
    """The joined texts of content parts, [{"type": "text", "text": …}]."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, str) and isinstance(content, list):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in _TEXT_PARTS:
            refuse_fields(place, part, READ_IN_PARTS)
            texts.append(part["text"])
        elif isinstance(part, dict) and part.get("type", "text") not in _TEXT_PARTS:
            kind = str(part["type"])
            if kind in ("thinking", "reasoning"):
                _refuse_reasoning(place, part, kind)
            if kind in ("tool_use", "tool_call"):
                _refuse_call(place, part)
            raise Mistake(
                "not_text",
                f"{place} holds a part of the type {kind!r}; only text is read",
                'leave such rows out with on_bad_row = "drop"',
            )
        else:
            wrong_type(place, content, "text")
    return "".join(texts)


def unread_fields(name: str, value: Any, read: frozenset[str]) -> Iterator[str]:
    """The names of the filled fields that are not `read`, in a column that holds messages or replies as a list, as one
    object, as an object with `messages` in it, or as JSON text of these: for example "messages[].name"."""
    if isinstance(value, str):
        value = conversation_in(value, value)
    if isinstance(value, dict):
        if isinstance(value.get("messages"), list):
            yield from (f"{name}.{field}" for field in sorted(value.keys() - _REQUEST_FIELDS) if filled(value[field]))
            value, name = value["messages"], f"{name}.messages"
        else:
            value = listed(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        for turn in value:
            if not isinstance(turn, dict):
                continue
            if not turn.keys() <= read:
                fields = _exchange(turn) if read is READ_FIELDS else None
                known = read if fields is None else read.union(fields, SYSTEM)
                if turn.keys().isdisjoint(_ROLE_FIELDS) and "text" in turn:  # a part of a system turn
                    known = known | READ_IN_PARTS
                yield from (f"{name}[].{field}" for field in sorted(turn.keys() - known) if filled(turn[field]))
            if isinstance(parts := turn.get("content"), list):
                for part in parts:
                    others = sorted(part.keys() - READ_IN_PARTS) if isinstance(part, dict) else ()
                    yield from (f"{name}[].content[].{field}" for field in others if filled(part[field]))


def untrained_turns(name: str, value: Any) -> tuple[int, ...]:
    """The numbers, from 0, of the assistant turns marked as not to be learnt from (`weight: 0`, `train: false`).

    Raises Mistake for a weight other than 0 and 1.
    """
    if not any(len(turn) > 2 for turn in value):  # a role and a content, and nothing else
        return ()
    found = []
    number = 0
    for i, turn in enumerate(value):
        number += _exchange(turn) is not None
        if ROLE_NAMES.get(str(_first(turn, _ROLE_FIELDS)).strip().lower()) != "assistant":
            continue
        if len(turn) > 2:
            _refuse_judged(f"{name}[{i}]", turn)
            for field in _TRAINED_FIELDS:
                weight = turn.get(field)
                if weight is None:
                    continue
                if not isinstance(weight, int | float) or weight not in (0, 1):
                    raise Mistake(
                        "weight",
                        f"{name}[{i}].{field} is {shown(weight)}; a turn is learnt from (1) or not (0)",
                        f"use 0 or 1, or leave it out of the data with FILE?ignore={field}",
                    )
                if weight == 0:
                    found.append(number)
        number += 1
    return tuple(found)


def _refuse_judged(place: str, turn: Mapping[str, Any]) -> None:
    """Raises Mistake for a reply that is rated, or has a thumb down: it may be one that is not to be imitated."""
    for field, value in turn.items():
        plain = plain_name(field)
        if (plain in LABEL and thumb(value) is False) or (plain in RATING and isinstance(value, int | float)):
            raise Mistake(
                "judged",
                f"{place}.{field} is {shown(value)}: it judges the reply, which would be imitated",
                f"remove replies that are not good enough, and leave the field out with FILE?ignore={field}",
            )


# ---- conversations written as text ----------------------------------------------------------------------------------

_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{\s*['\"]")
_OBJECT = re.compile(r"\s*\{\s*['\"](?:role|from|content|value|messages)['\"]\s*:")
_REQUEST = re.compile(r"\s*\{.*['\"]messages['\"]\s*:\s*\[\s*\{", re.DOTALL)
_BEGINS_A_MESSAGE = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from)['\"]\s*:")


def conversation_in(text: str, otherwise: Any) -> Any:
    """The list of messages (or the one message) that a text holds as JSON or as Python prints it; `otherwise` for any
    other text. Raises Mistake for a text that begins like a list of messages and cannot be read."""
    first = text[:1]
    if first not in "[{" and not first.isspace():
        return otherwise
    if not (_LIST_OF_OBJECTS.match(text) or _OBJECT.match(text) or _REQUEST.match(text)):
        return otherwise
    value = _parsed(text)
    turns = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    if turns and all(_is_turn(turn) for turn in turns):
        return value
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return value
    if value is None and _BEGINS_A_MESSAGE.match(text):
        raise Mistake(
            "broken_conversation",
            f"a conversation is written as text, but not as JSON: {shown(text)}",
            "write the list of messages as JSON (json.dumps in Python) instead of as a table prints it",
        )
    return otherwise


@lru_cache(maxsize=16)
def _parsed(text: str) -> Any:
    """`value_in` of the cells of a row, each of which several functions look at; nothing changes the value."""
    return value_in(text)


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    role = _first(turn, _ROLE_FIELDS)
    known = isinstance(role, str) and (role.strip().lower() in ROLE_NAMES or role.lower() in _CALL_ROLES)
    return known and any(name in turn for name in (*_CONTENT_FIELDS, *CALLS))


def value_in(text: str) -> Any:
    """The list or object that a text holds as JSON, or as Python prints it; None if it holds neither.

    Python's form is accepted only if printing the value gives the text again: numpy prints lists without commas, and
    Python would read two strings without a comma between them as one.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
        if repr(value) != text.strip():
            return None
    if "\\u" in text:
        refuse_half_characters(value)
    return value if isinstance(value, list | dict) else None


def refuse_half_characters(value: Any) -> None:
    """Raises Mistake if a text holds half of a character, as a text does that was cut inside an emoji."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise Mistake(
            "half_character",
            f"the text holds U+{ord(text[at]):04X}, half of a character: {text[max(at - 20, 0) : at]!r} and then it",
            "cut texts between characters, not between the two halves of one, or remove the escape",
        ) from None
