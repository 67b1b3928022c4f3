"""The layouts of files of verdicts, and what a row of each says.

The plain one has a row such as

    {"prompt": "Is 7 prime?", "model": "mine", "baseline": "base", "verdict": 1.0, "length": 31,
     "baseline_length": 240, "shown_first": "baseline", "judge": "anna", "reply": "Yes.", "baseline_reply": "…"}

of which the last six are optional, as are `turn` and `weight`. The others are those of the field:

- AlpacaEval's annotations: `preference` from 1 to 2, where 2 says that the second output is better; in older files 0
  is a tie. `generator_1` is the baseline.
- FastChat's judgements of MT-Bench. Pairs (`gpt-4_pair.jsonl`) are judged twice, with `model_1` shown first in game 1
  and `model_2` in game 2; `model_2` is the baseline where one was named. Scores (`gpt-4_single.jsonl`) are of one reply
  each, from 1 to 10, and -1 where none could be read.
- Arena-Hard's judgements: the baseline is shown first in the first of two games. `A>>B` is a strong verdict, which its
  score counts three times.
- Votes of people: MT-Bench's human judgements, and tables such as `trimtab feedback export --layout votes` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict
from trimtab.data.mistakes import shown
from trimtab.evals.verdicts import PairVerdict, Side
from trimtab.votes.table import NOT_JUDGED, WORTH, text_of

STRONG_WEIGHT = 3
"""How often Arena-Hard's score counts a strong verdict."""
NO_SCORE = -1
"""What FastChat writes where it could read no score in a judgement."""


@dataclass(frozen=True, kw_only=True)
class ReplyScore:
    """A judge's score of a single reply, from 1 to 10."""

    prompt: str
    model: str
    score: float
    judge: str
    turn: int | None
    where: str


FromRow = PairVerdict | ReplyScore | None
"""What a row holds; None for a judgement without a verdict: the judge gave none that could be read."""


@dataclass(frozen=True, kw_only=True)
class VerdictLayout:
    """One way in which files of verdicts are laid out."""

    columns: tuple[str, ...]
    """The columns that a row must have."""
    read: Callable[[JsonDict, str, str | None], Iterator[FromRow]]
    """Takes a row, its place, and the name of the baseline if the command gives one."""
    optional: tuple[str, ...] = ()
    """Further columns that are read if a row has them."""


def layout_of(row: Mapping[str, Any], *, where: str) -> VerdictLayout:
    """The layout of a row. Raises DataError, with the columns that the nearest layout has and the row lacks."""
    layout = next((layout for layout in LAYOUTS.values() if set(layout.columns) <= set(row)), None)
    if layout is None:
        name, nearest = max(LAYOUTS.items(), key=lambda item: len(set(item[1].columns) & set(row)))
        missing = ", ".join(column for column in nearest.columns if column not in row)
        raise DataError(
            f"a row without {missing}; it has {', '.join(row)}",
            where=where,
            fix="give each row the columns prompt, model, baseline and verdict, or those of a known file "
            f"({', '.join(LAYOUTS)}); nearest is {name}",
        )
    return layout


def _plain(row: JsonDict, where: str, _baseline: str | None) -> Iterator[FromRow]:
    value = _number(row["verdict"])
    names: dict[str, Any] = {key: _name(row, key, where) for key in ("prompt", "model", "baseline")}
    if value is None:
        yield None
        return
    replies: dict[str, Any] = {key: _reply(row, key, where) for key in ("reply", "baseline_reply")}
    yield PairVerdict(
        **names,
        **replies,
        verdict=_in_range(value, 0.0, 1.0, where),
        length=_length(row.get("length"), replies["reply"], where),
        baseline_length=_length(row.get("baseline_length"), replies["baseline_reply"], where),
        shown_first=_side(row.get("shown_first") or None, where=where),
        judge=text_of(row.get("judge")),
        turn=_count(row, "turn", where),
        weight=_count(row, "weight", where) or 1,
        where=where,
    )


