"""The run directory: what is in it, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trimtab.core.errors import ConfigError, DataError, EngineError
from trimtab.core.metrics import Mean
from trimtab.runs.facts import StageFacts
from trimtab.runs.run import Run

SETTINGS: dict[str, Any] = {"model": "m", "optimizer": {"learning_rate": 1e-5}, "target": None}


def opened(directory: Path, **changes: Any) -> Run:
    return Run.open(directory, stage="sft", settings={**SETTINGS, **changes})


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_one(text: str):
    def write(path: Path) -> None:
        (path / "weights.txt").write_text(text)

    return write


def test_a_new_run_records_its_settings_and_environment(tmp_path: Path):
    with opened(tmp_path / "a" / "run") as run:
        assert not run.finished
        assert tomllib.loads((run.directory / "settings.toml").read_text()) == {
            "stage": "sft",
            "model": "m",
            "optimizer": {"learning_rate": 1e-5},
        }
        environment = json.loads((run.directory / "environment.json").read_text())
    assert {"python", "platform", "cpu", "num_cpus", "threads", "torch", "transformers", "trimtab"} <= set(environment)


def test_a_run_with_other_settings_is_refused_by_key(tmp_path: Path):
    with opened(tmp_path) as run:
        run.log(1, {"loss/train": 1.0})
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, optimizer={"learning_rate": 2e-5}, target=3.0)
    assert "optimizer.learning_rate: 1e-05 there, 2e-05 now" in caught.value.problem
    assert "target: 'unset' there, 3.0 now" in caught.value.problem
    assert "model" not in caught.value.problem
    assert "--fresh" in caught.value.fix


def test_a_run_that_has_written_nothing_takes_other_settings(tmp_path: Path):
    opened(tmp_path, model="a wrong path").close()
    with opened(tmp_path) as run:
        assert tomllib.loads((run.directory / "settings.toml").read_text())["model"] == "m"


def test_a_run_of_another_stage_is_refused(tmp_path: Path):
    with opened(tmp_path) as run:
        run.log(1, {"loss/train": 1.0})
    with pytest.raises(ConfigError, match="stage: 'sft' there, 'reward' now"):
        Run.open(tmp_path, stage="reward", settings=SETTINGS)


def test_fresh_empties_a_run_and_nothing_else(tmp_path: Path):
    (tmp_path / "work").mkdir()
    facts = StageFacts(writes=("start", "train.jsonl"))
    with Run.open(tmp_path / "work" / "run", stage="sft", settings=SETTINGS, facts=facts) as run:
        run.log(1, {"loss/train": 1.0})
        run.save_checkpoint(1, write_one("x"))
        run.save_model(write_one("x"))
        (run.directory / "start").mkdir()  # the untrained model of pretrain, which must not outlive its settings
        (run.directory / "train.jsonl").write_text("{}\n")
        run.finish({})
    (run.directory / "notes.txt").write_text("mine")
    with Run.open(run.directory, stage="sft", settings={"model": "n"}, resume=False) as run:
        assert not run.finished
        assert run.load_checkpoint() is None
    assert sorted(p.name for p in run.directory.iterdir() if p.name != ".lock") == [
        "environment.json",
        "notes.txt",
        "settings.toml",
    ]


@pytest.mark.parametrize(
    "names",
    [
        {"model": "run/model"},
        {"rewards": [{"name": "model", "path": "run/model"}]},
        {"data": "run/samples.jsonl?columns=text:prompt"},
        {"data": "other.jsonl,run/*.jsonl"},
    ],
)
def test_fresh_keeps_what_the_run_is_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]):
    monkeypatch.chdir(tmp_path)
    with opened(Path("run")) as run:
        run.add_samples(1, [{"text": "a"}])
        run.save_model(write_one("precious"))
        run.finish({})
    with pytest.raises(ConfigError, match="lies in run, which --fresh is to empty"):
        Run.open("run", stage="sft", settings={**SETTINGS, **names}, resume=False)
    assert (tmp_path / "run" / "model" / "weights.txt").read_text() == "precious"
    beside = {"model": "run-before/model", "reference_cache": "run/.reference"}
    (tmp_path / "run" / ".reference").mkdir()
    (tmp_path / "run-before" / "model").mkdir(parents=True)
    Run.open("run", stage="sft", settings=SETTINGS | beside, resume=False).close()


@pytest.mark.parametrize("resume", [True, False])
def test_a_directory_of_something_else_is_never_touched(tmp_path: Path, resume: bool):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds model and no run"):
        Run.open(tmp_path, stage="sft", settings=SETTINGS, resume=resume)
    assert (tmp_path / "model" / "weights.txt").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_file_of_the_user_is_no_run(tmp_path: Path, resume: bool):
    (tmp_path / "settings.toml").write_text("model = 'm'  # mine\n")
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds data\.json, settings\.toml and no run") as caught:
        Run.open(tmp_path, stage="sft", settings=SETTINGS, resume=resume)
    assert "--fresh" not in caught.value.fix
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.json", "settings.toml"]


def test_a_run_is_held_by_one_owner_until_it_lets_go(tmp_path: Path):
    with opened(tmp_path) as first:
        with pytest.raises(ConfigError, match="is in use by process"):
            opened(tmp_path)
        first.finish({})
    with opened(tmp_path) as second:
        assert second.finished


def test_numbers_that_are_not_finite_are_null_in_what_is_written(tmp_path: Path):
    with opened(tmp_path) as run:
        run.log(1, {"loss/train": Mean(3.0, 2.0), "loss/validation": Mean(0.0, 0.0), "kl/coef": math.inf})
        run.finish({"accuracy": math.nan, "parts": [1.5]})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "loss/train": 1.5, "loss/validation": None, "kl/coef": None}
    assert json.loads((tmp_path / "summary.json").read_text()) == {"accuracy": None, "parts": [1.5]}


def test_rewinding_drops_later_rows_and_a_half_written_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with opened(tmp_path) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss/train": float(step)})
            run.add_samples(step, [{"response": "é"}, {"response": "b"}])
        run.rewind(2)
        assert steps(tmp_path / "metrics.jsonl") == [1, 2]
        assert steps(tmp_path / "samples.jsonl") == [1, 1, 2, 2]
        for torn in ('{"step": 2, "loss', '{"step": 2}', '{"step": "1"}\n', '{"step": null}\n', "5\n", '{"loss": 1}\n'):
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(torn)
            run.rewind(2)
            assert steps(tmp_path / "metrics.jsonl") == [1, 2]
        assert capsys.readouterr().err == ""
        run.rewind(4)
        assert "goes on after step 4 without the rows of steps 3 to 4" in capsys.readouterr().err
        run.rewind(0)
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_run_whose_samples_are_damaged_is_rewound(tmp_path: Path):
    with opened(tmp_path) as run:
        run.add_samples(1, [{"response": "a"}])
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write("7\n")
        run.rewind(2)
    assert steps(tmp_path / "samples.jsonl") == [1]


@pytest.mark.parametrize("content", ["", "[]", '{"num_st'])
def test_a_damaged_summary_is_answered_with_how_to_finish_again(tmp_path: Path, content: str):
    with opened(tmp_path) as run:
        run.finish({"num_steps": 3})
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=r"summary\.json is damaged") as caught:
        opened(tmp_path)
    assert "remove it" in caught.value.fix
    (tmp_path / "summary.json").unlink()
    with opened(tmp_path) as run:
        assert not run.finished


def test_a_checkpoint_that_cannot_be_written_says_what_is_kept(tmp_path: Path):
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as run:
        with pytest.raises(EngineError, match="nothing was saved yet: the same command begins again"):
            run.save_checkpoint(1, full)
        run.save_checkpoint(2, write_one("x"))
        with pytest.raises(EngineError, match="goes on from the checkpoint of step 2"):
            run.save_checkpoint(3, full)


def test_the_newest_checkpoints_are_kept_and_sha256sum_agrees_with_them(tmp_path: Path):
    with opened(tmp_path) as run:
        for step in (5, 10, 15):
            run.save_checkpoint(step, write_one(str(step)), keep=2)
        assert run.load_checkpoint() == (15, tmp_path / "checkpoints" / "step-00000015")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000015"]
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(check, cwd=tmp_path / "checkpoints" / "step-00000015", check=True, capture_output=True)


@pytest.mark.parametrize("damage", ["missing file", "extra file", "no sums", "empty sums"])
def test_a_checkpoint_that_is_not_as_written_does_not_count(tmp_path: Path, damage: str):
    with opened(tmp_path) as run:
        run.save_checkpoint(1, write_one("one"))
        run.save_checkpoint(2, write_one("two"))
        newest = tmp_path / "checkpoints" / "step-00000002"
        if damage == "missing file":
            (newest / "weights.txt").unlink()
        elif damage == "extra file":
            (newest / "more.txt").write_text("")
        elif damage == "no sums":
            (newest / "SHA256SUMS").unlink()
        else:
            (newest / "SHA256SUMS").write_text("")
        assert run.load_checkpoint() == (1, tmp_path / "checkpoints" / "step-00000001")
        assert (tmp_path / "checkpoints" / "damaged-00000002").is_dir()


def test_leftovers_of_a_killed_writer_are_removed_on_opening(tmp_path: Path):
    with opened(tmp_path) as run:
        run.save_checkpoint(1, write_one("one"))
    (tmp_path / "checkpoints" / ".writing-2").mkdir()
    (tmp_path / "checkpoints" / ".writing-2" / "weights.txt").write_text("tw")
    (tmp_path / ".writing-model").mkdir()
    with opened(tmp_path) as run:
        assert run.load_checkpoint() == (1, tmp_path / "checkpoints" / "step-00000001")
    assert not list(tmp_path.rglob(".writing-*"))


def test_a_saved_model_replaces_the_one_before(tmp_path: Path):
    with opened(tmp_path) as run:
        run.save_model(write_one("one"))
        run.save_model(write_one("two"))
        assert (run.model_dir / "weights.txt").read_text() == "two"


def test_data_that_changed_under_a_run_is_refused(tmp_path: Path):
    with opened(tmp_path) as run:
        run.add_data("a.jsonl", "00ff", 10)
        run.add_data("b.jsonl", "11ff", 3)
        run.add_data("a.jsonl", "00ff", 10)
        assert json.loads((tmp_path / "data.json").read_text()) == {
            "a.jsonl": {"sha256": "00ff", "rows": 10},
            "b.jsonl": {"sha256": "11ff", "rows": 3},
        }
        with pytest.raises(DataError, match=r"a\.jsonl is not the data this run began with \(11 rows now, 10 then\)"):
            run.add_data("a.jsonl", "22ff", 11)


def test_what_was_not_used_and_left_out_is_recorded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reading = {
        "layout": "pairs",
        "not_used": ["source", "messages[].name"],
        "dropped": {"empty_response": 2, "tools": 1},
    }
    with opened(tmp_path) as run:
        run.add_data("a.jsonl", "00ff", 9_997, reading)
        run.add_data("a.jsonl", "00ff", 9_997)  # how it was read may change, what was read may not
        run.add_data("a.jsonl", "00ff", 9_997, reading)
        assert (
            json.loads((tmp_path / "data.json").read_text())["a.jsonl"] == {"sha256": "00ff", "rows": 9_997} | reading
        )
    said = capsys.readouterr().err
    assert "a.jsonl: 3 of 10,000 rows are left out (2 empty response, 1 tools)" in said
    assert "a.jsonl: not used: source, messages[].name" in said


def test_going_on_in_another_environment_is_said_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    opened(tmp_path).close()
    path = tmp_path / "environment.json"
    began = json.loads(path.read_text())
    path.write_text(json.dumps({**began, "torch": "0.4.1"}))
    opened(tmp_path).close()
    assert "the run began with another torch" in capsys.readouterr().err
    recorded = json.loads(path.read_text())
    assert recorded == {**began, "torch": "0.4.1", "resumed_with": [{"torch": began["torch"]}]}
