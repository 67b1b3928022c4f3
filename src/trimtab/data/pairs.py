"""Compared and judged replies as batches: a tree for each prompt, with every reply to it once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, Self

import torch
from torch import Tensor

from trimtab.data.chat import Chat
from trimtab.data.chat import fit as fit_prompt
from trimtab.data.trees import TokenTrees, Tree, TreeBatch, per, response_tree
from trimtab.types import LabelledResponse, PreferencePair, Prompt

WhenTooLong = Literal["drop", "truncate_prompt_left"]


def fitted_tree(
    chat: Chat,
    prompt: Prompt,
    responses: Sequence[str],
    *,
    max_tokens: int,
    on_too_long: WhenTooLong,
    counts: dict[str, int],
) -> Tree | None:
    """The prompt with its replies, or None where they do not fit; what happened is added to `counts`.

    A reply is never cut, since its end would be lost; all replies of a prompt share one truncation of it.
    """
    encoded = [chat.encode_response(r) for r in responses]
    fitted = fit_prompt(
        chat.encode_prompt(prompt.messages),
        max(encoded, key=len),
        max_length=max_tokens,
        on_too_long=on_too_long,
        bos_id=chat.tokenizer.bos_token_id,
    )
    if fitted.outcome != "kept":
        name = f"{fitted.outcome}_too_long"
        counts[name] = counts.get(name, 0) + 1
    return None if fitted.outcome == "dropped" else response_tree(fitted.prompt_ids, encoded)


# --- pairs ---


@dataclass(frozen=True)
class Compared:
    """One pair among the branches of a tree: which is preferred to which, by what margin, and how surely."""

    chosen: int
    rejected: int
    margin: float
    label: float


_PER_PAIR = {"pairs": True}
"""Marks a field of a `PairBatch` that has one entry for each pair."""


@dataclass(frozen=True, kw_only=True)
class PairBatch(TreeBatch):
    """Prompts with their replies as trees, and the pairs that were compared.

    All pairs of a prompt stay in one batch: K replies cost K forward passes for up to K (K - 1) / 2 pairs, and a reply
    is not seen again in a later update, which would overfit it (Ouyang et al., arXiv:2203.02155, section 3.5).
    """

    compared: tuple[tuple[Compared, ...], ...]
    """For each tree, its pairs."""

    def select(self, indices: Sequence[int]) -> Self:
        """The same batch with only these trees, in this order."""
        starts = [0, *accumulate(len(pairs) for pairs in self.compared)]
        places = torch.tensor([p for i in indices for p in range(starts[i], starts[i + 1])], dtype=torch.int64)
        own: dict[str, Any] = {
            f.name: getattr(self, f.name)[places] for f in dataclasses.fields(self) if f.metadata == _PER_PAIR
        }
        own["compared"] = tuple(self.compared[i] for i in indices)
        return dataclasses.replace(super().select(indices), **own)

    @cached_property
    def chosen_ids(self) -> Tensor:
        """[P] the sequence of each preferred reply."""
        return self._sequences([[pair.chosen for pair in pairs] for pairs in self.compared])

    @cached_property
    def rejected_ids(self) -> Tensor:
        """[P] the sequence of each other reply."""
        return self._sequences([[pair.rejected for pair in pairs] for pairs in self.compared])

    @cached_property
    def margins(self) -> Tensor:
        """[P] the margin of each pair; 0 where the data has none."""
        return torch.tensor([pair.margin for pairs in self.compared for pair in pairs])

    @cached_property
    def labels(self) -> Tensor:
        """[P] the probability that the chosen reply is preferred."""
        return torch.tensor([pair.label for pairs in self.compared for pair in pairs])

    def _sequences(self, branches: Sequence[Sequence[int]]) -> Tensor:
        starts = [0, *accumulate(len(tree.branches) for tree in self.trees.trees)]
        return torch.tensor([start + b for start, bs in zip(starts, branches, strict=False) for b in bs])


@dataclass(frozen=True, kw_only=True)
class ReferencePairs(PairBatch):
    """Pairs with what the reference says of every reply."""

    ref_logprobs: Tensor = per("token")

    def with_targets(self, chosen: Tensor, rejected: Tensor) -> TargetedPairs:
        """The same with numbers [P] that were found over the whole update."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReferencePairs)}
        return TargetedPairs(**fields, chosen_targets=chosen, rejected_targets=rejected)


