"""`trimtab choose`: the checkpoints of a run, measured afterwards."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys

import pytest

from tests.stages.commands import FAST, rows, run_stage, trimtab, write_run_file
from tests.stages.guarded import CHECKS, checks, decision, hacked, judge, same_weights
from tests.stages.test_online_environment import settings_of
from trimtab.core.types import Prompt
from trimtab.data.layouts import load
from trimtab.environments.react import ReActEnvironment

LONG = f'measure=[{{name = "callable", function = "{judge("digits")["function"]}"}}]'


@pytest.fixture(scope="module")
def hacked_run(tmp_path_factory, base):
    """Three steps with a guard that only watches, and all checkpoints kept."""
    table = hacked(base, guard={}, num_steps=3, checkpoint_every=1, keep_checkpoints=10)
    return run_stage("online", tmp_path_factory.mktemp("choose") / "run", **table)


def test_it_measures_as_the_guard_did(tmp_path, hacked_run):
    assert len(list((hacked_run / "checkpoints").glob("step-*"))) == 4
    result = trimtab("choose", hacked_run, "--out", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    ours, theirs = found["checkpoints"], checks(hacked_run)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [0, 1, 2, 3]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("measure", "measure_low", "kl", "reward"):
            assert mine[name] == pytest.approx(other[name], abs=1e-4), name
    before = decision(hacked_run)
    assert found["chosen_step"] == before["chosen_step"] == 0
    assert found["measure"] == before["measure"]
    assert found["prompts"]["sha256"] == before["prompts"]["sha256"]
    table = next(line for line in result.output.splitlines() if "chosen" in line)
    assert table.split()[0] == "0"


def test_the_chosen_model_can_be_written(tmp_path, hacked_run, base):
    result = trimtab("choose", hacked_run, "--out", tmp_path / "a.json", "--export", tmp_path / "start")
    assert result.exit_code == 0, result.output
    assert same_weights(tmp_path / "start", base)
    result = trimtab("choose", hacked_run, LONG, "--out", tmp_path / "b.json", "--export", tmp_path / "last")
    assert result.exit_code == 0, result.output
    chosen = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["chosen_step"]
    assert chosen > 0
    assert same_weights(tmp_path / "last", hacked_run / "model") == (chosen == 3)


def test_a_run_of_imitation_with_an_adapter_can_be_asked_too(tmp_path, base):
    table = {"model": str(base), "data": "world:arithmetic?num=16", "batch_size": 4, "optimizer": FAST, "held_out": 0}
    table |= {"checkpoint_every": 2, "keep_checkpoints": 9, "adapter": {"rank": 2}}
    out = run_stage("sft", tmp_path / "sft", **table)
    export = tmp_path / "model"
    result = trimtab(
        "choose", out, "--prompts", CHECKS, "--gold", "arithmetic", "sampling.max_new_tokens=8", "--export", export
    )
    assert result.exit_code == 0, result.output
    found = decision(out)
    assert [row["step"] for row in found["checkpoints"]] == [0, 2, 4]
    assert found["checkpoints"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["checkpoints"][2]["reward"] is None
    assert (export / "adapter_config.json").exists()
    assert len(rows(out)) == 4


def refusal(*arguments):
    result = trimtab("choose", *arguments)
    assert result.exit_code == 2, result.output
    return result.output


def test_a_decision_is_not_overwritten(hacked_run):
    assert "decision.json is there already" in refusal(hacked_run)


def test_a_directory_that_is_there_is_not_exported_to(tmp_path, hacked_run):
    assert "name a new directory" in refusal(hacked_run, "--out", tmp_path / "d.json", "--export", tmp_path)


def test_what_is_no_run_of_a_policy_is_refused(tmp_path, reward_run):
    assert "holds no run" in refusal(tmp_path)
    assert "a run of the stage 'reward'" in refusal(reward_run, "--out", tmp_path / "d.json")


def test_a_run_without_checkpoints_is_told_how_to_keep_them(tmp_path, hacked_run):
    shutil.copytree(hacked_run, run := tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "train with keep_checkpoints" in refusal(run, "--out", tmp_path / "d.json")


def test_a_damaged_checkpoint_is_named(tmp_path, hacked_run):
    shutil.copytree(hacked_run, run := tmp_path / "run")
    (run / "checkpoints" / "step-00000002" / "policy.safetensors").write_bytes(b"")
    assert "the checkpoint of step 2 cannot be used" in refusal(run, "--out", tmp_path / "d.json")


def test_damaged_settings_are_named(tmp_path, hacked_run):
    shutil.copytree(hacked_run, run := tmp_path / "run")
    (run / "settings.toml").write_text("=")
    assert "settings.toml is damaged" in refusal(run, "--out", tmp_path / "d.json")


def test_a_run_at_work_is_refused(tmp_path, hacked_run):
    with (hacked_run / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "is in use by process" in refusal(hacked_run, "--out", tmp_path / "d.json")


def test_a_run_without_a_guard_needs_a_measure_and_prompts(tmp_path, base):
    table = hacked(base, guard={}, num_steps=1)
    del table["guard"]
    out = run_stage("online", tmp_path / "run", **table)
    said = refusal(out)
    assert "no measure and no prompts given, and the run had no guard that says" in said
    assert "--gold WORLD" in said
    assert "--prompts SOURCE" in said
    assert "no prompts given" in refusal(out, "--gold", "arithmetic")


def test_a_measure_that_judges_nothing_chooses_nothing(tmp_path, hacked_run):
    silent = LONG.replace(":digits", ":speechless")
    assert "judged too few replies" in refusal(hacked_run, silent, "--out", tmp_path / "d.json")


@pytest.mark.parametrize(
    ("override", "said"),
    [("measure=[]", "measure is empty"), ("num_prompts=1", "at least 2"), ("engine.workers=2", "a single process")],
)
def test_settings_that_choose_nothing_are_refused(tmp_path, hacked_run, override, said):
    assert said in refusal(hacked_run, override, "--out", tmp_path / "d.json")


def test_too_few_prompts_are_refused(tmp_path, hacked_run):
    source = "world:arithmetic?split=test&num=1"
    assert "1 different prompts" in refusal(hacked_run, "--prompts", source, "--out", tmp_path / "d.json")


def test_what_the_run_trained_on_decides_nothing(tmp_path, hacked_run):
    trained = LONG.replace(":digits", ":length")
    assert "is rewards.0 that training moves" in refusal(hacked_run, trained, "--out", tmp_path / "d.json")
    own = "world:arithmetic?num=8"
    assert "is what the run trained on" in refusal(hacked_run, "--prompts", own, "--out", tmp_path / "d.json")


def chosen(tmp_path, *arguments):
    result = trimtab("choose", *arguments, "--out", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "found.json").read_text(encoding="utf-8")), result.output


def test_prompts_that_were_trained_on_or_come_twice_are_counted(tmp_path, hacked_run):
    trained = load(Prompt, "world:arithmetic?num=8").records
    texts = [prompt.text for prompt in trained[:3]] * 2 + [f"What is {i} + 7?" for i in range(90, 95)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "answer": 1}) + "\n" for text in texts))
    found, said = chosen(tmp_path, hacked_run, "--prompts", file)
    assert (found["prompts"]["num"], found["prompts"]["num_trained_on"]) == (8, 3)
    assert "3 of 11 prompts repeat another" in said
    assert "3 of 8 prompts are among those of the run" in said


def test_a_run_in_an_environment_is_asked_in_it(tmp_path, base, monkeypatch):
    monkeypatch.setattr(ReActEnvironment, "stop", ("e", "n", "a", "r"))  # so that turns end, and are answered
    guard = {"measure": [judge("observed")], "prompts": "world:catalogue?split=test&num=8", "every": 1}
    out = run_stage("online", tmp_path / "run", **settings_of(base, guard=guard, num_steps=1, checkpoint_every=1))
    assert checks(out)[0]["measure"] > 0
    found, _ = chosen(tmp_path, out)
    for mine, other in zip(found["checkpoints"], checks(out), strict=True):
        assert mine["measure"] == pytest.approx(other["measure"], abs=1e-4)
        assert mine["kl"] == pytest.approx(other["kl"], abs=1e-4)


def test_sampling_that_is_not_given_is_that_of_the_run(tmp_path, base):
    table = hacked(base, guard={}, num_steps=1, checkpoint_every=1, sampling={"max_new_tokens": 8, "temperature": 0.3})
    out = run_stage("online", tmp_path / "run", **table)
    found, _ = chosen(tmp_path, out, "sampling.max_new_tokens=8")
    for mine, other in zip(found["checkpoints"], checks(out), strict=True):
        assert mine["measure"] == pytest.approx(other["measure"], abs=1e-4)
        assert mine["kl"] == pytest.approx(other["kl"], abs=1e-4)


def test_it_computes_where_it_is_asked_to(tmp_path, hacked_run):
    shutil.copytree(hacked_run, run := tmp_path / "run")  # as if it had been trained on a device that is not here
    text = (run / "settings.toml").read_text(encoding="utf-8")
    elsewhere = text.replace('device = "cpu"', 'device = "cuda:77"')
    assert elsewhere != text
    (run / "settings.toml").write_text(elsewhere, encoding="utf-8")
    assert len(chosen(tmp_path, run, "engine.device=cpu")[0]["checkpoints"]) == 4


def test_a_directory_beside_the_checkpoints_is_none(tmp_path, hacked_run):
    shutil.copytree(hacked_run, run := tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000002.bak")
    assert len(chosen(tmp_path, run)[0]["checkpoints"]) == 4


def test_fresh_removes_the_choice_of_a_run_that_has_no_guard(tmp_path, base):
    table = {"model": str(base), "data": "world:arithmetic?num=16", "batch_size": 4, "optimizer": FAST, "held_out": 0}
    out = run_stage("sft", tmp_path / "sft", **table)
    (out / "decision.json").write_text("{}")
    result = trimtab("sft", write_run_file(tmp_path / "run.toml", table), "--out", out, "--fresh")
    assert result.exit_code == 0, result.output
    assert not (out / "decision.json").exists()


def test_it_loads_by_itself():
    # the other tests have loaded the stages already, in an order in which a circle does not show
    subprocess.run([sys.executable, "-c", "import trimtab.stages.choose"], check=True)


def test_a_measure_or_prompts_given_twice_are_refused(tmp_path, hacked_run):
    out = ("--out", tmp_path / "d.json")
    assert "measure is given twice" in refusal(hacked_run, "--gold", "arithmetic", LONG, *out)
    assert "prompts is given twice" in refusal(hacked_run, "--prompts", CHECKS, f'prompts="{CHECKS}"', *out)
