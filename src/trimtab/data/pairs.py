"""Compared and judged replies as batches: one tree for each prompt, with every reply to it once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trimtab.batches.pairs import Compared, PairBatch
from trimtab.batches.trees import TokenTrees, Tree, response_tree
from trimtab.core.types import LabelledResponse, PreferencePair
from trimtab.data.chat import Chat
from trimtab.data.chat import fit as fit_prompt
from trimtab.data.tokens import Array, Lazy, TokenTable, table_of

WhenTooLong = Literal["drop", "truncate_prompt_left"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The prompts of a table whose replies fit, each with the numbers of its records."""

    table: TokenTable
    order: Array
    """The numbers of the records, those of one prompt together."""
    starts: Array
    """Where the records of each prompt begin in `order`, and the end of the last: one more than prompts."""
    max_tokens: int
    on_too_long: WhenTooLong
    bos_id: int | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def records(self, group: int) -> list[int]:
        """The numbers of the records of a prompt."""
        found: list[int] = self.order[self.starts[group] : self.starts[group + 1]].tolist()
        return found

    def column(self, name: str) -> Array:
        """A column of all records of all prompts, prompt after prompt."""
        return np.asarray(self.table.columns[name][self.order])

    def tree(self, group: int) -> tuple[Tree, list[list[int]]]:
        """The tree of a prompt with each reply once, and for each record of the prompt the places of its replies."""
        records = self.records(group)
        replies: dict[int, list[int]] = {}
        own = []
        for record in records:
            found = self.table.replies(record)
            own.append([text for text, _ in found])
            for text, ids in found:
                replies.setdefault(text, ids)
        places = {text: i for i, text in enumerate(replies)}
        fitted = fit_prompt(
            self.table.prompt(records[0]),
            max(replies.values(), key=len),
            max_length=self.max_tokens,
            on_too_long=self.on_too_long,
            bos_id=self.bos_id,
        )
        return response_tree(fitted.prompt_ids, replies.values()), [[places[text] for text in texts] for texts in own]


def group(
    table: TokenTable,
    chat: Chat,
    *,
    max_tokens: int,
    on_too_long: WhenTooLong,
    counts: dict[str, int],
    alone: bool = False,
) -> Groups:
    """The records grouped by prompt (or each `alone`), without prompts whose replies do not fit. The numbers of records
    dropped and truncated are added to `counts`.

    A reply is never cut, because it would lose its end; all replies to a prompt share one truncation of the prompt.
    """
    fit_prompt([], [], max_length=max_tokens)  # raises ConfigError if max_tokens leaves no room
    order, starts = (table.chosen, np.arange(len(table) + 1)) if alone else table.by_prompt()
    bos_id = chat.tokenizer.bos_token_id
    sizes = np.diff(starts)
    kept = np.ones(len(sizes), bool)
    if len(sizes):
        whole = table.part(order)
        firsts = table.part(order[starts[:-1]])
        room = max_tokens - np.maximum.reduceat(whole.longest(), starts[:-1])
        too_long = firsts.of("num_prompt") > room
        num_kept = firsts.first_ids() == bos_id if bos_id is not None else np.zeros(len(sizes), bool)
        dropped = too_long & (np.bool_(on_too_long == "drop") | (room <= num_kept))
        for name, which in (("dropped", dropped), ("truncated", too_long & ~dropped)):
            if num := int(sizes[which].sum()):
                counts[f"{name}_too_long"] = counts.get(f"{name}_too_long", 0) + num
        kept = ~dropped
    return Groups(
        table=table,
        order=order[np.repeat(kept, sizes)],
        starts=np.concatenate([[0], np.cumsum(sizes[kept])]),
        max_tokens=max_tokens,
        on_too_long=on_too_long,
        bos_id=bos_id,
    )


