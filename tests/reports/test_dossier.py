"""The dossier as JSON: it fits its published schema, whatever is in a directory."""

from __future__ import annotations

import json
import shlex
from importlib.resources import files

import jsonschema
import pytest
from click.testing import CliRunner

from tests.reports.fabricate import card, online_metrics, write_run
from trimtab import cli
from trimtab.core.errors import DataError, EngineError
from trimtab.reports.collect import collect
from trimtab.reports.dossier import MAX_POINTS, write_dossier
from trimtab.reports.run_page import write_report

SCHEMA = json.loads((files("trimtab.reports") / "dossier.schema.json").read_text(encoding="utf-8"))
SUITE = {
    "version": 1,
    "suite": "hhh",
    "model": "m",
    "baseline": "b",
    "model_sha256": "1",
    "baseline_sha256": "2",
    "num_items": 1,
    "command": "trimtab eval hhh m b --out hhh.json",
    "metrics": [
        {
            "name": "accuracy",
            "better": "higher",
            "model": {"value": 0.812, "low": 0.75, "high": 0.874, "count": 1},
            "baseline": {"value": 0.5, "low": None, "high": None, "count": 1},
            "difference": {"value": 0.312, "low": 0.2, "high": 0.4, "count": 1},
            "null": {"constant": 0.5},
        }
    ],
    "items": [{"id": "1", "cluster": "1", "scores": {"accuracy": [1.0]}, "baseline_scores": {"accuracy": [0.0]}}],
    "engine": {"device": "cpu"},
}


def dossier(directory, tmp_path, **options):
    """The dossier of a directory, which has to fit the schema."""
    path = write_dossier(directory, tmp_path / "found.json", **options)
    found = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def test_a_pipeline_has_its_verdict_its_runs_and_their_measures(pipeline, tmp_path):
    found = dossier(pipeline, tmp_path)
    assert found["kind"] == "pipeline"
    assert found["verdict"]["title"] == "Training made the model better."
    assert [run["name"] for run in found["runs"]] == [run.name for run in collect(pipeline).runs]
    measured = [run for run in found["runs"] if run["quality"] is not None]
    assert measured
    for run in measured:
        steps = [point["step"] for point in run["quality"]["points"]]
        assert run["quality"]["peak_step"] in steps
        assert run["quality"]["name"] == "gold"
    reward = next(run for run in found["runs"] if run["stage"] == "reward")
    assert reward["summary"]["accuracy"] == card()["accuracy"]
    assert all({"standing", "failures"} <= run["diagnosis"].keys() for run in found["runs"])
    assert all(one["last_step"] > 0 for one in reward["metrics"].values())


def test_a_long_course_of_quality_is_drawn_evenly_with_its_last_point(tmp_path):
    run = write_run(tmp_path / "run", stage="online", metrics=online_metrics(1000, leash=True))
    points = dossier(run, tmp_path)["runs"][0]["quality"]["points"]
    whole = collect(run).metrics["gold/mean"]
    assert len(points) == MAX_POINTS
    assert points[-1]["step"] == whole.steps[-1]
    assert points[-1]["quality"] == pytest.approx(whole.values[-1])


@pytest.mark.parametrize("known", [3, "x", [1], {"not_used": 5, "dropped": "x", "rows": [], "sha256": 2}])
def test_damaged_facts_about_the_data_are_shown_as_far_as_they_go(tmp_path, known):
    run = write_run(tmp_path / "run", stage="online", metrics=online_metrics(4, leash=True))
    (run / "data.json").write_text(json.dumps({"rows.jsonl": known}), encoding="utf-8")
    assert "rows.jsonl" in write_report(run).read_text(encoding="utf-8")
    assert dossier(run, tmp_path)["data"]["sources"][0]["source"] == "rows.jsonl"


