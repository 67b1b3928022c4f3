"""A guarded run that ends before its time, or finds its checkpoints damaged, through the command line."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pytest

from tests.stages.commands import rows, run_stage, summary, trimtab, write_run_file
from tests.stages.guarded import KILLED_AT, LADDER, Crash, actions, damaging, decision, hacked, scripted
from tests.stages.test_resume import differences
from trimtab.runs.run import Run


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
    table = hacked(base, guard={"actions": LADDER}, num_steps=12)
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", out)
    assert "guard: the run stays stopped after step 3: the measure fell" in result.output
    assert summary(out)["num_steps"] == 3
    assert rows(out, "guard.jsonl") == rows(ladder, "guard.jsonl")


def test_fresh_removes_the_record_and_the_decision(tmp_path, base, ladder):
    shutil.copytree(ladder, out := tmp_path / "run")
    table = hacked(base, guard={}, num_steps=1)
    del table["guard"]
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", out, "--fresh")
    assert result.exit_code == 0, result.output
    assert not any((out / name).exists() for name in ("guard.jsonl", "decision.json"))


def without_best(out, ladder):
    """The finished ladder, as if it still had to write its best checkpoint, which is gone."""
    shutil.copytree(ladder, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000000")
    text = (out / "settings.toml").read_text(encoding="utf-8")
    (out / "settings.toml").write_text(text.replace('writes = "last"', 'writes = "best"'), encoding="utf-8")
    return out


def test_the_best_whole_checkpoint_is_written_if_the_best_is_gone(tmp_path, base, ladder):
    out = without_best(tmp_path / "run", ladder)
    table = hacked(base, guard={"actions": LADDER, "writes": "best"})
    result = trimtab("online", write_run_file(tmp_path / "run.toml", table), "--out", out)
    assert result.exit_code == 0, result.output
    assert "the checkpoint of step 0 cannot be used: it is missing" in result.output
    found = decision(out)
    assert found["chosen_step"] == 0
    step = int(found["model_is"].split()[1].rstrip(","))
    assert step > 0
    assert "the chosen checkpoint is damaged" in found["model_is"]
    assert actions(out)[-1] == (3, "damaged")


def test_a_damaged_best_checkpoint_does_not_end_the_run(tmp_path, base, monkeypatch):
    damaging(monkeypatch, 0)
    measure = [scripted(tmp_path / "measure.py", [0.9, 0.8, 0.1, 0.1])]
    guard = {"measure": measure, "actions": ["roll_back"], "margin": 0.5}
    table = hacked(base, guard=guard, num_steps=3, checkpoint_every=1, keep_checkpoints=9)
    out = run_stage("online", tmp_path / "run", **table)
    assert actions(out) == [(2, "damaged"), (2, "roll_back")]
    row = next(row for row in rows(out, "guard.jsonl") if row["event"] == "roll_back")
    assert row["to_step"] == 1


def test_without_any_whole_checkpoint_the_run_goes_on_as_it_is(tmp_path, base, monkeypatch):
    damaging(monkeypatch, 0)
    table = hacked(base, guard={"actions": ["roll_back"], "every": 2}, num_steps=3, checkpoint_every=1)
    out = run_stage("online", tmp_path / "run", **table)
    assert actions(out) == [(2, "damaged"), (2, "roll_back")]
    assert rows(out)[2]["policy/kl"] > 0.01
