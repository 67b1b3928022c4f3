"""The doctor as a user meets it: any directory, the command, its files, and the page."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.reports.fabricate import online_metrics, reward_metrics, rollout_samples, supervised_metrics, write_run
from tests.reports.healthy_runs import online, online_columns, online_samples, record, supervised
from tests.stages.commands import trimtab
from trimtab.core import config
from trimtab.core.errors import ConfigError
from trimtab.reports.collect import PipelineRecord, Series, collect
from trimtab.reports.diagnosis import diagnose, diagnose_run
from trimtab.reports.diagnosis.kl_coefficient import kl_change, kl_coef_at
from trimtab.reports.diagnosis.remedy import as_override, mended
from trimtab.reports.diagnosis.rule import RULES, SettingChange
from trimtab.reports.diagnosis.text import lines_of
from trimtab.reports.diagnosis.text_rules import PhraseCount
from trimtab.reports.diagnosis.trends import spikes, trend
from trimtab.reports.run_page import write_report
from trimtab.stages import preflight

GOLD = [{"name": "gold", "world": "helpdesk"}]
SETTINGS = """
model = "sft"
prompts = "world:helpdesk?num=100"
[[rewards]]
name = "gold"
world = "helpdesk"
[kl]
name = "fixed"
coef = 0.0
"""


@pytest.fixture
def hacked(tmp_path):
    """A run without a leash, on disk."""
    metrics = online_metrics(40, leash=False)
    return write_run(
        tmp_path / "ppo", stage="online", metrics=metrics, samples=rollout_samples(40), summary={}, settings=SETTINGS
    )


# --- what a series did ---


def test_a_trend_is_that_of_medians():
    # windows of a fifth: two of ten values, but three at least
    found = trend(Series(np.arange(1.0, 11), np.array([1.0, 50.0, 2.0, 3, 3, 3, 3, 8.0, 9.0, -70.0])))
    assert (found.start, found.end) == (2.0, 8.0)
    assert (found.first_steps, found.last_steps) == ((1, 3), (8, 10))


def test_a_trend_leaves_out_what_is_no_number():
    values = np.array([np.nan, 1.0, 1.0, 1.0, np.nan, 2.0, 2.0, 2.0])
    found = trend(Series(np.arange(8.0), values))
    assert (found.start, found.end) == (1.0, 2.0)


def test_spikes_are_single_values_above_their_neighbours():
    rng = np.random.default_rng(0)
    values = 1 + 0.05 * rng.normal(size=100)
    values[[40, 70]] = 4.0
    assert spikes(Series(np.arange(100.0), values), least=0.5).steps.tolist() == [40, 70]
    assert spikes(Series(np.arange(100.0), np.linspace(9, 1, 100) ** 2), least=0.5).steps.tolist() == []


def test_phrases_must_grow_beyond_chance():
    def grew(before, after):
        return PhraseCount(before=before, num_before=16, after=after, num_after=16, sample=None).grew

    assert grew(0, 8)
    assert not grew(0, 3)  # p = 0.11
    assert not PhraseCount(before=40, num_before=100, after=70, num_after=100, sample=None).grew  # p < 1e-4, not twice
    assert PhraseCount(before=30, num_before=100, after=70, num_after=100, sample=None).grew
    assert not PhraseCount(before=0, num_before=4, after=4, num_after=4, sample=None).grew


def test_a_coefficient_that_is_to_hold_the_kl_is_at_least_doubled():
    run = record("online", {}, settings={"kl": {"name": "fixed", "coef": 0.2}})
    assert [change.new for change in kl_change(run, 0.01, target=6.0)] == [0.4]
    assert [change.new for change in kl_change(run, 0.01)] == [0.01]


def test_the_kl_coefficient_is_the_slope_of_the_reward():
    # reward = 2 sqrt(KL), whose slope at 4 nats is 1 / sqrt(4)
    kl = np.linspace(0, 16, 101)
    run = record("online", {"policy/kl": kl, "reward/mean": 2 * np.sqrt(kl)})
    start = float(np.median(2 * np.sqrt(kl[:3])))
    assert kl_coef_at(run, 4.0) == pytest.approx((4 - start) / 8, rel=0.02)
    assert np.isnan(kl_coef_at(record("online", {"policy/kl": kl, "reward/mean": -kl}), 4.0))


def test_a_kl_in_the_loss_is_charged_against_divided_rewards():
    kl = np.linspace(0, 16, 101)
    columns = {"policy/kl": kl, "reward/mean": 2 * np.sqrt(kl), "reward/std": np.full(101, 4.0)}
    group = {"advantage": {"name": "grpo", "scale": "group"}}
    in_reward = kl_coef_at(record("online", columns, settings=group | {"kl_in": "reward"}), 4.0)
    assert kl_coef_at(record("online", columns, settings=group | {"kl_in": "loss"}), 4.0) == pytest.approx(
        in_reward / 4
    )
    normalized = {"shaping": {"normalize": True}}
    assert kl_coef_at(record("online", columns, settings=normalized), 4.0) == pytest.approx(in_reward / 4)


def test_a_controller_that_adapts_gets_the_target():
    adaptive = online(hacked_columns(), kl={"name": "adaptive", "coef": 0.1, "target": 50.0, "horizon": 10000.0})
    found = next(failure for rule, failure in diagnose_run(adaptive).found if rule.name == "reward_hacking")
    changes = {change.key: change.new for change in found.changes}
    assert 3 < changes["kl.target"] < 15
    assert changes["kl.horizon"] == 1000.0


def hacked_columns():
    """Gold peaks at step 12 of 40, at 7.7 nats."""
    gold = np.concatenate([np.linspace(0.5, 0.7, 12), np.linspace(0.7, 0.2, 28)])
    return {"reward/mean": np.linspace(0, 1.5, 40), "gold/mean": gold, "policy/kl": np.linspace(0, 25, 40)}


# --- remedies ---


def resolved(stage, values):
    return config.resolve(preflight.describe(stage).settings, values, where="a test")


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "evaluate" not in rule.stages])
def test_every_remedy_is_a_valid_run_file(name):
    from tests.reports.test_diagnosis_rules import ILL

    needs = {
        "online": {"model": "m", "prompts": "p", "rewards": GOLD},
        **{stage: {"model": "m", "data": "d"} for stage in ("sft", "reward", "preference")},
    }
    for run in ILL[name]:
        defaults = config.dump(resolved(run.stage, needs[run.stage]))
        complete = replace(run, settings=_merged(defaults, dict(run.settings)))
        failure = next(failure for rule, failure in diagnose_run(complete).found if rule.name == name)
        values = mended(complete, failure.changes, where="a test")
        assert values.pop("stage") == run.stage
        assert resolved(run.stage, values) != resolved(run.stage, complete.settings) or not failure.changes


def _merged(below, above):
    """The tables of `above` on those of `below`, as far as the stage has their keys."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            merged[key] = _merged(known, value)
        elif key in merged and key != "name":
            merged[key] = value
    merged.pop("rewards", None)
    lag = merged.get("engine", {}).get("max_staleness", 0)
    return merged | ({"rewards": GOLD} if "rewards" in below else {}) | ({"correction": {}} if lag else {})


