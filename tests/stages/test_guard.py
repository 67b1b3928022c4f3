"""The guard of an online run, through the command line: a reward that pays for length, and a measure that does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.stages.commands import rows, run_stage, summary, trimtab, without_times, write_run_file
from tests.stages.guarded import CHECKS, LADDER, TAKEN, actions, checks, decision, hacked, judge, same_weights, scripted
from trimtab.core import config
from trimtab.evals.reply_signals import ReplySet
from trimtab.math.losses.policy import PPO
from trimtab.stages import online
from trimtab.stages.guard import watch
from trimtab.stages.guard.measuring import CheckReplies
from trimtab.stages.guard.state import GuardState
from trimtab.stages.guard.watch import RunGuard
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.plan import cut_short, estimate

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
    for said in (
        *LADDER,
        "Chosen is step 0",
        "paired by prompt",
        "These intervals count the choice",
        "4 measured checkpoints",
        "Measure of the guard",
    ):
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


def test_a_rehearsal_checks_the_first_and_the_last_policy_and_takes_no_action():
    table = hacked(Path("model"), guard={"every": 3, "num_prompts": 16, "actions": LADDER})
    settings = config.resolve(OnlineSettings, table, where="here")
    short = config.resolve(OnlineSettings, cut_short("online", table, settings), where="here")
    assert (short.num_steps, short.guard.num_checks(4), short.guard.actions) == (4, 2, ())
    assert online.STAGE.further_steps(settings, 8) == 0


def test_the_plan_counts_the_checks_of_a_guard_by_the_time_of_one(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 10.0}))
    steps = [{"step": i + 1, "time/step_seconds": 1.0 + 2.0 * (i == 3), "time/guard_seconds": 2.0 * (i == 3)}
             for i in range(4)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    settings = config.resolve(OnlineSettings, hacked(Path("model"), guard={"every": 3, "num_prompts": 16}), where="")
    found = estimate("ppo", "online", settings, tmp_path, share_of_data=1.0)
    # 8 steps of a second, checks of 2 s at 0, 3, 6 and 8; of the 10 s 4 were steps and 2 the last check
    assert (found.num_checks, found.seconds_per_check, found.seconds_per_step) == (4, 2.0, 1.0)
    assert found.seconds == 10 - 6 + 8 * 1.0 + 3 * 2.0


# --- what is said ---


def test_a_prompt_that_is_given_twice_is_asked_once(tmp_path, base):
    lines = [json.dumps({"prompt": f"What is {i % 10} + 2?"}) + "\n" for i in range(30)]
    (tmp_path / "twice.jsonl").write_text("".join(lines))
    table = hacked(base, guard={"prompts": str(tmp_path / "twice.jsonl")}, rewards=[{"name": "exact_answer"}])
    table |= {"num_steps": 1, "on_failed_reward": "drop"}
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "20 of 30 prompts repeat another" in result.output
    assert "10 of 10 prompts have no fact 'answer' that rewards.0 compares with" in result.output
    assert decision(tmp_path / "run")["prompts"]["num"] == 10


def test_a_measure_that_fails_later_is_said_and_ends_a_run_with_actions(tmp_path, base):
    code = (
        "calls = []\n"
        "def judge(prompt, response, facts):\n"
        "    calls.append(1)\n"
        "    assert len(calls) <= 18\n"  # 16 of the first check, and 2 of 16 of the second
        "    return 0.5\n"
    )
    for number, (ladder, expected) in enumerate([([], []), (["roll_back"], [(1, "stop")])]):
        (measure := tmp_path / f"measure_{number}.py").write_text(code)
        guard = {"measure": [{"name": "callable", "function": f"{measure}:judge"}], "actions": ladder}
        table, out = hacked(base, guard=guard, num_steps=2), tmp_path / f"run-{number}"
        result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", out)
        assert result.exit_code == 0, result.output
        assert "guard: step 1: the measure judged 2 of 16 prompts" in result.output
        assert actions(out) == expected


def test_more_steps_spend_what_is_left_of_alpha(tmp_path, base):
    out = tmp_path / "run"
    run_stage("online", out, **hacked(base, guard={}, num_steps=3))
    run_stage("online", out, **hacked(base, guard={}, num_steps=6))
    levels = [row["level"] for row in checks(out)[1:]]
    # four checks have 6 pairs; the third had no decision to spend its own 3 on, so 3/6 of alpha is left for 4, 5 and 6,
    # which come after four checks: 4 + 5 + 6 pairs
    assert levels == pytest.approx([0.05 / 6] * 3 + [0.05 / 2 / 15] * 3)
    assert sum(level * num for num, level in enumerate(levels, 1) if num != 3) <= 0.05 * (1 + 1e-9)


def test_a_measure_that_draws_noise_is_asked_by_the_seed(tmp_path, base):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run_stage("online", tmp_path / str(seed), **hacked(base, guard={"measure": [judge("noisy_flat")]}, num_steps=1))
        found.append([row["measure"] for row in checks(tmp_path / str(seed))])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_prompt_counts_with_the_mean_of_its_replies():
    class Given:
        def score(self, rollouts):
            return torch.tensor([0.0, 1.0, 0.5, torch.nan]), {}

    replies = CheckReplies([None] * 4, 2, torch.zeros(4), torch.zeros(4))
    assert replies.measured(3, Given()).values == (0.5, 0.5)
    first_alone = CheckReplies([None] * 4, 1, torch.zeros(4), torch.zeros(4))
    assert first_alone.measured(3, Given()).values[:3] == (0.0, 1.0, 0.5)


def test_a_kl_that_rises_faster_than_before_fires():
    class Texts:
        texts = None
        truncated_fraction = 0.0
        rewards = torch.zeros(1)

        def __init__(self, kl):
            self.kl = torch.tensor([kl])

    def fires(before, kl, step=20):
        guard = object.__new__(RunGuard)
        guard.state = SimpleNamespace(guard=GuardState(start=ReplySet(prompts=(), replies=(), rewards=()), kl=before))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watch, "measure_signals", lambda texts, start: ({}, []))
            found, fired = guard._signals(step, Texts(kl))
        return found["kl_slope"], "kl_slope" in fired

    # 1 nat in ten steps, then 2.5 more in the next ten: 0.25 a step against 0.1 so far
    assert fires((10, 1.0), 3.5) == (pytest.approx(0.25), True)
    assert fires((10, 1.0), 2.9) == (pytest.approx(0.19), False)
    assert fires((10, 0.1), 0.9) == (pytest.approx(0.08), False), "below a nat"
    assert fires((0, 0.0), 9.0) == (pytest.approx(0.45), False), "the first check has no rise before it"
