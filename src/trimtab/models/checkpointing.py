"""Activation checkpointing: activations are computed again in the backward pass instead of kept. Nothing else of
training mode, such as dropout, is switched on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.core.errors import EngineError


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Makes the model keep only the input of each block for the backward pass.

    Transformers does so for blocks in training mode. The rest of the model stays in evaluation mode, and so does a
    block while it computes, so that functional dropout, noise in routers and the like never run. Raises EngineError if
    the model does not support this.
    """
    if not model.supports_gradient_checkpointing:
        raise EngineError(
            "this model cannot compute its activations again",
            where=f"architecture {type(model).__name__}",
            fix="set checkpoint_activations = false",
        )
    model.activation_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not module.training:
            module.training = True
            block: Any = module
            block._gradient_checkpointing_func = partial(_run, block._gradient_checkpointing_func)


def _run(checkpoint: Callable[..., Any], forward: partial[Any], *args: Any) -> Any:
    # The block is the first argument of its forward pass. A block that held a function that holds the block would
    # outlive its model until Python looks for circles, which may be long after the next model was loaded.
    block: nn.Module = forward.args[0]

    def in_evaluation(*args: Any) -> Any:
        block.training = False
        try:
            return forward(*args)
        finally:
            block.training = True

    return checkpoint(in_evaluation, *args)
