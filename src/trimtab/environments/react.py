"""ReAct: tools that are called in the middle of a reply, each answered on the next line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab import worlds
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.errors import DataError
from trimtab.core.registry import register
from trimtab.core.types import Observation, Prompt
from trimtab.data.sources import read_good_rows
from trimtab.environments.tools import BM25, ToolError, calculate
from trimtab.worlds.source import is_world

Tool = Callable[[str], str]
_ACTION = re.compile(r"^Action: *(\w+)\[([^\n]*)\][ \t]*$", re.MULTILINE)
MAX_QUERY = 1000
"""How many characters of a query are read."""


@register("environment", "react")
@dataclass(frozen=True, kw_only=True)
class ReAct:
    """Tools in the middle of a reply (Yao et al., arXiv:2210.03629, section 2): a line "Action: NAME[INPUT]" is
    answered by a line "Observation: RESULT", and the reply goes on. A turn without an action ends the episode."""

    tools: tuple[Literal["search", "calculate"], ...] = ("search", "calculate")
    """The tools that can be called: search[words] in the corpus, calculate[expression]."""
    corpus: str | None = None
    """The texts to search: a file with a "text" in every row, or a world that has texts ("world:catalogue")."""
    num_passages: int = 1
    """Passages that a search shows, the best first."""

    def __post_init__(self) -> None:
        if not self.tools:
            raise ValueError("tools is empty; name at least one of 'search' and 'calculate'")
        if ("search" in self.tools) != (self.corpus is not None):
            raise ValueError(
                f"tools = {list(self.tools)} with corpus = {self.corpus!r}: the tool 'search' needs a corpus, "
                "and a corpus is for it alone"
            )
        refuse_out_of_range(self, "num_passages")

    def load(self) -> ReActEnvironment:
        """The environment, with its corpus indexed. Raises DataError if the corpus cannot be read."""
        tools: dict[str, Tool] = {}
        if "search" in self.tools:
            assert self.corpus is not None
            tools["search"] = Search(BM25(read_corpus(self.corpus)), self.num_passages)
        if "calculate" in self.tools:
            tools["calculate"] = calculate
        return ReActEnvironment(tools)


class ReActEnvironment:
    """Answers actions. If a call cannot be answered, the policy is told why, and the call is counted in
    `tool_errors`."""

    stop: ClassVar[tuple[str, ...]] = ("]\n",)

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        """Each of `tools` answers a text with a text, or raises ToolError with what to tell the policy."""
        self.tools = tools

    def reset(self, prompt: Prompt, *, seed: int) -> None:
        """Does nothing: no state is kept from turn to turn."""

    def step(self, state: None, turn: str) -> Observation:
        """The result of the last action, on a line of its own; the episode is over if there was no action."""
        actions = _ACTION.findall(turn)
        if not actions and not any(text in turn for text in self.stop):
            return Observation(done=True, events={"tool_calls": 0, "tool_errors": 0})
        calls, errors = 0, 0
        try:
            if not actions:
                raise ToolError("to use a tool, write a line such as Action: search[words]")
            name, given = actions[-1]
            calls = 1
            if name not in self.tools:
                raise ToolError(f"no tool is called {name!r}; there are {', '.join(self.tools)}")
            result = self.tools[name](given)
        except ToolError as error:
            errors, result = 1, f"error: {error}"
        line = " ".join(result.split())
        return Observation(text=f"Observation: {line}\n", events={"tool_calls": calls, "tool_errors": errors})


@dataclass(frozen=True)
class Search:
    """The tool that searches passages and shows the best ones."""

    index: BM25
    num_passages: int

    def __call__(self, query: str) -> str:
        """The best passages, separated by " | ". Raises ToolError if none shares a word with the query."""
        found = self.index.search(query[:MAX_QUERY], self.num_passages)
        if not found:
            raise ToolError("nothing is found with these words")
        return " | ".join(found)


def read_corpus(source: str) -> list[str]:
    """The passages of a file or of a world. Raises DataError if there are none, or a row has no text."""
    if is_world(source):
        return list(worlds.load(source.removeprefix("world:")).corpus())
    rows = read_good_rows(source)
    passages = []
    for where, row in rows.rows:
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"a row without a text, with {', '.join(row) or 'nothing'}",
                where=where,
                fix='give every row of the corpus a "text"',
            )
        passages.append(text)
    return passages
