"""Turns one row of a file, in any layout, into a record, or says what is wrong with it. The rows have the column names
of `columns.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from trimtab.core.types import (
    Demonstration,
    JsonDict,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
)
from trimtab.data.columns import RATING, SCORES_OF_PAIR, SYSTEM, thumb
from trimtab.data.messages import conversation_in, messages_of, texts_as_turns, untrained_turns
from trimtab.data.mistakes import Mistake, shown, wrong_type
from trimtab.data.prompts import (
    earlier_turns,
    field_of,
    make_prompt,
    no_single_reply,
    not_empty,
    prompt_in,
    refuse_beside_reply,
    refuse_markup,
    refuse_unread,
    refuse_written_turns,
    reply_of,
    reply_turns,
    split_reply,
    with_columns,
)
from trimtab.data.transcripts import is_transcript, joined, refuse_opening, transcript

# ---- values ---------------------------------------------------------------------------------------------------------


def number_in(row: Mapping[str, Any], name: str) -> float | None:
    """The number under `name`, also if it is written as text; None if it is empty. Raises Mistake for other values."""
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        wrong_type(name, value, "a finite number")
    try:
        number = float(value)
    except (ValueError, OverflowError):  # a whole number may be too large
        number = math.nan
    if not math.isfinite(number):
        wrong_type(name, value, "a finite number")
    return number


# ---- pairs ----------------------------------------------------------------------------------------------------------

_ORDERS: tuple[tuple[tuple[str, str], int], ...] = (
    *((names, 1) for names in SCORES_OF_PAIR),
    (("chosen_rank", "rejected_rank"), -1),
    (("rank_chosen", "rank_rejected"), -1),
)
"""Names of a number of the better and of the worse reply, with 1 if the higher number is the better one, else -1."""
_NUMBERS_OF_PAIR = frozenset(name for names, _ in _ORDERS for name in names)


def _pair(row: JsonDict, prompt: Prompt, chosen: str, rejected: str) -> PreferencePair:
    if chosen == rejected:
        raise Mistake(
            "identical_pair", f"chosen and rejected are the same: {shown(chosen)}", "remove the row: it says nothing"
        )
    refuse_beside_reply(row)
    if row.keys() & _NUMBERS_OF_PAIR:
        _refuse_swapped(row)
    for name in ("tie", "is_tie"):
        if thumb(row.get(name)):
            raise Mistake(
                "tied_pair", f"{name} is {shown(row[name])}: neither reply is the better one", "remove the row"
            )
    label = _probability(row.get("label"))
    margin = number_in(row, "margin")
    if margin is not None and margin < 0:
        raise Mistake(
            "swapped_pair",
            f"margin is {margin:g}: by it, the rejected reply is the better one",
            "swap chosen and rejected, and give the margin as a number above 0",
        )
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin, label=label)


def _refuse_swapped(row: JsonDict) -> None:
    for (one, other), sign in _ORDERS:
        if row.get(one) is None or row.get(other) is None:
            continue
        chosen, rejected = number_in(row, one), number_in(row, other)
        if chosen is not None and rejected is not None and sign * chosen < sign * rejected:
            raise Mistake(
                "swapped_pair",
                f"{one} is {chosen:g} and {other} {rejected:g}: by them, the rejected reply is the better one",
                f"swap the replies, or leave the scores out with FILE?ignore={one},{other} if they mean something else",
            )


def _probability(value: Any) -> float:
    """The label of a pair, the probability that chosen is preferred, from 0.5 to 1; an empty cell and true mean 1."""
    if value is None or value == "" or value is True:
        return 1.0
    try:
        label = float(value)
    except (TypeError, ValueError, OverflowError):
        label = math.nan
    if not 0.5 <= label <= 1:
        raise Mistake(
            "label_out_of_range",
            f"label is {shown(value)}, but the probability that chosen is preferred is from 0.5 to 1",
            "swap chosen and rejected where it is below 0.5, and give a probability, not a score; a column that means "
            "something else is left out with FILE?ignore=label",
        )
    return label


def to_explicit_pair(row: JsonDict) -> PreferencePair:
    """A pair with its prompt in a column of its own."""
    chosen = reply_turns("chosen", field_of(row, "chosen"))
    rejected = reply_turns("rejected", field_of(row, "rejected"))
    if isinstance(chosen, tuple) and isinstance(rejected, tuple) and (len(chosen) > 1 or len(rejected) > 1):
        return _conversations_pair(row, chosen, rejected)
    if isinstance(chosen, tuple):
        chosen = reply_of("chosen", row["chosen"])
    if isinstance(rejected, tuple):
        rejected = reply_of("rejected", row["rejected"])
    if is_transcript(row.get("prompt")):
        chosen_turns, rejected_turns = transcript("chosen", chosen), transcript("rejected", rejected)
        if chosen_turns and rejected_turns:  # whole transcripts, which repeat the prompt
            return _conversations_pair(row, joined(chosen_turns), joined(rejected_turns))
        chosen, rejected = not_empty("chosen", chosen.strip()), not_empty("rejected", rejected.strip())
    return _pair(row, prompt_in(row), chosen, rejected)


def _conversations_pair(row: JsonDict, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> PreferencePair:
    """The pair of two conversations. Some files repeat the prompt inside both, sometimes after a system turn that the
    prompt lacks; in others the prompt is followed by several turns."""
    stated = prompt_in(row)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise no_single_reply(name, turns)
    if chosen[0].role != "assistant" and rejected[0].role != "assistant":
        before, reply, other = _shared(chosen, rejected)
        whole = with_columns(before, {k: row[k] for k in SYSTEM if k in row})
        if stated.messages != whole[-len(stated.messages) :]:
            raise Mistake(
                "no_shared_prompt",
                f"chosen and rejected begin with another conversation than prompt ({shown(stated.text)})",
                "keep only the reply in chosen and rejected, or make the prompt the same",
            )
    else:
        before, reply, other = _shared((*stated.messages, *chosen), (*stated.messages, *rejected))
        whole = before
    return _pair(row, make_prompt(whole, row, dict(stated.facts)), reply, other)


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[tuple[Message, ...], str, str]:
    """The turns before the last one, which both conversations must share, and the last reply of each."""
    before, reply = split_reply("chosen", chosen)
    other_before, other_reply = split_reply("rejected", rejected)
    if before != other_before:
        at = _num_shared(before, other_before)
        raise Mistake(
            "no_shared_prompt",
            f"chosen and rejected part at turn {at + 1}, before the last reply "
            f"(they have {len(chosen)} and {len(rejected)} turns)",
            "give both the same conversation up to the last reply, or remove the row",
        )
    return before, reply, other_reply


def to_implicit_pair(row: JsonDict) -> PreferencePair:
    """A pair whose prompt is what both conversations or texts begin with."""
    chosen = reply_turns("chosen", field_of(row, "chosen"))
    rejected = reply_turns("rejected", field_of(row, "rejected"))
    refuse_unread(row)
    refuse_markup(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns, other_turns = transcript("chosen", chosen), transcript("rejected", rejected)
        if turns is None or other_turns is None:
            return _plain_text_pair(row, chosen, rejected)
        before, reply, other = _shared(turns, other_turns)
        before = joined(before)
    else:
        if isinstance(chosen, str) or isinstance(rejected, str):
            wrong_type("chosen or rejected", chosen if isinstance(chosen, str) else rejected, "a list of messages")
        before, reply, other = _shared(chosen, rejected)
    return _pair(row, make_prompt(with_columns(before, row), row), reply, other)


def _num_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items at the beginning are the same in both."""
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
    if "\n\nAssistant:" in shared.partition("\n\nHuman:")[2]:
        refuse_opening("chosen", shared)
    refuse_written_turns("what chosen and rejected begin with", shared[:cut])
    turns = with_columns((Message("user", shared[:cut].rstrip()),), row)
    return _pair(row, make_prompt(turns, row), not_empty("chosen", chosen[cut:]), not_empty("rejected", rejected[cut:]))


