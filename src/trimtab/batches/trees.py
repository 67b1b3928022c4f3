"""The one batch form: a flat row of token trees, in which sequences with a common prompt share its tokens.

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

from trimtab.batches.device import tensors_to_device


@dataclass(frozen=True)
class Branch:
    """What follows the prompt: token ids, and a mask that is true at the trained tokens."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.mask) > 0, f"a branch of {len(self.ids)} ids and {len(self.mask)} mask entries"


@dataclass(frozen=True)
class Tree:
    """A prompt and its branches, as made by `response_tree([1, 2], [[3, 4], [5]])`. A single sequence is a tree with an
    empty prompt and one branch."""

    prompt: tuple[int, ...]
    branches: tuple[Branch, ...]

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens of the tree, the prompt counted once."""
        return len(self.prompt) + sum(len(b.ids) for b in self.branches)

    @cached_property
    def num_trained(self) -> int:
        """Number of trained tokens. Without a prompt, a branch's first token cannot be predicted and is not counted."""
        return sum(sum(b.mask if self.prompt else b.mask[1:]) for b in self.branches)

    def nodes(self) -> Iterable[tuple[int, int]]:
        """Yields (start, length) of the prompt and of each branch within the tree's tokens."""
        start = 0
        for length in (len(self.prompt), *(len(b.ids) for b in self.branches)):
            yield start, length
            start += length


def response_tree(
    prompt_ids: Sequence[int], responses: Iterable[Sequence[int]], masks: Iterable[Sequence[bool]] | None = None
) -> Tree:
    """A tree of one prompt and its replies. Reply tokens are trained if their mask is true; without masks, all are."""
    replies = [tuple(r) for r in responses]
    trained = [(True,) * len(r) for r in replies] if masks is None else [tuple(m) for m in masks]
    return Tree(tuple(prompt_ids), tuple(Branch(r, m) for r, m in zip(replies, trained, strict=True)))


