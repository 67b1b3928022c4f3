"""Reads conversations that are written as one text: transcripts of hh-rlhf, and prompts of HelpSteer."""

from __future__ import annotations

import re
from typing import Any

from trimtab.core.types import Message
from trimtab.data.messages import ROLE_NAMES
from trimtab.data.mistakes import Mistake, shown

_OPENING = re.compile(r"\s*(?:Human|Assistant):")
_BETWEEN = re.compile(r"(?:\A\s*|\r?\n[ \t]*\r?\n\s*?)(Human|Assistant):")
_BETWEEN_LINES = re.compile(r"(?:\A\s*|\r?\n)(Human|Assistant):")
_ENDS_OPEN = re.compile(r"\n\s*Assistant:\s*\Z")


def transcript(name: str, text: str) -> tuple[Message, ...] | None:
    """The turns of "\\n\\nHuman: … \\n\\nAssistant: …" (hh-rlhf), stripped of blanks; None for other text.

    Raises Mistake for a transcript with other text before the first speaker.
    """
    if "Human:" not in text and "Assistant:" not in text:
        return None
    if not _OPENING.match(text):
        if "\n\nHuman:" in text and _ENDS_OPEN.search(text):
            refuse_opening(name, text)
        return None
    parts = _BETWEEN.split(text)
    if len(parts) == 3:  # one turn: either single line breaks separate the turns, or this is no transcript
        by_line = _BETWEEN_LINES.split(text)
        if len({*by_line[1::2]}) == 2:
            parts = by_line
        elif not text[0].isspace() or "\n\n" not in text[: text.index(":")].replace("\r", ""):
            return None
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple(Message("user" if who == "Human" else "assistant", said.strip()) for who, said in turns)


_MARKED = re.compile(r"(?:\A|\n)<extra_id_[01]>(System|User|Assistant)\n")


def marked_turns(text: str) -> tuple[Message, ...] | None:
    """The turns of a prompt with the marks of HelpSteer, "Hi\\n<extra_id_1>Assistant\\nYo\\n<extra_id_1>User\\nBye".
    None for other text. What stands before the first mark is what the user says."""
    opening, *parts = _MARKED.split(text)
    if not parts:
        return None
    found = [Message("user", opening)] if opening.strip() else []
    return tuple(
        found + [Message(ROLE_NAMES[who.lower()], said) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    )


def refuse_opening(name: str, text: str) -> None:
    """Raises Mistake for a transcript with other text before the first speaker; nothing says whose turn that is."""
    raise Mistake(
        "odd_transcript",
        f"{name} is a transcript that begins with {shown(text.partition('Human:')[0])}, before anybody speaks",
        "begin it with Human: or Assistant:, and give an instruction in a column 'system'",
    )


def is_transcript(value: Any) -> bool:
    """Whether a prompt is a transcript; then the blank after its last "Assistant:" is not part of the reply."""
    return isinstance(value, str) and "Assistant:" in value and transcript("prompt", value) is not None


def joined(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with neighbouring turns of one speaker joined: a few hh-rlhf transcripts have such turns, and most
    templates refuse them."""
    found: list[Message] = []
    for message in messages:
        if found and found[-1].role == message.role:
            found[-1] = Message(message.role, f"{found[-1].content}\n\n{message.content}")
        else:
            found.append(message)
    return tuple(found)