LONGER = {"rollout/length_mean": np.linspace(30, 90, 40), "gold/mean": None}


def test_a_reward_is_added_to_those_that_a_pipeline_refers_to():
    run = replace(online(LONGER), name="v1.0")
    table = {"stage": "online", "rewards": [{"name": "model", "path": "@reward/model"}]}
    pipeline = PipelineRecord(name="p", runs=(run,), settings={"stages": {"v1.0": table}})
    (found,) = diagnose(pipeline)
    rewards = mended(pipeline, found.changes, where="a test")["stages"]["v1.0"]["rewards"]
    assert rewards[0] == {"name": "model", "path": "@reward/model"}
    assert [one["name"] for one in rewards] == ["model", "length"]
    assert len(table["rewards"]) == 1, "the record stays as it is"


def test_a_change_that_does_not_fit_the_settings_is_refused():
    run = replace(online(), settings={"kl": 3})
    with pytest.raises(ConfigError, match="kl is the value 3, not a table"):
        mended(run, [SettingChange(("kl", "coef"), None, 0.1)], where="a test")


def test_an_override_is_what_the_command_line_reads():
    change = SettingChange(("rewards", "1"), None, {"name": "length", "max_tokens": 3})
    values = config.apply_overrides({"rewards": GOLD}, [as_override(change.below(()))])
    assert values == {"rewards": [*GOLD, change.new]}
    quoted = change.below(("stages", "v1.0"))
    assert as_override(quoted).startswith('stages."v1.0".rewards.1=')
    values = config.apply_overrides({"stages": {"v1.0": {"rewards": GOLD}}}, [as_override(quoted)])
    assert values == {"stages": {"v1.0": {"rewards": [*GOLD, change.new]}}}


