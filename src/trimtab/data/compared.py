"""Rows with two replies of which one was preferred, in the forms that files use: as votes, and as pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.core.types import Comparison, JsonDict, Message, PreferencePair, Prompt
from trimtab.data.columns import plain_name
from trimtab.data.messages import conversation_in, messages_of, value_in
from trimtab.data.mistakes import Mistake, shown
from trimtab.data.preferences import Judged, to_pairs
from trimtab.data.prompts import (
    field_of,
    make_prompt,
    prompt_in,
    refuse_row_weight,
    refuse_unread,
    reply_of,
    split_reply,
    with_columns,
)
from trimtab.data.rows import number_in

_TIES = frozenset({"tie", "ties", "tied", "equal", "same", "draw", "both", "neither", "both bad", "tie (bothbad)",
                   "tie bothbad", "both good", "tie (both bad)"})  # fmt: skip
_SCORES = (("score_a", "score_b"), ("score_0", "score_1"), ("score_1", "score_2"))
_END = re.compile(r"(?:\A|[_ -])?([ab]|\d)\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Sides:
    """How a file names its two replies: the last characters of their column names, and what numbers mean in a choice.

    For example, the columns `response_a` and `response_b` give `Sides("a", "b")`.
    """

    first: str
    second: str
    one_is_first: bool = False
    """True for SHP, in which a label is 1 if the first reply is preferred and 0 if the second is."""
    signed: bool = False
    """True for HelpSteer 2 and 3, in which a preference from -3 to 3 is for the first reply below 0 and for the second
    above 0."""


def sides_of(names: Mapping[str, str]) -> Sides:
    """The sides of a file; `names` is what `columns.names_of` gives for it."""
    old = {new: name for name, new in names.items()}
    first = old.get("response_a", "response_a").strip().lower()
    second = old.get("response_b", "response_b").strip().lower()
    choice = plain_name(old.get("choice", ""))
    signed = choice == "overall_preference" or (choice == "preference_strength" and first[-1] == "1")
    return Sides(first[-1], second[-1], one_is_first=first.startswith("human_ref"), signed=signed)


def to_judged(row: JsonDict, sides: Sides) -> Judged:
    """One vote over two replies. Raises Mistake."""
    refuse_row_weight(row)
    prompt, response_a, response_b = _asked(row)
    share = _share(row, sides)
    if response_a == response_b and share != 0.5:
        raise Mistake("identical_pair", "one reply is preferred, but both are the same", "remove the row")
    annotator = str(row["annotator"]) if row.get("annotator") is not None else ""
    return Judged(prompt, response_a, response_b, share, annotator)


def _asked(row: JsonDict) -> tuple[Prompt, str, str]:
    given_a, given_b = field_of(row, "response_a"), field_of(row, "response_b")
    if row.get("prompt") is None:
        given_a, given_b = (conversation_in(v, v) if isinstance(v, str) else v for v in (given_a, given_b))
        if isinstance(given_a, list) and isinstance(given_b, list):
            conversation_a, conversation_b = (messages_of("conversation", given) for given in (given_a, given_b))
            return _answered_twice(row, conversation_a, conversation_b)
    asked = field_of(row, "prompt")
    if (turns := _texts_of_turns(asked, given_a, given_b)) is not None:
        said, one, other = turns
        return _answered_twice(row, _by_turns(said, one), _by_turns(said, other))
    return prompt_in(row), reply_of("response_a", given_a, asked), reply_of("response_b", given_b, asked)


def _answered_twice(
    row: JsonDict, conversation_a: tuple[Message, ...], conversation_b: tuple[Message, ...]
) -> tuple[Prompt, str, str]:
    """The prompt that two whole conversations share, and the last reply of each."""
    before, one = split_reply("conversation_a", conversation_a)
    other_before, other = split_reply("conversation_b", conversation_b)
    if before != other_before:
        raise Mistake(
            "no_shared_prompt",
            "the two conversations part before the last reply, so it is not one prompt that both answer",
            "remove the row, or keep the turns up to the first reply",
        )
    refuse_unread(row)
    return make_prompt(with_columns(before, row), row), one, other


def _texts_of_turns(*values: Any) -> list[list[str]] | None:
    """What was asked and what each side replied turn after turn, if all are lists of texts of one length, as JSON text
    or not: {"prompt": ["Hi", "And you?"], "response_a": ["Hello.", "Fine."], …}. A null is an empty text."""
    found = []
    for value in values:
        texts = value_in(value) if isinstance(value, str) and value[:1] == "[" else value
        if not isinstance(texts, list) or not texts or not all(text is None or isinstance(text, str) for text in texts):
            return None
        found.append([text or "" for text in texts])
    return found if len({len(texts) for texts in found}) == 1 else None


def _by_turns(said: Sequence[str], replies: Sequence[str]) -> tuple[Message, ...]:
    return tuple(
        turn
        for question, reply in zip(said, replies, strict=True)
        for turn in (Message("user", question), Message("assistant", reply))
    )


def _share(row: JsonDict, sides: Sides) -> float:
    scores = next((pair for pair in _SCORES if row.get(pair[0]) is not None and row.get(pair[1]) is not None), None)
    by_score = None
    if scores is not None:
        a, b = number_in(row, scores[0]), number_in(row, scores[1])
        by_score = None if a is None or b is None else 0.5 if a == b else float(a > b)
    if row.get("choice") is None and row.get("winner_model_a") is not None:
        won = [bool(number_in(row, f"winner_{name}")) for name in ("model_a", "model_b", "tie")]
        if sum(won) != 1:
            raise Mistake("unknown_choice", "not one of winner_model_a, winner_model_b and winner_tie is 1", "set one")
        return (1.0, 0.0, 0.5)[won.index(True)]
    if row.get("choice") is None or row["choice"] == "":
        if by_score is not None:
            return by_score
        field_of(row, "choice")
    models = [row.get(f"model_{side}") for side in (sides.first, sides.second)]
    if row["choice"] in models and models[0] != models[1]:
        share = float(row["choice"] == models[0])
    else:
        share = share_for_first(row["choice"], sides)
    if by_score is not None and scores is not None and abs(share - by_score) > 0.5:
        raise Mistake(
            "swapped_pair",
            f"the choice is {row['choice']!r}, and by {scores[0]} and {scores[1]} the other reply is the better one",
            f"correct the row, or leave the scores out with FILE?ignore={scores[0]},{scores[1]} if they mean "
            "something else",
        )
    return share


def share_for_first(choice: Any, sides: Sides) -> float:
    """1 if the first reply is chosen, 0 if the second, 0.5 for a tie, in any spelling. Raises Mistake for others."""
    if isinstance(choice, str):
        word = choice.strip().strip("[]").lower().replace("_", " ")  # "[[A]]" is a verdict of MT-Bench
        if word in _TIES:
            return 0.5
        if word in ("first", "left", "second", "right"):
            return float(word in ("first", "left"))
        number = re.fullmatch(r"[+-]?\d+(\.\d+)?", word)
        if not number:
            end = _END.search(word)
            before = word.removesuffix(end[1]).strip(" -") if end else None
            if end and before in _SIDE_WORDS and end[1] in (sides.first, sides.second):
                return float(end[1] == sides.first)
            if end and before in ("", "model") and end[1] in "ab":
                return float(end[1] == "a")
            if not end or before != "model":
                raise _unknown(choice)
            if not sides.first.isdigit() and end[1] in "12":
                return float(end[1] == "1")
            raise _which(choice)
        choice = float(word)
    if isinstance(choice, bool) or not isinstance(choice, int | float):
        raise _unknown(choice)
    if sides.signed and abs(choice) <= 3:
        return 0.5 if choice == 0 else float(choice < 0)
    if sides.one_is_first and choice in (0, 1):
        return float(choice == 1)
    if sides.first.isdigit():
        first = int(sides.first)
        if first <= choice <= first + 1:  # between the two: a probability of the second, as AlpacaEval writes it
            return first + 1 - float(choice)
    raise _which(f"{choice:g}" if isinstance(choice, float) else shown(choice))


_SIDE_WORDS = frozenset({"", "response", "reply", "answer", "completion", "output", "model", "conversation",
                         "assistant", "human ref", "summary", "option"})  # fmt: skip


def _unknown(choice: Any) -> Mistake:
    return Mistake(
        "unknown_choice", f"a comparison labelled {shown(choice)}; labels are 'A', 'B' and 'tie'", "correct the label"
    )


def _which(choice: str) -> Mistake:
    """The Mistake of a number that may count the replies from 0 or from 1, which no single row can tell."""
    return Mistake(
        "unknown_choice",
        f"the preferred reply is given as {choice}, and nothing says which one that is",
        "write A, B or tie in a column 'choice'",
        droppable=False,
    )


def to_comparison(row: JsonDict, sides: Sides = Sides("a", "b")) -> Comparison:
    """One vote over two replies. Raises Mistake, also for a vote that is a probability."""
    judged = to_judged(row, sides)
    choices: dict[float, Literal["A", "B", "tie"]] = {1.0: "A", 0.0: "B", 0.5: "tie"}
    if judged.share not in choices:
        raise Mistake(
            "unknown_choice",
            f"a comparison labelled {shown(row.get('choice'))}, which is a probability and no vote",
            "round it to A, B or tie; as preference pairs such rows are read as they are",
        )
    return Comparison(
        prompt=judged.prompt,
        response_a=judged.response_a,
        response_b=judged.response_b,
        choice=choices[judged.share],
        annotator=judged.annotator,
    )


def pairs_of(judged: Sequence[Judged]) -> tuple[list[PreferencePair], dict[str, int]]:
    """One pair for each two replies, labelled with the share of votes for the preferred one, and further counts."""
    pairs, counts = to_pairs(judged, labels="soft")
    return pairs, {name: num for name, num in counts.items() if num and name not in ("pairs", "comparisons")}
