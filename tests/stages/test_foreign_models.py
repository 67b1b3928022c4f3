"""Stages that read one model's token ids with another ask first whether both mean the same by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from tests.models.test_save import BASES, write_base
from tests.stages.commands import FAST, online_settings, run_stage, trimtab, write_run_file
from tests.tiny import write_model_directory
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.data.chat import Chat
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.rewards.combined import load_rewards
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import RewardModelScorer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, and a language model and a reward model of another family with more rows and with fewer."""
    directory = tmp_path_factory.mktemp("foreign")
    write_model_directory(directory / "policy")
    for name, rows in (("more", 700), ("fewer", None)):
        base = write_base(directory / name, BASES["pad is eos, and unk is there"](), rows=rows)
        save_model(load_scalar(base, head_seed=0), load_tokenizer(base), directory / f"{name}_reward")
    return directory


def refused(stage, path, settings):
    done = trimtab(stage, write_run_file(path / "run.toml", settings), "--out", path / "run")
    assert done.exit_code == 2, done.output
    return done.output


@pytest.mark.parametrize("size", ["more", "fewer"])
def test_the_critic_of_ppo_does_not_read_ids_in_the_vocabulary_of_a_foreign_reward_model(models, tmp_path, size):
    settings = online_settings(models / "policy", models / f"{size}_reward", critic={"init": "reward"})
    said = refused("online", tmp_path, settings)
    assert "would read the policy's token ids in another vocabulary" in said
    assert "critic.init = 'policy'" in said


@pytest.mark.parametrize("size", ["more", "fewer"])
@pytest.mark.parametrize("stage", ["online", "preference", "evaluate"])
def test_nor_does_a_reference_or_baseline(models, tmp_path, stage, size):
    other = str(models / size)
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "I want a refund!", "chosen": "We can refund the lamp.", "rejected": "No."}
    pairs.write_text(json.dumps(row) + "\n")
    settings = {
        "online": lambda: online_settings(models / "policy", models / f"{size}_reward", reference=other),
        "preference": lambda: {
            "model": str(models / "policy"),
            "reference": other,
            "data": str(pairs),
            "held_out": 0.0,
        },
        "evaluate": lambda: {
            "model": str(models / "policy"),
            "baseline": other,
            "prompts": "world:arithmetic?num=2",
            "num_prompts": 2,
            "world": "arithmetic",
        },
    }[stage]()
    said = refused(stage, tmp_path, settings)
    assert "another vocabulary" in said
    assert str(models / size) in said


def test_a_foreign_reward_model_judges_the_text(models, tmp_path):
    settings = online_settings(models / "policy", models / "fewer_reward", num_steps=1)
    run_stage("online", tmp_path / "run", **settings)


def test_examples_beyond_the_positions_of_a_model_are_refused_before_the_first_step(tmp_path):
    base = write_base(tmp_path / "gpt2", BASES["end of the template is not eos"](), kind=GPT2Config)
    rows = [{"prompt": "Hello", "completion": "We can refund the lamp. " * n} for n in (1, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(base), "data": str(tmp_path / "rows.jsonl"), "held_out": 0.0, "batch_size": 2}
    said = refused("sft", tmp_path, settings)
    assert "1 of 2 examples have more tokens than the 96 positions" in said
    assert "max_tokens = 96" in said
    run_stage("sft", tmp_path / "fits", **settings, max_tokens=96)


@pytest.mark.parametrize("ours", [True, False])
def test_a_reward_adapter_scores_alike_alone_and_on_a_shared_base(tmp_path, base, pairs, ours):
    out = run_stage(
        "reward", tmp_path / "run", model=str(base), data=str(pairs), adapter={"rank": 2}, max_steps=2, batch_size=4,
        optimizer=FAST,
    )  # fmt: skip
    path = str(out / "model")
    if not ours:  # as another program writes it
        (Path(path) / "reward.json").unlink()
    chat = Chat(load_tokenizer(path))
    prompt = Prompt(messages=(Message("user", "Hi"),))
    ids = tuple(chat.encode_response("Hello"))
    one = Rollout(
        prompt=prompt, response="Hello", prompt_ids=tuple(chat.encode_prompt(prompt.messages)), response_ids=ids,
        logprobs=(0.0,) * len(ids), finish_reason="stop",
    )  # fmt: skip
    alone = RewardModelScorer.from_directory(path, token_budget=100).score([one])[0]
    shared = load_rewards([RewardModel(path=path)], token_budget=100, shared=load_causal(base), base=str(base)).score(
        [one]
    )[0]
    torch.testing.assert_close(alone, shared, rtol=1e-4, atol=1e-5)
