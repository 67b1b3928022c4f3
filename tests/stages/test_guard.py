"""The guard of an online run, through the command line: a reward that pays for length, and a measure that does not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.commands import online_settings, rows, run_stage, summary, trimtab, without_times, write_run_file
from tests.stages.test_resume import differences
from trimtab.core import config
from trimtab.core.errors import ConfigError
from trimtab.math.losses.policy import PPO
from trimtab.runs.run import Run
from trimtab.stages import online
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.plan import cut_short

FUNCTIONS = Path(__file__).with_name("reward_functions.py")
CHECKS = "world:arithmetic?split=test&num=16"
LADDER = ["raise_kl", "roll_back", "stop"]
TAKEN = [(1, "raise_kl"), (2, "roll_back"), (3, "stop")]


def judge(name):
    return {"name": "callable", "function": f"{FUNCTIONS}:{name}"}


def hacked(base, *, guard, **changed):
    """Eight steps that learn to write longer replies, with a guard that prefers brief ones."""
    guard = {"measure": [judge("brief")], "prompts": CHECKS, "every": 1, "patience": 1} | guard
    return (
        online_settings(base, base)
        | {
            "rewards": [judge("length")],
            "advantage": {"name": "rloo"},
            "loss": {"name": "reinforce"},
            "kl": {"name": "fixed", "coef": 0.0},
            "prompts_per_step": 8,
            "group_size": 4,
            "num_epochs": 1,
            "num_minibatches": 1,
            "num_steps": 8,
            "checkpoint_every": 3,
            "optimizer": {"learning_rate": 1e-2},
            "guard": guard,
        }
        | changed
    )


def scripted(path, values):
    """A measure that gives check i the mean `values[i]`, whatever the replies are; 16 replies are a check."""
    path.write_text(
        f"values, calls = {values}, []\n"
        "def judge(prompt, response, facts):\n"
        "    calls.append(1)\n"
        "    return values[(len(calls) - 1) // 16] + 0.01 * (facts['answer'] % 3)\n"
    )
    return {"name": "callable", "function": f"{path}:judge"}


def actions(out):
    return [(row["step"], row["event"]) for row in rows(out, "guard.jsonl") if row["event"] != "check"]


def checks(out):
    return [row for row in rows(out, "guard.jsonl") if row["event"] == "check"]


def weights(model):
    return load_file(model / "model.safetensors")


def same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    return all((ours[name] == theirs[name]).all() for name in ours)


def decision(out):
    return json.loads((out / "decision.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory, base):
    """A run whose guard takes every action that there is."""
    return run_stage("online", tmp_path_factory.mktemp("guard") / "ladder", **hacked(base, guard={"actions": LADDER}))


# --- a guard that takes no action ---


@pytest.mark.parametrize("lag", [0, 1])
def test_a_guard_that_takes_no_action_leaves_every_bit_as_it_was(tmp_path, base, other, lag, monkeypatch):
    plain = PPO.__call__

    def noisy(self, outputs, batch):  # as a router or a dropout that is not switched off
        loss, found = plain(self, outputs, batch)
        return loss * (1 + torch.rand(())), found

    monkeypatch.setattr(PPO, "__call__", noisy)
    table = hacked(base, guard={}, rewards=[judge("noisy")], loss={"name": "ppo"}, num_steps=4, reference=str(other))
    table |= {"shaping": {"normalize": True}, "engine": {"max_staleness": lag}} | ({"correction": {}} if lag else {})
    watched = run_stage("online", tmp_path / "watched", **table)
    alone = run_stage("online", tmp_path / "alone", **{key: table[key] for key in table.keys() - {"guard"}})
    assert checks(watched)[-1]["fired"], "the policy has to move, or nothing is shown"
    assert same_weights(watched / "model", alone / "model")
    assert rows(watched, "samples.jsonl") == rows(alone, "samples.jsonl")
    without_guard = [{k: v for k, v in row.items() if not k.startswith("guard/")} for row in rows(watched)]
    assert without_times(without_guard) == without_times(rows(alone))
    assert not any((alone / name).exists() for name in ("guard.jsonl", "decision.json"))


def test_every_check_is_logged_with_its_signals_and_its_measure(ladder):
    first, *later = checks(ladder)
    assert first["step"] == 0
    assert first["kl"] == 0
    assert {"words", "truncated"} <= set(later[0]["fired"])
    assert later[0]["p_value"] < later[0]["level"] == pytest.approx(0.05 / 36)  # nine checks, 36 pairs
    logged = rows(ladder)[0]
    assert logged["guard/measure_low"] < logged["guard/measure"] < logged["guard/measure_high"]
    assert logged["guard/kl"] == pytest.approx(later[0]["kl"])
    assert logged["guard/kl_slope"] == pytest.approx(logged["guard/kl"])
    assert logged["guard/unjudged"] == 0
    assert logged["time/guard_seconds"] > 0


# --- actions ---


def test_each_action_is_taken_in_its_turn_and_the_last_one_ends_the_run(ladder):
    assert actions(ladder) == TAKEN
    logged = rows(ladder)
    assert [row["kl/coef"] for row in logged] == [0, 0.02, 0.02]
    assert logged[1]["policy/kl"] > 0
    assert logged[2]["policy/kl"] == pytest.approx(0, abs=1e-5)  # step 3 begins with the weights of step 0
    assert summary(ladder)["num_steps"] == 3
    assert "fell from" in summary(ladder)["guard"]["stopped"]
    assert {path.name for path in (ladder / "checkpoints").iterdir()} >= {"step-00000000", "step-00000003"}


def test_a_decision_says_what_it_rests_on(ladder):
    found = decision(ladder)
    assert found["chosen_step"] == 0
    assert found["model_is"] == "the last step, 3"
    assert found["chosen_against"]["last"]["gain_low"] > 0
    assert found["chosen_against"]["best_reward"]["step"] == 3
    assert (found["prompts"]["num"], found["prompts"]["source"]) == (16, CHECKS)
    assert len(found["measure"]["sha256"]) == 64


def test_the_page_of_the_run_tells_actions_and_choice(ladder):
    page = (ladder / "report.html").read_text(encoding="utf-8")
    assert "4 checks, 3 actions." in page
    for said in (*LADDER, "Chosen is step 0", "paired by prompt", "4 measured checkpoints", "Measure of the guard"):
        assert said in page, said
    assert "not a finite number" not in page


def test_a_damaged_record_still_makes_a_page(tmp_path, ladder):
    shutil.copytree(ladder, out := tmp_path / "run")
    (out / "guard.jsonl").write_text('{"event": "<script>alert(1)</script>", "step": "x"}\n{"event"\n[]\n')
    (out / "decision.json").write_text('{"checkpoints": [1, {"measure": null}], "chosen_against": 3}')
    result = trimtab("report", out)
    assert result.exit_code == 0, result.output
    assert "<script>alert" not in (out / "report.html").read_text(encoding="utf-8")


def test_the_console_says_what_was_done(tmp_path, base):
    file = write_run_file(tmp_path / "run.toml", hacked(base, guard={"actions": ["stop"]}))
    result = trimtab("online", file, "--out", tmp_path / "run")
    assert "guard: step 1: stop: the measure fell from" in result.output


def test_a_raised_coefficient_is_lowered_again_at_a_new_best(tmp_path, base):
    measure = [scripted(tmp_path / "measure.py", [0.5, 0.1, 0.1, 0.9, 0.9])]
    guard = {"measure": measure, "actions": ["raise_kl"], "kl_factor": 3.0}
    table = hacked(base, guard=guard, kl={"name": "fixed", "coef": 0.1}, num_steps=4)
    out = run_stage("online", tmp_path / "run", **table)
    assert actions(out) == [(1, "raise_kl"), (3, "lower_kl")]
    assert [row["kl/coef"] for row in rows(out)] == pytest.approx([0.1, 0.3, 0.3, 0.1])
    assert decision(out)["chosen_step"] == 3


def test_the_guard_waits_after_an_action(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **hacked(base, guard={"actions": LADDER, "patience": 3}, num_steps=5))
    assert actions(out) == [(1, "raise_kl"), (4, "roll_back")]


def test_a_fall_within_the_margin_is_none(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **hacked(base, guard={"actions": LADDER, "margin": 2.0}, num_steps=2))
    assert actions(out) == []


def test_a_kl_budget_ends_the_run(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **hacked(base, guard={"kl_budget": 0.5}))
    ((step, event),) = actions(out)
    assert event == "stop"
    assert summary(out)["num_steps"] == step < 8
    assert checks(out)[-1]["kl"] > 0.5
    assert "kl_budget" in summary(out)["guard"]["stopped"]


def test_the_run_may_write_the_chosen_model(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **hacked(base, guard={"writes": "best"}, num_steps=2))
    assert decision(out)["chosen_step"] == 0
    assert decision(out)["model_is"] == "the chosen checkpoint"
    assert same_weights(out / "model", base)


def test_a_rollback_drops_what_was_drawn_ahead(tmp_path, base):
    lagging = {"loss": {"name": "ppo"}, "correction": {}, "engine": {"max_staleness": 1}, "num_steps": 4}
    out = run_stage("online", tmp_path / "run", **hacked(base, guard={"actions": ["roll_back"]}, **lagging))
    ((step, _),) = actions(out)
    after = rows(out)[step]
    assert after["rollout/staleness_max"] == 0
    assert after["policy/kl"] == pytest.approx(0, abs=1e-5)


# --- when the measure is asked ---


def test_between_its_turns_the_measure_is_asked_by_a_new_signal_alone(tmp_path, base):
    guard = {"every": 1, "measure_every": 4}
    out = run_stage("online", tmp_path / "run", **hacked(base, guard=guard, num_steps=5))
    asked = {row["step"]: row["asked_by"] for row in checks(out)[1:] if "measure" in row}
    assert {4, 5} <= asked.keys()
    assert asked[4] == asked[5] == []
    early = {step: names for step, names in asked.items() if step < 4}
    assert early
    assert all(early.values())
    assert len(asked) < 5, "a signal that goes on asks only once"


def test_without_prompts_of_its_own_the_guard_holds_some_out(tmp_path, base):
    table = hacked(base, guard={}, prompts="world:arithmetic?num=20", num_steps=4, prompts_per_step=4, group_size=2)
    del table["guard"]["prompts"]
    table["guard"]["num_prompts"] = 4
    out = run_stage("online", tmp_path / "run", **table)
    assert decision(out)["prompts"] | {"sha256": ""} == {
        "source": "held out of the run's own",
        "num": 4,
        "num_trained_on": 0,
        "replies_per_prompt": 1,
        "sha256": "",
    }
    assert len({row["prompt"] for row in rows(out, "samples.jsonl")}) == 16


def test_a_rehearsal_leaves_the_guard_out_and_the_plan_counts_its_work():
    table = hacked(Path("model"), guard={"every": 3, "num_prompts": 16})
    settings = config.resolve(OnlineSettings, table, where="here")
    assert config.resolve(OnlineSettings, cut_short("online", table, settings), where="here").guard is None
    # 8 steps have checks at 0, 3, 6 and 8; each draws 16 replies, and a step draws 8 * 4
    assert online.STAGE.further_steps(settings, 8) == 4 * 16 / 32


# --- kills ---

KILLED_AT = """
import os, signal, sys
from trimtab.cli import main
from trimtab.runs.run import Run
written = Run.add_rows
def add_rows(self, name, step, rows):
    written(self, name, step, rows)
    if any(row.get("event") == sys.argv[1] for row in rows):
        os.kill(os.getpid(), signal.SIGKILL)