@dataclass(frozen=True, kw_only=True)
class TargetedPairs(ReferencePairs):
    """Pairs that know what the order of all pairs of the update sets against their log-ratios."""

    chosen_targets: Tensor = dataclasses.field(metadata=_PER_PAIR)
    rejected_targets: Tensor = dataclasses.field(metadata=_PER_PAIR)


@dataclass(frozen=True)
class Comparisons:
    """Pairs grouped by prompt: a tree for each prompt with the replies that were compared, each reply once."""

    pairs: list[PreferencePair]
    """The pairs that fit, prompt after prompt: the order of `PairBatch.chosen_ids` over the whole set."""
    trees: list[Tree]
    compared: list[tuple[Compared, ...]]

    def batch(self, indices: Sequence[int] | None = None) -> PairBatch:
        """The prompts with these numbers, or all, as one batch."""
        indices = range(len(self.trees)) if indices is None else indices
        return PairBatch(
            trees=TokenTrees.build([self.trees[i] for i in indices]),
            compared=tuple(self.compared[i] for i in indices),
        )


def group_pairs(
    pairs: Iterable[PreferencePair], chat: Chat, *, max_tokens: int, on_too_long: WhenTooLong, counts: dict[str, int]
) -> Comparisons:
    """The pairs of each prompt together; prompts whose replies do not fit are counted by their pairs."""
    grouped: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        grouped.setdefault(pair.prompt.id, []).append(pair)
    kept = Comparisons([], [], [])
    for group in grouped.values():
        replies = {r: i for i, r in enumerate(dict.fromkeys(r for pair in group for r in (pair.chosen, pair.rejected)))}
        tree = _counted_tree(chat, group[0].prompt, list(replies), len(group), max_tokens, on_too_long, counts)
        if tree is not None:
            kept.pairs.extend(group)
            kept.trees.append(tree)
            kept.compared.append(
                tuple(Compared(replies[p.chosen], replies[p.rejected], p.margin or 0.0, p.label) for p in group)
            )
    return kept


# --- replies judged one by one ---