def sequence_tree(ids: Sequence[int], mask: Sequence[bool] | None = None) -> Tree:
    """A tree of a single sequence, trained at the tokens whose `mask` is true; without a mask, at all of them."""
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
    """[N] the part of its tree that a token belongs to: 0 is the prompt, 1 the first branch, and so on."""
    predict_from: Tensor
    """[M] index in the row of the token before each trained token. Before a branch's first token it is the prompt's
    last."""
    targets: Tensor
    """[M] the ids of the trained tokens."""
    sequence_ids: Tensor
    """[M] the sequence that each trained token belongs to, 0 to B - 1, ascending."""
    last_tokens: Tensor
    """[B] index in the row of each sequence's last token, at which a reward model reads its score."""

    @classmethod
    def build(cls, trees: Sequence[Tree]) -> Self:
        """Builds the row of `trees`, in their order."""
        columns: list[list[int]] = [[] for _ in range(7)]
        ids, positions, nodes, predict_from, targets, sequence_ids, last_tokens = columns  # as the fields
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
        """B, the sequences."""
        return len(self.last_tokens)

    def select(self, indices: Sequence[int]) -> TokenTrees:
        """The row with only these trees, in this order."""
        if list(indices) == list(range(len(self.trees))):
            return self
        return TokenTrees.build([self.trees[i] for i in indices])

    @cached_property
    def _token_starts(self) -> list[int]:
        return [0, *accumulate(t.num_trained for t in self.trees)]

    @cached_property
    def _sequence_starts(self) -> list[int]:
        return [0, *accumulate(len(t.branches) for t in self.trees)]

    def index_of(self, axis: str, indices: Sequence[int]) -> Tensor:
        """The indices of these trees' trained tokens ("token"), sequences ("sequence") or of the trees ("tree")."""
        if axis == "tree":
            return torch.tensor(list(indices), dtype=torch.int64)
        starts = self._token_starts if axis == "token" else self._sequence_starts
        return torch.tensor([j for i in indices for j in range(starts[i], starts[i + 1])], dtype=torch.int64)

    def to(self, device: torch.device) -> Self:
        """The same row on a device, with what it needs for attention."""
        return tensors_to_device(self, device)

    @cached_property
    def parts(self) -> TreeParts:
        """The row as chains and forks, for attention without a mask."""
        return TreeParts.build(self.trees).to(self.input_ids.device)

    @cached_property
    def packed(self) -> PackedParts:
        """The same, for kernels that need no padding."""
        return PackedParts.build(self.trees).to(self.input_ids.device)

    @cached_property
    def strips(self) -> Strips:
        """The trees side by side, one in each strip."""
        ends = list(accumulate(t.num_tokens for t in self.trees))
        stretches = [(end - t.num_tokens, t.num_tokens) for t, end in zip(self.trees, ends, strict=True)]
        return Strips.build(stretches).to(self.input_ids.device)

    def visible(self, window: int | Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[P, L, L] true if a token of a tree (second axis) sees another (third).

        A token sees itself, its prompt and the earlier tokens of its own branch. With an int `window` it sees of these
        only tokens less than `window` positions back; a function is called with the positions of both tokens and says
        which are seen. Places past a tree's end see place 0, so that no softmax runs over nothing.
        """
        strips = self.strips
        place = torch.arange(strips.rows.shape[1], device=strips.rows.device)
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
        """Every sequence as a row of its own, with its prompt repeated, padded on the right. For models that cannot
        attend over a tree, and for tests of the tree."""
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
    """Stretches of the row side by side, in the shape that attention needs. C is the number of stretches, L the length
    of the longest, n their tokens."""

    rows: Tensor
    """[C, L] index in the row of each stretch's tokens. Places past a stretch's end hold 0 and are never read back."""
    filled: Tensor
    """[C, L] true if the place holds a token."""
    places: Tensor
    """[n] the indices of the tokens in the flattened strips."""
    tokens: Tensor
    """[n] the indices in the row of those tokens."""
    is_full: bool
    """Whether every place holds a token."""

    @classmethod
    def build(cls, stretches: Sequence[tuple[int, int]]) -> Self:
        """The strips of stretches given as (start, length)."""
        starts, lengths = torch.tensor(stretches, dtype=torch.int64).view(-1, 2).unbind(1)
        place = torch.arange(int(lengths.max()) if len(lengths) else 0)
        filled = place < lengths[:, None]
        rows = torch.where(filled, place + starts[:, None], 0)
        places = torch.nonzero(filled.flatten()).squeeze(1)
        return cls(rows, filled, places, rows.flatten().index_select(0, places), len(places) == filled.numel())

    def to(self, device: torch.device) -> Self:
        """The same strips on a device."""
        return tensors_to_device(self, device)

    def cut(self, x: Tensor) -> Tensor:
        """[C, H, L, D] x [N, H, D] cut into strips."""
        return x.index_select(0, self.rows.flatten()).view(*self.rows.shape, *x.shape[1:]).transpose(1, 2)

    def back(self, x: Tensor) -> Tensor:
        """[n, H, ...] the entries of x [C, H, L, ...] at tokens, in the order of `tokens`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class TreeParts:
    """A row of trees split for attention: chains, in which a token sees itself and the tokens before it, and forks, at
    which the tokens of several branches see the whole prompt. Parts of similar lengths are side by side."""

    chains: tuple[Strips, ...]
    forks: tuple[tuple[Strips, Strips], ...]
    """Pairs (branches, prompts); each row of the two holds the same tree."""

    @classmethod
    def build(cls, trees: Sequence[Tree]) -> Self:
        """Builds the parts of `trees`."""
        chains, forks = chains_and_forks(trees)
        return cls(
            tuple(Strips.build(group) for group in _alike(chains, lambda chain: chain[1])),
            tuple(
                (Strips.build([b for b, _ in group]), Strips.build([p for _, p in group]))
                for group in _alike(forks, lambda fork: fork[0][1] + fork[1][1])
            ),
        )

    def to(self, device: torch.device) -> TreeParts:
        """The same parts on a device."""
        return TreeParts(
            tuple(tensors_to_device(chain, device) for chain in self.chains),
            tuple(
                (tensors_to_device(branches, device), tensors_to_device(prompts, device))
                for branches, prompts in self.forks
            ),
        )


Stretch = tuple[int, int]
"""Neighbouring tokens of the row: the index of the first, and their number."""


def chains_and_forks(trees: Sequence[Tree]) -> tuple[list[Stretch], list[tuple[Stretch, Stretch]]]:
    """The chains of `trees`, in the order of the row, of which they leave out nothing, and the forks as (branches,
    prompt). A prompt with a single branch is one chain."""
    chains: list[Stretch] = []
    forks: list[tuple[Stretch, Stretch]] = []
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
    return chains, forks


@dataclass(frozen=True)
class Packed:
    """Stretches of the row one after the other, without padding."""

    tokens: Tensor
    """[n] the indices in the row of their tokens."""
    bounds: Tensor
    """[C + 1] int32, where each stretch begins among `tokens`, and n."""
    longest: int
    """The length of the longest stretch."""

    @classmethod
    def build(cls, stretches: Sequence[Stretch]) -> Self:
        """Packs these stretches."""
        tokens = torch.tensor(
            [i for start, length in stretches for i in range(start, start + length)], dtype=torch.int64
        )
        bounds = torch.tensor([0, *accumulate(length for _, length in stretches)], dtype=torch.int32)
        return cls(tokens, bounds, max((length for _, length in stretches), default=0))


@dataclass(frozen=True)
class PackedParts:
    """What `TreeParts` holds, for kernels that read stretches of different lengths without padding."""

    chains: Packed
    """All tokens, in the order of the row."""
    forks: tuple[Packed, Packed] | None
    """(branches, prompts) with the same trees; None if no tree has both a prompt and several branches."""

    @classmethod
    def build(cls, trees: Sequence[Tree]) -> Self:
        """Builds the parts of `trees`."""
        chains, forks = chains_and_forks(trees)
        branches, prompts = [b for b, _ in forks], [p for _, p in forks]
        return cls(Packed.build(chains), (Packed.build(branches), Packed.build(prompts)) if forks else None)

    def to(self, device: torch.device) -> PackedParts:
        """The same parts on a device."""
        chains, forks = tensors_to_device(self.chains, device), None
        if self.forks is not None:
            forks = tensors_to_device(self.forks[0], device), tensors_to_device(self.forks[1], device)
        return PackedParts(chains, forks)


@dataclass(frozen=True)
class PaddedRows:
    """Sequences as rows [B, T]. `predict_from` [M] and `last_tokens` [B] are indices into the flattened rows."""

    input_ids: Tensor
    attention_mask: Tensor
    predict_from: Tensor
    last_tokens: Tensor


def per(axis: str) -> Any:
    """A batch field with one entry for each trained "token", "sequence" or "tree", as in `x: Tensor = per("token")`."""
    return field(metadata={"axis": axis})


@dataclass(frozen=True, kw_only=True)
class TreeBatch:
    """Trees with tensors about them. When a batch is split, a field made with `per` is split with its trees."""

    trees: TokenTrees

    def __post_init__(self) -> None:
        sizes = {"token": self.trees.num_trained, "sequence": self.num_sequences, "tree": len(self.trees.trees)}
        for f in dataclasses.fields(self):
            if axis := f.metadata.get("axis"):
                shape = tuple(getattr(self, f.name).shape)
                assert shape == (sizes[axis],), f"{f.name} has shape {shape}, one entry a {axis} makes {sizes[axis]}"

    @property
    def sequence_ids(self) -> Tensor:
        """[M] the sequence that each trained token belongs to."""
        return self.trees.sequence_ids

    @property
    def num_sequences(self) -> int:
        """B, the sequences."""
        return self.trees.num_sequences

    def select(self, indices: Sequence[int]) -> Self:
        """A copy with only these trees, in this order."""
        return self._only(self.trees.select(indices), lambda axis: self.trees.index_of(axis, indices))

    def filter(self, kept: Tensor) -> Self:
        """A copy with only the sequences that are `kept` ([B], bool). A tree that keeps no sequence is left out."""
        flags = iter(kept.tolist())
        branches = [tuple(b for b in tree.branches if next(flags)) for tree in self.trees.trees]
        kept_of = {
            "token": kept[self.sequence_ids],
            "sequence": kept,
            "tree": torch.tensor([bool(bs) for bs in branches], dtype=torch.bool),
        }
        trees = [Tree(tree.prompt, bs) for tree, bs in zip(self.trees.trees, branches, strict=True) if bs]
        return self._only(TokenTrees.build(trees), kept_of.__getitem__)

    def _only(self, trees: TokenTrees, entries: Callable[[str], Tensor]) -> Self:
        """A copy with these trees, and of every field made with `per` the entries that `entries` gives for its axis."""
        fields = {
            f.name: getattr(self, f.name)[entries(axis)]
            for f in dataclasses.fields(self)
            if (axis := f.metadata.get("axis"))
        }
        return dataclasses.replace(self, trees=trees, **fields)

    def micro_batches(self, token_budget: int) -> Iterator[Self]:
        """Yields the batch in parts of at most `token_budget` tokens, as `split_by_tokens` groups them."""
        groups = split_by_tokens(self.trees, token_budget)
        return iter([self]) if len(groups) == 1 else (self.select(group) for group in groups)


def split_by_tokens(trees: TokenTrees, token_budget: int) -> list[list[int]]:
    """Tree indices in groups of at most `token_budget` tokens, similar sizes together. A larger tree is a group alone.

    Grouping changes speed and memory, never a result: losses are sums divided by a weight known beforehand.
    """
    return split_sizes([tree.num_tokens for tree in trees.trees], token_budget)


def split_sizes(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """`split_by_tokens` for trees with these numbers of tokens."""
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
    """The items in groups of similar lengths. A group has a fixed cost, so a new one is opened only when padding to the
    longest would add more pairs of tokens than `_PAIRS_PER_CALL`, which cost about as much."""
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
