"""Records and rows as tests of layouts write them."""

from __future__ import annotations

from trimtab.core.types import Demonstration, Message, PreferencePair, Prompt

CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
REPLY = {"prompt": "Hi", "completion": "Yo"}


def prompt(*contents: str, system: str = "", **more) -> Prompt:
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], text) for i, text in enumerate(contents)]
    return Prompt(messages=tuple([Message("system", system)] if system else []) + tuple(turns), **more)


def shown(*contents: str, **more) -> Demonstration:
    return Demonstration(prompt=prompt(*contents[:-1], **more), response=contents[-1])


def pair(asked: Prompt, chosen: str = "Yes.", rejected: str = "No.", **more) -> PreferencePair:
    return PreferencePair(prompt=asked, chosen=chosen, rejected=rejected, **more)


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
IS_IT = [user("Is it?"), said("Yes.")], [user("Is it?"), said("No.")]