# ---- one reply ------------------------------------------------------------------------------------------------------


def _answered(row: JsonDict, reply: Any) -> tuple[Prompt, str, tuple[int, ...]]:
    """The prompt, the last reply to it, and the numbers of the assistant turns not to learn from; `reply` may hold
    several turns."""
    prompt = prompt_in(row)
    refuse_beside_reply(row)
    turns = reply_turns("completion", reply)
    if isinstance(turns, str):
        if is_transcript(row["prompt"]):
            turns = not_empty("completion", turns.strip())
        return prompt, turns, _untrained_before(row, "prompt")
    if not turns or turns[0].role != "assistant":
        raise no_single_reply("completion", turns)
    before, said = split_reply("completion", turns)
    earlier = _num_replies(prompt.messages)
    untrained = (*_untrained_before(row, "prompt"), *(earlier + i for i in _untrained_in("completion", reply)))
    if before:
        prompt = replace(prompt, messages=(*prompt.messages, *before), id=str(row.get("id") or ""))
    return prompt, said, _without_last("completion", untrained, prompt)


def _untrained_before(row: JsonDict, name: str) -> tuple[int, ...]:
    """The numbers of the assistant turns not to learn from in the history and, after it, in the messages of a
    column."""
    earlier = _num_replies(earlier_turns(row))
    return (*_untrained_in("history", row.get("history")), *(earlier + i for i in _untrained_in(name, row.get(name))))