def test_an_empty_or_damaged_run_has_a_dossier_too(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.toml").write_text('stage = "online"\nwhen = 2026-01-02\nkl = nan\n', encoding="utf-8")
    (run / "summary.json").write_text('{"text": "\\ud800", "value": NaN}', encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 1, "policy/kl": NaN}\n{broken\n{"step": 2}\n', encoding="utf-8")
    found = dossier(run, tmp_path)
    (one,) = found["runs"]
    assert one["settings"] == {"when": "2026-01-02", "kl": None}
    assert one["summary"] == {"text": "?", "value": None}
    assert one["quality"] is None
    assert any("damaged" in alarm for alarm in one["alarms"])


def test_suites_are_held_without_their_items(tmp_path):
    run = write_run(tmp_path / "run", stage="online", metrics=online_metrics(30, leash=True))
    path = tmp_path / "hhh.json"
    path.write_text(json.dumps(SUITE), encoding="utf-8")
    (suite,) = dossier(run, tmp_path, suites=[path])["suites"]
    assert suite["suite"] == "hhh"
    assert not {"items", "engine"} & suite.keys()
    neither = SUITE["metrics"][0] | {"better": "neither"}  # as of a trait, which says nothing about a tax
    path.write_text(json.dumps(SUITE | {"metrics": [neither]}), encoding="utf-8")
    assert dossier(run, tmp_path, suites=[path])["suites"][0]["metrics"][0]["better"] == "neither"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError):
        write_dossier(run, tmp_path / "x.json", suites=[path])


def test_the_agreement_of_people_is_that_of_their_study(tmp_path, monkeypatch):
    rows = [
        {"item": i, "annotator": who, "choice": "A" if i % 3 or who == "x" else "B"} for i in range(9) for who in "xy"
    ]
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["feedback", "agreement", str(votes), "--out", str(tmp_path / "a.html")]
    monkeypatch.setattr("sys.argv", ["trimtab", *words])
    made = CliRunner().invoke(cli.main, words)
    assert made.exit_code == 0, made.output
    run = write_run(tmp_path / "run", stage="reward")
    (study,) = dossier(run, tmp_path, agreements=[tmp_path / "a.json"])["data"]["votes"]
    assert study["agreement"]["value"] == pytest.approx(6 / 9)
    assert study["agreement"]["low"] < 6 / 9 < study["agreement"]["high"]
    assert study["noise_limit"]["value"] == pytest.approx((1 + (2 * 6 / 9 - 1) ** 0.5) / 2)
    assert study["num_pairs"] == 9
    assert study["command"] == shlex.join(["trimtab", *words])
    with pytest.raises(DataError, match="no figures of votes"):
        write_dossier(run, tmp_path / "x.json", agreements=[run / "environment.json"])
    with pytest.raises(DataError, match="no such file"):
        write_dossier(run, tmp_path / "x.json", agreements=[tmp_path / "none.json"])


def test_the_command_writes_it_beside_the_page(tmp_path):
    run = write_run(tmp_path / "run", stage="online", metrics=online_metrics(30, leash=True))

    def report(*options):
        return CliRunner().invoke(cli.main, ["report", str(run), *map(str, options)])

    result = report()
    assert result.exit_code == 0, result.output
    assert f"dossier: {run / 'report.json'}" in result.output
    assert json.loads((run / "report.json").read_text(encoding="utf-8"))["runs"][0]["name"] == "run"
    (run / "report.json").unlink()
    assert "dossier" not in report("--out", tmp_path / "page.html").output
    assert not (run / "report.json").exists()
    (tmp_path / "hhh.json").write_text(json.dumps(SUITE), encoding="utf-8")
    options = ("--out", tmp_path / "page.html", "--json", tmp_path / "d.json", "--suite", tmp_path / "hhh.json")
    assert report(*options).exit_code == 0
    assert json.loads((tmp_path / "d.json").read_text())["suites"][0]["suite"] == "hhh"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "trimtab eval hhh m b --out hhh.json" in text
    assert "0.812 [0.75, 0.874] (n=1)" in text
    refused = report("--out", tmp_path / "page.html", "--suite", tmp_path / "d.json")
    assert refused.exit_code == 2
    assert "no results of a suite" in refused.output


def test_what_cannot_be_written_leaves_the_run_and_says_so(tmp_path):
    directory, file = tmp_path / "ppo", tmp_path / "ppo" / "settings.toml"
    write_run(directory, stage="online", metrics=online_metrics(3, leash=True))
    file.touch()
    for write in (write_report, write_dossier):
        with pytest.raises(
            EngineError, match=r"could not be written: [^\n]*\n[^\n]*\n.*the run is whole: trimtab report"
        ):
            write(directory, tmp_path / "ppo" / "settings.toml" / "page")
