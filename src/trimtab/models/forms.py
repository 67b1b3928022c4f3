"""The form in which a model is computed over token trees. It is found and proved when the model is first used.

Each form is compared with the model's plain hidden states: those of transformers with eager attention, one unpadded row
at a time. The first form that agrees is taken.

- tree: one shared row, in which attention follows the tree;
- padded: every sequence is a row of its own, padded on the right, with transformers' own attention;
- alone: every sequence is a batch of its own, for models whose results depend on padding or on other rows.

For the proof the windows of the model are narrowed, so that the rows are longer than them. All forms build their masks
from the same setting, so a wide window needs no long row. Rows longer than the length at which rotary embeddings begin
to stretch are always computed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batches.device import to_device
from trimtab.batches.trees import PaddedRows, TokenTrees, response_tree
from trimtab.core.errors import EngineError
from trimtab.data.tokenizers import first_line
from trimtab.math.row_sums import take_rows
from trimtab.models.attention import ROW_ATTENTION, backbone, described, row_states
from trimtab.models.fused_layers import fuse_layers, own_layers
from trimtab.models.last_block import reading
from trimtab.models.positions import forget_lengths, length_limit
from trimtab.models.tree_attention import tree_attention
from trimtab.models.weights import refuse_damage

Form = Literal["tree", "padded", "alone"]
Place = Literal["predict_from", "last_tokens"]
"""Where hidden states are read: at the M tokens before trained tokens, or at the last tokens of the B sequences."""

LENGTHS = ((7, (9, 2)), (3, (1,)))
"""Numbers of tokens of the proof's prompts and their replies. The longest row has 16 tokens, the shortest 4 and much
padding."""
NARROW = 4
"""Size of windows and chunks during the proof."""
TOLERANCE = 3e-4
"""Largest difference of a hidden state, relative to its norm. Rounding stays below 2e-5; a lost window, sink or mask
changes the states of trained models by 1e-2 and more."""
TRIES = 3
"""Proofs with other tokens before a form is rejected, because rounding may, rarely, send a token to another expert."""


@dataclass(frozen=True)
class Proved:
    """The result of the proof of a model."""

    form: Form
    attention: str
    """The name of the attention implementation that the form uses, such as "eager" or `ROW_ATTENTION`."""
    causal: bool
    """Whether a token's state does not depend on later tokens."""
    length_limit: int | None
    """Rows longer than this are computed alone; None if there is no limit."""


_PROVED: WeakKeyDictionary[PreTrainedModel, Proved] = WeakKeyDictionary()


def proved(model: PreTrainedModel) -> Proved:
    """The proved form of this model, which is also set up for it. The proof is made once for each model. Raises
    EngineError if no form gives the plain hidden states, or if the model cannot be run at all."""
    if (known := _PROVED.get(model)) is None:
        known = _PROVED[model] = _prove(model)
        _attend_with(model, known.attention)
    return known


def hidden_states(
    backbone: PreTrainedModel,
    trees: TokenTrees,
    places: Sequence[Place],
    *,
    form: Form,
    pad_id: int,
    length_limit: int | None = None,
) -> list[Tensor]:
    """Last hidden states at each of `places`, [M, D] or [B, D]. They are the same in every form up to rounding.

    Trees with a sequence longer than `length_limit` are computed alone in every form.
    """
    if length_limit is not None and form != "alone":
        return _by_length(backbone, trees, places, form=form, pad_id=pad_id, limit=length_limit)
    if form == "tree":
        return _tree_states(backbone, trees, places)
    padded = trees.padded(pad_id)
    hidden = _padded_states(backbone, padded, form).flatten(0, 1)
    return [take_rows(hidden, to_device(getattr(padded, place), hidden.device)) for place in places]


