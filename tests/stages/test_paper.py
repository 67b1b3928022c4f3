"""Plans on paper, by the command line: without the machine, the weights or the data."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.test_machines import FOUND
from tests.models.test_shape import LLAMA_8B, QWEN3_06B, SMALL
from tests.stages.commands import trimtab, write_run_file
from trimtab.core import config
from trimtab.core.errors import ConfigError, TrimtabError
from trimtab.engines.machines import machine_of, write_machine
from trimtab.engines.placement import ASSUMPTIONS, GIB
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.paper import OnPaper, online_job, plan_on_paper, rows_of
from trimtab.stages.paper_models import ModelOnPaper, ModelsOnPaper


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


def online(model, made=(), **more):
    values = {"model": model, "prompts": "nowhere.jsonl", "rewards": [{"name": "exact_answer"}]} | more
    settings = config.resolve(OnlineSettings, values, where="the test")
    return online_job(settings, ModelsOnPaper(Path("runs/plan"), dict(made)), OnPaper(on="h100"))


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
    guard = {"measure": [{"name": "model", "path": llama}]}
    assert [role.name for role in online(llama, critic={"init": "policy"}, guard=guard).roles][3:] == ["reward model"]
    adapted = online(llama, adapter={"rank": 16}, critic={"init": "policy"}).roles
    assert [role.on_base for role in adapted] == [False, True, True]
    assert [role.adapter for role in adapted] == [41_943_040, 0, 41_943_040]
    exact = online(llama, critic={"init": "policy"}, kl_estimator="exact").roles
    assert [role.passes for role in exact] == [2, 2, 1]


ADAPTER = 41_943_040
"""Weights of rank 16 on all linear layers of Llama 3 8B: 32 x 16 x (4 x 4096 + 2 x 5120 + 3 x 18432) by hand."""


def adapter_on(base, place, names=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
    place.mkdir(parents=True)
    facts = {"base_model_name_or_path": base, "r": 16, "target_modules": list(names)}
    (place / "adapter_config.json").write_text(json.dumps(facts))
    return str(place)


def test_a_reward_model_on_the_base_of_the_policy_is_an_adapter_there(tmp_path, llama):
    judge, lora = adapter_on(llama, tmp_path / "judge"), {"adapter": {"rank": 8}}
    rewards = {"rewards": [{"name": "model", "path": judge}]}
    policy, reference, critic, beside = online(llama, **lora, **rewards).roles  # the critic starts from the judge
    assert (beside.on_base, beside.adapter, beside.weight_bytes()) == (True, ADAPTER, 4 * ADAPTER)
    assert (critic.on_base, critic.adapter) == (True, ADAPTER // 2)
    assert (reference.on_base, reference.starts_policy) == (True, True)
    # A policy of all weights has no base to share: the judge's adapter is merged into its own.
    alone = online(llama, **rewards, critic={"init": "policy"}).roles[-1]
    assert (alone.on_base, alone.adapter, alone.weight_bytes()) == (False, 0, 4 * alone.shape.num_weights)
    assert policy.adapter == ADAPTER // 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(QWEN3_06B))
    elsewhere = online(str(tmp_path / "other"), **lora, **rewards, critic={"init": "policy"}).roles[-1]
    assert (elsewhere.on_base, elsewhere.adapter) == (False, 0)


def test_references_beside_an_adapter(tmp_path, llama):
    before = adapter_on(llama, tmp_path / "sft")
    lora = {"adapter": {"rank": 16}, "critic": {"init": "policy"}}
    for model, reference, found in (
        (llama, None, (True, 0, True)),  # the base
        (before, None, (True, ADAPTER, True)),  # a copy of the adapter, as it was
        (before, llama, (True, 0, False)),
        (llama, before, (True, ADAPTER, False)),
    ):
        role = online(model, reference=reference, **lora).roles[1]
        assert (role.on_base, role.adapter, role.starts_policy) == found, (model, reference)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(QWEN3_06B))
    role = online(llama, reference=str(tmp_path / "other"), **lora).roles[1]
    assert (role.on_base, role.starts_policy, role.shape.num_layers) == (False, False, 28)
    whole = online(before, critic={"init": "policy"}).roles[1]
    assert (whole.on_base, whole.adapter, whole.starts_policy) == (False, 0, True)


def test_a_teacher_is_counted_beside_its_student(llama):
    teacher = [{"name": "model", "path": llama, "length_correction": "lowess"}]
    adapted = {"adapter": {"rank": 16}}  # the student's base is no place for a teacher
    plan = planned(sft_of(llama, stage="reward", teacher=teacher) | adapted, on="h100")
    assert [role.name for role in plan.job.roles] == ["reward model", "teacher"]
    assert (plan.job.roles[1].controller_only, plan.job.roles[1].on_base) == (True, False)


def test_each_member_of_an_ensemble_is_counted(tmp_path, llama):
    settings = sft_of(llama, stage="reward", members=3)
    whole = planned(settings, on="h100")
    assert [role.name for role in whole.job.roles] == ["reward model", *(f"reward model, member {n}" for n in (1, 2))]
    one = planned(sft_of(llama, stage="reward"), on="h100")
    assert sum(whole.controller.held.values()) == 3 * sum(one.controller.held.values())
    assert whole.time.update == pytest.approx(3 * one.time.update)
    adapted = planned(settings | {"adapter": {"rank": 16}}, on="h100")
    weights = one.job.roles[0].shape.num_weights
    assert adapted.controller.held["reward model weights"] == 4 * (weights + ADAPTER)
    assert adapted.controller.held["reward model, member 2 weights"] == 4 * ADAPTER
    # The same models as rewards: of their own, on one base of their own, or on the policy's.
    judge = ModelOnPaper(shape=one.job.roles[0].shape, members=3)
    on_llama = replace(judge, base=llama, adapter=ADAPTER)
    options = {"rewards": [{"name": "model", "path": "judge"}], "critic": {"init": "policy"}}
    for model, lora, first, others in (
        (judge, None, weights, weights),
        (on_llama, None, weights + ADAPTER, ADAPTER),
        (on_llama, {"rank": 8}, ADAPTER, ADAPTER),
    ):
        roles = online(llama, {"judge": model}, adapter=lora, **options).roles[3:]
        assert [role.weight_bytes() for role in roles] == [4 * first, 4 * others, 4 * others]
        assert all(role.controller_only and role.passes == 1 for role in roles)


def test_an_ensemble_and_adapters_on_disk_are_read(tmp_path, llama):
    names = [f"model.layers.{n}.self_attn.{m}_proj" for n in (30, 31) for m in "qkvo"]
    judge = Path(adapter_on(llama, tmp_path / "judge", names))
    (judge / "ensemble.json").write_text(json.dumps({"members": [".", "members/1"]}))
    found = ModelsOnPaper(Path("runs/plan")).find(str(judge))
    # rank 16 on two blocks: q and o are 4096 x 4096, k and v 4096 x 1024
    assert (found.members, found.base, found.adapter) == (2, llama, 2 * 16 * (2 * 8192 + 2 * 5120))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "adapter_config.json cannot be read"),
        ("[]", "holds no object"),
        ("{}", "base_model_name_or_path is None"),
        ('{"base_model_name_or_path": 3}', "base_model_name_or_path is 3"),
        ('{"base_model_name_or_path": "nowhere/base"}', "downloads nothing"),
        ('{"base_model_name_or_path": "8b", "r": "16"}', "r is '16'"),
    ],
)
def test_a_broken_adapter_is_answered_in_a_sentence(tmp_path, llama, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(TrimtabError, match=re.escape(said)):
        planned(sft_of("adapter"), on="h100")


def test_a_reference_of_its_own_is_held_by_the_preference_stage(tmp_path, llama):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(QWEN3_06B))
    table = sft_of(llama, stage="preference", reference=str(tmp_path / "other"))
    policy, reference = planned(table, on="h100").job.roles
    assert (policy.passes, reference.passes, reference.shape.num_layers) == (0, 1, 28)
    assert len(planned(table | {"loss": "simpo"}, on="h100").job.roles) == 1
    assert len(planned(table | {"reference": llama}, on="h100").job.roles) == 1


def ppo_of(model, **more):
    rewards = {"rewards": [{"name": "exact_answer"}], "critic": {"init": "policy"}}
    return {"stage": "online", "model": model, "prompts": "nowhere.jsonl", **rewards, **more}


def test_processes_that_draw_are_those_of_the_settings(llama):
    here = planned(ppo_of(llama), on="h200")
    assert here.sampler is None
    apart = planned(ppo_of(llama, engine={"sampler": {"name": "process", "processes": 2, "device": "cuda"}}), on="h200")
    assert apart.job.sampling.processes == 2
    assert apart.sampler.held == {"sampler weights": 4 * here.job.roles[0].shape.num_weights}
    vllm = {"name": "vllm", "device": "cuda", "gpu_memory": 0.3}
    apart = planned(ppo_of(llama, engine={"sampler": vllm}), on="h200")
    assert apart.needed == apart.controller.total + 0.3 * apart.memory
    assert apart.left_out == ("how much faster vLLM draws than trimtab itself",)
    # Processors that are not planned for take nothing of this one.
    for device in ("cpu", "cuda:1"):
        other = planned(ppo_of(llama, engine={"sampler": vllm | {"device": device}}), on="h200")
        assert (other.sampler, other.time.sampling) == (None, 0.0)
        assert other.left_out == (f"drawing replies on engine.sampler.device = {device!r}",)


def test_what_a_plan_cannot_know_is_said(llama):
    ranked = planned(sft_of(llama, stage="reward", loss="plackett_luce"), on="h100")
    assert ranked.left_out == ("replies of a ranking beyond the first two",)
    assert planned(sft_of(llama, stage="reward"), on="h100").left_out == ()
    late = ppo_of(llama, engine={"max_staleness": 1}, correction={})
    assert planned(late, on="h100").left_out == ("the time that is won by engine.max_staleness",)


def test_lengths_beyond_the_run_file_are_refused(llama):
    for table, lengths, said in (
        (sft_of(llama), {"prompt_tokens": 4096}, "--prompt-tokens 4096 and --reply-tokens 1, and max_tokens = 4096"),
        (sft_of(llama), {"prompt_tokens": 96, "reply_tokens": 4001}, "raise max_tokens to 4097"),
        (sft_of(llama), {"reply_tokens": 4097}, "--reply-tokens 4097, and max_tokens = 4096"),
        (ppo_of(llama), {"prompt_tokens": 1025}, "--prompt-tokens 1025, and sampling.max_prompt_tokens = 1024"),
        (ppo_of(llama), {"reply_tokens": 65}, "--reply-tokens 65, and sampling.max_new_tokens = 64"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)) as refused:
            planned(table, on="h100", **lengths)
        assert "stages.one" in str(refused.value)


def test_tables_that_are_none_are_answered_in_a_sentence(tmp_path, llama):
    file = write_run_file(tmp_path / "p.toml", {"stages": {"a": sft_of(llama)}})
    cpu = tmp_path / "machine.json"
    write_machine(
        machine_of("cpu", "cpu", FOUND, "-"),
        cpu,
    )
    for words, said in (
        (["engine=3"], "stages.a.engine: should be a table, not 3"),
        (["stages.a.engine=3"], "stages.a.engine: should be a table, not 3"),
        (["engine.workers=abc"], "workers"),
        (["stages.a=3"], "stages.a.stage is None"),
        (["stages.a.stage=[1]"], "stages.a.stage is [1]"),
        (["stages.a.like=[1]"], "stages.a.like = [1] names no earlier stage"),
        (["stages=3"], "a pipeline without stages"),
        (["variables=3", "stages.a.data=$x"], "variables is 3"),
    ):
        for machine in ("h100", cpu):
            result = trimtab("plan", file, "--on", machine, *words)
            assert (result.exit_code, said in result.output) == (2, True), (words, machine, result.output)
    single = write_run_file(tmp_path / "sft.toml", {"model": llama, "data": "nowhere.jsonl"})
    for stage in ("3", "[1]"):
        result = trimtab("plan", single, "--on", "h100", f"stage={stage}")
        assert result.exit_code == 2, result.output


def test_lengths_are_those_that_are_given_or_the_limits(llama):
    limits = planned(sft_of(llama), on="h100").job
    assert (limits.prompt_tokens, limits.reply_tokens, limits.up_to) == (2048, 2048, True)
    given = planned(sft_of(llama), on="h100", prompt_tokens=0, reply_tokens=4096).job
    assert (given.prompt_tokens, given.reply_tokens, given.up_to) == (0, 4096, False)
    long = planned(sft_of(llama), on="h100", reply_tokens=3000).job
    assert (long.prompt_tokens, long.reply_tokens, long.up_to) == (1096, 3000, True)
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