def _alpaca_eval(row: JsonDict, where: str, _baseline: str | None) -> Iterator[FromRow]:
    value = _number(row["preference"])
    prompt, model, baseline = (_name(row, key, where) for key in ("instruction", "generator_2", "generator_1"))
    if value is None:
        yield None
        return
    outputs = [row.get("output_2"), row.get("output_1")]
    reply, baseline_reply = (text if isinstance(text, str) else None for text in outputs)
    lengths = [None if isinstance(text, str) else text for text in outputs]
    yield PairVerdict(
        prompt=prompt,
        model=model,
        baseline=baseline,
        verdict=_in_range(1.5 if value == 0 else value, 1.0, 2.0, where) - 1.0,
        length=_length(lengths[0], reply, where),
        baseline_length=_length(lengths[1], baseline_reply, where),
        reply=reply,
        baseline_reply=baseline_reply,
        judge=text_of(row.get("annotator")),  # it draws the order of each prompt, and stores outputs in their own
        where=where,
    )


_WINNERS = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}


def _fastchat_pair(row: JsonDict, where: str, _baseline: str | None) -> Iterator[FromRow]:
    common: dict[str, Any] = _question(row, where) | {
        "model": _name(row, "model_1", where),
        "baseline": _name(row, "model_2", where),
    }
    if {"m1_score", "m2_score"} <= row.keys():  # each reply was scored alone, so there is one verdict and no order
        broken = NO_SCORE in (row["m1_score"], row["m2_score"])
        value = _word(row, "g1_winner", _WINNERS, where)
        yield None if broken or value is None else PairVerdict(**common, verdict=value)
        return
    sides: tuple[tuple[str, Side], ...] = (("g1_winner", "model"), ("g2_winner", "baseline"))
    for name, side in sides:
        value = _word(row, name, _WINNERS, where)
        yield None if value is None else PairVerdict(**common, verdict=value, shown_first=side)


def _fastchat_score(row: JsonDict, where: str, _baseline: str | None) -> Iterator[FromRow]:
    model, question, score = _name(row, "model", where), _question(row, where), _number(row["score"])
    if score is None or score == NO_SCORE:
        yield None
        return
    if not isinstance(score, float) or not 0 <= score <= 10:
        raise DataError(
            f"score is {row['score']!r}; a judge scores from 1 to 10",
            where=where,
            fix="correct the score, or write -1 if the judge gave none",
        )
    yield ReplyScore(model=model, score=score, **question)


_GAMES = {
    "A>>B": (1.0, STRONG_WEIGHT),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "A<B": (0.0, 1),
    "A<<B": (0.0, STRONG_WEIGHT),
}
_GAMES |= {f"B{label[1:-1]}A": (1 - value, weight) for label, (value, weight) in tuple(_GAMES.items())}


def _arena_hard(row: JsonDict, where: str, baseline: str | None) -> Iterator[FromRow]:
    if row.get("baseline") is None and baseline is None:
        raise DataError(
            "the row has no baseline, as rows of Arena-Hard before version 2 have none",
            where=where,
            fix="name the model that all others were compared with: --baseline gpt-4-0314 for Arena-Hard v0.1",
        )
    games = row["games"]
    if not isinstance(games, list) or len(games) != 2:
        raise DataError(
            f"games is {shown(games)}; two games are needed, the second with the replies in the other order",
            where=where,
            fix="have the replies judged pairwise",
        )
    common: dict[str, Any] = _question(row, where) | {
        "model": _name(row, "model", where),
        "baseline": baseline if row.get("baseline") is None else _name(row, "baseline", where),
    }
    for number, game in enumerate(games):
        label = game.get("score") if isinstance(game, dict) else game
        if label is None:
            yield None
            continue
        word = label.strip().upper() if isinstance(label, str) else ""
        if word not in _GAMES:
            raise DataError(
                f"games[{number}].score is {shown(label)}; known are {', '.join(_GAMES)}",
                where=where,
                fix="write one of these, or null if the judge gave none",
            )
        for_a, weight = _GAMES[word]
        side: Side = "model" if number == 1 else "baseline"  # who is A
        value = for_a if side == "model" else 1 - for_a
        yield PairVerdict(**common, verdict=value, weight=weight, shown_first=side)


