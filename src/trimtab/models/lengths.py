"""Checks, before anything is computed, that sequences are not longer than the positions that a model has."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from trimtab.batches.trees import Tree
from trimtab.core.errors import EngineError
from trimtab.models.own_forward import learned_positions


def positions_of(model: PreTrainedModel) -> int | None:
    """The number of tokens of the longest sequence that the model can read; None if positions are computed, as with
    rotary embeddings.

    Models of RoBERTa's family count positions from the index after that of their pad token.
    """
    limit = learned_positions(model)
    if limit is None:
        return None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    counted_from = [m.padding_idx + 1 for m in tables if m.num_embeddings == limit and m.padding_idx is not None]
    return limit - max(counted_from, default=0)


def refuse_long(model: PreTrainedModel, trees: Iterable[Tree], *, where: str, fix: str) -> None:
    """Raises EngineError if a sequence of the trees has more tokens than the model has positions. In `fix`, LIMIT is
    replaced by the number of positions."""
    limit = positions_of(model)
    if limit is None:
        return
    lengths = [len(t.prompt) + max((len(b.ids) for b in t.branches), default=0) for t in trees]
    if long := [n for n in lengths if n > limit]:
        raise EngineError(
            f"{len(long)} of {len(lengths)} examples have more tokens than the {limit} positions that the model has "
            f"learned; the longest has {max(long)}",
            where=f"{where}, for {model.config._name_or_path or type(model).__name__}",
            fix=fix.replace("LIMIT", str(limit)),
        )
