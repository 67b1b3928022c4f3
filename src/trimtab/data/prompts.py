"""Reads the prompt and the reply of one row: text, transcript or messages, with what other columns add to them.

Columns that are part of the prompt in any layout (a system turn, an input or context, earlier turns) are read here.
Columns that no record can hold are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from trimtab.core.types import JsonDict, Message, Prompt
from trimtab.data.columns import CONTEXT, PART_OF_PROMPT, REASONING, SYSTEM, UNREAD, WEIGHT
from trimtab.data.messages import conversation_in, listed, messages_of, refuse_field, system_text
from trimtab.data.mistakes import Mistake, filled, shown, wrong_type
from trimtab.data.transcripts import is_transcript, joined, marked_turns, transcript

_BESIDE_REPLY = REASONING | WEIGHT
_NO_INPUT = frozenset({"<noinput>", "<no input>", "noinput", "no input"})
"""What Alpaca and its kin write for an input that is empty."""
_REPLIES = ("chosen", "rejected", "completion", "response", "worked_answer", "response_a", "response_b")
_OPENS_TURN = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>)?\s*"
    r"(?:(?:<\|im_start\|>|<start_of_turn>|<\|start\|>|<\|start_header_id\|>)(?:system|developer|user|assistant)"
    r"|<\|(?:system|user)\|>\s*\n|\[INST\](?=.*\[/INST\])|<｜User｜>)",
    re.DOTALL,
)
_ENDS_TURN = re.compile(
    r"(?:<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|<\|end_of_text\|>|<end_of_turn>|<\|end\|>|<eos>|</s>"
    r"|<｜end▁of▁sentence｜>|<extra_id_1>)\s*\Z"
)
"""How the chat templates of well-known models open and end a turn."""
_AWAITS_REPLY = re.compile(
    r"(?:<\|im_start\|>assistant|<start_of_turn>model|<\|start_header_id\|>assistant<\|end_header_id\|>"
    r"|<\|assistant\|>|<｜Assistant｜>|\[/INST\])\s*\Z"
)
_WRITTEN_OUT = re.compile(
    r"\s*(?:### *)?(?:User|USER|Human)(?: *###)?:.*[\n ](?:### *)?(?:Assistant|ASSISTANT|AI|Bot|GPT)(?: *###)?:\s*\Z",
    re.DOTALL,
)
"""How a prompt ends that a chat template wrote, and how one reads whose turns were written out as text."""


def field_of(row: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of `names` that the row has. Raises Mistake if it has none of them."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise Mistake(
        "missing_field",
        f"no value for {names[0]!r}; the row has {', '.join(k for k, v in row.items() if v is not None) or 'nothing'}",
        f"fill in {names[0]!r}",
    )


# ---- replies --------------------------------------------------------------------------------------------------------


def reply_turns(name: str, value: Any) -> tuple[Message, ...] | str:
    """A reply as text, or as the turns that come after the prompt. Raises Mistake."""
    if isinstance(value, str):
        value = conversation_in(value, value)
        if isinstance(value, str):
            return not_empty(name, value)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        refuse_unread(value)
        return with_columns(messages_of(f"{name}.messages", value["messages"]), value)
    value = listed(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        wrong_type(name, value, "text or a list of messages")
    return messages_of(name, value)


def reply_of(name: str, value: Any, to: Any = None) -> str:
    """A reply, given as text or as a list with one assistant message. A text that continues the transcript `to` loses
    the blanks around it. Raises Mistake."""
    turns = reply_turns(name, value)
    if isinstance(turns, str):
        return not_empty(name, turns.strip()) if is_transcript(to) else turns
    if len(turns) != 1 or turns[0].role != "assistant":
        raise no_single_reply(name, turns)
    return not_empty(name, turns[0].content)


def no_single_reply(name: str, turns: Sequence[Message]) -> Mistake:
    """The Mistake of a reply that has these turns and not one assistant turn."""
    return Mistake(
        "no_assistant_turn",
        f"{name} has the turns {', '.join(m.role for m in turns) or '(none)'} where one assistant turn is needed",
        f"keep only the assistant's reply in {name}",
    )


def not_empty(name: str, text: str) -> str:
    """The text itself. Raises Mistake if it is empty or blank."""
    if not text or text.isspace():
        raise Mistake("empty_response", f"{name} is empty", f"write a reply in {name}, or remove the row")
    return text


def refuse_markup(row: Mapping[str, Any]) -> None:
    """Raises Mistake if the prompt or a reply is a text that a chat template has written: the template of the model
    would be put around it. The contents of messages are taken as they are."""
    for name in ("prompt", *_REPLIES):
        text = row.get(name)
        if not isinstance(text, str):
            continue
        found = _OPENS_TURN.match(text)
        if found is None and name == "prompt":
            found = _AWAITS_REPLY.search(text, max(len(text) - 60, 0))
        if found is None and name in _REPLIES:
            found = _ENDS_TURN.search(text, max(len(text) - 40, 0))
        if found and not (found[0].startswith("</s>") and "<s>" in text):  # struck out in HTML
            raise Mistake(
                "markup",
                f"{name} holds {found[0].strip()!r}, the mark of a chat template: the template of the model would be "
                "put around it, and the mark learnt as plain text",
                "write prompt and replies as lists of messages without such marks, or leave such rows out with "
                'on_bad_row = "drop"',
            )


def refuse_written_turns(name: str, text: str) -> None:
    """Raises Mistake for a prompt in which the turns are written out as "User: … Assistant:", other than in a
    transcript that can be read: they would be one turn of the user."""
    if _WRITTEN_OUT.match(text):
        raise Mistake(
            "markup",
            f"{name} is {shown(text)}: turns that are written out, which would be learnt as one turn of the user",
            'write them as a list of messages, or as a transcript, "\\n\\nHuman: … \\n\\nAssistant:"; or leave such '
            'rows out with on_bad_row = "drop"',
        )


def split_reply(name: str, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """The turns before the last turn, and the text of the last turn. Raises Mistake unless it is the assistant's."""
    if not messages or messages[-1].role != "assistant":
        raise Mistake(
            "no_assistant_turn",
            f"{name} ends with {f'a {messages[-1].role} turn' if messages else 'nothing'}: there is no reply",
            f"end {name} with an assistant turn"
            if name != "messages"
            else "end messages with an assistant turn, or say which column holds the reply: "
            "FILE?columns=messages:prompt,NAME:completion",
        )
    return messages[:-1], not_empty(name, messages[-1].content)


