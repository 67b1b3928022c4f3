"""One row of a file as a record, whatever its layout, or what is wrong with it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

from trimtab.types import (
    ROLES,
    Comparison,
    Demonstration,
    JsonDict,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    SteppedResponse,
)


class Mistake(Exception):
    """Something wrong with one row; `load` adds where the row is."""

    def __init__(self, kind: str, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.fix = kind, problem, fix


def _wrong_type(name: str, value: Any, wanted: str) -> NoReturn:
    raise Mistake(
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
    raise Mistake(
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
            raise Mistake(
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
        raise Mistake("empty_response", f"{name} is empty", f"write a reply in {name}, or remove the row")
    return text


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        _wrong_type(name, value, "a list of messages")
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            _wrong_type(f"{name}[{i}]", turn, 'an object with "role" and "content"')
        if turn["role"] not in ROLES:
            raise Mistake(
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
        raise Mistake(
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
        raise Mistake(
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


# ---- the records -----------------------------------------------------------------------------------------------------


def _pair(row: JsonDict, prompt: Prompt, chosen: str, rejected: str) -> PreferencePair:
    if chosen == rejected:
        raise Mistake(
            "identical_pair", f"chosen and rejected are the same: {_shown(chosen)}", "remove the row: it says nothing"
        )
    # Only a fraction is a probability: an integer label is some code of its source.
    label = _number(row, "label") if isinstance(row.get("label"), float) else 1.0
    assert label is not None
    if not 0.5 <= label <= 1:
        raise Mistake(
            "label_out_of_range",
            f"label is {label}, but the probability that chosen is preferred is from 0.5 to 1",
            "swap chosen and rejected where it is below 0.5, and give a probability, not a score",
        )
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=_number(row, "margin"), label=label)


def to_explicit_pair(row: JsonDict) -> PreferencePair:
    """A pair with its prompt in a column of its own."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1:
        # Some files repeat the prompt inside both conversations, sometimes after a system turn that it lacks.
        whole = to_implicit_pair(row)
        stated = _prompt(row)
        if stated.messages != whole.prompt.messages[-len(stated.messages) :]:
            raise Mistake(
                "no_shared_prompt",
                f"chosen and rejected begin with another conversation than prompt ({_shown(stated.text)})",
                "keep only the reply in chosen and rejected, or make the prompt the same",
            )
        return replace(whole, prompt=_make_prompt(whole.prompt.messages, row, dict(stated.facts)))
    return _pair(row, _prompt(row), _reply("chosen", chosen), _reply("rejected", rejected))


def to_implicit_pair(row: JsonDict) -> PreferencePair:
    """A pair whose prompt is what both conversations or texts begin with."""
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
        raise Mistake(
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
        raise Mistake(
            "no_shared_prompt",
            "chosen and rejected do not begin alike, and there is no prompt",
            "add a column 'prompt', or let both begin with it",
        )
    prompt = _make_prompt((Message("user", shared[:cut].rstrip()),), row)
    return _pair(row, prompt, _not_empty("chosen", chosen[cut:]), _not_empty("rejected", rejected[cut:]))


def to_demonstration(row: JsonDict) -> Demonstration:
    """A prompt with its completion."""
    return Demonstration(prompt=_prompt(row), response=_reply("completion", _field(row, "completion", "response")))


def to_question_answer(row: JsonDict) -> Demonstration:
    """A question with its worked answer; the final answer is a fact of the prompt."""
    return Demonstration(
        prompt=_prompt(row, "question", facts=_answer(row)), response=_reply("answer", _field(row, "answer"))
    )


def _answer(row: JsonDict) -> JsonDict:
    """The final answer, for a verifier: what follows the last "####" (gsm8k), or else all of it."""
    return {"answer": str(_field(row, "answer")).rpartition("####")[2].strip()}


def to_conversation(row: JsonDict) -> Demonstration:
    """A conversation that ends with the reply to imitate."""
    messages, reply = _split_reply("messages", _messages("messages", _field(row, "messages")))
    return Demonstration(prompt=_make_prompt(messages, row), response=reply)


def to_labelled_response(row: JsonDict) -> LabelledResponse:
    """A reply with a thumb up or down."""
    label = _field(row, "label")
    if not isinstance(label, bool):
        _wrong_type("label", label, "true or false")
    reply = _reply("completion", _field(row, "completion", "response"))
    return LabelledResponse(prompt=_prompt(row), response=reply, label=label)


def to_stepped_response(row: JsonDict) -> SteppedResponse:
    """A reply in steps, each right or wrong."""
    steps = _field(row, "completions", "steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        _wrong_type("completions", steps, "a list of texts")
    labels = _flags("labels", _field(row, "labels"))
    if not steps or not all(step.strip() for step in steps):
        raise Mistake("empty_response", "there is no step, or an empty one", "write every step, or remove the row")
    if len(steps) != len(labels):
        raise Mistake(
            "wrong_number_of_labels", f"{len(steps)} steps with {len(labels)} labels", "give each step one label"
        )
    return SteppedResponse(prompt=_prompt(row), steps=tuple(steps), labels=labels)


def to_comparison(row: JsonDict) -> Comparison:
    """One vote over two replies."""
    choice = _field(row, "choice")
    if choice not in ("A", "B", "tie"):
        raise Mistake(
            "unknown_choice", f"a comparison labelled {choice!r}; labels are 'A', 'B' and 'tie'", "correct the label"
        )
    response_a = _reply("response_a", _field(row, "response_a"))
    response_b = _reply("response_b", _field(row, "response_b"))
    if response_a == response_b and choice != "tie":
        raise Mistake("identical_pair", f"{choice} is preferred, but both replies are the same", "remove the row")
    annotator = str(row["annotator"]) if row.get("annotator") is not None else ""
    return Comparison(
        prompt=_prompt(row), response_a=response_a, response_b=response_b, choice=choice, annotator=annotator
    )


def prompt_of(convert: Callable[[JsonDict], Any]) -> Callable[[JsonDict], Prompt]:
    """The prompt of the record that `convert` makes."""
    return lambda row: cast(Prompt, convert(row).prompt)


def prompt_alone(name: str) -> Callable[[JsonDict], Prompt]:
    """The prompt under `name`; every other column of the file becomes one of its facts, for verifiers."""

    def convert(row: JsonDict) -> Prompt:
        others = {k: v for k, v in row.items() if k not in (name, "id", "facts") and v is not None}
        facts: JsonDict = json.loads(json.dumps(others, default=str))
        return _prompt(row, name, facts=facts)

    return convert


def to_question(row: JsonDict) -> Prompt:
    """The question as a prompt, with its final answer among the facts."""
    prompt = prompt_alone("question")(row)
    return replace(prompt, facts={**prompt.facts, **_answer(row)})


def to_conversation_prompt(row: JsonDict) -> Prompt:
    """A conversation up to the last turn that is not the assistant's: a reply at the end is not part of the prompt."""
    messages = _messages("messages", _field(row, "messages"))
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    others = {k: v for k, v in row.items() if k not in ("messages", "id", "facts") and v is not None}
    facts: JsonDict = json.loads(json.dumps(others, default=str))
    return _make_prompt(messages, row, facts)
