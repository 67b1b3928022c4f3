"""Examples against the positions that a model has learned."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig, RobertaConfig

from tests.tiny import causal, scalar
from trimtab.batches.trees import response_tree
from trimtab.core.errors import EngineError
from trimtab.models.lengths import positions_of, refuse_long

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def opt():
    return AutoModelForCausalLM.from_config(
        OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=40)
    )


def roberta():
    config = RobertaConfig(**SHAPE, intermediate_size=48, max_position_embeddings=42, pad_token_id=1, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(("make", "limit"), [(lambda: causal("gpt2"), 128), (opt, 40), (roberta, 40)])
def test_the_longest_sequence_that_a_model_reads(make, limit):
    model = make().eval()
    assert positions_of(model) == limit
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("make", [lambda: causal("llama"), lambda: scalar("qwen3")])
def test_rotary_positions_have_no_end(make):
    model = make()
    assert positions_of(model) is None
    refuse_long(model, [response_tree([3] * 5000, [[4] * 5000])], where="data", fix="")


def test_longer_examples_are_refused_with_their_number_and_the_setting():
    trees = [response_tree([3] * 100, [[4] * 20, [4] * 28]), response_tree([3] * 100, [[4] * 20, [4] * 29])]
    refuse_long(causal("gpt2"), trees[:1], where="data", fix="")
    says = r"(?s)1 of 2 examples have more tokens than the 128 positions .* has 129.*pairs\.jsonl.*max_tokens = 128"
    with pytest.raises(EngineError, match=says):
        refuse_long(causal("gpt2"), trees, where="pairs.jsonl", fix="set max_tokens = LIMIT")
