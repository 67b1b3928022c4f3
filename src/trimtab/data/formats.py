"""The known layouts of files: the columns that show each one, and the functions that turn its rows into records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from trimtab.core.types import (
    Comparison,
    Demonstration,
    JsonDict,
    LabelledResponse,
    PreferencePair,
    Prompt,
    RatedResponse,
    SteppedResponse,
)
from trimtab.data.columns import RATING, thumb
from trimtab.data.compared import pairs_of, to_comparison, to_judged
from trimtab.data.messages import READ_FIELDS
from trimtab.data.mistakes import Mistake, filled, shown
from trimtab.data.prompts import prompt_in
from trimtab.data.questions import has_turns, to_first_turn
from trimtab.data.ranked import (
    READ_OF_INSTANCE,
    READ_OF_REPLY,
    REPLY_LISTS,
    SCORE_LISTS,
    is_ranked,
    to_instances,
    to_ranked_pairs,
    to_tree_demonstrations,
    to_tree_pairs,
    to_tree_prompts,
    trees_of_rows,
)
from trimtab.data.rows import (
    final_answer,
    prompt_of,
    to_conversation,
    to_conversation_prompt,
    to_demonstration,
    to_explicit_pair,
    to_implicit_pair,
    to_labelled_response,
    to_question_answer,
    to_rated_response,
)
from trimtab.data.stepped import (
    READ_OF_PRM800K,
    is_math_shepherd,
    is_prm800k,
    math_shepherd_prompt,
    prm800k_prompt,
    to_math_shepherd,
    to_prm800k,
    to_stepped_response,
)

ColumnSet = frozenset[str]
Sample = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which files are laid out: how it is recognised and the records that it can give."""

    name: str
    columns: str
    """The columns, as messages to people name them."""
    matches: Callable[[ColumnSet, Sample], bool]
    """Takes the columns present in most rows, by the names of `columns.names_of`, and a sample value of each; true if
    this layout fits."""
    converters: Mapping[type, Callable[..., Any]]
    """For each kind of record, the function that turns a row into one or a list of them. The first kind is what the
    layout is for."""
    uses: frozenset[str] = frozenset()
    """Columns that become part of the records."""
    reads: frozenset[str] = READ_FIELDS
    """Fields that are read of the objects in these columns."""
    instead: Mapping[type, str] = field(default_factory=dict)
    """For a kind of record that the layout seems to hold but does not: the fix that an error shows."""
    gather: Callable[[Iterable[Any]], Iterator[Any]] | None = None
    """Joins rows that form one row only together, such as the messages of a tree; None if each row is complete."""
    collect: Mapping[type, Callable[[Sequence[Any]], tuple[list[Any], dict[str, int]]]] = field(default_factory=dict)
    """For a kind of record that may need several rows: turns what its converter gives for all rows into the records
    and further counts."""
    takes_sides: bool = False
    """Whether the converters also take the `Sides` of the file."""


@dataclass(frozen=True, kw_only=True)
class LayoutReading:
    """How the rows of one file are read as records of one kind."""

    layout: Layout
    kind: type
    names: Mapping[str, str]
    """For each renamed column, from its name in the file to its name here: for example {"question": "prompt"}."""
    convert: Callable[[JsonDict], Any]
    uses: frozenset[str]
    """The names, here, of columns that are part of the records."""
    seen: frozenset[str]
    """The columns that a row has filled in so far, by their names in the file."""

    @cached_property
    def used(self) -> frozenset[str]:
        """The columns seen that are part of the records, by their names in the file."""
        return frozenset(name for name in self.seen if self.names.get(name, name) in self.uses)

    def plain(self, row: JsonDict) -> JsonDict:
        """The row with the column names that are used here."""
        if not self.names:
            return row
        given = [(self.names.get(name, name), value) for name, value in row.items() if value is not None]
        found = dict(given)
        if len(found) < len(given):  # of two columns with one name, the one that is filled in
            found |= {name: value for name, value in given if filled(value)}
        return found

    def records(self, row: JsonDict, plain: JsonDict) -> list[Any]:
        """The records of a row; `plain` is `plain(row)`. A prompt takes every unused column as a fact. Raises
        Mistake."""
        if self.names and len(plain) < sum(value is not None for value in row.values()):
            _refuse_two_of_one_name(self.names, row)
        made = self.convert(plain)
        found = made if isinstance(made, list) else [made]
        if self.kind is Prompt and self.layout.gather is None and not _is_own(row.get("prompt")):
            left = {k: v for k, v in row.items() if self.names.get(k, k) not in self.uses}
            others = {k: v for k, v in left.items() if v is not None and v == v}
            _refuse_two_facts(others, row.get("facts"), self.names)
            facts: JsonDict = json.loads(json.dumps(others, default=str)) if others else {}
            found = found if not facts else [replace(prompt, facts={**facts, **prompt.facts}) for prompt in found]
        return found

    def collect(self, made: list[Any]) -> tuple[list[Any], dict[str, int]]:
        """The records of all rows, made from those of each row, and further counts."""
        together = self.layout.collect.get(self.kind)
        return (made, {}) if together is None else together(made)


