"""The chain with adapters: every role a small change to one frozen base."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.stages.commands import FAST, online_settings, rows, run_stage, summary, trimtab, write_run_file
from tests.stages.test_resume import differences, kill_after, start, wait_for_rows
from trimtab.core import config
from trimtab.core.hub import base_of
from trimtab.data.chat import Chat
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.stages.online.models import load_models
from trimtab.stages.online.settings import OnlineSettings

LORA = {"rank": 4, "alpha": 8.0}
FASTER = FAST | {"learning_rate": 1e-2}


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory, base):
    return run_stage(
        "sft",
        tmp_path_factory.mktemp("adapters") / "sft",
        model=str(base),
        data="world:arithmetic?num=24",
        batch_size=4,
        optimizer=FASTER,
        adapter=LORA,
    )


@pytest.fixture(scope="module")
def reward_adapter(tmp_path_factory, sft_adapter, pairs):
    return run_stage(
        "reward",
        tmp_path_factory.mktemp("adapters") / "reward",
        model=str(sft_adapter / "model"),
        data=str(pairs),
        held_out=0.3,
        batch_size=3,
        optimizer=FASTER,
        adapter=LORA,
    )


def online(base_model, reward_model, **changed):
    return online_settings(base_model, reward_model, adapter=LORA, optimizer=FASTER, **changed)


def test_sft_writes_an_adapter_that_learned(sft_adapter, base):
    assert base_of(sft_adapter / "model") == str(base)
    losses = [row["loss/train"] for row in rows(sft_adapter)]
    assert losses[-1] < losses[0]
    files = {file.name for file in (sft_adapter / "model").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_all_four_models_share_one_base(sft_adapter, reward_adapter, base):
    values = online(sft_adapter / "model", reward_adapter / "model", critic={"init": "reward", "optimizer": FAST})
    settings = config.resolve(OnlineSettings, values, where="the test")
    models = load_models(settings, Chat(load_tokenizer(str(base))))
    roles = [models.policy, models.reference, models.critic, models.rewards.parts[0].reward.model]
    assert len({id(role.model) for role in roles}) == 1
    assert [role.adapter for role in roles] == ["policy", "reference", "critic", "reward_model"]
    critic, reward = roles[2], roles[3]  # a critic that starts as the reward model has its head, not a new one
    assert torch.equal(critic.head.weight, reward.head.weight)
    assert critic.head.weight.any()
    assert critic.head.weight.data_ptr() != reward.head.weight.data_ptr()
    num_base = sum(p.numel() for p in load_causal(str(base)).parameters())
    assert sum(p.numel() for p in models.policy.model.parameters()) < 2 * num_base


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_ppo_on_adapters_trains_only_the_policys(tmp_path, sft_adapter, reward_adapter, base):
    critic = {"init": "reward", "optimizer": FAST}
    out = run_stage(
        "online", tmp_path / "run", **online(sft_adapter / "model", reward_adapter / "model", critic=critic)
    )
    assert rows(out)[0]["policy/kl"] == pytest.approx(0, abs=1e-5)  # the reference is the adapter as it was
    assert rows(out)[0]["rollout/logprob_difference"] < 1e-4
    assert rows(out)[1]["policy/kl"] != 0
    assert base_of(out / "model") == str(base)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "model")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            plain(input_ids=ids).logits, load_causal(out / "model")(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
    assert (
        trimtab("generate", "--model", out / "model", "--prompt", "What is 1 + 1?", "--max-new-tokens", 4).exit_code
        == 0
    )


def test_a_new_adapter_has_the_base_as_reference(tmp_path, base, reward_adapter):
    out = run_stage("online", tmp_path / "run", **online(base, reward_adapter / "model"))
    assert rows(out)[0]["policy/kl"] == pytest.approx(0, abs=1e-6)
    assert summary(out)["num_steps"] == 2


def test_killed_and_run_again_adapters_end_with_the_same_bits(tmp_path, base, reward_adapter):
    settings = online(base, reward_adapter / "model", checkpoint_every=1, num_steps=6)
    whole = run_stage("online", tmp_path / "whole", **settings)
    run_file, out = write_run_file(tmp_path / "run.toml", settings), tmp_path / "run"
    process = start("online", run_file, out)
    wait_for_rows(process, out, 2)
    assert kill_after(process, 0.02)
    run_stage("online", out, **settings)
    assert not differences(whole, out)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_chain_on_a_base_of_few_bits(tmp_path, base, pairs, bits):
    few = {"adapter": LORA | {"base_bits": bits}, "optimizer": FASTER}
    reward = run_stage(
        "reward", tmp_path / "reward", model=str(base), data=str(pairs), held_out=0.3, batch_size=3, **few
    )
    values = online_settings(base, reward / "model", critic={"init": "reward", "optimizer": FAST}, **few)
    out = run_stage("online", tmp_path / "online", **values)
    assert rows(out)[0]["policy/kl"] == pytest.approx(0, abs=1e-5)
    assert rows(out)[0]["rollout/logprob_difference"] < 1e-3
    assert rows(out)[1]["policy/kl"] != 0
    assert summary(out)["sampler"].startswith("rows")
    preferred = run_stage(
        "preference", tmp_path / "preference", model=str(out / "model"), data=str(pairs), batch_size=3, **few
    )
    assert base_of(preferred / "model") == str(base)
    assert rows(preferred)[0]["loss/train"] == pytest.approx(0.6931, abs=1e-3)  # the policy is its own reference


def test_a_critic_from_another_base_is_refused(tmp_path, base, other, reward_run):
    values = online(base, reward_run / "model", critic={"init": "reward", "optimizer": FAST})
    result = trimtab("online", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code != 0
    assert "which is no adapter of" in result.output
    assert "critic.init = 'policy'" in result.output


def test_the_reward_adapter_scores_as_it_was_judged(reward_adapter, tmp_path):
    data = tmp_path / "replies.jsonl"
    data.write_text(json.dumps({"prompt": "What is 1 + 1?", "completion": "#### 2"}) + "\n", encoding="utf-8")
    result = trimtab("score", "--model", reward_adapter / "model", "--data", data, "--out", tmp_path / "scored.jsonl")
    assert result.exit_code == 0, result.output
    assert isinstance(rows(tmp_path, "scored.jsonl")[0]["reward"], float)
