"""The one batch form: a flat row of token trees, in which sequences with a common prompt hold its tokens once.

A tree is a prompt with one or more branches. Attention follows the tree, position ids restart at the fork, and the
first token of every branch is predicted from the prompt's last token. The shift to next-token prediction happens
here, once, and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """What follows the prompt: token ids, and which of them are trained on."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.mask) > 0, f"a branch of {len(self.ids)} ids and {len(self.mask)} mask entries"


@dataclass(frozen=True)
class Tree:
    """A prompt and its branches. A sequence of its own is a tree with an empty prompt and one branch."""

    prompt: tuple[int, ...]
    branches: tuple[Branch, ...]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the tree, the prompt counted once."""
        return len(self.prompt) + sum(len(b.ids) for b in self.branches)

    @cached_property
    def num_trained(self) -> int:
        """Trained tokens; the first token of a branch without a prompt has nothing to be predicted from."""
        return sum(sum(b.mask if self.prompt else b.mask[1:]) for b in self.branches)

    def nodes(self) -> Iterable[tuple[int, int]]:
        """(start, length) of the prompt and of each branch within the tree's tokens."""
        start = 0
        for length in (len(self.prompt), *(len(b.ids) for b in self.branches)):
            yield start, length
            start += length


def response_tree(
    prompt_ids: Sequence[int], responses: Iterable[Sequence[int]], masks: Iterable[Sequence[bool]] | None = None
) -> Tree:
    """One prompt and its replies, trained where `masks` are true: at every reply token without them."""
    replies = [tuple(r) for r in responses]
    trained = [(True,) * len(r) for r in replies] if masks is None else [tuple(m) for m in masks]
    return Tree(tuple(prompt_ids), tuple(Branch(r, m) for r, m in zip(replies, trained, strict=True)))


def sequence_tree(ids: Sequence[int], mask: Sequence[bool] | None = None) -> Tree:
    """One sequence on its own, trained where `mask` is true (everywhere without one)."""
    return Tree((), (Branch(tuple(ids), tuple(mask) if mask is not None else (True,) * len(ids)),))