def _refuse_two_of_one_name(names: Mapping[str, str], row: JsonDict) -> None:
    """Raises Mistake for a row that fills in two columns of one name here."""
    first: dict[str, str] = {}
    for name in filter(lambda name: filled(row[name]), row):
        other = first.setdefault(names.get(name, name), name)
        if other != name:
            renamed, left = (name, other) if name in names else (other, name)
            raise Mistake(
                "two_columns",
                f"{renamed} is read as {names[renamed]!r}, and this row fills in a column of that name too",
                f"leave that one out: FILE? with ignore={left} behind it",
            )


def _is_own(prompt: Any) -> bool:
    """Whether this is a prompt as `to_dict` writes it, with facts of its own."""
    return isinstance(prompt, dict) and "messages" in prompt and "facts" in prompt


def _refuse_two_facts(columns: JsonDict, facts: Any, names: Mapping[str, str]) -> None:
    """Raises Mistake for a column that holds another value than the fact of its name. A worked answer may: its last
    line alone is the fact."""
    for name, fact in facts.items() if isinstance(facts, dict) else ():
        if name in columns and str(columns[name]) != str(fact) and names.get(name) != "worked_answer":
            raise Mistake(
                "two_facts",
                f"{name} is {shown(columns[name])} in its column and {shown(fact)} in facts",
                f"correct one of them, or leave the column out with FILE?ignore={name}",
            )


def _has(*names: str) -> Callable[[ColumnSet, Sample], bool]:
    return lambda columns, _: columns.issuperset(names)


def _is_reply(columns: ColumnSet) -> bool:
    return "prompt" in columns and bool(columns & {"completion", "response"})


def _has_thumb(columns: ColumnSet, sample: Sample) -> bool:
    return "label" in columns and thumb(sample.get("label")) is not None


_CHOSEN_IS_NO_DEMONSTRATION = (
    "the better of two replies need not be a good one; to imitate the chosen ones anyway, "
    "set chosen_as_demonstrations = true in the sft stage"
)
_THUMBS_ARE_NO_DEMONSTRATION = (
    "keep only the rows with label true and leave the column out (FILE?ignore={label}), or learn from both kinds with "
    "the preference stage and a loss of single replies, such as loss = 'kto'"
)
_SAYS_WHICH = frozenset(
    {"choice", "winner_model_a", "winner_model_b", "winner_tie", "score_a", "score_b", "score_0", "score_1", "score_2"}
)
_OF_TREES = frozenset({"message_id", "parent_id", "role", "text", "rank", "deleted", "review_result"})
_REPLY = frozenset({"completion", "response", "untrained_turns"})


def _to_asked(row: JsonDict) -> Prompt:
    return to_conversation_prompt(row) if row.get("prompt") is None else prompt_in(row)


def _to_question(row: JsonDict) -> Prompt:
    """The question as a prompt, with its final answer among the facts."""
    prompt = prompt_in(row)
    return replace(prompt, facts={**final_answer(row), **prompt.facts})


