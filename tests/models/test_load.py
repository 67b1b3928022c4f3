"""Wrong models are answered in a sentence when they are loaded, and nothing of another kind is taken for a model."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

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


def shards_missing(file):
    file.rename(file.with_name("model-00001-of-00002.safetensors"))
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


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
        (shards_missing, r"1 of 2 files of weights are not there: model-00002"),
        (index_of_nothing, r"model\.safetensors\.index\.json does not say which file holds which weight"),
    ],
)
def test_weights_that_are_not_whole(damaged, damage, says):
    damage(damaged / "model.safetensors")
    with pytest.raises(EngineError, match=says):
        load_causal(damaged)
    with pytest.raises(EngineError, match=says):
        ScalarModel(load_scalar(damaged, head_seed=0), pad_id=0)


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
    with pytest.raises(EngineError, match=r"the model cannot be loaded: .*mismatch"):
        load_causal(damaged)


# --- kinds ---


def write_reward_model(base, path, num_labels=1):
    config = AutoConfig.from_pretrained(base)
    config.num_labels = num_labels
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    load_tokenizer(base).save_pretrained(path)
    return path


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