@dataclass(frozen=True)
class TokenTrees:
    """Trees as tensors: N tokens in one row, M trained tokens, B sequences (branches), P trees."""

    trees: tuple[Tree, ...]
    input_ids: Tensor
    """[N] token ids, tree after tree: the prompt, then each branch."""
    position_ids: Tensor
    """[N] position of a token in its own sequence."""
    node_ids: Tensor
    """[N] which prompt or branch a token belongs to: 0 is its tree's prompt, 1 its first branch, and so on."""
    predict_from: Tensor
    """[M] the row of the token before a trained token, which for the first of a branch is the prompt's last."""
    targets: Tensor
    """[M] the trained tokens themselves."""
    sequence_ids: Tensor
    """[M] whose they are, 0 to B - 1, ascending."""
    last_tokens: Tensor
    """[B] the row of each sequence's last token, where a reward model reads its score."""

    @classmethod
    def build(cls, trees: Sequence[Tree]) -> Self:
        """The row of `trees`, in their order."""
        ids: list[int] = []
        positions: list[int] = []
        nodes: list[int] = []
        predict_from: list[int] = []
        targets: list[int] = []
        sequence_ids: list[int] = []
        last_tokens: list[int] = []
        for tree in trees:
            fork, num_prompt = len(ids), len(tree.prompt)
            ids += tree.prompt
            positions += range(num_prompt)
            nodes += [0] * num_prompt
            for node, branch in enumerate(tree.branches, start=1):
                start = len(ids)
                before = fork + num_prompt - 1 if num_prompt else -1
                for offset, trained in enumerate(branch.mask):
                    if trained and before >= 0:
                        predict_from.append(before)
                        targets.append(branch.ids[offset])
                        sequence_ids.append(len(last_tokens))
                    before = start + offset
                ids += branch.ids
                positions += range(num_prompt, num_prompt + len(branch.ids))
                nodes += [node] * len(branch.ids)
                last_tokens.append(before)
        columns = (ids, positions, nodes, predict_from, targets, sequence_ids, last_tokens)
        return cls(tuple(trees), *(torch.tensor(c, dtype=torch.int64) for c in columns))

    @property
    def num_tokens(self) -> int:
        """N, the tokens of a forward pass."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """M, the trained tokens."""
        return len(self.targets)

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.last_tokens)

    def select(self, indices: Sequence[int]) -> TokenTrees:
        """The row of only these trees, in this order."""
        return TokenTrees.build([self.trees[i] for i in indices])

    @cached_property
    def _token_starts(self) -> list[int]:
        return _starts(t.num_trained for t in self.trees)

    @cached_property
    def _sequence_starts(self) -> list[int]:
        return _starts(len(t.branches) for t in self.trees)

    def index_of(self, axis: str, indices: Sequence[int]) -> Tensor:
        """Where the trained tokens ("token"), sequences ("sequence") or trees ("tree") of these trees stand."""
        if axis == "tree":
            return torch.tensor(list(indices), dtype=torch.int64)
        starts = self._token_starts if axis == "token" else self._sequence_starts
        return torch.tensor([j for i in indices for j in range(starts[i], starts[i + 1])], dtype=torch.int64)

    @cached_property
    def parts(self) -> TreeParts:
        """The row as chains and forks, what attention without a mask needs."""
        return TreeParts.build(self.trees)

    @cached_property
    def strips(self) -> Strips:
        """The trees side by side."""
        ends = list(accumulate(t.num_tokens for t in self.trees))
        return Strips.build([(end - t.num_tokens, t.num_tokens) for t, end in zip(self.trees, ends, strict=True)])

    def visible(self, window: int | Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[P, L, L] true where a token of a tree (second axis) sees another (third): its prompt and the earlier tokens
        of its own branch, of these with a window only those less than `window` positions back, or those that it says
        are seen, called with the positions of both. Places past a tree's end see place 0 so that no softmax runs over
        nothing."""
        strips = self.strips
        place = torch.arange(strips.rows.shape[1])
        nodes = torch.where(strips.filled, self.node_ids[strips.rows], -1)
        same_path = (nodes[:, None, :] == nodes[:, :, None]) | (nodes[:, None, :] == 0)
        visible = same_path & (place <= place[:, None]) & strips.filled[:, None, :]
        if window is not None:
            positions = self.position_ids[strips.rows]
            asking, seen = positions[:, :, None], positions[:, None, :]
            visible &= window(asking, seen) if callable(window) else seen > asking - window
        visible[:, :, 0] |= ~strips.filled
        return visible

    def padded(self, pad_id: int) -> PaddedRows:
        """Every sequence as a row of its own with its prompt repeated, padded on the right: for models that cannot
        attend over a tree, and to check the tree against."""
        rows = [tree.prompt + branch.ids for tree in self.trees for branch in tree.branches]
        width = max((len(r) for r in rows), default=0)
        input_ids = torch.tensor([list(r) + [pad_id] * (width - len(r)) for r in rows], dtype=torch.int64)
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        attention_mask = torch.arange(width)[None, :] < lengths[:, None]
        return PaddedRows(
            input_ids=input_ids.view(len(rows), width),
            attention_mask=attention_mask,
            predict_from=self.sequence_ids * width + self.position_ids[self.predict_from],
            last_tokens=torch.arange(len(rows)) * width + lengths - 1,
        )


@dataclass(frozen=True)
class Strips:
    """Stretches of the row side by side, as attention wants them."""

    rows: Tensor
    """[C, L] the row of each stretch's tokens; places past a stretch's end repeat row 0 and are never read back."""
    filled: Tensor
    """[C, L] true where there is a token."""

    @classmethod
    def build(cls, stretches: Sequence[tuple[int, int]]) -> Self:
        """Strips of stretches given as (start, length)."""
        starts, lengths = torch.tensor(stretches, dtype=torch.int64).view(-1, 2).unbind(1)
        place = torch.arange(int(lengths.max()) if len(lengths) else 0)
        filled = place < lengths[:, None]
        return cls(torch.where(filled, place + starts[:, None], 0), filled)

    @cached_property
    def places(self) -> Tensor:
        """[n] where the tokens stand in the flattened strips."""
        return torch.nonzero(self.filled.flatten()).squeeze(1)

    @cached_property
    def tokens(self) -> Tensor:
        """[n] the rows of those tokens."""
        return self.rows.flatten().index_select(0, self.places)

    def cut(self, x: Tensor) -> Tensor:
        """[C, H, L, D] the strips of x [N, H, D]."""
        return x.index_select(0, self.rows.flatten()).view(*self.rows.shape, *x.shape[1:]).transpose(1, 2)

    def back(self, x: Tensor) -> Tensor:
        """[n, H, ...] the tokens' part of x [C, H, L, ...], in the order of `tokens`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class TreeParts:
    """A row of trees as what attention is made of: chains, in which a token sees itself and those before it, and
    forks, at which the tokens of several branches see the whole prompt. Like lengths are side by side."""

    chains: tuple[Strips, ...]
    forks: tuple[tuple[Strips, Strips], ...]
    """(branches, prompts), a tree a row."""

    @classmethod
    def build(cls, trees: Sequence[Tree]) -> Self:
        """The parts of `trees`. A prompt with a single branch is one chain."""
        chains: list[tuple[int, int]] = []
        forks: list[tuple[tuple[int, int], tuple[int, int]]] = []
        start = 0
        for tree in trees:
            num_prompt = len(tree.prompt)
            if len(tree.branches) == 1:
                chains.append((start, tree.num_tokens))
            else:
                chains += [(start + at, length) for at, length in tree.nodes() if length]
                if num_prompt:
                    forks.append(((start + num_prompt, tree.num_tokens - num_prompt), (start, num_prompt)))
            start += tree.num_tokens
        return cls(
            tuple(Strips.build(group) for group in _alike(chains, lambda chain: chain[1])),
            tuple(
                (Strips.build([b for b, _ in group]), Strips.build([p for _, p in group]))
                for group in _alike(forks, lambda fork: fork[0][1] + fork[1][1])
            ),
        )


@dataclass(frozen=True)
class PaddedRows:
    """Sequences as rows [B, T], with the places the tree's M and B quantities are read from in the flattened rows."""

    input_ids: Tensor
    attention_mask: Tensor
    predict_from: Tensor
    last_tokens: Tensor


