"""Replies with labels at some of their tokens, as trees: at the end of each step, at every token, or at the last one.

Where a step ends is found in the token ids of the whole reply, in the same way for a labelled reply and for one that
was sampled: a model that learnt from joined pieces would be read at other tokens than it was trained at.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """A reply's ids, and the labels at places in them, ascending: `Grade((5, 6, 2), (0, 2), (1.0, 0.0))`.

    `num_before_gap` is the number of labels before the first step that nobody judged; None if all steps are judged.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    labels: tuple[float, ...]
    num_before_gap: int | None = None


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
    gap = record.labels.index(None) if None in record.labels else None
    return Grade(tuple(ids), tuple(end for end, _ in judged), tuple(label for _, label in judged), gap)


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
    """Graded replies by prompt: one tree for each prompt, with all its replies as branches, or several trees if they
    are more than one forward pass takes."""

    trees: Sequence[Tree]
    grades: Sequence[Sequence[Grade]]
    """The grades of each tree's branches."""
    prompts: Sequence[int]
    """The number of each tree's prompt."""

    @property
    def num_replies(self) -> int:
        """The number of replies."""
        return sum(map(len, self.grades))

    def batch(self, indices: Sequence[int] | None = None) -> GradedReplies:
        """The trees with these numbers, or all trees, as one batch."""
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
    token_budget: int,
    counts: dict[str, int],
) -> GradedPrompts:
    """The grades of records, by the messages of their prompts. Replies that leave no room for their prompt are left
    out; `counts` counts the replies dropped, and those whose prompt was truncated. A tree holds at most `token_budget`
    tokens, or one reply."""
    fit_prompt([], [], max_length=max_tokens)  # raises ConfigError if max_tokens leaves no room
    by_prompt: dict[Any, list[Grade]] = {}
    for record, grade in graded:
        by_prompt.setdefault(record.prompt.messages, []).append(grade)
    how: dict[str, Any] = {"max_length": max_tokens, "on_too_long": on_too_long, "bos_id": chat.tokenizer.bos_token_id}
    trees: list[Tree] = []
    grades: list[Sequence[Grade]] = []
    prompts: list[int] = []

    def count(outcome: str, num: int) -> None:
        if num:
            counts[f"{outcome}_too_long"] = counts.get(f"{outcome}_too_long", 0) + num

    for number, (messages, of_prompt) in enumerate(by_prompt.items()):
        prompt_ids = chat.encode_prompt(messages)
        kept = [grade for grade in of_prompt if fit_prompt(prompt_ids, list(grade.ids), **how).outcome != "dropped"]
        count("dropped", len(of_prompt) - len(kept))
        if not kept:
            continue
        fitted = fit_prompt(prompt_ids, list(max(kept, key=lambda grade: len(grade.ids)).ids), **how)
        count("truncated", len(kept) * (fitted.outcome == "truncated"))
        for branches in _in_budget(kept, token_budget - len(fitted.prompt_ids)):
            # A score is read at a token as the value of the token behind it, which is the one that is marked.
            masks = [mask_of(grade) for grade in branches]
            trees.append(response_tree(fitted.prompt_ids, [grade.ids for grade in branches], masks))
            grades.append(tuple(branches))
            prompts.append(number)
    return GradedPrompts(trees, grades, prompts)


def _in_budget(grades: Iterable[Grade], budget: int) -> Iterator[list[Grade]]:
    """Runs of grades with at most `budget` ids together, or a single one."""
    run: list[Grade] = []
    for grade in grades:
        if run and sum(len(own.ids) for own in [*run, grade]) > budget:
            yield run
            run = []
        run.append(grade)
    if run:
        yield run


def mask_of(grade: Grade) -> list[bool]:
    """True at the tokens behind a labelled one."""
    places = set(grade.places)
    return [i - 1 in places for i in range(len(grade.ids))]
