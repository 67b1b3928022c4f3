"""Answers of models to the questions of MT-Bench and Arena-Hard, in the layouts of FastChat and of Arena-Hard.

A row of FastChat's `model_answer/NAME.jsonl` is

    {"question_id": 81, "answer_id": "…", "model_id": "NAME", "choices": [{"index": 0, "turns": ["…", "…"]}],
     "tstamp": 1686286924.8}

and Arena-Hard has the same before version 2, with {"content": "…"} for a turn. Since version 2 its rows are

    {"uid": "328c…", "ans_id": "…", "model": "NAME", "messages": [{"role": "user", "content": "…"},
     {"role": "assistant", "content": {"answer": "…"}}], "tstamp": 1745605748.4, "metadata": {…}}

The metadata, counts of tokens of one tokenizer and of Markdown, are not written: Arena-Hard's own script adds them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import JsonDict, Prompt
from trimtab.data.mistakes import shown
from trimtab.data.sources import read_good_rows
from trimtab.evals.verdicts import PairVerdict
from trimtab.votes.table import text_of

Conversation = Sequence[tuple[str, str]]
"""The turns of a conversation: what the user says, and the reply."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The replies of models, turn by turn."""

    turns: Mapping[tuple[str, str], tuple[str, ...]]
    """By the name of the question and the name of the model."""
    sha256: Mapping[str, str]
    """The hash of each file, by its name as it was given."""

    def fill(self, verdicts: Sequence[PairVerdict]) -> tuple[tuple[PairVerdict, ...], int]:
        """The verdicts with the texts and lengths of their replies, and how many of them lack one of the two here and
        stay as they are. Raises DataError if all do."""
        filled = [self._filled(verdict) for verdict in verdicts]
        num_missing = sum(one is None for one in filled)
        if num_missing == len(verdicts):
            one = verdicts[0]
            models = ", ".join(sorted({model for _, model in self.turns}))
            raise DataError(
                f"the answers hold no two replies that were compared, such as those of {one.model!r} and "
                f"{one.baseline!r} to {shown(one.prompt)}; they are of {models}",
                where=", ".join(self.sha256),
                fix="give the files of all models and of their baseline; the names of models and questions have to be "
                "those of the verdicts",
            )
        return tuple(new or old for new, old in zip(filled, verdicts, strict=True)), num_missing

    def _filled(self, verdict: PairVerdict) -> PairVerdict | None:
        turn = (verdict.turn or 1) - 1
        replies = [self.turns.get((verdict.prompt, name), ())[turn:] for name in (verdict.model, verdict.baseline)]
        return verdict.with_replies(replies[0][0], replies[1][0]) if all(replies) else None


def read_answers(sources: Sequence[str | Path]) -> Answers:
    """The answers in files or folders of either layout; of several choices the first, which is the one that is judged.

    Raises DataError for a row of no layout, without texts, and for two different answers of a model to a question.
    """
    turns: dict[tuple[str, str], tuple[str, ...]] = {}
    places: dict[tuple[str, str], str] = {}
    hashes: dict[str, str] = {}
    for source in sources:
        read = read_good_rows(source)
        hashes[read.source] = read.sha256
        for where, row in read.rows:
            question, model, said = _of_row(row, where=where)
            if turns.setdefault((question, model), said) != said:
                raise DataError(
                    f"a second, different answer of {model!r} to {question}",
                    where=f"{places[question, model]} and {where}",
                    fix="remove one of them, or give the models different names",
                )
            places.setdefault((question, model), where)
    return Answers(turns=turns, sha256=hashes)


def _of_row(row: JsonDict, *, where: str) -> tuple[str, str, tuple[str, ...]]:
    if {"question_id", "model_id", "choices"} <= row.keys():
        names = (row["question_id"], row["model_id"])
        choices = row["choices"]
        first = choices[0] if isinstance(choices, list) and choices else None
        field, given = "choices[0].turns", first.get("turns") if isinstance(first, dict) else None
        turns = [turn.get("content") if isinstance(turn, dict) else turn for turn in _list_of(given)]
    elif {"uid", "model", "messages"} <= row.keys():
        names = (row["uid"], row["model"])
        field, given = "messages", row["messages"]
        said = [
            one.get("content") for one in _list_of(given) if isinstance(one, dict) and one.get("role") == "assistant"
        ]
        turns = [turn.get("answer") if isinstance(turn, dict) else turn for turn in said]
    else:
        raise DataError(
            f"a row that is no answer; it has {', '.join(row)}",
            where=where,
            fix="give rows with question_id, model_id and choices (FastChat), or uid, model and messages (Arena-Hard)",
        )
    question, model = map(text_of, names)
    if not question or not model:
        raise DataError(
            f"an answer of {names[1]!r} to the question {names[0]!r}",
            where=where,
            fix="name the question and the model",
        )
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise DataError(
            f"{field} is {shown(given)}, and holds no text for each turn",
            where=where,
            fix="answer the question again, or remove the row: the answer was not given",
        )
    return question, model, tuple(map(str, turns))


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# ---- writing --------------------------------------------------------------------------------------------------------


def fastchat_row(prompt: Prompt, model: str, choices: Sequence[Conversation]) -> JsonDict:
    """A row of FastChat's model answers. Raises ConfigError if the prompt does not name its question."""
    question = _question_of(prompt, "question_id", "uid")
    turns = [{"index": i, "turns": [reply for _, reply in choice]} for i, choice in enumerate(choices)]
    return {
        "question_id": question,
        "answer_id": _answer_id(model, question, turns),
        "model_id": model,
        "choices": turns,
        "tstamp": time.time(),
    }


def arena_hard_row(prompt: Prompt, model: str, choices: Sequence[Conversation]) -> JsonDict:
    """A row of Arena-Hard's model answers, which hold one choice. Raises ConfigError if there are more, or if the
    prompt does not name its question."""
    if len(choices) != 1:
        raise ConfigError(
            f"{len(choices)} replies to a prompt", where="the layout arena_hard", fix="sample one: --num-samples 1"
        )
    question = _question_of(prompt, "uid", "question_id")
    messages: list[JsonDict] = [
        message
        for asked, reply in choices[0]
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": {"answer": reply}})
    ]
    return {
        "uid": question,
        "ans_id": _answer_id(model, question, messages),
        "model": model,
        "messages": messages,
        "tstamp": time.time(),
    }


ANSWER_ROWS: Mapping[str, Callable[[Prompt, str, Sequence[Conversation]], JsonDict]] = {
    "fastchat": fastchat_row,
    "arena_hard": arena_hard_row,
}
"""The layouts in which answers are written: the row of a prompt, the model's name, and its choices."""


def answer_rows(
    layout: str, model: str, answered: Sequence[tuple[Prompt, Sequence[Conversation]]]
) -> Iterator[JsonDict]:
    """The rows of one model's answers to prompts, each with its choices."""
    for prompt, choices in answered:
        yield ANSWER_ROWS[layout](prompt, model, choices)


def _question_of(prompt: Prompt, *names: str) -> Any:
    for name in names:
        if prompt.facts.get(name) is not None:
            return prompt.facts[name]
    raise ConfigError(
        f"the prompt {shown(prompt.text)} does not name its question",
        where="the layout of the answers",
        fix=f"give each prompt a {names[0]}, as question.jsonl of MT-Bench and Arena-Hard has it",
    )


def _answer_id(model: str, question: Any, content: Any) -> str:
    """22 hex digits, as long as FastChat's, that follow from the answer."""
    text = json.dumps([model, question, content], ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:22]