def _untrained_in(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = conversation_in(value, value)
    if isinstance(value, dict):
        value = value.get("messages", [value])
    return untrained_turns(name, value) if isinstance(value, list) and value and isinstance(value[0], dict) else ()


def _num_replies(messages: Sequence[Message]) -> int:
    return sum(message.role == "assistant" for message in messages)


def _without_last(name: str, untrained: tuple[int, ...], prompt: Prompt) -> tuple[int, ...]:
    """The untrained turns themselves. Raises Mistake if the reply to the prompt is one of them."""
    if untrained and _num_replies(prompt.messages) in untrained:
        raise Mistake(
            "weight",
            f"the last reply of {name} is marked as not to be learnt from, and it is what is learnt",
            f"end {name} with a reply to learn from, or remove the row",
        )
    return untrained


def to_demonstration(row: JsonDict) -> Demonstration:
    """A prompt with its completion."""
    prompt, reply, untrained = _answered(row, field_of(row, "completion", "response"))
    return Demonstration(prompt=prompt, response=reply, untrained_turns=_untrained(row, untrained))


def _untrained(row: JsonDict, found: tuple[int, ...]) -> tuple[int, ...]:
    """The row's own `untrained_turns`, which files that trimtab wrote have, else those found in the messages."""
    return tuple(row["untrained_turns"]) if isinstance(row.get("untrained_turns"), list) else found


def to_question_answer(row: JsonDict) -> Demonstration:
    """A question with its worked answer; the final answer is a fact of the prompt."""
    prompt, reply, untrained = _answered(row, field_of(row, "worked_answer"))
    prompt = replace(prompt, facts={**final_answer(row), **prompt.facts})
    return Demonstration(prompt=prompt, response=reply, untrained_turns=untrained)


def final_answer(row: JsonDict) -> JsonDict:
    """The final answer, for a verifier: what follows the last "####" (gsm8k), or else all of it."""
    return {"answer": str(field_of(row, "worked_answer")).rpartition("####")[2].strip()}


def to_conversation(row: JsonDict) -> Demonstration:
    """A conversation that ends with the reply to imitate."""
    value = _list_of_messages(row)
    refuse_unread(row)
    refuse_beside_reply(row)
    messages, reply = split_reply("messages", messages_of("messages", value))
    prompt = make_prompt(with_columns(messages, row), row)
    untrained = _without_last("messages", _untrained_before(row, "messages"), prompt)
    return Demonstration(prompt=prompt, response=reply, untrained_turns=untrained)


def _list_of_messages(row: JsonDict) -> Any:
    value = field_of(row, "messages")
    return texts_as_turns("messages", conversation_in(value, value) if isinstance(value, str) else value)


def to_labelled_response(row: JsonDict) -> LabelledResponse:
    """A reply with a thumb up or down."""
    value = field_of(row, "label")
    label = thumb(value)
    if label is None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        raise Mistake(
            "unknown_label",
            f"label is {shown(value)}, and a thumb is true or false",
            "write true or false" + (": say from which number on a reply is good" if number else ""),
            droppable=not number,
        )
    if row.get("messages") is not None and row.get("prompt") is None:
        shown_reply = to_conversation(row)
        return LabelledResponse(prompt=shown_reply.prompt, response=shown_reply.response, label=label)
    prompt, reply, _ = _answered(row, field_of(row, "completion", "response"))
    return LabelledResponse(prompt=prompt, response=reply, label=label)


def to_rated_response(row: JsonDict) -> RatedResponse:
    """A reply with the one number that rates it."""
    rated = [name for name in RATING if row.get(name) not in (None, "")]
    if len(rated) > 1:
        raise Mistake(
            "two_ratings",
            f"{' and '.join(rated)} rate the reply, and one number is learnt",
            f"leave the others out, for instance FILE?ignore={','.join(rated[1:])}",
        )
    rating = number_in(row, rated[0]) if rated else None
    if rating is None:
        raise Mistake("missing_field", "the reply has no rating", f"fill in one of {', '.join(RATING)}")
    prompt, reply, _ = _answered(row, field_of(row, "completion", "response"))
    return RatedResponse(prompt=prompt, response=reply, rating=rating)


# ---- prompts alone --------------------------------------------------------------------------------------------------


def prompt_of(convert: Callable[[JsonDict], Any]) -> Callable[[JsonDict], Prompt]:
    """A function that gives the prompt of the record that `convert` makes."""
    return lambda row: cast(Prompt, convert(row).prompt)


def to_conversation_prompt(row: JsonDict) -> Prompt:
    """A conversation up to the last turn that is not the assistant's: a reply at the end is not part of the prompt."""
    refuse_unread(row)
    messages = messages_of("messages", _list_of_messages(row))
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return make_prompt(with_columns(messages, row), row)