_VOTES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "tie (inconsistent)": 0.5, "both_bad": 0.5}


def _model_votes(row: JsonDict, where: str, _baseline: str | None) -> Iterator[FromRow]:
    value = _word(row, "winner", _VOTES, where)
    assert value is not None, "every vote has a value"
    question = _question(row, where)
    found = PairVerdict(
        model=_name(row, "model_a", where), baseline=_name(row, "model_b", where), verdict=value, **question
    )
    replies = [_turn_of(row.get(f"conversation_{side}"), found.turn) for side in "ab"]
    if replies[0] is not None and replies[1] is not None:
        found = found.with_replies(replies[0], replies[1])
    yield _by_name(found)


_CHOICES = {**WORTH, **dict.fromkeys(NOT_JUDGED)}


def _vote_table(row: JsonDict, where: str, _baseline: str | None) -> Iterator[FromRow]:
    if text_of(row.get("banned")).lower() == "true" or text_of(row.get("purpose")) not in ("", "task"):
        yield None
        return
    choice = text_of(row["choice"])
    if choice not in _CHOICES:
        raise DataError(
            f"choice is {shown(row['choice'])}; known are {', '.join(filter(None, _CHOICES))}",
            where=where,
            fix="give votes over two replies; those of ratings and of whole rankings hold no verdict",
        )
    value = _CHOICES[choice]
    if value is None:
        yield None
        return
    left = text_of(row.get("shown_left")).upper()
    if left not in ("", "A", "B"):
        raise DataError(f"shown_left is {row['shown_left']!r}", where=where, fix="write the side that it was: A or B")
    first: dict[str, Side | None] = {"A": "model", "B": "baseline", "": None}
    found = PairVerdict(
        prompt=text_of(row.get("group")) or _name(row, "item", where),
        model=_name(row, "model_a", where),
        baseline=_name(row, "model_b", where),
        verdict=value,
        shown_first=first[left],
        judge=text_of(row["annotator"]),
        where=where,
    )
    yield _by_name(found)


LAYOUTS: dict[str, VerdictLayout] = {
    "plain": VerdictLayout(
        columns=("prompt", "model", "baseline", "verdict"),
        read=_plain,
        optional=(*("reply", "baseline_reply", "length", "baseline_length"), "shown_first", "judge", "turn", "weight"),
    ),
    "alpaca_eval": VerdictLayout(
        columns=("instruction", "generator_1", "generator_2", "preference"),
        read=_alpaca_eval,
        optional=("output_1", "output_2", "annotator"),
    ),
    "fastchat_pair": VerdictLayout(
        columns=("question_id", "model_1", "model_2", "g1_winner", "g2_winner"),
        read=_fastchat_pair,
        optional=("uid", "judge", "turn", "m1_score", "m2_score"),
    ),
    "arena_hard": VerdictLayout(
        columns=("model", "judge", "games"), read=_arena_hard, optional=("uid", "question_id", "baseline", "turn")
    ),
    "model_votes": VerdictLayout(
        columns=("question_id", "model_a", "model_b", "winner"),
        read=_model_votes,
        optional=("uid", "judge", "turn", "conversation_a", "conversation_b"),
    ),
    "votes": VerdictLayout(
        columns=("item", "annotator", "choice", "model_a", "model_b"),
        read=_vote_table,
        optional=("group", "shown_left", "banned", "purpose"),
    ),
    "fastchat_single": VerdictLayout(
        columns=("question_id", "model", "judge", "score"), read=_fastchat_score, optional=("uid", "turn")
    ),
}
"""The layouts by name; the first whose columns a row has is taken."""


