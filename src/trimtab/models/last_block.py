"""Computes the last block of a decoder only at the tokens whose hidden states are read.

Its keys and values are needed for every token. Everything after attention is needed only at the tokens that predict a
trained one, or at the last tokens that a reward model scores. With prompts three times as long as the reply this saves
a tenth of the work of eight blocks, forward and backward, and the activations that belong to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.attention import LLAMA_LIKE


def reading(backbone: PreTrainedModel, rows: Tensor, num_tokens: int) -> Context[None]:
    """Inside this block the last block of the model, run over a row of `num_tokens`, gives only the hidden states at
    `rows`, if `reads_rows` is true for the model. For other models nothing changes."""
    return _reading(backbone, rows) if reads_rows(backbone) and len(rows) < num_tokens else nullcontext()


def reads_rows(backbone: PreTrainedModel) -> bool:
    """Whether `reading` has an effect. It needs blocks that compute x + attention(norm(x)), then x + mlp(norm(x)), and
    that are not run a second time in the backward pass, because `reading` has ended by then."""
    model: Any = backbone
    return type(model).__name__ in LLAMA_LIKE and not (
        model.layers[-1].gradient_checkpointing and model.layers[-1].training
    )


@contextmanager
def _reading(backbone: PreTrainedModel, rows: Tensor) -> Iterator[None]:
    layers: Any = backbone.layers
    block = layers[-1]

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        mixed, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        x = hidden_states.index_select(1, rows) + mixed
        result: Tensor = x + block.mlp(block.post_attention_layernorm(x))
        return result

    hook = block.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].index_select(1, rows),))
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        hook.remove()