# The more specific layouts come first, because the first one that fits is taken.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="messages of trees",
        columns="message_id, parent_id, role, text, rank (OpenAssistant)",
        matches=_has("message_id", "role", "text"),
        converters={
            PreferencePair: to_tree_pairs, Demonstration: to_tree_demonstrations, Prompt: to_tree_prompts
        },
        uses=_OF_TREES,
        gather=trees_of_rows,
    ),
    Layout(
        name="trees of messages",
        columns="message_tree_id, prompt with text, role and replies (OpenAssistant)",
        matches=lambda columns, sample: isinstance(sample.get("prompt"), dict) and "replies" in sample["prompt"],
        converters={
            PreferencePair: to_tree_pairs, Demonstration: to_tree_demonstrations, Prompt: to_tree_prompts
        },
        uses=frozenset({"prompt"}),
        reads=READ_FIELDS | _OF_TREES | {"replies"},
    ),
    Layout(
        name="comparisons",
        columns="prompt, response_a, response_b, choice",
        matches=lambda columns, _: columns >= {"response_a", "response_b"} and bool(columns & _SAYS_WHICH),
        converters={
            Comparison: to_comparison,
            PreferencePair: to_judged,
            Prompt: lambda row, sides: to_judged(row, sides).prompt,
        },
        uses=_SAYS_WHICH | {"response_a", "response_b", "annotator"},
        collect={PreferencePair: pairs_of},
        takes_sides=True,
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="stepwise replies",
        columns="prompt, completions, labels",
        matches=lambda columns, _: columns >= {"prompt", "labels"} and bool(columns & {"completions", "steps"}),
        converters={SteppedResponse: to_stepped_response, Prompt: prompt_in},
        uses=frozenset({"completions", "steps", "labels", "neutral"}),
    ),
    Layout(
        name="steps of PRM800K",
        columns="question with problem, label with steps (PRM800K)",
        matches=lambda _, sample: is_prm800k(sample),
        converters={SteppedResponse: to_prm800k, Prompt: prm800k_prompt},
        uses=frozenset(
            {"prompt", "label", "neutral", "is_quality_control_question", "is_initial_screening_question"}
        ),
        reads=READ_OF_PRM800K,
    ),
    Layout(
        name="steps of Math-Shepherd",
        columns="input with steps that end with a tag, label (Math-Shepherd)",
        matches=lambda _, sample: is_math_shepherd(sample),
        converters={SteppedResponse: to_math_shepherd, Prompt: math_shepherd_prompt},
        uses=frozenset({"prompt", "label"}),
    ),
    Layout(
        name="ranked replies",
        columns="prompt, responses (or completions, answers) with scores or ranks",
        matches=lambda columns, sample: "prompt" in columns and is_ranked(dict(sample)),
        converters={PreferencePair: to_ranked_pairs, Prompt: prompt_in},
        uses=frozenset({*SCORE_LISTS, *REPLY_LISTS, "targets"}),
        reads=READ_OF_REPLY,
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="preference pairs",
        columns="prompt, chosen, rejected",
        matches=_has("prompt", "chosen", "rejected"),
        converters={PreferencePair: to_explicit_pair, Prompt: prompt_of(to_explicit_pair)},
        uses=frozenset({"chosen", "rejected", "label", "margin"}),
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="preference pairs with an implicit prompt",
        columns="chosen, rejected that begin alike: texts, message lists or Human/Assistant transcripts",
        matches=_has("chosen", "rejected"),
        converters={PreferencePair: to_implicit_pair, Prompt: prompt_of(to_implicit_pair)},
        uses=frozenset({"chosen", "rejected", "label", "margin"}),
        instead={Demonstration: _CHOSEN_IS_NO_DEMONSTRATION},
    ),
    Layout(
        name="replies with thumbs up or down",
        columns="prompt, completion (or messages), label (true or false)",
        matches=lambda columns, sample: (_is_reply(columns) or "messages" in columns) and _has_thumb(columns, sample),
        converters={LabelledResponse: to_labelled_response, Prompt: _to_asked},
        uses=_REPLY | {"label"},
        instead={Demonstration: _THUMBS_ARE_NO_DEMONSTRATION},
    ),
    Layout(
        name="prompts with completions",
        columns="prompt, completion (or response)",
        matches=lambda columns, _: _is_reply(columns),
        converters={Demonstration: to_demonstration, Prompt: prompt_in},
        uses=_REPLY,
    ),
    Layout(
        name="replies with ratings",
        columns="prompt, completion (or response), rating (or score)",
        matches=lambda columns, _: _is_reply(columns) and bool(columns & set(RATING)),
        converters={RatedResponse: to_rated_response, Prompt: prompt_in},
        uses=_REPLY | set(RATING),
    ),
    Layout(
        name="conversations",
        columns="messages",
        matches=_has("messages"),
        converters={Demonstration: to_conversation, Prompt: to_conversation_prompt},
        uses=frozenset({"messages"}),
    ),
    Layout(
        name="instructions with instances",
        columns="instruction, instances with input and output (self-instruct)",
        matches=lambda columns, sample: "prompt" in columns and isinstance(sample.get("instances"), list),
        converters={Demonstration: to_instances, Prompt: lambda row: [d.prompt for d in to_instances(row)]},
        uses=frozenset({"instances"}),
        reads=READ_OF_INSTANCE,
    ),
    Layout(
        name="questions with answers",
        columns="question (or instruction, problem), answer",
        matches=_has("prompt", "worked_answer"),
        converters={Demonstration: to_question_answer, Prompt: _to_question},
        uses=frozenset({"worked_answer"}),
    ),
    Layout(
        name="questions of several turns",
        columns="question_id, turns (MT-Bench)",
        matches=lambda columns, sample: columns >= {"question_id", "turns"} and has_turns(sample),
        converters={Prompt: to_first_turn},
    ),
    Layout(
        name="prompts",
        columns="prompt",
        matches=_has("prompt"),
        converters={Prompt: prompt_in},
        instead={
            Demonstration: "add a column 'completion' with the replies to imitate, or name the one that holds them: "
            "FILE?columns=NAME:completion",
        },
    ),
)  # fmt: skip
