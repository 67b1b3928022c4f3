"""Computes once what several adapters of one base have in common: the blocks below the first that any of them changes.

An ensemble of adapters in the last blocks scores a batch in one pass through the shared blocks and one through the rest
for each member. Nothing is approximated: what the shared blocks give is the same for all members.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.models.adapters import is_adapted
from trimtab.models.attention import backbone, num_layers, skipping


def blocks_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The blocks of a model in their order; empty if it does not hold them as one list."""
    wanted = num_layers(model)
    lists = [m for m in backbone(model).modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    return list(lists[0]) if len(lists) == 1 else []


def num_shared(model: PreTrainedModel) -> int:
    """The number of blocks that come before everything that an adapter changes, the last block never among them."""
    blocks = blocks_of(model)
    inside = {id(m) for block in blocks for m in block.modules()}
    if any(is_adapted(m) and id(m) not in inside for m in backbone(model).modules()):
        return 0  # such as an embedding
    changed = [i for i, block in enumerate(blocks) if any(map(is_adapted, block.modules()))]
    return min([*changed, len(blocks) - 1]) if blocks else 0


class Trunk:
    """What the shared blocks gave in one pass over a batch, for the passes that follow over the same batch.

    The first pass is made inside `with trunk.kept(): …`, each further one inside `with trunk.used(): …`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.size = num_shared(model)
        self._blocks: list[Any] = list(blocks_of(model)[: self.size])
        self._outputs: list[Any] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside this block a pass of the model leaves what its shared blocks give."""
        self._outputs = []
        if not self._blocks:
            yield
            return
        hook = self._blocks[-1].register_forward_hook(lambda _module, _inputs, output: self._outputs.append(output))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside this block a pass over the same batch begins with what was left. A batch that is computed in several
        calls of the model is so again, in the same order."""
        if not self._blocks:
            yield
            return
        left = iter(self._outputs)
        whole = isinstance(self._outputs[0], Tensor)

        def unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return hidden_states if whole else (hidden_states,)

        for block in self._blocks[:-1]:
            block.forward = unchanged
        self._blocks[-1].forward = lambda *_, **__: next(left)
        try:
            with skipping(self.size):
                yield
        finally:
            for block in self._blocks:
                del block.forward
