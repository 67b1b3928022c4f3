"""The guard of a preference run, through the command line: pairs that teach few letters, and a measure that likes many.

What the stages share is tested on online runs (`test_guard.py`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.stages.commands import rows, run_stage, summary, trimtab, without_times, write_run_file
from tests.stages.guarded import (
    CHECKS,
    KILLED_AT,
    Crash,
    actions,
    checks,
    damaging,
    decision,
    judge,
    same_weights,
    scripted,
)
from tests.stages.test_resume import differences
from trimtab.core import config
from trimtab.core.errors import ConfigError
from trimtab.math.losses.preference.pairs import DPO
from trimtab.runs.run import Run
from trimtab.stages import preference
from trimtab.stages.plan import cut_short, plan, show
from trimtab.stages.preference import PreferenceSettings

LADDER = ["roll_back", "stop"]


def hacked(base, pairs, *, guard, **changed):
    """Six steps that learn to write one of the answers, which are of few letters."""
    sampling = {"max_new_tokens": 8}
    guard = {"measure": [judge("digits")], "prompts": CHECKS, "every": 1, "patience": 1, "sampling": sampling} | guard
    return {
        "model": str(base),
        "data": str(pairs),
        "held_out": 0.3,
        "batch_size": 4,
        "num_epochs": 4,
        "max_steps": 6,
        "loss": {"name": "dpo", "nll_coef": 1.0},
        "optimizer": {"learning_rate": 3e-2},
        "checkpoint_every": 3,
        "guard": guard,
    } | changed


@pytest.fixture(scope="module")
def ladder(tmp_path_factory, base, pairs):
    """A run whose guard takes every action that there is here."""
    out = tmp_path_factory.mktemp("preference-guard") / "ladder"
    return run_stage("preference", out, **hacked(base, pairs, guard={"actions": LADDER}))


# --- a guard that takes no action ---


@pytest.mark.parametrize("changed", [{}, {"adapter": {"rank": 2}, "checkpoint_activations": True}, {"loss": "kto"}])
def test_a_guard_that_takes_no_action_leaves_every_bit_as_it_was(tmp_path, base, pairs, changed, monkeypatch):
    plain = DPO.__call__

    def noisy(self, outputs, batch):  # as a router or a dropout that is not switched off
        loss, found = plain(self, outputs, batch)
        return loss * (1 + torch.rand(())), found

    monkeypatch.setattr(DPO, "__call__", noisy)
    table = hacked(base, pairs, guard={"measure": [judge("noisy_flat")]}, validate_every=2, **changed)
    watched = run_stage("preference", tmp_path / "a" / "watched", **table)
    alone = run_stage("preference", tmp_path / "b" / "alone", **{k: table[k] for k in table.keys() - {"guard"}})
    assert checks(watched)[-1]["kl"] > 0.01, "the policy has to move, or nothing is shown"
    weights = "adapter_model.safetensors" if "adapter" in changed else "model.safetensors"
    assert (watched / "model" / weights).read_bytes() == (alone / "model" / weights).read_bytes()
    without_guard = [{k: v for k, v in row.items() if not k.startswith("guard/")} for row in rows(watched)]
    assert without_times(without_guard) == without_times(rows(alone))
    assert not any((alone / name).exists() for name in ("guard.jsonl", "decision.json"))
    assert [path.name for path in sorted((alone / "checkpoints").rglob("state.json"))] == []


def test_every_check_is_logged_with_its_signals_and_its_measure(ladder):
    first, *later = checks(ladder)
    assert first["step"] == 0
    assert first["kl"] == 0
    assert first["reward"] is None
    assert later[0]["level"] == pytest.approx(0.05 / 21)  # seven checks, 21 pairs
    logged = rows(ladder)[0]
    assert logged["guard/measure_low"] < logged["guard/measure"] < logged["guard/measure_high"]
    assert logged["guard/kl"] == pytest.approx(later[0]["kl"])
    assert "guard/reward" not in logged
    assert logged["time/guard_seconds"] > 0


@pytest.mark.parametrize("changed", [{"loss": "simpo"}, {"loss": "orpo"}, {"adapter": {"rank": 2}}])
def test_checks_compare_with_the_start_whatever_the_loss_needs(tmp_path, base, pairs, changed):
    table = hacked(base, pairs, guard={"every": 2}, max_steps=2, **changed)
    first, second = checks(run_stage("preference", tmp_path / "run", **table))
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert abs(second["kl"]) > 1e-4


def test_another_reference_is_the_one_of_the_checks(tmp_path, base, other, pairs):
    table = hacked(base, pairs, guard={}, max_steps=1, reference=str(other))
    assert checks(run_stage("preference", tmp_path / "run", **table))[0]["kl"] > 0.1


# --- actions ---


def test_each_action_is_taken_in_its_turn_and_the_last_one_ends_the_run(ladder):
    (first, rolled_back), (last, stopped) = actions(ladder)
    assert (rolled_back, stopped) == ("roll_back", "stop")
    assert rows(ladder)[0]["policy/margin"] == 0.0
    assert rows(ladder)[first - 1]["policy/margin"] != 0.0 or first == 1
    assert rows(ladder)[first]["policy/margin"] == 0.0  # the next step begins with the weights of step 0
    assert rows(ladder)[first]["optimizer/policy_updates"] == 1
    assert summary(ladder)["num_steps"] == last < 6
    assert summary(ladder)["num_planned_steps"] > 6
    assert "fell from" in summary(ladder)["guard"]["stopped"]


def test_a_run_that_is_stopped_has_validated_its_last_step(ladder):
    assert "loss/validation" in rows(ladder)[-1]
    assert summary(ladder)["num_held_out"] > 0
    assert summary(ladder)["accuracy"] == rows(ladder)[-1]["policy/validation_accuracy"]


def test_a_decision_says_what_it_rests_on(ladder):
    found = decision(ladder)
    last = summary(ladder)["num_steps"]
    assert found["chosen_step"] == 0
    assert found["model_is"] == f"the last step, {last}"
    assert found["chosen_against"]["last"]["gain_low"] > 0
    assert "best_reward" not in found["chosen_against"]
    assert (found["prompts"]["num"], found["prompts"]["source"]) == (16, CHECKS)
    assert found["prompts"]["num_trained_on"] == 0


def test_the_page_of_the_run_tells_actions_and_choice(ladder):
    page = (ladder / "report.html").read_text(encoding="utf-8")
    for said in (*LADDER, "2 actions.", "Chosen is step 0", "paired by prompt", "Measure of the guard"):
        assert said in page, said
    assert "not a finite number" not in page


def test_a_kl_budget_ends_the_run(tmp_path, base, pairs):
    out = run_stage("preference", tmp_path / "run", **hacked(base, pairs, guard={"kl_budget": 0.05}))
    ((step, event),) = actions(out)
    assert event == "stop"
    assert summary(out)["num_steps"] == step < 6
    assert checks(out)[-1]["kl"] > 0.05


def test_the_run_may_write_the_chosen_model_and_judges_that_one(tmp_path, base, pairs):
    measure = [scripted(tmp_path / "measure.py", [0.9, 0.5, 0.5])]
    guard = {"measure": measure, "writes": "best"}
    out = run_stage("preference", tmp_path / "run", **hacked(base, pairs, guard=guard, max_steps=2))
    assert decision(out)["chosen_step"] == 0
    assert same_weights(out / "model", base)
    assert rows(out)[-1]["policy/validation_margin"] != 0
    assert summary(out)["policy/validation_margin"] == 0
    assert summary(out)["accuracy"] == 0.5


def test_a_damaged_best_checkpoint_does_not_end_the_run(tmp_path, base, pairs, monkeypatch):
    damaging(monkeypatch, 0)
    measure = [scripted(tmp_path / "measure.py", [0.9, 0.8, 0.1, 0.1])]
    guard = {"measure": measure, "actions": ["roll_back"], "margin": 0.5}
    table = hacked(base, pairs, guard=guard, max_steps=3, checkpoint_every=1, keep_checkpoints=9)
    out = run_stage("preference", tmp_path / "run", **table)
    assert actions(out) == [(2, "damaged"), (2, "roll_back")]
    assert next(row for row in rows(out, "guard.jsonl") if row["event"] == "roll_back")["to_step"] == 1


# --- kills ---


def test_killed_at_every_action_the_run_takes_the_same_actions(tmp_path, base, pairs, ladder):
    table = hacked(base, pairs, guard={"actions": LADDER})
    run_file, out = write_run_file(tmp_path / "run.toml", table), tmp_path / "run"
    for event in LADDER:
        command = [sys.executable, "-c", KILLED_AT, event, "preference", str(run_file), "--out", str(out)]
        killed = subprocess.run(command, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    run_stage("preference", out, **table)
    assert not differences(ladder, out)
    assert rows(ladder, "guard.jsonl") == rows(out, "guard.jsonl")
    assert decision(ladder) == decision(out)


def test_a_run_that_ends_before_its_first_checkpoint_decides_again(tmp_path, base, pairs, ladder, monkeypatch):
    table, out = hacked(base, pairs, guard={"actions": LADDER}), tmp_path / "run"
    saved = Run.save_checkpoint

    def crashing(self, number, *args, **options):
        raise Crash

    monkeypatch.setattr(Run, "save_checkpoint", crashing)
    with pytest.raises(Crash):
        run_stage("preference", out, **table)
    monkeypatch.setattr(Run, "save_checkpoint", saved)
    run_stage("preference", out, **table)
    assert not differences(ladder, out)
    assert rows(ladder, "guard.jsonl") == rows(out, "guard.jsonl")


def test_a_stopped_run_stays_stopped_when_it_is_given_more_steps(tmp_path, base, pairs):
    table = hacked(base, pairs, guard={"kl_budget": 0.05})
    out = run_stage("preference", tmp_path / "run", **table)
    result = trimtab("preference", write_run_file(tmp_path / "more.toml", table | {"max_steps": 8}), "--out", out)
    assert "guard: the run stays stopped after step" in result.output
    assert summary(out)["num_steps"] == len(rows(out)) < 6


# --- other processes, other commands ---


def test_two_processes_check_as_one_does(tmp_path, base, pairs):
    table = hacked(base, pairs, guard={"every": 2}, max_steps=2)
    one = run_stage("preference", tmp_path / "one", **table)
    two = run_stage("preference", tmp_path / "two", **table, engine={"workers": 2, "shard": True})
    for mine, other in zip(checks(one), checks(two), strict=True):
        for name in ("measure", "measure_low", "kl"):
            assert mine[name] == pytest.approx(other[name], abs=1e-3), name


def test_choose_measures_as_the_guard_did(tmp_path, base, pairs):
    table = hacked(base, pairs, guard={}, max_steps=2, checkpoint_every=1, keep_checkpoints=9)
    out = run_stage("preference", tmp_path / "run", **table)
    result = trimtab("choose", out, "--out", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in found["checkpoints"]] == [0, 1, 2]
    for mine, other in zip(found["checkpoints"], checks(out), strict=True):
        for name in ("measure", "measure_low", "kl"):
            assert mine[name] == pytest.approx(other[name], abs=1e-4), name
    assert found["prompts"]["sha256"] == decision(out)["prompts"]["sha256"]


def test_a_rehearsal_checks_the_first_and_the_last_policy_and_takes_no_action():
    table = hacked(Path("model"), Path("pairs.jsonl"), guard={"num_prompts": 16, "actions": LADDER}, batch_size=8)
    settings = config.resolve(PreferenceSettings, table, where="here")
    short = config.resolve(PreferenceSettings, cut_short("preference", table, settings), where="here")
    assert short.max_steps == 4
    assert (short.guard.num_checks(4), short.guard.actions) == (2, ())
    assert short.guard.num_prompts == settings.guard.num_prompts == 16
    assert preference.STAGE.further_steps(settings, 8) == pytest.approx(8 / (3 * 4))  # the reference reads the data


def test_the_plan_holds_what_the_checks_of_a_guard_take(base, pairs):
    table = hacked(base, pairs, guard={"every": 2, "actions": LADDER}) | {"stage": "preference"}
    (watched,) = plan({"stages": {"dpo": table}}, where="here")
    (alone,) = plan({"stages": {"dpo": {k: v for k, v in table.items() if k != "guard"}}}, where="here")
    assert watched.num_steps == alone.num_steps == 6
    assert (watched.num_checks, alone.num_checks) == (4, 0)  # at 0, 2, 4 and 6
    assert watched.seconds_per_check > 0
    assert watched.peak_rss_gb > 0.9 * alone.peak_rss_gb
    said = StringIO()
    show([watched], Console(file=said, width=120))
    assert "the guard of dpo: 4 checks, " in said.getvalue()


def test_prompts_that_are_trained_on_are_counted_and_said(tmp_path, base, pairs):
    """The pairs are those of the first twenty prompts of the world, of which some are held out."""
    table = hacked(base, pairs, guard={"prompts": "world:arithmetic?num=20"}, max_steps=1)
    result = trimtab("preference", write_run_file(tmp_path / "run.toml", table), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    num = decision(tmp_path / "run")["prompts"]["num_trained_on"]
    assert num == summary(tmp_path / "run")["num_prompts"] < 20
    assert f"{num} of 20 prompts of the guard are trained on too" in result.output


# --- refusals ---


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"actions": ["raise_kl"]}, "'raise_kl' has nothing to raise here.*larger loss.beta from the start"),
        ({"kl_factor": 2.0}, "kl_factor"),
        ({"prompts": "pairs.jsonl"}, "guard.prompts and data are both"),
        ({"prompts": "./pairs.jsonl"}, "guard.prompts and data are both"),
        ({"sampling": {"temperature": 0.7}}, "at temperature 1; leave it out"),
        ({"measure": []}, "measure is empty"),
        ({"actions": ["stop"], "num_prompts": 7}, "at least 8"),
    ],
)
def test_settings_that_make_no_guard_are_refused(changed, said):
    table = hacked(Path("model"), Path("pairs.jsonl"), guard=changed)
    with pytest.raises(ConfigError, match=said):
        config.resolve(PreferenceSettings, table, where="here")


def test_a_guard_without_prompts_is_refused():
    table = hacked(Path("model"), Path("pairs.jsonl"), guard={})
    del table["guard"]["prompts"]
    with pytest.raises(ConfigError, match="prompts"):
        config.resolve(PreferenceSettings, table, where="here")


def refusal(tmp_path, table):
    result = trimtab("preference", write_run_file(tmp_path / "run.toml", table), "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    return result.output


def test_too_few_prompts_are_refused(tmp_path, base, pairs):
    table = hacked(base, pairs, guard={"prompts": "world:arithmetic?split=test&num=1"})
    assert "1 different prompts for the guard, which needs at least 2" in refusal(tmp_path, table)


def test_a_measure_that_judges_nothing_is_refused_before_the_first_step(tmp_path, base, pairs):
    said = refusal(tmp_path, hacked(base, pairs, guard={"measure": [judge("speechless")]}))
    assert "the measure judged the replies to 0 of 16 prompts" in said
