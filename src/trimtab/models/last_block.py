"""The last block of a decoder, computed only where somebody reads it.

Its keys and values are needed of every token, but what follows attention there only at the tokens that predict a
trained one, or at the ends that a reward model scores: with prompts of three times the reply's length that is a tenth
of the work of eight blocks, forward and backward, and the activations that go with it.
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
    """Within it the last block of the model, run over a row of `num_tokens`, gives only the hidden states at `rows`,
    if the block is one that is known here; `reads_rows` says whether."""
    return _reading(backbone, rows) if reads_rows(backbone) and len(rows) < num_tokens else nullcontext()


def reads_rows(backbone: PreTrainedModel) -> bool:
    """Whether `reading` has an effect: blocks are x + attention(norm(x)) and then x + mlp(norm(x)), and are not run a
    second time in the backward pass, when it is over."""
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
