"""What makes no guard of an online run: settings, prompts, and a measure that training moves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.stages.commands import trimtab, write_run_file
from tests.stages.guarded import hacked, judge
from trimtab.core import config
from trimtab.core.errors import ConfigError
from trimtab.stages.online.settings import OnlineSettings


def refusal(tmp_path, table):
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    return result.output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"measure": []}, "measure is empty"),
        ({"num_prompts": 1}, "at least 2"),
        ({"alpha": 1.0}, "above 0 and below 1"),
        ({"kl_factor": 1.0}, "above 1"),
        ({"actions": ["stop", "roll_back"]}, "nothing comes after 'stop'"),
        ({"actions": ["pray"]}, "pray"),
        ({"prompts": "world:arithmetic?num=8"}, "guard.prompts and prompts are both"),
    ],
)
def test_settings_that_make_no_guard_are_refused(changed, said):
    table = hacked(Path("model"), guard=changed)
    with pytest.raises(ConfigError, match=said):
        config.resolve(OnlineSettings, table, where="here")


def test_an_adaptive_coefficient_is_not_raised(tmp_path):
    table = hacked(Path("model"), guard={"actions": ["raise_kl"]}, kl={"name": "adaptive"})
    with pytest.raises(ConfigError, match=r"AdaptiveKL.*kl.name = 'fixed'"):
        config.resolve(OnlineSettings, table, where="here")


def test_the_reward_model_that_is_trained_on_measures_nothing():
    model = {"name": "model", "path": "reward/model"}
    table = hacked(Path("model"), guard={"measure": [model]}, rewards=[model | {"weight": 2.0}])
    with pytest.raises(ConfigError, match="shows no fall of its"):
        config.resolve(OnlineSettings, table, where="here")


def test_a_measure_that_judges_nothing_is_refused_before_the_first_step(tmp_path, base):
    said = refusal(tmp_path, hacked(base, guard={"measure": [judge("speechless")]}))
    assert "the measure judged the replies to 0 of 16 prompts" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_actions_that_no_check_can_take_are_noted(tmp_path, base):
    table = hacked(base, guard={"every": 2, "actions": ["stop"]}, num_steps=2)
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "there is no check before the last step" in result.output


def test_too_few_prompts_to_hold_some_out_are_refused(tmp_path, base):
    table = hacked(base, guard={"num_prompts": 4})
    del table["guard"]["prompts"]
    assert "leave 4 to train on, and a step takes 8" in refusal(tmp_path, table)


def test_one_prompt_makes_no_guard(tmp_path, base):
    table = hacked(base, guard={"prompts": "world:arithmetic?split=test&num=1"})
    assert "1 different prompts for the guard" in refusal(tmp_path, table)


def test_a_measure_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, base):
    said = refusal(tmp_path, hacked(base, guard={"measure": [{"name": "model", "path": str(tmp_path / "none")}]}))
    assert "guard.measure.0.path" in said


# --- what the measure may be ---


def refused(table, said):
    with pytest.raises(ConfigError, match=said):
        config.resolve(OnlineSettings, table, where="here")


@pytest.mark.parametrize("way", ["{}/", "./{}", "{}/../{}", "absolute", "link", "copy"])
def test_the_trained_reward_model_is_known_by_any_path(tmp_path, base, way, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "judge")
    Path("link").symlink_to("judge")
    shutil.copytree("judge", "copy")
    path = {"absolute": str(tmp_path / "judge")}.get(way, way.format("judge", "judge"))
    trained = {"name": "model", "path": "judge", "weight": 2.0}
    refused(
        hacked(base, guard={"measure": [{"name": "model", "path": path}]}, rewards=[trained]), "shows no fall of its"
    )


def test_a_trained_function_or_cost_measures_nothing(base):
    same = judge("length") | {"weight": 3.0}
    refused(hacked(base, guard={"measure": [judge("brief"), same]}), r"measure.1.*rewards.0")
    cost = {"reward": judge("flat"), "limit": 0.5}
    refused(hacked(base, guard={"measure": [judge("flat")]}, cost=cost), r"measure.0.*cost.reward")
    refused(hacked(base, guard={"measure": [judge("brief") | {"weight": 0.0}]}), "weight = 0 and decides nothing")


def test_the_same_prompts_are_known_by_another_path(tmp_path, base):
    (tmp_path / "prompts.jsonl").write_text("")
    one, other = str(tmp_path / "prompts.jsonl"), f"{tmp_path}/./prompts.jsonl"
    refused(hacked(base, guard={"prompts": other}, prompts=one), "guard.prompts and prompts are both")


def test_actions_need_enough_prompts(tmp_path, base):
    refused(hacked(base, guard={"actions": ["stop"], "num_prompts": 7}), "at least 8")
    few = hacked(base, guard={"actions": ["stop"], "prompts": "world:arithmetic?split=test&num=7"})
    assert "7 different prompts for the guard, which needs at least 8" in refusal(tmp_path, few)


def test_a_coefficient_that_nothing_pays_is_not_raised(base):
    rewards, advantage = [judge("length"), judge("noisy")], {"name": "grpo", "per_reward": True}
    table = hacked(base, guard={"actions": ["raise_kl"]}, rewards=rewards, advantage=advantage)
    refused(table, "no KL is paid that could be raised")
    config.resolve(OnlineSettings, table | {"kl_in": "loss"}, where="here")