Run.add_rows = add_rows
main(sys.argv[2:])
"""


def test_killed_at_every_action_the_run_takes_the_same_actions(tmp_path, base, ladder):
    table = hacked(base, guard={"actions": LADDER})
    run_file, out = write_run_file(tmp_path / "run.toml", table), tmp_path / "run"
    for event in LADDER:
        command = [sys.executable, "-c", KILLED_AT, event, "online", str(run_file), "--out", str(out)]
        killed = subprocess.run(command, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    run_stage("online", out, **table)
    assert not differences(ladder, out)
    assert rows(ladder, "guard.jsonl") == rows(out, "guard.jsonl")
    assert decision(ladder) == decision(out)


class Crash(BaseException):
    """The end of the process, but for what it has in memory."""


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_ends_before_a_checkpoint_of_the_guard_decides_again(tmp_path, base, ladder, step, monkeypatch):
    table, out = hacked(base, guard={"actions": LADDER}), tmp_path / "run"
    saved = Run.save_checkpoint

    def crashing(self, number, *args, **options):
        if number == step:
            raise Crash
        saved(self, number, *args, **options)

    monkeypatch.setattr(Run, "save_checkpoint", crashing)
    with pytest.raises(Crash):
        run_stage("online", out, **table)
    monkeypatch.setattr(Run, "save_checkpoint", saved)
    run_stage("online", out, **table)
    assert not differences(ladder, out)
    assert rows(ladder, "guard.jsonl") == rows(out, "guard.jsonl")


def test_a_stopped_run_stays_stopped_when_it_is_given_more_steps(tmp_path, base, ladder):
    shutil.copytree(ladder, out := tmp_path / "run")
    run_stage("online", out, **hacked(base, guard={"actions": LADDER}, num_steps=12))
    assert summary(out)["num_steps"] == 3
    assert rows(out, "guard.jsonl") == rows(ladder, "guard.jsonl")


def test_fresh_removes_the_record_and_the_decision(tmp_path, base, ladder):
    shutil.copytree(ladder, out := tmp_path / "run")
    table = hacked(base, guard={}, num_steps=1)
    del table["guard"]
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", out, "--fresh")
    assert result.exit_code == 0, result.output
    assert not any((out / name).exists() for name in ("guard.jsonl", "decision.json"))


# --- refusals ---


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


def test_too_few_prompts_to_hold_some_out_are_refused(tmp_path, base):
    table = hacked(base, guard={"num_prompts": 4})
    del table["guard"]["prompts"]
    assert "leave 4 to train on, and a step takes 8" in refusal(tmp_path, table)


def test_one_prompt_makes_no_guard(tmp_path, base):
    table = hacked(base, guard={"prompts": "world:arithmetic?split=test&num=1"})
    assert "1 prompts for the guard" in refusal(tmp_path, table)


def test_a_measure_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, base):
    said = refusal(tmp_path, hacked(base, guard={"measure": [{"name": "model", "path": str(tmp_path / "none")}]}))
    assert "guard.measure.0.path" in said


def test_a_chosen_checkpoint_that_was_removed_is_named(tmp_path, base, ladder):
    shutil.copytree(ladder, out := tmp_path / "run")
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000000")
    text = (out / "settings.toml").read_text(encoding="utf-8")
    (out / "settings.toml").write_text(text.replace('writes = "last"', 'writes = "best"'), encoding="utf-8")
    table = hacked(base, guard={"actions": LADDER, "writes": "best"})
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", out)
    assert result.exit_code == 2
    assert "the checkpoint of step 0 cannot be used: it is missing" in result.output
