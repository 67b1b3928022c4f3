"""What a run is said to take, against what it took."""

from io import StringIO

import pytest
from rich.console import Console

from tests.stages.commands import FAST, SHORT, online_settings, summary, trimtab, write_run_file
from tests.stages.test_pipeline import PIPELINE, STAGES
from trimtab.core import config
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.plan import StagePlan, cut_short, duration, plan, show, weights
from trimtab.stages.stage import FEW_PROMPTS, FEW_STEPS

COMPARED = PIPELINE | {
    "stages": {
        "base": STAGES["base"] | {"num_documents": 24},
        "compare": {
            "stage": "compare",
            "model": "@base",
            "world": "arithmetic",
            "num_prompts": 2 * FEW_PROMPTS,
            "num_held_out_prompts": 8,
            "sampling": SHORT,
        },
        "reward": {
            "stage": "reward",
            "model": "@base",
            "data": "@compare/train.jsonl",
            "held_out_data": "@compare/held_out.jsonl",
            "batch_size": 16,
            "optimizer": FAST,
        },
    }
}


def test_the_plan_of_a_pipeline_is_what_it_takes(tmp_path):
    found = {p.name: p for p in plan(COMPARED, where="the test")}
    file = write_run_file(tmp_path / "pipeline.toml", COMPARED)
    assert trimtab("run", file, "--out", tmp_path / "out").exit_code == 0
    assert list(found) == ["base", "compare", "reward"]
    for name in ("base", "reward"):
        # A pair with a blank reply is dropped, so the share of the pairs that are used is only nearly the same.
        assert found[name].num_steps == pytest.approx(summary(tmp_path / "out" / name)["num_steps"], abs=2)
        assert found[name].weights_gb
    assert found["compare"].num_steps is None
    assert 0.2 < found["reward"].peak_rss_gb < 2


def test_plan_prints_a_table_and_leaves_nothing_behind(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    settings = {"model": str(base), "data": "world:arithmetic?num=40", "batch_size": 4, "optimizer": FAST}
    file = write_run_file(tmp_path / "sft.toml", settings)
    result = trimtab("plan", file, "--stage", "sft")
    assert result.exit_code == 0, result.output
    assert "sft" in result.output
    assert "in all" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["sft.toml"]


def test_plan_says_what_it_needs(tmp_path, base):
    file = write_run_file(tmp_path / "sft.toml", {"model": str(base), "data": "world:arithmetic?num=40"})
    result = trimtab("plan", file)
    assert result.exit_code == 2
    assert "--stage sft or --stage reward or --stage preference" in result.output
    nothing = trimtab("plan", file, "batch_sise=3")
    assert "those of no stage" in nothing.output
    missing = trimtab("plan", file, "--stage", "sft", "data=nowhere.jsonl")
    assert missing.exit_code == 2
    assert "there is no file 'nowhere.jsonl'" in missing.output
    wrong = trimtab("plan", file, "--stage", "sft", "batch_sise=3")
    assert "batch_size" in wrong.output
    pipeline = trimtab("plan", write_run_file(tmp_path / "pipeline.toml", COMPARED), "--stage", "reward")
    assert "--stage reward for a pipeline" in pipeline.output


def test_the_stage_of_a_file_is_known_by_its_keys(tmp_path, base, reward_run):
    file = write_run_file(tmp_path / "online.toml", online_settings(base, reward_run / "model", model="nowhere"))
    result = trimtab("plan", file)
    assert "stages.online.model" in result.output


@pytest.mark.parametrize("max_steps", [1, 5])
def test_a_run_that_is_to_stop_early_is_planned_so(base, max_steps):
    stages = {
        "sft": {
            "stage": "sft",
            "model": str(base),
            "data": "world:arithmetic?num=40",
            "batch_size": 4,
            "max_steps": max_steps,
        }
    }
    (found,) = plan({"stages": stages}, where="the test")
    assert found.num_steps == max_steps


def test_a_rehearsal_is_no_longer_than_the_run():
    assert cut_short("sft", {"max_steps": 2}, None) == {"max_steps": 2}
    assert cut_short("online", {"num_steps": 1}, None)["num_steps"] == 1


def test_a_rehearsal_is_short_and_trains_the_policy():
    short = cut_short("online", {"num_steps": 100, "critic": {"warmup_steps": 5, "init": "policy"}}, None)
    assert short == {"num_steps": FEW_STEPS, "critic": {"warmup_steps": 0, "init": "policy"}}


@pytest.mark.parametrize(("seconds", "said"), [(5, "5 s"), (89.6, "90 s"), (300, "5 min"), (3 * 3600, "3.0 h")])
def test_durations_read_as_people_say_them(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("advantage", "held"), [("gae", True), ("grpo", False)])
def test_a_critic_is_counted_if_it_is_loaded(tmp_path, base, advantage, held):
    values = {"model": str(base), "prompts": "world:arithmetic?num=8", "advantage": advantage, "group_size": 2}
    values |= {"rewards": [{"name": "exact_answer"}], "critic": {"init": "policy"}}
    settings = config.resolve(OnlineSettings, values, where="the test")
    assert ("critic" in weights("online", settings, tmp_path)) == held


def test_the_measure_of_a_guard_is_counted(tmp_path, base):
    values = {"model": str(base), "prompts": "world:arithmetic?num=8", "critic": {"init": "policy"}}
    values |= {"rewards": [{"name": "exact_answer"}], "guard": {"measure": [{"name": "model", "path": str(base)}]}}
    settings = config.resolve(OnlineSettings, values, where="the test")
    held = weights("online", settings, tmp_path)
    assert held["reward 1"] == held["reference"] > 0


def test_the_memory_of_each_process_is_shown():
    found = StagePlan(
        name="sft",
        stage="sft",
        num_steps=10,
        seconds_per_step=1.0,
        seconds=12.0,
        peak_rss_gb=1.2,
        peak_rss_gb_each=[0.5, 0.4, 0.3],
        tokens_per_second=None,
        laps={},
        weights_gb={},
    )
    said = StringIO()
    show([found], Console(file=said, width=120))
    assert "memory of sft: controller 0.50 GB, workers 0.40, 0.30 GB" in said.getvalue()
    assert "at most 1.20 GB" in said.getvalue()


@pytest.mark.slow
def test_a_plan_of_several_processes_rehearses_several(base):
    table = {"stage": "sft", "model": str(base), "data": "world:arithmetic?num=80", "batch_size": 4, "max_steps": 6}
    (found,) = plan({"stages": {"sft": table}, "engine": {"workers": 2, "shard": True}}, where="the test")
    assert len(found.peak_rss_gb_each) == 2
    assert all(0.2 < gb < 2 for gb in found.peak_rss_gb_each)
    assert found.peak_rss_gb == pytest.approx(sum(found.peak_rss_gb_each))