def _by_name(verdict: PairVerdict) -> PairVerdict:
    """The verdict with the model whose name comes first as `model`: votes have no baseline, and name their sides at
    random, so that without this two models would meet in two match-ups."""
    return verdict.turned() if verdict.baseline < verdict.model else verdict


def _question(row: JsonDict, where: str) -> dict[str, Any]:
    """What judgements of a question have in common: its name, the turn, the judge, and the place of the row."""
    name = text_of(row.get("uid")) or text_of(row.get("question_id"))
    if not name:
        raise DataError(
            f"question_id is {row.get('question_id')!r}", where=where, fix="give the row the name of its question"
        )
    judge = row.get("judge")
    # FastChat writes the judge with its prompt, which differs by category and turn
    judge = judge[0] if isinstance(judge, list) and judge else judge
    return {"prompt": name, "turn": _count(row, "turn", where), "judge": text_of(judge), "where": where}


def _turn_of(conversation: Any, turn: int | None) -> str | None:
    """The reply of the assistant in this turn of a conversation, in the first if none is given; None if it is not
    there."""
    turns = conversation if isinstance(conversation, list) else []
    said = [one.get("content") for one in turns if isinstance(one, dict) and one.get("role") == "assistant"]
    found = said[(turn or 1) - 1 : turn or 1]
    return found[0] if found and isinstance(found[0], str) else None


def _word(row: JsonDict, name: str, known: Mapping[str, float | None], where: str) -> float | None:
    word = row[name]
    if not isinstance(word, str) or word not in known:
        raise DataError(f"{name} is {shown(word)}", where=where, fix=f"write one of {', '.join(known)}")
    return known[word]


def _name(row: JsonDict, key: str, where: str) -> str:
    name = row[key]
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f"the {key} is {name!r}",
            where=where,
            fix=f"give the row its {key} as text; verdicts are grouped by it",
        )
    return name


def _reply(row: JsonDict, key: str, where: str) -> str | None:
    text = row.get(key)
    if text is not None and not isinstance(text, str):
        raise DataError(f"the {key} is {shown(text)}", where=where, fix="give it as text, or leave the column out")
    return text


def _in_range(value: Any, low: float, high: float, where: str) -> float:
    if not isinstance(value, float) or not low <= value <= high:
        raise DataError(
            f"a verdict of {value!r}; this layout has numbers from {low:g} to {high:g}",
            where=where,
            fix=f"write {high:g} if the model's reply is better, {low:g} if the baseline's is, else their middle",
        )
    return value


def _length(cell: Any, reply: str | None, where: str) -> int | None:
    """The length that a cell gives, or without one that of the reply."""
    length = _number(cell)
    if length is None:
        return None if reply is None else len(reply)
    if isinstance(length, bool) or not isinstance(length, float) or not length >= 0 or length % 1:
        raise DataError(
            f"a length of {cell!r}",
            where=where,
            fix="give the number of characters of each reply, or leave both columns out",
        )
    if reply is not None and length != len(reply):
        raise DataError(
            f"a length of {length:g}, and the reply has {len(reply)} characters",
            where=where,
            fix="leave the column of lengths out",
        )
    return int(length)


def _count(row: JsonDict, name: str, where: str) -> int | None:
    """A whole number from 1 in a cell; None if the cell is empty."""
    value = _number(row.get(name))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, float) or value < 1 or value % 1:
        raise DataError(f"{name} is {row[name]!r}", where=where, fix="write a whole number from 1, or leave it out")
    return int(value)


def _side(value: Any, *, where: str) -> Side | None:
    if value is None or value == "model" or value == "baseline":
        return value  # type: ignore[no-any-return]
    raise DataError(
        f"shown_first is {value!r}", where=where, fix="write whose reply was shown first: model or baseline"
    )


def _number(cell: Any) -> Any:
    """A number, or the text of one as in a CSV file, as a float; None for an empty cell; anything else as it is."""
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bool):
        return cell
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return cell