@dataclass(frozen=True, kw_only=True)
class JudgedReplies(TreeBatch):
    """Prompts with their replies as trees, what the reference says of each, and how often each was called good or bad.

    A pair split in two is a good reply and a bad one, each by the share of votes for it.
    """

    ref_logprobs: Tensor = per("token")
    desirable: Tensor = per("sequence")
    """[B] judgements that call the reply good."""
    undesirable: Tensor = per("sequence")
    """[B] those that call it bad."""

    def with_baseline(self, baseline: Tensor) -> BaselinedReplies:
        """The same with one log-ratio, in nats, that all replies of the update are measured from."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(JudgedReplies)}
        return BaselinedReplies(**fields, baseline=baseline.expand(self.num_sequences))


@dataclass(frozen=True, kw_only=True)
class MismatchedReplies(JudgedReplies):
    """Judged replies, and beside each prompt the replies to another one."""

    mismatched: TokenTrees
    """A tree for each of `trees`: its prompt with the replies to another."""
    mismatched_ref_logprobs: Tensor
    """What the reference says of their trained tokens."""

    def select(self, indices: Sequence[int]) -> Self:
        """The same batch with only these trees, in this order."""
        places = self.mismatched.index_of("token", indices)
        return dataclasses.replace(
            super().select(indices),
            mismatched=self.mismatched.select(indices),
            mismatched_ref_logprobs=self.mismatched_ref_logprobs[places],
        )


@dataclass(frozen=True, kw_only=True)
class BaselinedReplies(JudgedReplies):
    """Judged replies with the log-ratio that the update measures them from."""

    baseline: Tensor = per("sequence")


@dataclass(frozen=True)
class Judgements:
    """Judged replies grouped by prompt, each reply once."""

    trees: list[Tree]
    desirable: list[tuple[float, ...]]
    """For each tree, the judgements that call its replies good; shares where votes are shares."""
    undesirable: list[tuple[float, ...]]

    @property
    def totals(self) -> tuple[float, float]:
        """Good and bad judgements in all."""
        return sum(map(sum, self.desirable)), sum(map(sum, self.undesirable))


def group_replies(
    replies: Iterable[LabelledResponse],
    chat: Chat,
    *,
    max_tokens: int,
    on_too_long: WhenTooLong,
    counts: dict[str, int],
) -> Judgements:
    """The judged replies of each prompt together; prompts that do not fit are counted by their judgements."""
    grouped: dict[str, list[LabelledResponse]] = {}
    for reply in replies:
        grouped.setdefault(reply.prompt.id, []).append(reply)
    kept = Judgements([], [], [])
    for group in grouped.values():
        texts = list(dict.fromkeys(reply.response for reply in group))
        tree = _counted_tree(chat, group[0].prompt, texts, len(group), max_tokens, on_too_long, counts)
        if tree is not None:
            judged = [[r.label for r in group if r.response == text] for text in texts]
            kept.trees.append(tree)
            kept.desirable.append(tuple(float(sum(labels)) for labels in judged))
            kept.undesirable.append(tuple(float(len(labels) - sum(labels)) for labels in judged))
    return kept


def split_in_two(comparisons: Comparisons) -> Judgements:
    """Each pair as two judgements: of a pair with label q, the chosen reply is good by q and bad by 1 - q, the
    rejected one the other way round."""
    desirable, undesirable = [], []
    for tree, pairs in zip(comparisons.trees, comparisons.compared, strict=True):
        good, bad = [0.0] * len(tree.branches), [0.0] * len(tree.branches)
        for pair in pairs:
            good[pair.chosen] += pair.label
            bad[pair.chosen] += 1 - pair.label
            good[pair.rejected] += 1 - pair.label
            bad[pair.rejected] += pair.label
        desirable.append(tuple(good))
        undesirable.append(tuple(bad))
    return Judgements(comparisons.trees, desirable, undesirable)


def mismatch(trees: Sequence[Tree], *, max_tokens: int, bos_id: int | None) -> list[Tree]:
    """Each prompt with the replies to another prompt, half the set away: neighbours in a file are often alike.

    The pairing is one for the whole set, so that the reference reads each of these trees once.
    """
    found = []
    for i, tree in enumerate(trees):
        replies = trees[(i + len(trees) // 2) % len(trees)].branches
        longest = max((b.ids for b in replies), key=len)
        fitted = fit_prompt(
            list(tree.prompt), list(longest), max_length=max_tokens, on_too_long="truncate_prompt_left", bos_id=bos_id
        )
        assert fitted.outcome != "dropped", "every reply leaves room for a token of its own prompt"
        found.append(Tree(tuple(fitted.prompt_ids), replies))
    return found


def _counted_tree(
    chat: Chat,
    prompt: Prompt,
    replies: Sequence[str],
    num_records: int,
    max_tokens: int,
    on_too_long: WhenTooLong,
    counts: dict[str, int],
) -> Tree | None:
    """`fitted_tree` of a prompt that stands for several records."""
    outcomes: dict[str, int] = {}
    tree = fitted_tree(chat, prompt, replies, max_tokens=max_tokens, on_too_long=on_too_long, counts=outcomes)
    for name, num in outcomes.items():
        counts[name] = counts.get(name, 0) + num * num_records
    return tree
