"""Plans on paper, by the command line: without the machine, the weights or the data."""

import json
from pathlib import Path

import pytest

from tests.models.test_shape import LLAMA_8B, QWEN3_06B, SMALL
from tests.stages.commands import trimtab, write_run_file
from trimtab.core import config
from trimtab.engines.placement import ASSUMPTIONS, GIB
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.paper import OnPaper, ShapesOnPaper, online_job, plan_on_paper, rows_of


@pytest.fixture
def llama(tmp_path):
    """The config.json of Llama 3 8B, and nothing else of it."""
    file = tmp_path / "8b" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(LLAMA_8B))
    return str(file.parent)


def sft_of(model, **more):
    long = {"max_tokens": 4096, "token_budget": 16384, "batch_size": 32}
    fast = {"precision": "bfloat16", "checkpoint_activations": True}
    return {"stage": "sft", "model": model, "data": "nowhere.jsonl", **long, **fast, **more}


def planned(table, **asked):
    (found,), others = plan_on_paper({"stages": {"one": table}}, OnPaper(**asked), where="the test")
    assert not others
    return found


def test_a_plan_says_what_everything_takes(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_run_file(tmp_path / "sft.toml", sft_of(llama, max_steps=100))
    result = trimtab("plan", file, "--on", "h100", "--gpus", 8, "--price", 2, "engine.shard=true")
    assert result.exit_code == 0, result.output
    for said in (
        "on paper: 8 x h100",
        "! trimtab does not run on several GPUs yet",
        "policy moments",
        "gathered weights, in the update of the policy",
        "fits: ",
        "a step takes",
        "100 steps take",
        "at 2 an hour each",
        "constants of h100",
        "assumed",
        "published",
    ):
        assert said in result.output, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8b", "sft.toml"]


def test_one_gpu_is_planned_as_it_is_run(tmp_path, llama):
    file = write_run_file(tmp_path / "sft.toml", sft_of(llama))
    output = trimtab("plan", file, "--on", "h200").output
    assert "yet" not in output.partition("a step:")[0]
    assert "does not fit: " in output
    assert "first too much are the" in output
    assert "cheapest change, an adapter instead of all weights: adapter.rank = 16" in output
    fits = trimtab("plan", file, "--on", "h200", "adapter.rank=16").output
    assert "fits: " in fits
    assert "does not fit" not in fits


def test_what_is_not_counted_is_said(tmp_path, llama):
    mix = {"pretraining_mix": {"data": "nowhere.jsonl"}, "adapter": {"rank": 8}, "critic": {"init": "policy"}}
    table = {"model": llama, "prompts": "nowhere.jsonl", "rewards": [{"name": "exact_answer"}], **mix}
    file = write_run_file(tmp_path / "online.toml", table)
    output = trimtab("plan", file, "--on", "h100").output
    assert "! not counted: pretraining_mix" in output
    assert "! adapters were not tried on a GPU" in output


def test_assumptions_are_named_and_known(tmp_path, llama):
    file = write_run_file(tmp_path / "sft.toml", sft_of(llama))
    output = trimtab("plan", file, "--on", "h100", "--gpus", 8, "--assume", "gather-bfloat16").output
    assert "! assumed: sharded blocks are gathered in bfloat16" in output
    told = "".join(trimtab("plan", "--help").output.split())  # names are broken over lines
    assert all(name in told for name in ASSUMPTIONS)
    wrong = trimtab("plan", file, "--on", "h100", "--assume", "magic")
    assert wrong.exit_code == 2
    assert "nothing is known of magic" in wrong.output


def test_what_cannot_be_planned_is_refused(tmp_path, llama):
    file = write_run_file(tmp_path / "sft.toml", sft_of(llama))
    for words, said in (
        (["--gpus", 8], "--gpus without --on"),
        (["--on", "h100", "--price", "nan"], "nan is not a finite number"),
        (["--price", 2, "--prompt-tokens", 8], "--price, --prompt-tokens without --on"),
        (["--on", "h100", "--workers", 4], "engine.workers = 4 with 1 of h100"),
        (["--on", "h1000"], "no machine 'h1000' is known"),
        (["--on", "h100", "model=meta-llama/Meta-Llama-3-8B"], "downloads nothing"),
        (["--on", "h100", "batch_sise=3"], "batch_size"),
        (["--on", "h100", "--gpus", 2, "engine.shard=true", "adapter.rank=8"], "base of an adapter is not sharded"),
    ):
        result = trimtab("plan", file, *words)
        assert result.exit_code == 2, words
        assert said in result.output, (words, result.output)


def test_the_machine_of_a_check_is_planned_for(tmp_path, llama, monkeypatch):
    monkeypatch.setattr("trimtab.engines.check.SECONDS", 0.01)
    assert trimtab("check", "--workers", 1, "--out", tmp_path / "runs").exit_code == 0
    machine = tmp_path / "runs" / "machine.json"
    (tmp_path / "small.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    table = {"model": str(tmp_path / "small.json"), "data": "nowhere.jsonl"}
    file = write_run_file(tmp_path / "sft.toml", table)
    result = trimtab("plan", file, "--stage", "sft", "--on", machine, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "on paper: 2 processes on" in result.output
    assert "each worker" in result.output
    assert "trimtab check, torch" in result.output
    refused = trimtab("plan", file, "--stage", "sft", "--on", machine, "--gpus", 2)
    assert "on a machine without GPUs" in refused.output


def test_stages_of_a_pipeline_know_the_models_of_earlier_ones():
    stages = {
        "base": {
            "stage": "pretrain",
            "data": "world:arithmetic",
            "num_documents": 8,
            "vocab_size": 300,
            "architecture": {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "mlp_size": 96},
        },
        "sft": {"stage": "sft", "model": "@base", "data": "nowhere.jsonl"},
        "reward": {"stage": "reward", "model": "@sft", "data": "nowhere.jsonl"},
        "ppo": {
            "stage": "online",
            "model": "@sft",
            "prompts": "nowhere.jsonl",
            "rewards": [{"name": "model", "path": "@reward"}],
            "sampling": {"max_prompt_tokens": 32, "max_new_tokens": 16},
        },
    }
    plans, others = plan_on_paper({"stages": stages}, OnPaper(on="h100"), where="the test")
    assert others == ["base"]
    sft, reward, ppo = plans
    assert (sft.job.roles[0].shape.num_layers, sft.job.roles[0].shape.scalar) == (3, False)
    assert reward.job.roles[0].shape.scalar
    assert [role.name for role in ppo.job.roles] == ["policy", "reference", "critic", "reward model"]
    assert ppo.job.tree_tokens == 48
    weights = ppo.job.roles[0].shape.num_weights
    assert weights == 300 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64


def online(model, **more):
    values = {"model": model, "prompts": "nowhere.jsonl", "rewards": [{"name": "exact_answer"}]} | more
    settings = config.resolve(OnlineSettings, values, where="the test")
    return online_job(settings, ShapesOnPaper(Path("runs/plan")), OnPaper(on="h100"))


def test_roles_are_those_of_the_settings(llama):
    policy, reference = online(llama, advantage="grpo", group_size=4, num_epochs=1).roles
    assert (policy.trained, policy.passes) == (
        True,
        0,
    )  # its only update shows what the sampler's log-probabilities are
    assert (reference.trained, reference.passes, reference.on_base) == (False, 1, False)
    names = [role.name for role in online(llama, critic={"init": "policy"}).roles]
    assert names == ["policy", "reference", "critic"]
    assert [role.name for role in online(llama, critic={"init": "value_head"}).roles] == ["policy", "reference"]
    judged = online(llama, rewards=[{"name": "model", "path": llama}] * 2).roles
    assert [(r.name, r.controller_only) for r in judged[3:]] == [("reward model 1", True), ("reward model 2", True)]
    adapted = online(llama, adapter={"rank": 16}, critic={"init": "policy"}).roles
    assert [role.on_base for role in adapted] == [False, True, True]
    assert [role.adapter for role in adapted] == [41_943_040, 0, 41_943_040]
    exact = online(llama, critic={"init": "policy"}, kl_estimator="exact").roles
    assert [role.passes for role in exact] == [2, 2, 1]


def test_lengths_are_those_that_are_given_or_the_limits(llama):
    limits = planned(sft_of(llama), on="h100").job
    assert (limits.prompt_tokens, limits.reply_tokens, limits.up_to) == (2048, 2048, True)
    given = planned(sft_of(llama), on="h100", prompt_tokens=0, reply_tokens=8192).job
    assert (given.prompt_tokens, given.reply_tokens, given.up_to) == (0, 8192, False)
    assert planned(sft_of(llama), on="h100").num_steps is None
    pair = planned(sft_of(llama, stage="preference"), on="h100").job
    assert (pair.replies, pair.roles[0].passes) == (2, 1)
    free = planned(sft_of(llama, stage="preference", loss="simpo"), on="h100").job
    assert free.roles[0].passes == 0


def test_the_rows_of_a_plan_are_all_that_it_takes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    found = planned(sft_of(str(tmp_path)), on="h200").controller
    rows = rows_of(found)
    assert sum(size for name, size in rows.items() if name != "in all") == pytest.approx(rows["in all"])
    assert rows["in all"] == found.total > 8.88 * GIB
