"""What every stage that samples owes its user before and while it samples."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config

from tests.stages.commands import PROMPTS, SHORT, run_stage, summary, trimtab, write_run_file
from trimtab.core.compiled import SWITCH
from trimtab.engines.local import sampler as local_generator
from trimtab.engines.local.kernels import find
from trimtab.engines.local.slots import SlotForm
from trimtab.models.load import load_tokenizer
from trimtab.models.save import save_model

SMALL = {"sampling": SHORT}
GRPO = {"advantage": {"name": "grpo"}, "rewards": [{"name": "length", "max_tokens": 3}], "group_size": 2}


def stages(base):
    model = str(base)
    return {
        "compare": {"model": model, "world": "arithmetic", "num_prompts": 4, "num_held_out_prompts": 4},
        "evaluate": {"model": model, "baseline": model, "prompts": PROMPTS, "world": "arithmetic"},
        "select": {"model": model, "prompts": PROMPTS, "rewards": GRPO["rewards"], "replies_per_prompt": 2},
        "online": {"model": model, "prompts": PROMPTS, "prompts_per_step": 2, "num_steps": 1, **GRPO},
    }


@pytest.mark.parametrize("stage", ["compare", "evaluate", "select", "online"])
def test_replies_beyond_the_positions_of_the_model_are_refused_before_any_is_sampled(
    stage, base, tmp_path, monkeypatch
):
    monkeypatch.setattr(local_generator, "learned_positions", lambda model: 20)
    monkeypatch.delattr(local_generator.LocalSampler, "continue_ids")
    run_file = write_run_file(tmp_path / "run.toml", stages(base)[stage] | SMALL)
    result = trimtab(stage, run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "and a reply of up to 8 need" in result.output
    assert "positions; the model has 20" in result.output


@pytest.mark.parametrize(("stage", "new_tokens"), [("evaluate", 60), ("select", 60), ("online", 60), ("online", 8)])
def test_replies_beyond_the_positions_of_the_reward_model_are_refused_before_any_is_sampled(
    stage, new_tokens, base, tmp_path
):
    tokenizer = load_tokenizer(base)
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = GPT2Config(**shape, num_labels=1, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, tmp_path / "judge")
    judged = {"rewards": [{"name": "model", "path": str(tmp_path / "judge")}]}
    settings = stages(base)[stage] | judged | {"sampling": {"max_new_tokens": new_tokens}}
    run_file = write_run_file(tmp_path / "run.toml", settings)
    result = trimtab(stage, run_file, "--out", tmp_path / "run")
    assert (result.exit_code == 2) == (new_tokens == 60), result.output
    if new_tokens == 60:
        assert "and a reply of up to 60 need" in result.output
        assert "the reward model has learned 128" in result.output
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("stage", ["compare", "evaluate", "select", "online", "generate"])
def test_a_sampler_that_is_not_the_policy_stops_every_stage(stage, base, tmp_path, monkeypatch):
    decode = SlotForm.decode

    def with_other_weights(form, prompts, *arguments):
        weight = form.policy.model.base_model.layers[0].mlp.down_proj.weight
        changed = 0.1 if len(arguments[1].uniforms[0]) == 8 else 0.0  # the choice of the form has shorter replies
        weight.data.add_(changed)
        decode(form, prompts, *arguments)
        weight.data.sub_(changed)

    monkeypatch.setattr(SlotForm, "decode", with_other_weights)
    if stage == "generate":
        result = trimtab("generate", "--model", base, "--prompt", "Hello", "--max-new-tokens", 8)
    else:
        run_file = write_run_file(tmp_path / "run.toml", stages(base)[stage] | SMALL)
        result = trimtab(stage, run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "sampler and policy disagree by" in result.output


def test_the_summary_says_how_replies_were_decoded_and_how_near_the_policy(base, tmp_path):
    found = summary(run_stage("evaluate", tmp_path / "evaluate", **stages(base)["evaluate"], **SMALL))
    for model in ("policy", "baseline"):
        assert found[model]["sampler"].startswith("fused")
        assert 0 < found[model]["logprob_difference"] < 1e-4


def test_a_resume_that_must_take_another_path_says_so_and_records_it(base, tmp_path, monkeypatch):
    if not find(torch.zeros(1)).compiled:
        pytest.skip("no C compiler with OpenMP on this machine")
    settings = stages(base)["select"] | SMALL | {"prompts_per_step": 2}
    run_file, out = write_run_file(tmp_path / "run.toml", settings), tmp_path / "run"
    assert trimtab("select", run_file, "max_steps=1", "--out", out).exit_code == 0
    assert json.loads((out / "environment.json").read_text())["paths"] == {"sampler": "fused, compiled"}
    monkeypatch.setenv(SWITCH, "torch")
    result = trimtab("select", run_file, "max_steps=2", "--out", out)
    assert "the run began with the sampler 'fused, compiled' and goes on with 'fused'" in result.output
    assert {"paths.sampler": "fused"} in json.loads((out / "environment.json").read_text())["resumed_with"]