def _padded_states(backbone: PreTrainedModel, padded: PaddedRows, form: Form) -> Tensor:
    """[B, T, D] last hidden states as transformers computes them: of all rows together, or ("alone") of each row
    without its padding, with zeros at the padding."""
    if form == "padded":
        return _states_of(backbone, padded.input_ids, padded.attention_mask.long())
    rows = []
    for ids, mask in zip(padded.input_ids, padded.attention_mask, strict=True):
        states = _states_of(backbone, ids[mask][None])[0]
        rows.append(torch.cat([states, states.new_zeros(int((~mask).sum()), states.shape[-1])]))
    return torch.stack(rows)


def _states_of(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    mask = None if attention_mask is None else to_device(attention_mask, backbone.device)
    ids = to_device(input_ids, backbone.device)
    hidden: Tensor = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden


def _tree_states(backbone: PreTrainedModel, trees: TokenTrees, places: Sequence[Place]) -> list[Tensor]:
    wanted = [getattr(trees, place) for place in places]
    rows, found = torch.unique(torch.cat(wanted), return_inverse=True)
    trees = trees.to(backbone.device)
    with reading(backbone, to_device(rows, backbone.device), trees.num_tokens):
        hidden = row_states(backbone, trees.input_ids, trees.position_ids, tree_attention(trees))
    if len(hidden) < trees.num_tokens:
        wanted = list(found.split([len(w) for w in wanted]))
    return [take_rows(hidden, to_device(where, hidden.device)) for where in wanted]


def _by_length(
    backbone: PreTrainedModel, trees: TokenTrees, places: Sequence[Place], *, form: Form, pad_id: int, limit: int
) -> list[Tensor]:
    longest = [len(t.prompt) + max(len(b.ids) for b in t.branches) for t in trees.trees]
    groups: dict[Form, list[int]] = {form: [], "alone": []}
    for i, length in enumerate(longest):
        groups[form if length <= limit else "alone"].append(i)
    if not groups["alone"]:
        return hidden_states(backbone, trees, places, form=form, pad_id=pad_id)
    parts: list[tuple[list[int], list[Tensor]]] = []
    for kind, indices in groups.items():
        if indices:
            some = trees.select(indices)
            parts.append((indices, hidden_states(backbone, some, places, form=kind, pad_id=pad_id)))
    axes = {"predict_from": "token", "last_tokens": "sequence"}
    found = []
    for i, place in enumerate(places):
        order = torch.argsort(torch.cat([trees.index_of(axes[place], indices) for indices, _ in parts]))
        found.append(torch.cat([states[i] for _, states in parts])[to_device(order, backbone.device)])
    return found


def _prove(model: PreTrainedModel) -> Proved:
    base, own = backbone(model), model.config._attn_implementation
    forget_lengths(model)
    fuse_layers(model)
    training = model.training
    model.train(False)

    @cache
    def plain(attempt: int) -> tuple[TokenTrees, Tensor]:
        trees = _some_trees(model, attempt)
        return trees, _plain(model, base, trees, own)

    try:
        with torch.no_grad(), narrow_windows(model):
            for form, attention in _candidates(model, own):
                if any(_agrees(model, base, form, attention, *plain(attempt)) for attempt in range(TRIES)):
                    return Proved(form, attention, _is_causal(*plain(0)), length_limit(model))
    finally:
        _attend_with(model, own)
        model.train(training)
    refuse_damage(model.named_parameters(), described(model))
    raise EngineError(
        "this model gives other hidden states each time that it is run on the same row",
        where=described(model),
        fix="use another architecture; what makes equal inputs differ is not known here",
    )


def _candidates(model: PreTrainedModel, own: str) -> list[tuple[Form, str]]:
    found: list[tuple[Form, str]] = []
    encodes = getattr(model.config, "is_encoder_decoder", False)
    if model._supports_attention_backend and not encodes:
        found.append(("tree", ROW_ATTENTION))
    for form in ("padded", "alone"):
        found += [(form, own), (form, "eager")]
    return list(dict.fromkeys(found))


def _plain(model: PreTrainedModel, base: PreTrainedModel, trees: TokenTrees, own: str) -> Tensor:
    """The plain hidden states of all tokens of all sequences, one after the other."""
    if not _attend_with(model, "eager"):
        _attend_with(model, own)
    try:
        with own_layers(model):
            return _all_states(base, trees, "alone")
    except Exception as error:
        raise EngineError(
            f"transformers cannot run this model on one plain row: {type(error).__name__}: {first_line(error)}",
            where=described(model),
            fix="use a decoder that gives `last_hidden_state` for `input_ids`, or the release of transformers it needs",
        ) from error


def _agrees(
    model: PreTrainedModel, base: PreTrainedModel, form: Form, attention: str, trees: TokenTrees, plain: Tensor
) -> bool:
    if not _attend_with(model, attention):
        return False
    try:
        states = _all_states(base, trees, form)
    except Exception:  # whatever a model raises in a form that does not suit it; the next form is tried
        return False
    difference = (states - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-12)
    return bool((difference <= TOLERANCE).all())


def _all_states(base: PreTrainedModel, trees: TokenTrees, form: Form) -> Tensor:
    """Hidden states of all tokens of all sequences, one after the other."""
    if form != "tree":
        padded = trees.padded(0)
        states = _padded_states(base, padded, form)
        return states[to_device(padded.attention_mask, states.device)]
    trees = trees.to(base.device)
    hidden = row_states(base, trees.input_ids, trees.position_ids, tree_attention(trees))
    rows, start = [], 0
    for tree in trees.trees:
        (_, prompt), *branches = tree.nodes()
        for at, length in branches:
            rows += [*range(start, start + prompt), *range(start + at, start + at + length)]
        start += tree.num_tokens
    return hidden[to_device(torch.tensor(rows), hidden.device)]


def _is_causal(trees: TokenTrees, states: Tensor) -> bool:
    """Whether the states of a prompt are the same with either of two replies after it."""
    first = trees.trees[0]
    num_prompt, row = len(first.prompt), len(first.prompt) + len(first.branches[0].ids)
    one, other = states[:num_prompt], states[row : row + num_prompt]
    return bool(((one - other).norm(dim=-1) <= TOLERANCE * one.norm(dim=-1)).all())


def _some_trees(model: PreTrainedModel, seed: int) -> TokenTrees:
    """Trees of random tokens, no longer than the model's positions allow."""
    config = model.config.get_text_config()
    longest = max(prompt + max(replies) for prompt, replies in LENGTHS)
    share = min(1.0, _room(config, length_limit(model)) / longest)
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        found = torch.randint(
            min(3, config.vocab_size - 1), config.vocab_size, (max(1, int(n * share)),), generator=draw
        )
        padding = getattr(config, "pad_token_id", None)
        return [i if i != padding else max(0, i - 1) for i in found.tolist()]

    return TokenTrees.build([response_tree(ids(prompt), [ids(n) for n in replies]) for prompt, replies in LENGTHS])


def _room(config: Any, limit: int | None) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    return min(n for n in (positions, limit, 1 << 30) if isinstance(n, int) and n > 0)


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block, sizes of windows and chunks that are larger than `NARROW` are set to it, both in the
    configuration and in layers that hold a copy."""
    holders = [model.config.get_text_config(), *model.modules()]
    before: list[tuple[Any, str, int]] = []
    for holder in holders:
        for key in ("sliding_window", "attention_chunk_size"):
            size = getattr(holder, key, None)
            if type(size) is int and size > NARROW:
                before.append((holder, key, size))
                setattr(holder, key, NARROW)
    try:
        yield
    finally:
        for holder, key, size in before:
            setattr(holder, key, size)


def _attend_with(model: PreTrainedModel, attention: str) -> bool:
    """Sets the attention implementation. Returns false if the model does not have it."""
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError):
        return False
    return bool(model.config._attn_implementation == attention)
