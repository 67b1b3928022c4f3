"""The sizes of a model on paper are those of the model that transformers makes of the same configuration."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab.batches.trees import TokenTrees, sequence_tree
from trimtab.core.errors import ConfigError, EngineError
from trimtab.models.adapters import LoRA, adapter_parameters, add_adapter
from trimtab.models.roles import Policy
from trimtab.models.shape import read_shape, shape_of

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 96,
}
KINDS = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
}


def config_of(values):
    return CONFIG_MAPPING[values["model_type"]](**{k: v for k, v in values.items() if k != "model_type"})


@pytest.mark.parametrize(
    ("values", "published"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496), (QWEN3_06B, 596_049_920)]
)
def test_public_models_have_their_published_sizes(values, published):
    assert shape_of(values, where="").num_weights == published


def test_a_block_of_llama_8b_by_hand():
    shape = shape_of(LLAMA_8B, where="")
    # query and output 4096 x 4096, key and value 4096 x 1024, three of 4096 x 14336, two norms
    assert shape.block_weights == 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    # a rank of 16 on all seven: 16 x (8192 + 2 x 5120 + 8192 + 3 x 18432) in each of 32 blocks
    assert shape.adapter_weights(16) == 32 * 16 * (8192 + 5120 + 5120 + 8192 + 3 * 18432) == 41_943_040
    # float32: 24,576 for norms, 10,240 for attention and 57,344 for the MLP, in 4 bytes; 32 sums and 2 deviations
    assert shape.kept_bytes(bfloat16=False, fused=False) == 4 * (6 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336) + 4 * 34


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_are_counted(kind):
    values = SMALL | KINDS[kind]
    policy = AutoModelForCausalLM.from_config(config_of(values))
    assert shape_of(values, where="").num_weights == policy.num_parameters()
    scores = AutoModelForSequenceClassification.from_config(config_of(values | {"num_labels": 1}))
    assert shape_of(values, where="", scalar=True).num_weights == scores.num_parameters()


@pytest.mark.parametrize("modules", [(), ("q_proj", "down_proj")])
def test_an_adapter_is_as_large_as_that_of_peft(modules):
    values = SMALL | KINDS["qwen3"]
    model = AutoModelForCausalLM.from_config(config_of(values))
    add_adapter(model, "policy", LoRA(rank=4, modules=modules), seed=0)
    made = sum(p.numel() for p in adapter_parameters(model, "policy").values())
    assert shape_of(values, where="").adapter_weights(4, modules) == made


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_block_keeps_what_autograd_saves(kind, precision):
    num_tokens, kept = 96, []
    for layers in (2, 4):
        values = SMALL | KINDS[kind] | {"num_hidden_layers": layers}
        policy = Policy(AutoModelForCausalLM.from_config(config_of(values)).eval(), pad_id=0)
        policy.precision = precision
        own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def note(x, own=own, saved=saved):
            if x.untyped_storage().data_ptr() not in own:
                saved[x.untyped_storage().data_ptr()] = x
            return x

        trees = TokenTrees.build([sequence_tree([i % 90 + 2 for i in range(num_tokens)])])
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            policy(trees)
        kept.append(sum(x.untyped_storage().nbytes() for x in saved.values()))
    shape = shape_of(SMALL | KINDS[kind], where="")
    bfloat16 = precision == "bfloat16"
    copies = 2 * shape.linear_weights if bfloat16 else 0  # of the weights, which are not kept for each token
    # Without the last token's target one token less is computed after the last block's attention, which is not counted.
    found = ((kept[1] - kept[0]) / 2 - copies) / num_tokens
    fused = any("transformers_own" in vars(type(m)) for m in policy.modules()) and not bfloat16
    assert found == pytest.approx(shape.kept_bytes(bfloat16=bfloat16, fused=fused), rel=1e-3)


def test_a_directory_and_a_file_are_read_and_nothing_else(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    assert read_shape(tmp_path) == read_shape(tmp_path / "config.json") == shape_of(QWEN3_06B, where="")
    with pytest.raises(ConfigError, match="downloads nothing"):
        read_shape("meta-llama/Meta-Llama-3-8B")
    for text, said in (("{", "cannot be read"), ("[]", "holds no object"), ("null", "holds no object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(EngineError, match=said):
            read_shape(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", None])
def test_what_is_not_known_is_refused(family):
    with pytest.raises(ConfigError, match="known on paper"):
        shape_of(SMALL | {"model_type": family}, where="config.json")


def test_a_size_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        shape_of({k: v for k, v in LLAMA_8B.items() if k != "vocab_size"}, where="config.json")


@pytest.mark.parametrize("size", [None, "4096", 0, -1, 4096.0, True, [4096]])
@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_none_is_shown(name, size):
    with pytest.raises(ConfigError, match=re.escape(f"{name} = {size!r}; it is a whole number above 0")):
        shape_of(LLAMA_8B | {name: size}, where="config.json")


def test_sizes_that_follow_from_others_may_be_left_out_or_null():
    heads = replace(shape_of(LLAMA_8B, where=""), num_kv_heads=32)
    for changed in ({"num_key_value_heads": None}, {"num_key_value_heads": 32, "head_dim": None}):
        assert shape_of(LLAMA_8B | changed, where="") == heads
    with pytest.raises(ConfigError, match="num_key_value_heads = 0"):
        shape_of(LLAMA_8B | {"num_key_value_heads": 0}, where="")


def test_an_adapter_of_the_last_blocks_has_their_part_of_the_weights():
    shape = shape_of(LLAMA_8B, where="")  # of 32 blocks
    assert 8 * shape.adapter_weights(16, blocks=4) == shape.adapter_weights(16)
