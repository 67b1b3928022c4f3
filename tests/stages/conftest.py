"""Tiny models that the stages start from, made once."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from tests.stages.commands import FAST, run_stage
from tests.stages.guarded import LADDER, hacked
from tests.tiny import write_model_directory
from trimtab import worlds
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.save import save_model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A model whose replies sometimes end within eight tokens, and sometimes do not."""
    return ending_model(tmp_path_factory.mktemp("stages") / "base", seed=0)


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """The shape of `base` with other weights."""
    return ending_model(tmp_path_factory.mktemp("stages") / "other", seed=1)


@torch.no_grad()
def ending_model(directory, seed):
    """A random model that gives the end token an eighth of the probability on average, and no more at the start."""
    model, tokenizer = load_causal(write_model_directory(directory, seed=seed)), load_tokenizer(directory)
    hidden = model.base_model(torch.arange(len(tokenizer))[None]).last_hidden_state[0]
    embeddings, end = model.get_output_embeddings().weight, tokenizer.eos_token_id
    start = tokenizer("<|assistant|>\n", return_tensors="pt")["input_ids"]
    first = model.base_model(start).last_hidden_state[0, -1]
    direction = hidden.mean(0) - (hidden.mean(0) @ first) / (first @ first) * first
    direction /= direction.norm()
    for _ in range(100):
        if (hidden @ embeddings.T).softmax(-1)[:, end].mean() > 1 / 8:
            break
        embeddings[end] += 0.1 * direction
    save_model(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, base):
    """A tiny BERT with the tokenizer of `base`."""
    tokenizer = load_tokenizer(base)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("stages") / "encoder"
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Twenty pairs: a right and a wrong answer, every other one with a margin, every third with a soft label."""
    path = tmp_path_factory.mktemp("stages") / "pairs.jsonl"
    lines = []
    for i, prompt in enumerate(worlds.load("arithmetic").prompts("train", 20)):
        row = {"prompt": prompt.text, "chosen": f"#### {prompt.facts['answer']}", "rejected": "I can not say."}
        row |= {"margin": 0.5} if i % 2 == 0 else {}
        row |= {"label": 0.75} if i % 3 == 0 else {}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory, base, pairs):
    """Two steps of the reward stage."""
    out = tmp_path_factory.mktemp("stages") / "reward"
    return run_stage("reward", out, model=str(base), data=str(pairs), held_out=0.3, batch_size=10, optimizer=FAST)


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory, reward_run):
    """A reward model whose weights are finite, and whose scores are not."""
    model, directory = load_scalar(reward_run / "model"), tmp_path_factory.mktemp("stages") / "overflowing"
    torch.nn.init.constant_(model.score.weight, 3e38)
    save_model(model, load_tokenizer(reward_run / "model"), directory)
    return directory


@pytest.fixture(scope="session")
def ladder(tmp_path_factory, base):
    """An online run whose guard takes every action that there is."""
    out = tmp_path_factory.mktemp("guard") / "ladder"
    return run_stage("online", out, **hacked(base, guard={"actions": LADDER}))
