"""Several replies to one prompt, ranked or scored: UltraFeedback, Nectar, OpenAssistant, multiple choice, groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from trimtab.core.types import Demonstration, JsonDict, Message, PreferencePair, Prompt
from trimtab.data.columns import thumb
from trimtab.data.files import Located
from trimtab.data.messages import refuse_fields
from trimtab.data.mistakes import BadRow, Mistake, shown, wrong_type
from trimtab.data.prompts import field_of, prompt_in, refuse_beside_reply, refuse_row_weight, reply_of
from trimtab.data.rows import number_in

TEXT_OF_REPLY = ("response", "answer", "text", "completion", "content", "output")
"""Fields of a reply in a list of replies that may hold its text."""
_SCORES = {
    "rank": -1.0,
    **dict.fromkeys(("overall_score", "score", "rating", "overall_rating", "pm_score", "reward"), 1.0),
}
"""Fields of a reply that say how good it is: 1 if higher is better, -1 if lower is better."""
READ_OF_REPLY = frozenset({*TEXT_OF_REPLY, *_SCORES})
"""Fields of a reply in a list of replies that are read."""
READ_OF_INSTANCE = frozenset({"input", "output"})
"""Fields of an instance of an instruction that are read."""
SCORE_LISTS = {"scores": 1.0, "ratings": 1.0, "rewards": 1.0,
               "ranks": -1.0, "rank": -1.0, "mean_ranks": -1.0, "rankings": -1.0}  # fmt: skip
"""Columns with a list of one number for each reply: 1 if higher is better, -1 if lower is better."""
_RANKS = frozenset({"rank", "ranks", "rankings"})
"""The fields that hold places in an order, of which none may be missing. Mean ranks are not among them."""
REPLY_LISTS = ("responses", "answers", "completions", "replies", "generations")


def is_ranked(row: JsonDict) -> bool:
    """Whether a row holds several replies and something that says which is better."""
    return bool(_ranked_list(row)) or isinstance(row.get("targets"), dict)


def _ranked_list(row: JsonDict) -> str:
    for name in REPLY_LISTS:
        value = row.get(name)
        if not isinstance(value, list) or not value:
            continue
        if isinstance(value[0], dict) and any(t in value[0] for t in TEXT_OF_REPLY) and "role" not in value[0]:
            return name
        if any(isinstance(row.get(by), list) for by in SCORE_LISTS):
            return name
    return ""


@dataclass(frozen=True)
class _Scored:
    text: str
    score: float
    """Higher is better."""


def to_ranked_pairs(row: JsonDict) -> list[PreferencePair]:
    """A pair for every two replies of which one is better, in the order of the row. Raises Mistake."""
    field_of(row, "prompt")
    refuse_row_weight(row)
    prompt, replies = _read(row)
    found = []
    for one, other in combinations(replies, 2):
        if one.score != other.score and one.text != other.text:
            better, worse = (one, other) if one.score > other.score else (other, one)
            found.append(PreferencePair(prompt=prompt, chosen=better.text, rejected=worse.text))
    if not found:
        raise Mistake("all_tied", "no reply is better than another", "remove the row: it says nothing")
    return found


def _read(row: JsonDict) -> tuple[Prompt, list[_Scored]]:
    if isinstance(row.get("targets"), dict):  # multiple choice: 1 is right, 0 wrong
        targets = row["targets"]
        texts, scores = targets.get("choices"), targets.get("labels")
        by_first = _by_first({"labels": _numbers("targets", texts, scores, 1.0)}, "targets")
        return prompt_in(row), [_Scored(reply_of("targets", texts[i], row["prompt"]), score) for i, score in by_first]
    name = _ranked_list(row)
    if not name:
        field_of(row, *REPLY_LISTS)
        wrong_type("responses", row.get("responses") or row.get("answers"), "a list of replies with scores or ranks")
    prompt, value = prompt_in(row), row[name]
    if isinstance(value[0], dict):
        return prompt, _scored(row, name, value)
    scores = {
        by: _numbers(name, value, row[by], sign) for by, sign in SCORE_LISTS.items() if isinstance(row.get(by), list)
    }
    if not scores:
        wrong_type(name, value, "a list of replies with scores or ranks")
    return prompt, [_Scored(reply_of(name, value[i], row["prompt"]), score) for i, score in _by_first(scores, name)]


def _numbers(name: str, texts: Any, scores: Any, sign: float) -> list[float]:
    """One number for each text, higher for better ones; nan for one that is empty."""
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise Mistake("wrong_number_of_labels", f"{name} has not one score for each reply", "give each reply one score")
    numbers = [number_in({name: score}, name) for score in scores]
    return [math.nan if number is None else sign * number for number in numbers]


def _scored(row: JsonDict, name: str, replies: Sequence[Any]) -> list[_Scored]:
    """The replies of a list of objects that hold a reply and its scores."""
    texts = []
    for i, reply in enumerate(replies):
        place = f"{name}[{i}]"
        if not isinstance(reply, dict):
            wrong_type(place, reply, "an object with the reply and its score or rank")
        refuse_fields(place, reply, READ_OF_REPLY)
        texts.append(reply_of(place, field_of(reply, *TEXT_OF_REPLY), row["prompt"]))
        if all(reply.get(by) is None for by in _SCORES):
            raise Mistake(
                "missing_field",
                f"{place} has neither a score nor a rank: it has {', '.join(reply)}",
                f"give each reply one of {', '.join(_SCORES)}",
            )
    scores = {
        by: _numbers(f"{name}.{by}", texts, [reply.get(by) for reply in replies], sign)
        for by, sign in _SCORES.items()
        if any(reply.get(by) is not None for reply in replies)
    }
    first = next(iter(scores))
    for i, reply in enumerate(replies):
        if reply.get(first) is None:
            raise Mistake(
                "mixed_scores",
                f"{name}[{i}] has no {first}, and another reply of the row has one",
                f"give each reply its {first}, or leave that field out of all",
            )
    return [_Scored(texts[i], score) for i, score in _by_first(scores, name)]


def _by_first(scores: Mapping[str, list[float]], name: str) -> list[tuple[int, float]]:
    """Numbers of the replies and their scores of the first kind, without those for which it is empty. Raises Mistake if
    another kind puts two of these replies in the other order, or if ranks have a gap."""
    for kind in _RANKS & scores.keys():
        _refuse_gap(kind, [-score for score in scores[kind] if not math.isnan(score)], name)
    (first, chosen), *others = scores.items()
    known = [i for i, score in enumerate(chosen) if not math.isnan(score)]
    for kind, further in others:
        for i, j in combinations(known, 2):
            if (chosen[i] - chosen[j]) * (further[i] - further[j]) < 0:
                raise Mistake(
                    "scores_disagree",
                    f"{name}: {first} and {kind} put replies {i} and {j} in opposite orders",
                    f"leave {first} or {kind} out of the file: only one can say which reply is better",
                )
    return [(i, chosen[i]) for i in known]


def _refuse_gap(kind: str, ranks: Sequence[float], name: str) -> None:
    """Raises Mistake for ranks that leave a place empty, as 1, 2, 4 do: a reply of the ranking is missing. They begin
    at 0 or 1. Behind two replies at rank 1 the next rank is 2 or 3. Ranks that are not whole numbers are scores."""
    if not ranks or not all(rank.is_integer() for rank in ranks):
        return
    counts = Counter(ranks)
    expected = min(1.0, max(0.0, min(ranks)))
    latest = expected
    for rank in sorted(counts):
        if not expected <= rank <= latest:
            raise Mistake(
                "ranking_gap",
                f"{name}: the {kind} values are {', '.join(f'{r:g}' for r in sorted(ranks))}, and no reply is at "
                f"{expected:g}",
                "add the reply that is missing, or number the others without a gap",
            )
        expected, latest = rank + 1, rank + counts[rank]


# ---- OpenAssistant --------------------------------------------------------------------------------------------------


def trees_of_rows(rows: Iterable[Located | BadRow]) -> Iterator[Located | BadRow]:
    """Rows that each hold one message and the id of its parent, joined to one row for each tree of messages.

    A message whose parent is not in the file is a bad row, and so is a message that no first message leads to. So is
    a second message with the same id if the two differ.
    """
    messages: dict[str, tuple[str, JsonDict]] = {}
    bad: list[BadRow] = []
    for found in rows:
        if isinstance(found, BadRow):
            bad.append(found)
            continue
        where, row = found
        name = str(row.get("message_id"))
        known = messages.setdefault(name, (where, {**row, "replies": []}))[1]
        if {k: v for k, v in known.items() if k != "replies"} != row:
            problem = f"two messages have the id {name}, and they differ"
            bad.append(BadRow(where, "repeated_id", problem, "give every message an id of its own"))
    roots: list[Located] = []
    for where, message in messages.values():
        parent = message.get("parent_id")
        if parent is None or parent == "":
            roots.append((where, {"message_tree_id": message.get("message_id"), "prompt": message}))
        elif str(parent) in messages:
            messages[str(parent)][1]["replies"].append(message)
        else:
            problem = f"the message before it, {shown(parent)}, is not in the file"
            bad.append(BadRow(where, "missing_parent", problem, "add that message, or remove what answers it"))
    reached = set[str]()
    waiting: list[JsonDict] = [root["prompt"] for _, root in roots]
    while waiting:
        known = waiting.pop()
        reached.add(str(known.get("message_id")))
        waiting += known["replies"]
    missing = {row.where for row in bad}
    for name, (where, message) in messages.items():
        if name not in reached and where not in missing:
            problem = f"no first message leads to it: it answers {shown(message.get('parent_id'))}"
            bad.append(BadRow(where, "no_first_message", problem, "correct parent_id, or remove the message"))
    yield from bad
    yield from roots


_Path = tuple[Message, ...]


def _walk(row: JsonDict) -> Iterator[tuple[_Path, list[JsonDict], bool]]:
    """For every message: the turns up to and with it, the replies to it, and whether all assistant turns on the way to
    it are best replies."""
    root = field_of(row, "prompt")
    if not isinstance(root, dict):
        wrong_type("prompt", root, "a message with text and replies")
    if _is_removed(root):
        return
    waiting: list[tuple[_Path, JsonDict, bool]] = [((), root, True)]
    while waiting:
        before, message, best = waiting.pop(0)
        text = message.get("text")
        if not isinstance(text, str):
            wrong_type("text", text, "text")
        role = message.get("role")
        if role not in ("prompter", "assistant"):
            raise Mistake("unknown_role", f"a message has the role {role!r}, not prompter or assistant", "correct it")
        path = (*before, Message("user" if role == "prompter" else "assistant", text))
        given = message.get("replies") or []
        replies = [reply for reply in given if not _is_removed(reply)]
        yield path, replies, best
        top = _best(replies)
        waiting += [(path, r, best and (role == "assistant" or r is top)) for r in replies]


def _is_removed(message: JsonDict) -> bool:
    """Whether a message was deleted or failed its review; CSV files have both as text."""
    return thumb(message.get("deleted")) is True or thumb(message.get("review_result")) is False


def _rank(message: JsonDict) -> float | None:
    """The rank of a reply, 0 for the best; None if it has none. Raises Mistake for a rank that is no number."""
    rank = message.get("rank")
    return None if rank is None or rank != rank else number_in(message, "rank")  # a table may hold NaN for none


def _best(replies: Sequence[JsonDict]) -> JsonDict | None:
    """The reply with the lowest rank, or the only reply; None if nothing says which is best."""
    if len(replies) == 1:
        return replies[0]
    ranked = [(rank, i) for i, reply in enumerate(replies) if (rank := _rank(reply)) is not None]
    return replies[min(ranked)[1]] if ranked else None


def to_tree_pairs(row: JsonDict) -> list[PreferencePair]:
    """A pair for every two replies to the same turn of a tree that differ in rank. Raises Mistake."""
    found = []
    for path, replies, _ in _walk(row):
        said = [(_rank(reply), reply) for reply in replies if reply.get("role") == "assistant"]
        ranked = [(rank, reply) for rank, reply in said if rank is not None]
        for (rank, one), (other_rank, other) in combinations(ranked, 2):
            if rank != other_rank and one.get("text") != other.get("text"):
                better, worse = (one, other) if rank < other_rank else (other, one)
                texts = (field_of(better, "text"), field_of(worse, "text"))
                found.append(PreferencePair(prompt=Prompt(messages=path), chosen=texts[0], rejected=texts[1]))
    return found


def to_tree_demonstrations(row: JsonDict) -> list[Demonstration]:
    """The best reply to every user turn that only best replies lead to."""
    found = []
    for path, replies, best in _walk(row):
        top = _best(replies) if best and path[-1].role == "user" else None
        if top is not None:
            found.append(Demonstration(prompt=Prompt(messages=path), response=reply_of("text", field_of(top, "text"))))
    return found


def to_tree_prompts(row: JsonDict) -> list[Prompt]:
    """A prompt for every user turn that only best replies lead to."""
    return [Prompt(messages=path) for path, _, best in _walk(row) if best and path[-1].role == "user"]


# ---- instructions with instances ------------------------------------------------------------------------------------


def to_instances(row: JsonDict) -> list[Demonstration]:
    """One demonstration for each instance, {"input": …, "output": …}, of an instruction."""
    instances = field_of(row, "instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        wrong_type("instances", instances, 'a list of objects with "input" and "output"')
    refuse_beside_reply(row)
    found = []
    for i, instance in enumerate(instances):
        refuse_fields(f"instances[{i}]", instance, READ_OF_INSTANCE)
        prompt = prompt_in({**row, "input": instance.get("input")})
        found.append(Demonstration(prompt=prompt, response=reply_of("output", instance.get("output"))))
    return found if len(found) == 1 else [replace(d, prompt=replace(d.prompt, id="")) for d in found]
