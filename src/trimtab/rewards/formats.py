"""Rewards for the form of a reply: a pattern, reasoning and then an answer, or JSON that fits a schema."""

from __future__ import annotations

import json
import logging
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self

from torch import Tensor

from trimtab.core.errors import ConfigError, need
from trimtab.core.metrics import Metrics
from trimtab.core.registry import register
from trimtab.core.types import Rollout
from trimtab.rewards.each import EachReply, HelpedReply, Score

_log = logging.getLogger("trimtab.rewards")
_FENCED = re.compile(r"^([^\S\n]*)```[^\S\n]*([\w+-]*)[^\n]*\n(.*?)^\1```[^\S\n]*$", re.DOTALL | re.MULTILINE)


@register("reward", "regex")
@dataclass(frozen=True, kw_only=True)
class Regex(HelpedReply):
    """1 for a reply that matches a regular expression (Python's, with . for line breaks too), else 0."""

    pattern: str
    """The regular expression."""
    match: Literal["full", "search"] = "full"
    """Whether it has to match the whole reply or may be found anywhere in it."""
    seconds: float = 1.0
    """Processor time for one reply. Some patterns take for ever on some texts; such a reply is not judged."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern = {self.pattern!r} is no regular expression: {error}") from error

    def _judge(self, rollout: Rollout) -> Score:
        return Score(float(self.helper.ask("matches", self.pattern, self.match, rollout.response)))


@register("reward", "reasoning_format")
@dataclass(frozen=True, kw_only=True)
class ReasoningFormat(EachReply):
    """1 for `<think>…</think> <answer>…</answer>` and nothing else, each once and neither empty; else 0."""

    reasoning: str = "think"
    """Name of the first tag."""
    answer: str = "answer"
    """Name of the second tag; "" for an answer that is the rest of the reply, without tags."""
    opened: bool = False
    """Whether the prompt ends with the first opening tag, so that replies begin inside it."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] 1 or 0; the log says if the setting `opened` does not fit how the replies begin."""
        scores, metrics = super().score(rollouts)
        other = replace(self, opened=not self.opened)
        num_other = sum(other.holds(r.response) for r in rollouts)
        if num_other > scores.sum():
            _log.warning(
                "reward reasoning_format: %d of %d replies have the form %s <%s> before them and %d as they are; "
                "set opened = %s if the chat template %s",
                num_other,
                len(rollouts),
                "with an opening" if other.opened else "without an opening",
                self.reasoning,
                int(scores.sum()),
                str(other.opened).lower(),
                "ends the prompt with the tag" if other.opened else "leaves the tag to the reply",
            )
        return scores, metrics

    def _judge(self, rollout: Rollout) -> Score:
        return Score(float(self.holds(rollout.response)))

    def holds(self, reply: str) -> bool:
        """Whether a reply has the form."""
        text = f"<{self.reasoning}>{reply}" if self.opened else reply
        tags = [f"<{self.reasoning}>", f"</{self.reasoning}>"]
        tags += [f"<{self.answer}>", f"</{self.answer}>"] if self.answer else []
        if any(text.count(tag) != 1 for tag in tags):
            return False
        pieces, rest = [], text
        for tag in tags:
            piece, found, rest = rest.partition(tag)
            if not found:
                return False
            pieces.append(piece.strip())
        outside = [pieces[0], *pieces[2:3], rest.strip()] if self.answer else [pieces[0]]
        inside = [pieces[1], pieces[3] if self.answer else rest.strip()]
        return all(inside) and not any(outside)


@register("reward", "json_schema")
@dataclass(frozen=True, kw_only=True)
class JsonSchema(HelpedReply):
    """1 for a reply that is JSON and fits a schema, else 0."""

    schema: str
    """File with the JSON Schema. References to other addresses are not followed."""
    find: Literal["whole", "fenced"] = "whole"
    """Whether the whole reply is the JSON, or its last block between lines of ```."""
    seconds: float = 1.0
    """Processor time for one reply; a reply that takes longer is not judged."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def load(self, *, token_budget: int) -> Self:
        """The reward itself. Raises ConfigError for a file that holds no schema."""
        need("jsonschema", extra="json", setting="the reward json_schema", where="rewards")
        try:
            self.helper.ask("check_schema", self._text)
        except RuntimeError as error:
            raise ConfigError(
                f"no JSON Schema: {error}", where=self.schema, fix="correct the file (https://json-schema.org)"
            ) from error
        return self

    @cached_property
    def _text(self) -> str:
        """The schema as JSON."""
        try:
            return json.dumps(json.loads(Path(self.schema).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the schema cannot be read: {error}", where=self.schema, fix="name a file with one JSON value"
            ) from error

    def _judge(self, rollout: Rollout) -> Score:
        text = rollout.response if self.find == "whole" else last_fenced(rollout.response, ("json",))
        return Score(float(text is not None and self.helper.ask("fits_schema", self._text, text)))


def last_fenced(reply: str, languages: Sequence[str]) -> str | None:
    """The last block between lines of ``` that names one of these languages; if none does, the last block of all, or
    None. A block inside a list is indented, and loses that."""
    found = _FENCED.findall(reply)
    named = [block for block in found if block[1].lower() in languages]
    for indent, _, text in (named or found)[-1:]:
        return textwrap.dedent(text) if indent else text
    return None