# ---- prompts --------------------------------------------------------------------------------------------------------


def refuse_unread(row: Mapping[str, Any]) -> None:
    """Raises Mistake for a filled column that changes what a row means and that no record can hold."""
    _refuse_columns(row, UNREAD.keys())


def refuse_beside_reply(row: Mapping[str, Any]) -> None:
    """Raises Mistake for a column of reasoning beside a reply, or for one that gives the row another weight than 1."""
    _refuse_columns(row, _BESIDE_REPLY)


def refuse_row_weight(row: Mapping[str, Any]) -> None:
    """Raises Mistake for a column that gives the row another weight than 1. Beside several replies, reasoning may be
    that of whoever compared them, so it is only not used."""
    _refuse_columns(row, WEIGHT)


def _refuse_columns(row: Mapping[str, Any], names: Set[str]) -> None:
    for name in sorted(row.keys() & names):
        if filled(row[name]):
            refuse_field(name, row[name], name)


def prompt_in(row: Mapping[str, Any], name: str = "prompt", *, facts: JsonDict | None = None) -> Prompt:
    """The prompt under `name`: text, a transcript, messages, or a `Prompt` as `to_dict` writes it. Raises Mistake."""
    value = field_of(row, name)
    if isinstance(value, str):
        value = conversation_in(value, value)
    value = listed(value)
    if isinstance(value, dict) and "messages" in value:
        refuse_unread({**row, **value})
        messages = with_columns(messages_of(f"{name}.messages", value["messages"]), value)
        return make_prompt(with_columns(messages, row), {**row, **value}, facts)
    refuse_unread(row)
    if isinstance(value, dict) and isinstance(value.get("full_text"), str):
        value = value["full_text"]
    if isinstance(value, str):
        refuse_markup(row)
        turns = marked_turns(value) if "<extra_id_" in value else transcript(name, value)
        if turns is None:
            refuse_written_turns(name, value)
            turns = (Message("user", value),)
        elif turns[-1] == Message("assistant", ""):  # "…\n\nAssistant:" only says who speaks next
            turns = turns[:-1]
        messages = joined(turns)
    elif isinstance(value, list):
        messages = messages_of(name, value)
    else:
        wrong_type(name, value, "text or a list of messages")
    return make_prompt(with_columns(messages, row), row, facts)


