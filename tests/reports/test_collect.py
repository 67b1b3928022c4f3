from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trimtab.core.errors import DataError
from trimtab.reports import collect as collecting
from trimtab.reports.collect import PipelineRecord, RunRecord, collect


def test_a_run_is_read_back_as_it_was_written(make_run):
    rows = [{"step": 1, "loss/train": 2.0}, {"step": 2, "loss/train": 1.0, "loss/validation": 1.5}]
    directory = make_run(stage="sft", metrics=rows, samples=[{"step": 2, "response": "hi"}], summary={"num_steps": 2})
    run = collect(directory)
    assert isinstance(run, RunRecord)
    assert (run.name, run.stage, run.finished, run.num_steps, run.problems) == ("run", "sft", True, 2, ())
    assert run.settings == {"seed": 0}
    assert run.metrics["loss/train"].values.tolist() == [2.0, 1.0]
    assert run.metrics["loss/validation"].steps.tolist() == [2.0]
    assert run.samples == ({"step": 2, "response": "hi"},)
    assert run.data["world:helpdesk?split=train&num=2000"]["rows"] == 2000


def test_a_last_line_still_being_written_is_left_out_without_complaint(make_run):
    directory = make_run(stage="sft", metrics=[{"step": 1, "loss/train": 2.0}])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss/tr')
    run = collect(directory)
    assert run.num_steps == 1
    assert run.problems == ()
    assert not run.finished


def test_damaged_lines_are_counted_and_the_rest_is_read(make_run):
    directory = make_run(stage="sft")
    lines = [b'{"step": 1, "loss/train": 2}', b"\xff\x00garbage", b"[1, 2]", b'{"step": 2, "loss/train": 1}', b""]
    (directory / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run = collect(directory)
    assert run.metrics["loss/train"].values.tolist() == [2.0, 1.0]
    assert run.problems == ("2 damaged lines of metrics.jsonl were left out",)


def test_values_that_are_not_finite_numbers_are_kept_as_unknown(make_run):
    directory = make_run(stage="sft")
    text = '{"step": 1, "a": NaN, "b": null, "c": 1e999, "d": "text", "e": %s}\n{"step": "x", "a": 1}\n' % ("9" * 400)
    (directory / "metrics.jsonl").write_text(text)
    run = collect(directory)
    assert sorted(run.metrics) == ["a", "b", "c", "e"]
    assert all(np.isnan(series.values).all() for series in run.metrics.values())


def test_unreadable_settings_and_summary_are_named(make_run):
    directory = make_run(stage="sft")
    (directory / "settings.toml").write_text("stage = [")
    (directory / "summary.json").write_text("[]")
    run = collect(directory)
    assert run.problems == (
        "settings.toml is not readable TOML and was left out",
        "summary.json is not a readable JSON object and was left out",
    )
    assert not run.finished


@pytest.mark.parametrize(
    ("files", "stage"),
    [
        ({"metrics.jsonl": '{"step": 1, "policy/kl": 0.1, "loss/train": 1}\n'}, "online"),
        ({"metrics.jsonl": '{"step": 1, "reward/accuracy": 0.5}\n'}, "reward"),
        ({"samples.jsonl": '{"step": 0, "response": "a", "baseline_response": "b"}\n'}, "evaluate"),
        ({"summary.json": "{}"}, "run"),
    ],
)
def test_the_stage_is_guessed_where_the_settings_are_lost(tmp_path, files, stage):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert collect(tmp_path).stage == stage


def test_a_pipeline_keeps_the_order_of_its_stages_and_skips_those_not_begun(pipeline):
    record = collect(pipeline)
    assert isinstance(record, PipelineRecord)
    assert [run.name for run in record.runs] == ["pretrain", "sft", "reward", "ppo", "ppo_no_leash", "evaluate"]
    assert [run.stage for run in record.runs][3:5] == ["online", "online"]
    assert record.finished


def test_a_stage_name_never_leads_out_of_the_pipeline(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "summary.json").write_text("{}")
    directory = tmp_path / "pipeline"
    directory.mkdir()
    (directory / "pipeline.toml").write_text('[stages."../outside"]\nstage = "sft"\n')
    assert collect(directory).runs == ()


def test_a_pipeline_with_damaged_settings_shows_every_run_below_it(tmp_path):
    (tmp_path / "pipeline.toml").write_text("[[")
    for name in ("b", "a", "cache"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss/train": 1}\n')
    record = collect(tmp_path)
    assert [run.name for run in record.runs] == ["a", "b"]
    assert record.problems


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds neither a run nor a pipeline"):
        collect(tmp_path)


def test_of_a_very_long_file_the_beginning_and_the_end_are_read(make_run, monkeypatch):
    monkeypatch.setattr(collecting, "MAX_BYTES", 1000)
    rows = [{"step": step, "response": "x" * 20} for step in range(1, 201)]
    run = collect(make_run(stage="online", samples=rows))
    steps = [row["step"] for row in run.samples]
    assert steps[0] == 1
    assert steps[-1] == 200
    assert steps == sorted(set(steps))
    assert len(json.dumps(run.samples)) < 1000
    assert "only its beginning and end were read" in run.problems[0]


def test_the_first_and_last_tenth_of_a_series_leave_unknown_values_out():
    series = collecting.Series(np.arange(21.0), np.array([math.nan, *range(1, 21)], dtype=float))
    assert series.mean_of_first() == 1.5
    assert series.mean_of_last() == 19.5
    assert math.isnan(collecting.Series(np.arange(2.0), np.full(2, math.nan)).mean_of_last())
