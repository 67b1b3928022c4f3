"""Decides which prompts are held out, by their messages alone, so that every file and every project agrees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from trimtab.core.types import Message, Prompt, prompt_id


class HasPrompt(Protocol):
    """A record about one prompt, such as a `Demonstration` or a `PreferencePair`."""

    @property
    def prompt(self) -> Prompt: ...


P = TypeVar("P", bound=Prompt | HasPrompt)


def split_by_prompt(records: Sequence[P], held_out: float = 0.1) -> tuple[list[P], list[P]]:
    """The records to train on, and the records held out: about the share `held_out` of all prompts.

    All records of a prompt go to one side. The side depends only on the prompt's messages, not on its id (rows often
    have one each) nor on the other records, so a prompt is held out from every file it is in and stays so as data is
    added. If there are few prompts, all may fall on one side.
    """
    train: list[P] = []
    rest: list[P] = []
    for record in records:
        prompt = record if isinstance(record, Prompt) else record.prompt
        (rest if place_of_prompt(prompt.messages) < held_out else train).append(record)
    return train, rest


def place_of_prompt(messages: Sequence[Message]) -> float:
    """A number in [0, 1) that is the same for equal conversations on every machine; a prompt is held out if the number
    is below the share to hold out."""
    return place_of_name(prompt_id(messages))


def place_of_name(name: str) -> float:
    """A number in [0, 1) that is the same for a name on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