def test_a_failure_that_another_explains_waits(hacked):
    (found,) = diagnose(collect(hacked))
    names = [rule.name for rule, _ in found.found]
    assert "reward_hacking" in names
    assert "length_growth" in names
    assert found.explains(RULES["length_growth"]).name in ("reward_hacking", "kl_explosion")
    assert "rewards" not in {change.key for change in found.changes}


def test_of_two_changes_of_one_setting_the_first_holds(hacked):
    (found,) = diagnose(collect(hacked))
    keys = [change.key for change in found.changes]
    assert len(keys) == len(set(keys))


def test_the_keys_of_a_pipeline_name_their_stage():
    flat = 1 + 0.01 * np.random.default_rng(0).normal(size=80)
    run = replace(supervised("sft", {"loss/train": flat}), name="first")
    pipeline = PipelineRecord(name="p", runs=(run,), settings={"stages": {"first": {"stage": "sft"}}})
    (found,) = diagnose(pipeline)
    assert found.changes[0].key == "stages.first.optimizer.learning_rate"
    values = mended(pipeline, found.changes, where="a test")
    assert values["stages"]["first"]["optimizer"]["learning_rate"] == pytest.approx(1e-4)


# --- bills ---


def test_a_healthy_run_gets_a_clean_bill_that_says_what_was_looked_at():
    found = diagnose_run(online())
    assert not found.found
    assert not found.not_looked
    assert found.standing == f"Nothing is wrong in the {len(found.clean)} things looked at."
    assert {rule.name for rule in found.clean} == {name for name, rule in RULES.items() if "online" in rule.stages}


def test_what_could_not_be_looked_at_is_said():
    found = diagnose_run(online({"gold/mean": None, "critic/loss": None}, samples=()))
    reasons = {rule.name: reason.reason for rule, reason in found.not_looked}
    assert set(reasons) == {"reward_hacking", "critic_instability", "over_refusal", "sycophancy", "template_mismatch"}
    assert "world" in reasons["reward_hacking"]
    assert reasons["critic_instability"] == "critic/loss is not logged"


def test_a_short_run_is_not_judged_by_its_trends():
    short = record("online", {name: values[:4] for name, values in online_columns().items()})
    found = diagnose_run(short)
    assert not found.found
    assert any("4 values, and 10 are needed" in reason.reason for _, reason in found.not_looked)


@pytest.mark.parametrize("stage", ["compare", "select", "run"])
def test_a_stage_without_rules_has_no_bill(stage):
    assert diagnose_run(record(stage, {"x/y": np.ones(20)})).standing == "Nothing could be looked at."


@pytest.mark.parametrize("stage", ["sft", "reward", "online"])
def test_healthy_runs_on_disk_are_called_so(tmp_path, stage):
    metrics = {
        "sft": supervised_metrics(120, 1.0, 0.4),
        "reward": reward_metrics(120),
        "online": online_metrics(60, leash=True),
    }
    run = write_run(tmp_path / "run", stage=stage, metrics=metrics[stage], summary={})
    assert not diagnose(collect(run))[0].found


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
SETTINGS_TABLES = "kl sampling rewards shaping optimizer critic engine loss kl_in advantage num_epochs group_size"
CARD_ENTRIES = "accuracy ece temperature resembles gold_difference policy"


@hypothesis_settings(max_examples=50)
@given(
    stage=st.sampled_from(["online", "reward", "preference", "sft", "evaluate"]),
    num=st.integers(0, 14),
    level=st.sampled_from([0.0, -1.0, 1e300, -1e300, np.nan, 0.5]),
    settings=st.dictionaries(st.sampled_from(SETTINGS_TABLES.split()), JUNK, max_size=6),
    summary=st.dictionaries(st.sampled_from(CARD_ENTRIES.split()), JUNK),
    samples=st.lists(st.dictionaries(st.sampled_from(["step", "response", "baseline_response"]), JUNK), max_size=20),
)
def test_damaged_records_get_an_answer(stage, num, level, settings, summary, samples):
    with np.errstate(all="ignore"):
        columns = {name: np.full(num, level) for name in online_columns()} if num else {}
        columns |= {"loss/train": np.full(num, level), "loss/validation": np.full(num, level)} if num else {}
        run = record(stage, columns, settings=settings, summary=summary, samples=tuple(samples))
        found = diagnose_run(run)
        assert "".join(lines_of(found))
        json.dumps(found.as_json, default=str)


# --- the command ---


def test_the_command_tells_and_writes(hacked, tmp_path):
    out, new = tmp_path / "doctor.json", tmp_path / "new.toml"
    result = trimtab("doctor", hacked, "--json", out, "--apply", new)
    assert result.exit_code == 1
    assert "Reward up, quality down (reward_hacking)" in result.output
    written = json.loads(out.read_text())["runs"][0]
    assert written["failures"][0]["rule"] == "reward_hacking"
    assert written["failures"][0]["changes"][0]["old"] == 0.0
    values = tomllib.loads(new.read_text())
    assert values["stage"] == "online"
    assert values["kl"]["coef"] == written["changes"][0]["new"] > 0
    assert resolved("online", {k: v for k, v in values.items() if k != "stage"}).kl.coef > 0


def test_without_apply_the_overrides_are_printed(hacked):
    result = trimtab("doctor", hacked)
    assert "kl.coef=0" in result.output.split("With these overrides")[1]


def test_a_run_file_that_exists_is_not_replaced(hacked, tmp_path):
    (tmp_path / "mine.toml").write_text("seed = 1\n")
    result = trimtab("doctor", hacked, "--apply", tmp_path / "mine.toml")
    assert result.exit_code == 2
    assert "exists" in result.output
    assert (tmp_path / "mine.toml").read_text() == "seed = 1\n"


def test_without_settings_there_is_nothing_to_apply_to(hacked, tmp_path):
    (hacked / "settings.toml").write_text("no = toml = here")
    result = trimtab("doctor", hacked, "--apply", tmp_path / "new.toml")
    assert result.exit_code == 2
    assert "missing or damaged" in result.output


def test_settings_of_another_version_are_refused(hacked, tmp_path):
    with (hacked / "settings.toml").open("a") as file:
        file.write("weight_of_old = 3\n")
    result = trimtab("doctor", hacked, "--apply", tmp_path / "new.toml")
    assert result.exit_code == 2
    assert "weight_of_old" in result.output
    assert not (tmp_path / "new.toml").exists()


def test_a_table_that_names_no_stage_is_refused(hacked, tmp_path):
    new = tmp_path / "new.toml"
    (tmp_path / "pipeline.toml").write_text('[stages.ppo]\nstage = "online"\n[stages.other]\nseed = 1\n')
    result = trimtab("doctor", tmp_path, "--apply", new)
    assert result.exit_code == 2
    assert "stages.other names none of the stages" in result.output
    assert not new.exists()


def test_a_healthy_run_exits_with_zero_and_writes_no_run_file(tmp_path):
    run = write_run(tmp_path / "sft", stage="sft", metrics=supervised_metrics(120, 1.0, 0.4), summary={})
    result = trimtab("doctor", run, "--apply", tmp_path / "new.toml")
    assert result.exit_code == 0
    assert "Nothing is wrong" in result.output
    assert not (tmp_path / "new.toml").exists()


@pytest.mark.parametrize("content", ["", "{", '{"step": 1}\n', "\x00\xff\n", '{"step": 1, "policy/kl": null}\n' * 3])
def test_empty_cut_and_damaged_logs_get_an_answer(tmp_path, content):
    run = write_run(tmp_path / "run", stage="online", settings=SETTINGS)
    (run / "metrics.jsonl").write_text(content)
    result = trimtab("doctor", run)
    assert result.exit_code in (0, 1)
    assert "It is not finished" in result.output


def test_a_directory_without_a_run_is_refused(tmp_path):
    assert trimtab("doctor", tmp_path).exit_code == 2


# --- the page ---


def test_the_page_of_a_run_holds_its_diagnosis(hacked):
    page = write_report(hacked).read_text(encoding="utf-8")
    assert "Diagnosis" in page
    assert "Reward up, quality down" in page
    assert "kl.coef=" in page


def test_the_page_escapes_what_a_model_said(tmp_path):
    run = write_run(
        tmp_path / "ppo",
        stage="online",
        metrics=online_metrics(40, leash=True),
        samples=[*online_samples(), *({"step": 90, "response": "<|user|><script>x</script>"} for _ in range(30))],
        settings=SETTINGS,
    )
    page = write_report(run).read_text(encoding="utf-8")
    assert "Template mismatch" in page
    assert "<script>" not in page


def test_the_documentation_names_every_rule():
    page = (Path(__file__).parents[2] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert named == set(RULES)