def per(axis: str) -> Any:
    """A field of a batch with one entry for each "token" (trained), "sequence" or "tree"."""
    return field(metadata={"axis": axis})


@dataclass(frozen=True, kw_only=True)
class TreeBatch:
    """Trees and what is known of them. A field made with `per` follows its trees through every split."""

    trees: TokenTrees

    def __post_init__(self) -> None:
        sizes = {"token": self.trees.num_trained, "sequence": self.num_sequences, "tree": len(self.trees.trees)}
        for f in dataclasses.fields(self):
            if axis := f.metadata.get("axis"):
                shape = tuple(getattr(self, f.name).shape)
                assert shape == (sizes[axis],), f"{f.name} has shape {shape}, one entry a {axis} makes {sizes[axis]}"

    @property
    def sequence_ids(self) -> Tensor:
        """[M] whose each trained token is."""
        return self.trees.sequence_ids

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.trees.num_sequences

    def select(self, indices: Sequence[int]) -> Self:
        """The same batch with only these trees, in this order."""
        fields = {
            f.name: getattr(self, f.name)[self.trees.index_of(axis, indices)]
            for f in dataclasses.fields(self)
            if (axis := f.metadata.get("axis"))
        }
        return dataclasses.replace(self, trees=self.trees.select(indices), **fields)

    def filter(self, kept: Tensor) -> Self:
        """The same batch with only the sequences that are `kept` ([B], bool); a tree without any is left out."""
        flags = iter(kept.tolist())
        branches = [tuple(b for b in tree.branches if next(flags)) for tree in self.trees.trees]
        kept_of = {
            "token": kept[self.sequence_ids],
            "sequence": kept,
            "tree": torch.tensor([bool(bs) for bs in branches], dtype=torch.bool),
        }
        fields = {
            f.name: getattr(self, f.name)[kept_of[axis]]
            for f in dataclasses.fields(self)
            if (axis := f.metadata.get("axis"))
        }
        trees = [Tree(tree.prompt, bs) for tree, bs in zip(self.trees.trees, branches, strict=True) if bs]
        return dataclasses.replace(self, trees=TokenTrees.build(trees), **fields)

    def micro_batches(self, token_budget: int) -> Iterator[Self]:
        """The batch in pieces of at most `token_budget` tokens, as `split_by_tokens` groups them."""
        groups = split_by_tokens(self.trees, token_budget)
        return iter([self]) if len(groups) == 1 else (self.select(group) for group in groups)


def split_by_tokens(trees: TokenTrees, token_budget: int) -> list[list[int]]:
    """Tree indices in groups of at most `token_budget` tokens (a larger tree stands alone), like sizes together.

    Grouping changes speed and memory, never a result: losses are sums divided by a weight known beforehand.
    """
    return split_sizes([tree.num_tokens for tree in trees.trees], token_budget)


def split_sizes(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """`split_by_tokens` of trees with these numbers of tokens."""
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        size = sizes[i]
        if not groups or size > room:
            groups.append([])
            room = token_budget
        groups[-1].append(i)
        room -= size
    return groups


def _alike(items: Sequence[Any], length: Callable[[Any], int]) -> list[list[Any]]:
    """The items in groups of like lengths. Each group costs a fixed effort, so one is opened only when padding to the
    longest would add more pairs of tokens than that effort is worth."""
    groups: list[list[Any]] = []
    wasted = longest = 0
    for item in sorted(items, key=length, reverse=True):
        wasted += longest**2 - length(item) ** 2
        if not groups or wasted > _PAIRS_PER_CALL:
            groups.append([])
            wasted, longest = 0, length(item)
        groups[-1].append(item)
    return groups


_PAIRS_PER_CALL = 1 << 16


def _starts(sizes: Iterable[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts
