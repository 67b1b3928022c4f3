"""`trimtab doctor` on real runs of tiny models: a failure that a setting made is found and mended."""

from __future__ import annotations

import json

import pytest

from tests.stages.commands import FAST, online_settings, run_stage, trimtab
from trimtab.reports.collect import collect
from trimtab.reports.diagnosis.learning_rate import usual_rates

GRPO = {"advantage": "grpo", "group_size": 2, "num_epochs": 1, "num_minibatches": 1, "num_steps": 12, "critic": {}}


def diagnosis(run, out):
    trimtab("doctor", run, "--json", out)
    return json.loads(out.read_text())["runs"][0]


def found_in(run, out):
    return [one["rule"] for one in diagnosis(run, out)["failures"]]


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("truncated_replies", {"sampling": {"max_new_tokens": 2}}),
        ("policy_stays", {"optimizer": {"learning_rate": 1e-12}}),
    ],
)
def test_a_failure_of_online_training_is_found(tmp_path, base, reward_run, rule, changed):
    settings = online_settings(base, reward_run / "model", **GRPO) | changed
    run = run_stage("online", tmp_path / "run", **settings)
    assert rule in found_in(run, tmp_path / "found.json")


def test_replies_from_a_truncated_distribution_are_mended(tmp_path, base, reward_run):
    wrong = {"sampling": {"max_new_tokens": 8, "top_p": 0.5}}
    run = run_stage("online", tmp_path / "run", **online_settings(base, reward_run / "model", **GRPO) | wrong)
    assert "sampler_mismatch" in found_in(run, tmp_path / "found.json")
    new = tmp_path / "mended.toml"
    assert trimtab("doctor", run, "--apply", new).exit_code == 1
    again = tmp_path / "again"
    assert trimtab("online", new, "--out", again).exit_code == 0
    assert "sampler_mismatch" not in found_in(again, tmp_path / "found.json")


def test_a_learning_rate_that_teaches_nothing_is_found_in_sft(tmp_path, base):
    wrong = {"optimizer": {"learning_rate": 1e-12}, "batch_size": 4, "held_out": 0.1}
    run = run_stage("sft", tmp_path / "run", model=str(base), data="world:arithmetic?num=60", **wrong)
    found = diagnosis(run, tmp_path / "found.json")
    assert [one["rule"] for one in found["failures"]] == ["nothing_learned"]
    (change,) = found["changes"]
    assert (change["key"], change["old"]) == ("optimizer.learning_rate", 1e-12)
    usual = usual_rates(collect(run))
    assert usual.low < change["new"] < usual.high
    new, again = tmp_path / "mended.toml", tmp_path / "again"
    assert trimtab("doctor", run, "--apply", new).exit_code == 1
    assert trimtab("sft", new, "--out", again).exit_code == 0
    assert found_in(again, tmp_path / "found.json") == []


def test_a_healthy_sft_run_gets_a_clean_bill(tmp_path, base):
    good = {"optimizer": FAST, "batch_size": 4, "held_out": 0.1}
    run = run_stage("sft", tmp_path / "run", model=str(base), data="world:arithmetic?num=60", **good)
    found = diagnosis(run, tmp_path / "found.json")
    assert found["failures"] == []
    assert found["clean"] == ["loss_spikes", "nothing_learned", "overfitting"]


def test_a_reward_model_of_two_steps_says_that_it_is_too_short(tmp_path, reward_run):
    found = diagnosis(reward_run, tmp_path / "found.json")
    assert "2 values, and 10 are needed" in found["not_looked"]["nothing_learned"]
