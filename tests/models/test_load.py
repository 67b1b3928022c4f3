"""Wrong models are answered in a sentence when they are loaded, and nothing of another kind is taken for a model."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BartConfig

from tests.models.test_save import BASES, write_base
from tests.tiny import write_model_directory
from trimtab.core.errors import ConfigError, EngineError
from trimtab.data.chat import Chat
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.models.save import save_model
from trimtab.models.vocabulary import refuse_other_vocabulary


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("load") / "base", seed=3)


@pytest.fixture
def damaged(base, tmp_path):
    shutil.copytree(base, tmp_path / "damaged")
    return tmp_path / "damaged"


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_the_header(file):
    file.write_bytes(file.read_bytes()[:60])


def empty(file):
    file.write_bytes(b"")


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")


def garbage(file):
    file.write_bytes(b"\x00\xff" * 500)


def pickle(file):
    file.rename(file.with_name("pytorch_model.bin"))


def gone(file):
    file.unlink()


def with_nan(file):
    weights = load_file(file)
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


def with_nan_in_a_rare_row(file):
    weights = load_file(file)
    weights["model.embed_tokens.weight"][-1] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


def incomplete(file):
    weights = load_file(file)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})


def under_names_of_a_wrapper(file):
    save_file({f"_orig_mod.{name}": w for name, w in load_file(file).items()}, file, metadata={"format": "pt"})


def shards_missing(file):
    file.rename(file.with_name("model-00001-of-00002.safetensors"))
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def beside_other_shards(file):
    shutil.copy(file, file.with_name("model-00001-of-00001.safetensors"))
    shard = {"model.norm.weight": "model-00001-of-00001.safetensors"}
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))


def index_of_nothing(file):
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": ["model.safetensors"]}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, r"model\.safetensors is damaged or cut short"),
        (cut_in_the_header, r"model\.safetensors is damaged or cut short"),
        (empty, r"model\.safetensors is empty"),
        (pointer, r"(?s)a pointer of Git LFS.*git lfs pull"),
        (garbage, r"model\.safetensors is damaged"),
        (pickle, r"(?s)pytorch_model\.bin, a format that can run code.*safetensors are needed.*convert"),
        (gone, r"there is no model\.safetensors"),
        (with_nan, r"1 of its weights hold nan or infinity, such as model\.norm\.weight"),
        (with_nan_in_a_rare_row, r"1 of its weights hold nan or infinity, such as model\.embed_tokens\.weight"),
        (incomplete, r"lacks weights of a Llama\w+, such as model\.layers\.0\.mlp\.down_proj"),
        (under_names_of_a_wrapper, r"calls its weights otherwise, such as _orig_mod\.model\.embed_tokens\.weight"),
        (shards_missing, r"1 of 2 files of weights are not there: model-00002"),
        (beside_other_shards, r"two sets of weights, model\.safetensors and the 1 files of model\.safetensors\.index"),
        (index_of_nothing, r"model\.safetensors\.index\.json does not say which file holds which weight"),
    ],
)
def test_weights_that_are_not_whole(damaged, damage, says):
    damage(damaged / "model.safetensors")
    with pytest.raises(EngineError, match=says):
        load_causal(damaged)
    with pytest.raises(EngineError, match=says):
        ScalarModel(load_scalar(damaged, head_seed=0), pad_id=0)


def with_biases(weights):
    return {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}


def with_a_further_block(weights):
    return {
        name.replace("layers.0.", "layers.1."): value.clone() for name, value in weights.items() if "layers.0." in name
    }


def with_norms_of_another_architecture(weights):
    return {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}


def with_an_adapter_inside(weights):
    return {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 32)}


def with_scales_of_rounded_weights(weights):
    return {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(48, 1)}


@pytest.mark.parametrize(
    "further",
    [
        with_biases,
        with_a_further_block,
        with_norms_of_another_architecture,
        with_an_adapter_inside,
        with_scales_of_rounded_weights,
    ],
)
def test_weights_that_the_configuration_leaves_out_are_named(damaged, further):
    """transformers leaves them out without an error, and computes another model."""
    file = damaged / "model.safetensors"
    weights = load_file(file)
    save_file(weights | further(weights), file, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"has no place for \d+ of the weights in the file, such as model\.layers"):
        load_causal(damaged)
    with pytest.raises(EngineError, match="has no place for"):
        load_scalar(damaged, head_seed=0)


def test_weights_beside_the_blocks_may_be_left_out(damaged):
    file = damaged / "model.safetensors"
    beside = {
        "v_head.summary.weight": torch.ones(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "mtp.0.norm.weight": torch.ones(32),
    }
    before = [load(damaged).state_dict() for load in (load_causal, partial(load_scalar, head_seed=0))]
    save_file(load_file(file) | beside, file, metadata={"format": "pt"})
    for weights, load in zip(before, (load_causal, partial(load_scalar, head_seed=0)), strict=True):
        after = load(damaged).state_dict()
        assert weights.keys() == after.keys()
        assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_head_of_its_own_is_kept_and_said_whatever_the_configuration_says(damaged, tmp_path):
    """transformers loads both, while other libraries go by the configuration and take the embedding for both."""
    file = damaged / "model.safetensors"
    weights = load_file(file)
    head = torch.randn(weights["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    model = load_causal(damaged)
    assert torch.equal(model.get_output_embeddings().weight, head)
    save_model(model, load_tokenizer(damaged), tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "written" / "model.safetensors")["lm_head.weight"], head)


def test_a_score_head_that_broke_down_in_training_is_refused_before_anything_is_scored(base, tmp_path):
    reward = write_reward_model(base, tmp_path / "reward")
    weights = load_file(reward / "model.safetensors")
    weights["score.weight"][0, 3] = torch.inf
    save_file(weights, reward / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"1 of its weights hold nan or infinity, such as score\.weight"):
        load_scalar(reward)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "adapter_config.json"])
def test_json_that_is_not_whole(damaged, file):
    (damaged / file).write_text('{"model_type": "lla')
    with pytest.raises(EngineError, match=r"cannot be|can be loaded|without adapter_model"):
        load_tokenizer(damaged)


def test_shapes_that_are_not_those_of_the_configuration(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 44}))
    says = r"\d weights have other sizes than config\.json says, such as .*: a mismatch of \("
    with pytest.raises(EngineError, match=says):
        load_causal(damaged)


# --- kinds ---


def write_reward_model(base, path, num_labels=1):
    config = AutoConfig.from_pretrained(base)
    config.num_labels = num_labels
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    load_tokenizer(base).save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "exl2", "torchao"])
def test_rounded_weights_are_refused_without_the_library_that_reads_them(damaged, method):
    config = json.loads((damaged / "config.json").read_text())
    rounded = {"quant_method": method, "bits": 4, "group_size": 128, "load_in_4bit": True}
    (damaged / "config.json").write_text(json.dumps(config | {"quantization_config": rounded}))
    with pytest.raises(EngineError, match=rf"a quantised model: {method}(?s:.*)name the model it was made from"):
        load_causal(damaged)


def test_a_setting_that_transformers_does_not_know_is_named(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "odd", "factor": 2.0}}))
    with pytest.raises(EngineError, match="its configuration names 'odd', which transformers does not know"):
        load_causal(damaged)


def test_a_tokenizer_without_its_vocabulary_is_refused(damaged):
    """transformers makes an empty one of the class that tokenizer_config.json names."""
    (damaged / "tokenizer.json").unlink()
    (damaged / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(EngineError, match=r"(?s)3 special tokens and no other.*needs tokenizer\.json"):
        load_tokenizer(damaged)


@pytest.mark.parametrize("ids", ["422", [[1]], {"a": 1}])
def test_ends_that_are_no_ids_are_refused(damaged, ids):
    (damaged / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(EngineError, match="is neither a number nor a list of numbers"):
        load_tokenizer(damaged)


def test_the_template_of_a_processor_is_that_of_the_tokenizer(damaged):
    (damaged / "chat_template.jinja").unlink()
    template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    (damaged / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(damaged).chat_template == template


@pytest.mark.parametrize(
    "wish", [{"output_attentions": True, "output_hidden_states": True}, {"attn_implementation": "flash_attention_2"}]
)
def test_wishes_of_a_configuration_that_change_no_number_are_no_obstacle(base, damaged, tmp_path, wish):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | wish))
    model = load_causal(damaged)
    save_model(model, load_tokenizer(damaged), tmp_path / "written")
    ids, plain = torch.arange(3, 12)[None], AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    torch.testing.assert_close(plain(input_ids=ids).logits, load_causal(base)(input_ids=ids).logits)


def test_a_reward_model_with_an_encoder_and_a_decoder_is_refused(damaged):
    config = BartConfig(vocab_size=320, d_model=32, num_labels=1, architectures=["BartForSequenceClassification"])
    config.save_pretrained(damaged)
    with pytest.raises(EngineError, match="this model has an encoder and a decoder"):
        load_scalar(damaged)


def test_a_reward_model_writes_no_text_and_a_language_model_gives_no_score(base, tmp_path):
    reward = write_reward_model(base, tmp_path / "reward")
    load_scalar(reward)
    with pytest.raises(
        EngineError, match=r"(?s)a reward model or classifier \(LlamaForSeq.*writes no text.*trimtab score"
    ):
        load_causal(reward)
    with pytest.raises(EngineError, match=r"(?s)no trained score head \(missing: score.weight\).*trimtab reward"):
        load_scalar(base)


@pytest.mark.parametrize("head_seed", [None, 0])
def test_a_classifier_with_two_labels_is_no_reward_model(base, tmp_path, head_seed):
    two = write_reward_model(base, tmp_path / "two", num_labels=2)
    with pytest.raises(EngineError, match=r"a classifier with 2 labels; .* one label is needed"):
        load_scalar(two, head_seed=head_seed)


# --- vocabularies ---


def compared(tokenizer, path):
    refuse_other_vocabulary(tokenizer, path, role="critic")


def test_a_model_with_another_vocabulary_is_refused_with_the_way_out(base, tmp_path):
    own = load_tokenizer(base)
    compared(own, base)
    compared(own, write_reward_model(base, tmp_path / "reward"))
    other = write_base(tmp_path / "other", BASES["pad is eos, and unk is there"](), rows=400)
    with pytest.raises(
        ConfigError, match=r"(?s)critic '.*other' would read .* another vocabulary: \d+ of \d+ ids.*'policy'"
    ):
        compared(own, other)


def test_rows_are_compared_where_there_is_no_other_text(base, tmp_path):
    own = load_tokenizer(base)
    wider = load_causal(base)
    wider.resize_token_embeddings(len(own) + 40, mean_resizing=False)
    save_model(wider, own, tmp_path / "wider")
    compared(own, tmp_path / "wider")
    assert load_tokenizer(tmp_path / "wider").model_facts.num_rows == len(own) + 40
    compared(load_tokenizer(tmp_path / "wider"), base)  # rows that fill up are never sampled
    more = load_tokenizer(tmp_path / "wider")
    more.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    with pytest.raises(
        ConfigError, match=re.escape(f"has {len(own)} rows in its embedding and the policy's tokens need {len(more)}")
    ):
        compared(more, base)
    for file in (tmp_path / "wider").glob("token*"):
        file.unlink()  # a model without a tokenizer
    compared(own, tmp_path / "wider")


def test_tokens_without_a_row_are_refused_if_a_conversation_can_hold_them(tmp_path):
    tok = BASES["end of the template is not eos"]()
    rows = len(tok)
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    Chat(load_tokenizer(write_base(tmp_path / "image", tok, rows=rows)))  # as text models of such families have it
    tok.add_tokens(["refund"])
    with pytest.raises(
        EngineError, match=rf"(?s)1 tokens .* no row for, such as 'refund' with id {rows + 1}.*{rows} rows.*resize"
    ):
        Chat(load_tokenizer(write_base(tmp_path / "word", tok, rows=rows)))
    with pytest.raises(EngineError, match=r"such as .<.im_end.>."):
        Chat(load_tokenizer(write_base(tmp_path / "end", BASES["end of the template is not eos"](), rows=2)))