# --- pairs ---


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Pairs grouped by prompt: a tree for each prompt with the replies that were compared, each reply once.

    Trees are made when they are asked for.
    """

    groups: Groups

    @property
    def trees(self) -> Sequence[Tree]:
        """A tree for each prompt."""
        return Lazy(len(self.groups), lambda i: self.groups.tree(i)[0])

    @property
    def compared(self) -> Sequence[tuple[Compared, ...]]:
        """The pairs of each tree."""
        return Lazy(len(self.groups), lambda i: self._compared(i, self.groups.tree(i)[1]))

    @property
    def num_pairs(self) -> int:
        """The number of pairs that fit."""
        return len(self.groups.order)

    @property
    def labels(self) -> Array:
        """The label of each pair, in the order of `pairs`."""
        return self.groups.column("label")

    @property
    def margins(self) -> Array:
        """The margin of each pair, in the order of `pairs`; nan if it has none."""
        return self.groups.column("margin")

    def pairs(self, limit: int | None = None) -> list[PreferencePair]:
        """The pairs that fit, or the first `limit` of them, prompt after prompt: the order of `PairBatch.chosen_ids`
        over the whole set. They are read from their source if they are not in memory."""
        return self.groups.table.part(self.groups.order[:limit]).records()

    def relabelled(self, labels: Array) -> Comparisons:
        """The same pairs with other labels, in the order of `pairs`, and without margins. A label is the probability
        that the chosen reply is preferred; in batches, the sides of a pair with a label below a half change places.
        `pairs` still gives what the source says."""
        columns = dict(self.groups.table.columns)
        for name, values in (("label", labels), ("margin", np.nan)):
            columns[name] = np.array(columns[name])
            columns[name][self.groups.order] = values
        return Comparisons(replace(self.groups, table=replace(self.groups.table, columns=columns)))

    def batch(self, indices: Sequence[int] | None = None) -> PairBatch:
        """The prompts with these numbers, or all prompts, as one batch."""
        found = [(i, *self.groups.tree(i)) for i in (range(len(self.groups)) if indices is None else indices)]
        return PairBatch(
            trees=TokenTrees.build([tree for _, tree, _ in found]),
            compared=tuple(self._compared(i, own) for i, _, own in found),
        )

    def _compared(self, group: int, own: Sequence[Sequence[int]]) -> tuple[Compared, ...]:
        records = self.groups.records(group)
        margins, labels = (self.groups.table.columns[name][records].tolist() for name in ("margin", "label"))
        return tuple(
            _compared_as(chosen, rejected, 0.0 if math.isnan(margin) else margin, label)
            for (chosen, rejected), margin, label in zip(own, margins, labels, strict=True)
        )


def _compared_as(chosen: int, rejected: int, margin: float, label: float) -> Compared:
    """The pair with the side that is preferred first."""
    return Compared(chosen, rejected, margin, label) if label >= 0.5 else Compared(rejected, chosen, -margin, 1 - label)


def group_pairs(
    pairs: Iterable[PreferencePair] | TokenTable,
    chat: Chat,
    *,
    max_tokens: int,
    on_too_long: WhenTooLong,
    counts: dict[str, int],
) -> Comparisons:
    """The pairs grouped by prompt; `counts` counts the pairs of prompts whose replies do not fit."""
    table = pairs if isinstance(pairs, TokenTable) else table_of(chat, PreferencePair, pairs)
    return Comparisons(group(table, chat, max_tokens=max_tokens, on_too_long=on_too_long, counts=counts))


# --- replies judged one by one ---


@dataclass(frozen=True, eq=False)
class Judgements:
    """Judged replies grouped by prompt, each reply once."""

    groups: Groups
    trees: Sequence[Tree]
    desirable: Sequence[tuple[float, ...]]
    """For each tree, how many judgements call each of its replies good; fractions if labels are probabilities."""
    undesirable: Sequence[tuple[float, ...]]
    """For each tree, how many judgements call each of its replies bad."""
    totals: tuple[float, float]
    """The total numbers of good and of bad judgements."""


def group_replies(
    replies: Iterable[LabelledResponse] | TokenTable,
    chat: Chat,
    *,
    max_tokens: int,
    on_too_long: WhenTooLong,
    counts: dict[str, int],
) -> Judgements:
    """The judged replies grouped by prompt; `counts` counts the judgements of prompts that do not fit."""
    table = replies if isinstance(replies, TokenTable) else table_of(chat, LabelledResponse, replies)
    groups = group(table, chat, max_tokens=max_tokens, on_too_long=on_too_long, counts=counts)

    def judged(i: int, good: bool) -> tuple[float, ...]:
        tree, own = groups.tree(i)
        found = [0.0] * len(tree.branches)
        for (reply,), label in zip(own, table.columns["label"][groups.records(i)].tolist(), strict=True):
            found[reply] += label if good else 1 - label
        return tuple(found)

    labels = groups.column("label")
    return Judgements(
        groups,
        Lazy(len(groups), lambda i: groups.tree(i)[0]),
        Lazy(len(groups), lambda i: judged(i, True)),
        Lazy(len(groups), lambda i: judged(i, False)),
        totals=(float(labels.sum()), float((1 - labels).sum())),
    )


def split_in_two(comparisons: Comparisons) -> Judgements:
    """Each pair as two judgements: for a label q, the chosen reply counts as q good and 1 - q bad judgements, and the
    rejected reply as 1 - q good and q bad ones."""

    def judged(i: int, good: bool) -> tuple[float, ...]:
        found = [0.0] * len(comparisons.trees[i].branches)
        for pair in comparisons.compared[i]:
            found[pair.chosen] += pair.label if good else 1 - pair.label
            found[pair.rejected] += 1 - pair.label if good else pair.label
        return tuple(found)

    size = len(comparisons.trees)
    return Judgements(
        comparisons.groups,
        comparisons.trees,
        Lazy(size, lambda i: judged(i, True)),
        Lazy(size, lambda i: judged(i, False)),
        totals=(float(comparisons.num_pairs), float(comparisons.num_pairs)),
    )


def mismatch(trees: Sequence[Tree], *, max_tokens: int, bos_id: int | None) -> Sequence[Tree]:
    """A tree for each prompt with the replies to another prompt, half the set away: neighbours are often alike.

    The pairing is the same for the whole run, so that the reference reads each of these trees once.
    """

    def mixed(i: int) -> Tree:
        replies = trees[(i + len(trees) // 2) % len(trees)].branches
        longest = max((b.ids for b in replies), key=len)
        fitted = fit_prompt(
            list(trees[i].prompt),
            list(longest),
            max_length=max_tokens,
            on_too_long="truncate_prompt_left",
            bos_id=bos_id,
        )
        assert fitted.outcome != "dropped", "every reply leaves room for a token of its own prompt"
        return Tree(tuple(fitted.prompt_ids), replies)

    return Lazy(len(trees), mixed)