def with_columns(messages: tuple[Message, ...], row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns with what other columns add to them: an input or context at the end of the last user turn, unless it is
    stated there, and earlier turns and a system turn before the first."""
    present = row.keys() & PART_OF_PROMPT
    if not present:
        return messages
    contexts = [(name, row[name]) for name in CONTEXT if name in present and filled(row[name])]
    for name, value in contexts:
        text = _running_text(name, value)
        if text.strip().lower() in _NO_INPUT:
            continue
        if not messages or messages[-1].role != "user":
            raise Mistake(
                "no_place", f"{name} is given, but no user turn comes last that it could belong to", f"remove {name}"
            )
        if not text.isspace() and not _is_stated(text.strip(), messages[-1].content):
            messages = (*messages[:-1], Message("user", f"{messages[-1].content}\n\n{text}"))
    messages = (*earlier_turns(row), *messages)
    for name in SYSTEM:
        value = row.get(name) if name in present else None
        if filled(value):
            messages = _with_system(name, system_text(name, value), messages)
    return messages


def _is_stated(text: str, said: str) -> bool:
    """Whether a prompt holds an input already, as prompts do that were filled into a template. One word may occur by
    chance ("a" in "Is it a noun?"), so it must end a line and begin one or stand behind a colon."""
    if text not in said:
        return False
    return len(text.split()) > 1 or bool(re.search(rf"(?:^|:)[ \t]*{re.escape(text)}[ \t]*$", said, re.MULTILINE))


def _running_text(name: str, value: Any) -> str:
    """The value as one text. Several texts become paragraphs; a passage may be a list of lines."""
    if _are_texts(value):
        return "\n\n".join(value)
    if isinstance(value, list) and all(_are_texts(lines) for lines in value):
        return "\n\n".join("\n".join(lines) for lines in value)
    if not isinstance(value, str) or not isinstance(conversation_in(value, value), str):
        wrong_type(name, value, "text (earlier turns stand in a column 'history')")
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def earlier_turns(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of the column `history`, which holds messages or the [question, answer] pairs of Alpaca-like files."""
    value = row.get("history")
    if not filled(value):
        return ()
    if isinstance(value, list) and all(_are_texts(turn) and len(turn) == 2 for turn in value):
        return tuple(turn for q, a in value for turn in (Message("user", q), Message("assistant", a)))
    return messages_of("history", value)


def _with_system(name: str, text: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if messages and messages[0].role == "system":
        if messages[0].content.strip() == text.strip():
            return messages
        raise Mistake(
            "two_systems",
            f"{name} says {shown(text)}, and the conversation begins with another system turn",
            f"keep one of them, or leave the column out with FILE?ignore={name}",
        )
    return messages if text.isspace() else (Message("system", text), *messages)


def make_prompt(messages: tuple[Message, ...], row: Mapping[str, Any], facts: JsonDict | None = None) -> Prompt:
    """The prompt of these turns with the id and the facts of the row. Raises Mistake if there is nothing to answer."""
    if (
        not messages
        or messages[-1].role == "assistant"
        or not any(m.content and not m.content.isspace() for m in messages)
    ):
        raise Mistake(
            "no_prompt",
            "the prompt is empty"
            if not messages or messages[-1].role != "assistant"
            else "the prompt ends with an assistant turn, so it is not the assistant's turn to speak",
            "end the prompt with a user turn that says something",
        )
    given = row.get("facts") or {}
    if not isinstance(given, dict):
        wrong_type("facts", given, "an object")
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        wrong_type("id", name, "text or a whole number")
    return Prompt(messages=messages, id="" if name is None else str(name), facts={**(facts or {}), **given})
