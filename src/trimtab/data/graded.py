"""Replies with labels at some of their tokens, as trees: at the end of each step, at every token, or at the last one.

Where a step ends is found in the token ids of the whole reply, in the same way for a labelled reply and for one that
was sampled: a model that learnt from joined pieces would be read at other tokens than it was trained at.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from trimtab.batches.replies import GradedReplies
from trimtab.batches.trees import TokenTrees, Tree, response_tree
from trimtab.core.errors import DataError
from trimtab.core.types import LabelledResponse, RatedResponse, SteppedResponse
from trimtab.data.chat import Chat
from trimtab.data.chat import fit as fit_prompt
from trimtab.data.pairs import WhenTooLong


def step_ends(chat: Chat, ids: Sequence[int], separator: str) -> list[int]:
    """The places in a reply's ids, ascending, of the last token of each step.

    A step ends at the token that completes the separator behind it, and the last step at the last id. A separator with
    nothing but blanks before it or behind it ends no step. Ids that stand for no text, such as the end token, belong to
    the last step. There is one place if the separator does not occur, and none without ids.
    """
    if not ids:
        return []
    text = _text(chat, ids)
    ends: list[int] = []
    at = begin = 0
    while (found := text.find(separator, at)) >= 0:
        at = found + len(separator)
        if text[begin:found].strip() and text[at:].strip():
            ends.append(at)
            begin = at
    # The shortest beginning of the ids whose text holds all characters before the end; a character may be cut in two.
    places = [bisect_left(range(1, len(ids)), True, key=_covers(chat, ids, text[:end])) for end in ends]
    return [*dict.fromkeys(place for place in places if place < len(ids) - 1), len(ids) - 1]


def _covers(chat: Chat, ids: Sequence[int], beginning: str) -> Callable[[int], bool]:
    return lambda num: _text(chat, ids[:num]).startswith(beginning)


def _text(chat: Chat, ids: Sequence[int]) -> str:
    return str(chat.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Grade(NamedTuple):
    """A reply's ids, and the labels at places in them, ascending: `Grade((5, 6, 2), (0, 2), (1.0, 0.0))`."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    labels: tuple[float, ...]


def grade_steps(record: SteppedResponse, chat: Chat, *, separator: str) -> Grade:
    """The labels at the ends of the steps that are judged. Raises DataError if a step holds the separator, at which a
    reply would be cut in two when the model is used."""
    ids = chat.encode_response(separator.join(record.steps))
    ends = step_ends(chat, ids, separator)
    if len(ends) != len(record.steps):
        raise DataError(
            f"{len(record.steps)} labelled steps, and the separator {separator!r} cuts their text into {len(ends)}: "
            f"{separator.join(record.steps)[:80]!r}",
            where=f"the reply to {record.prompt.text[:60]!r}",
            fix="set loss.separator to a text that stands between steps and never inside one, such as '\\n\\n'",
        )
    judged = [(end, float(label)) for end, label in zip(ends, record.labels, strict=True) if label is not None]
    return Grade(tuple(ids), tuple(end for end, _ in judged), tuple(label for _, label in judged))


def grade_outcome(record: LabelledResponse, chat: Chat, *, tokens: Literal["all", "last"]) -> Grade:
    """The label of the whole reply at each of its tokens, or at the last one."""
    ids = chat.encode_response(record.response)
    places = range(len(ids)) if tokens == "all" else range(len(ids) - 1, len(ids))
    return Grade(tuple(ids), tuple(places), (float(record.label),) * len(places))


def grade_rating(record: RatedResponse, chat: Chat) -> Grade:
    """The rating at the last token."""
    ids = chat.encode_response(record.response)
    return Grade(tuple(ids), (len(ids) - 1,), (record.rating,))


@dataclass(frozen=True, eq=False)
class GradedPrompts:
    """Graded replies by prompt: one tree for each prompt, with all its replies as branches."""

    trees: Sequence[Tree]
    grades: Sequence[Sequence[Grade]]
    """The grades of each tree's branches."""

    @property
    def num_replies(self) -> int:
        """The number of replies."""
        return sum(map(len, self.grades))

    def batch(self, indices: Sequence[int] | None = None) -> GradedReplies:
        """The prompts with these numbers, or all prompts, as one batch."""
        chosen = list(range(len(self.trees)) if indices is None else indices)
        labels: list[float] = []
        last_labels: list[float] = []
        for grade in (grade for i in chosen for grade in self.grades[i]):
            last = len(grade.ids) - 1
            by_place = dict(zip(grade.places, grade.labels, strict=True))
            last_labels.append(by_place.pop(last, torch.nan))
            labels += by_place.values()
        return GradedReplies(
            trees=TokenTrees.build([self.trees[i] for i in chosen]),
            labels=torch.tensor(labels),
            last_labels=torch.tensor(last_labels),
        )


def group_graded(
    graded: Iterable[tuple[Any, Grade]],
    chat: Chat,
    *,
    max_tokens: int,
    on_too_long: WhenTooLong,
    counts: dict[str, int],
) -> GradedPrompts:
    """The grades of records, by the messages of their prompts. Replies that leave no room for their prompt are left
    out; `counts` counts the replies dropped, and those whose prompt was truncated."""
    fit_prompt([], [], max_length=max_tokens)  # raises ConfigError if max_tokens leaves no room
    by_prompt: dict[Any, list[Grade]] = {}
    for record, grade in graded:
        by_prompt.setdefault(record.prompt.messages, []).append(grade)
    trees, grades = [], []
    for messages, of_prompt in by_prompt.items():
        fitted = fit_prompt(
            chat.encode_prompt(messages),
            list(max(of_prompt, key=lambda grade: len(grade.ids)).ids),
            max_length=max_tokens,
            on_too_long=on_too_long,
            bos_id=chat.tokenizer.bos_token_id,
        )
        if fitted.outcome != "kept":
            counts[f"{fitted.outcome}_too_long"] = counts.get(f"{fitted.outcome}_too_long", 0) + len(of_prompt)
        if fitted.outcome != "dropped":
            # A score is read at a token as the value of the token behind it, which is the one that is marked.
            masks = [mask_of(grade) for grade in of_prompt]
            trees.append(response_tree(fitted.prompt_ids, [grade.ids for grade in of_prompt], masks))
            grades.append(tuple(of_prompt))
    return GradedPrompts(trees, grades)


def mask_of(grade: Grade) -> list[bool]:
    """True at the tokens behind a labelled one."""
    places = set(grade.places)
    return [i - 1 in places for i in range(len(grade.ids))]
