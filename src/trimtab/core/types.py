"""Records: the text data that stages pass on. They are frozen, and each round-trips through a JSON line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as _quoted
from typing import Any, Literal, TypeVar, cast

MessageRole = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length"]

JsonDict = dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: MessageRole
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that ends where the assistant is to speak."""

    messages: tuple[Message, ...]
    id: str = ""
    """Stable name: `prompt_id(messages)`, unless the source gave one. Splits go by the messages, not by the id."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a verifier or a world needs to score a reply, for example {"answer": "42"} (JSON values only). It is never
    shown to a model."""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", prompt_id(self.messages))

    @property
    def text(self) -> str:
        """The last user turn, which people read as the prompt."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt with the reply to imitate."""

    prompt: Prompt
    response: str
    untrained_turns: tuple[int, ...] = ()
    """Indices of the earlier replies in the prompt that the source marks as not to be trained on, counted among its
    replies. They matter only if all turns of a conversation are trained."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One judgement of one annotator over two replies."""

    prompt: Prompt
    response_a: str
    response_b: str
    choice: Literal["A", "B", "tie"]
    annotator: str = ""


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two replies in order of preference, as reward models and the DPO family read them."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    """How much better `chosen` is, in the units of its source; None if the source does not say."""
    label: float = 1.0
    """Probability in [0.5, 1] that `chosen` is preferred: 1 for one vote, a fraction for several."""


@dataclass(frozen=True, kw_only=True)
class LabelledResponse:
    """One reply with a thumbs up or down (the unpaired layout)."""

    prompt: Prompt
    response: str
    label: bool


@dataclass(frozen=True, kw_only=True)
class RatedResponse:
    """One reply with a rating."""

    prompt: Prompt
    response: str
    rating: float
    """How good the reply is, in the units of its source; more is better."""


@dataclass(frozen=True, kw_only=True)
class SteppedResponse:
    """One reply in steps, each labelled right or wrong (the stepwise layout)."""

    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    """The probability that each step is right: 1 or 0 for a verdict, a fraction for several; None for a step that is
    not judged, from which nothing is learnt."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A sampled reply: the exact tokens, and their logprobs under the distribution that they were sampled from."""

    prompt: Prompt
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Includes the end token if the policy finished the reply."""
    logprobs: tuple[float, ...]
    """One natural log for each token the policy chose, under the sampling distribution (temperature, top-p, top-k)."""
    finish_reason: FinishReason
    observations: tuple[tuple[int, int], ...] = ()
    """Ranges [start, end) of response_ids that an environment wrote, not the policy."""
    events: Mapping[str, int] = field(default_factory=dict)
    """Event counts during sampling, for example {"tool_calls": 2}; logged as `rollout/NAME`."""

    @property
    def response_mask(self) -> tuple[bool, ...]:
        """True at the response tokens that the policy chose."""
        observed = {i for start, end in self.observations for i in range(start, end)}
        return tuple(i not in observed for i in range(len(self.response_ids)))


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an environment answers to a turn of the policy, for example
    `Observation(text="4", events={"tool_calls": 1})`."""

    text: str = ""
    """Shown to the policy as plain text, unchanged, and never trained on. Not shown if the episode is over."""
    done: bool = False
    """Whether the episode is over."""
    new_turn: bool = False
    """Whether the text is a user turn of its own, after which the policy begins a new turn. If not, the text becomes
    part of the policy's turn, which continues after it. If the policy has already ended its turn, a new turn always
    follows."""
    events: Mapping[str, int] = field(default_factory=dict)
    """Event counts to add, for example {"tool_calls": 1, "tool_errors": 0}."""


Record = TypeVar(
    "Record",
    Prompt,
    Demonstration,
    Comparison,
    PreferencePair,
    LabelledResponse,
    RatedResponse,
    SteppedResponse,
    Rollout,
)


def prompt_id(messages: Sequence[Message]) -> str:
    """Sixteen hex digits of the SHA-256 of the messages; equal conversations have equal ids on every machine."""
    # The same text as json.dumps([[role, content], …], ensure_ascii=False), in a third of the time.
    turns = ", ".join([f"[{_quoted(m.role)}, {_quoted(m.content)}]" for m in messages])
    return hashlib.sha256(f"[{turns}]".encode()).hexdigest()[:16]


def to_dict(record: Any) -> JsonDict:
    """The record as JSON values. `from_dict` gives an equal record back."""
    return cast(JsonDict, json.loads(json.dumps(record, default=_fields, ensure_ascii=False)))


def _fields(record: Any) -> JsonDict:
    """The fields of a record, which `dataclasses.asdict` would copy one by one."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def rows_hash(rows: Iterable[JsonDict]) -> str:
    """SHA-256 of the rows as JSON lines with sorted keys. Values that JSON cannot express are hashed as their text."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def records_hash(records: Iterable[Any]) -> str:
    """`rows_hash` of records."""
    return rows_hash(to_dict(record) for record in records)


def from_dict(cls: type[Record], row: Mapping[str, Any]) -> Record:
    """The record that `to_dict` wrote. Raises TypeError or KeyError for a row of another shape."""
    values = dict(row)
    if cls is Prompt:
        values["messages"] = tuple(Message(**m) for m in values["messages"])
    elif "prompt" in values:
        values["prompt"] = from_dict(Prompt, values["prompt"])
    make: Callable[..., Record] = cls
    return make(**{name: _tuples(v) for name, v in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
