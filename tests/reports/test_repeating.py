"""The command beside each figure: it parses, it runs, and it gives the figure again."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.reports.fabricate import online_metrics, rollout_samples, write_pipeline, write_run
from trimtab import cli
from trimtab.core.types import records_hash
from trimtab.reports.collect import collect
from trimtab.reports.dossier import dossier_of
from trimtab.reports.repeating import Repeating
from trimtab.worlds.source import read_world


def commands_in(value: Any) -> Iterator[str]:
    """Every command of a dossier."""
    if isinstance(value, dict):
        for name, inside in value.items():
            if name in ("command", "decision_command") and isinstance(inside, str):
                yield inside
            else:
                yield from commands_in(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from commands_in(inside)


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """The name of a command and its values, as the command line reads them."""
    program, *words = shlex.split(command)
    assert program == "trimtab"
    found: click.Command = cli.main
    context = click.Context(cli.main, info_name="trimtab")
    while isinstance(found, click.Group):
        name, inner, words = found.resolve_command(context, words)
        assert inner is not None, command
        found, context = inner, click.Context(inner, info_name=name, parent=context)
    return str(context.info_name), found.make_context(context.info_name, list(words), parent=context.parent).params


def told(record: Path) -> dict[str, Any]:
    return dossier_of(collect(record))


def in_place(run: Path, cwd: Path, *, directory: Path | None = None) -> None:
    """Records where a run was begun, as `Run.open` does."""
    path = run / "environment.json"
    place = {"cwd": str(cwd), "directory": str(directory or run)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"place": place}))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline in runs/my loop, which was begun in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_pipeline(tmp_path / "runs" / "my loop")
    for run in (tmp_path / "runs" / "my loop").iterdir():
        if run.is_dir():
            in_place(run, tmp_path)
    return tmp_path / "runs" / "my loop"


def test_every_command_of_a_pipeline_parses_and_names_what_is_there(runs: Path):
    found = told(runs)
    commands = set(commands_in(found))
    assert len(commands) > 10
    for command in commands:
        name, values = parsed(command)
        for value in values.values():
            if isinstance(value, Path) and "again" not in str(value):
                assert value.exists(), command
                assert not value.is_absolute(), command
        if name == "report":
            assert "again" not in command
    assert found["command"] == "trimtab report 'runs/my loop'"
    assert found["pipeline"]["command"] == "trimtab run 'runs/my loop/pipeline.toml' --out 'runs/my loop-again'"
    reward = next(run for run in found["runs"] if run["name"] == "reward")
    assert reward["command"] == "trimtab reward 'runs/my loop/reward/settings.toml' --out 'runs/my loop-again/reward'"
    assert found["place"] == str(runs.parents[1])


def test_every_section_of_a_dossier_has_its_command(runs: Path):
    found = told(runs)
    ppo = next(run for run in found["runs"] if run["name"] == "ppo")
    whole = [found, *(found[name] for name in ("verdict", "pipeline", "samples", "costs"))]
    assert ppo["fits"]
    for part in (*whole, *found["data"]["sources"], *found["runs"], ppo["quality"], *ppo["fits"], ppo["diagnosis"]):
        assert part["command"].startswith("trimtab ")


def test_the_cheap_commands_run_and_give_the_figures_again(runs: Path):
    before = json.loads(json.dumps(told(runs), default=str))
    for command in sorted(set(commands_in(before))):
        words = shlex.split(command)[1:]
        if words[0] in ("report", "doctor"):
            done = CliRunner().invoke(cli.main, words)
            assert done.exit_code in (0, 1), done.output  # the doctor's 1 is a finding
    again = json.loads((runs / "report.json").read_text(encoding="utf-8"))
    assert again["verdict"] == before["verdict"]
    assert [run["fits"] for run in again["runs"]] == [run["fits"] for run in before["runs"]]


def test_the_rows_and_the_hash_of_a_world_are_shown_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    source = "world:arithmetic?num=30"
    for stage, key, demonstrations in (("online", "prompts", False), ("sft", "data", True)):
        run = write_run(tmp_path / stage, stage=stage, settings=f'{key} = "{source}"\n')
        digest = records_hash(read_world(source, demonstrations=demonstrations))
        (run / "data.json").write_text(json.dumps({source: {"sha256": digest, "rows": 30}}))
        (one,) = told(run)["data"]["sources"]
        done = CliRunner().invoke(cli.main, shlex.split(one["command"])[1:])
        assert done.exit_code == 0, done.output
        assert digest[:30] in done.output.replace("\n", "").replace(" ", "")
        assert "30" in done.output


def test_a_run_that_was_moved_is_named_where_it_is_and_its_pipeline_is_run_as_a_whole(runs: Path):
    for name in ("ppo", "sft"):
        in_place(runs / name, Path("/somewhere"), directory=Path("/somewhere/runs") / name)
    moved = runs.with_name("moved")
    shutil.move(runs, moved)
    found = told(moved)
    assert found["place"] == str(runs.parents[1])  # the working directory: nothing lies where it was written
    for run in found["runs"]:
        assert run["command"] == "trimtab run runs/moved/pipeline.toml --out runs/moved-again"


def test_a_run_elsewhere_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = write_run(tmp_path / "there", stage="sft")
    in_place(run, tmp_path / "here")
    assert Repeating(collect(run)).report == f"trimtab report {tmp_path}/there"


def test_what_cannot_be_run_again_has_no_command(tmp_path: Path):
    unknown = write_run(tmp_path / "a", stage="unheard-of")
    assert told(unknown)["runs"][0]["command"] is None
    lost = write_run(tmp_path / "b", stage="online", metrics=online_metrics(3, leash=True))
    (lost / "settings.toml").unlink()
    assert told(lost)["runs"][0]["command"] is None
    assert told(lost)["runs"][0]["diagnosis"]["command"].startswith("trimtab doctor ")


@pytest.mark.parametrize(
    ("decision", "command"),
    [
        ({"chosen_step": 4}, "trimtab online run/settings.toml --out run-again"),
        ({"run": "/x", "command": ""}, None),
        ({"run": "/x"}, None),
        ({"run": "/x", "command": "trimtab choose 'run"}, None),
        ({"run": "/x", "command": "trimtab choose run --gold w --export m --out=d.json 'measure=[\"a b\"]'"},
         "trimtab choose run --gold w 'measure=[\"a b\"]' --out run-decision-again.json"),
    ],
)  # fmt: skip
def test_a_choice_is_made_again_by_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decision, command):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", stage="online")
    (run / "decision.json").write_text(json.dumps(decision))
    assert told(run)["runs"][0]["decision_command"] == command
    if command is not None:
        parsed(command)


def test_people_of_a_project_are_compared_by_its_own_command(tmp_path: Path):
    source = "feedback:my votes/project.toml?split=train"
    run = write_run(tmp_path / "run", stage="reward", settings=f'data = "{source}"\n')
    (run / "data.json").write_text(json.dumps({source: {"sha256": "1" * 64, "rows": 12}}))
    (votes,) = told(run)["data"]["votes"]
    assert votes["num_pairs"] == 12
    assert votes["command"] == "trimtab feedback agreement 'my votes/project.toml' --out project-agreement-again.html"
    parsed(votes["command"])


def test_hostile_names_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name = "-x $(touch y); 'z'"
    run = write_run(tmp_path / name, stage="online", samples=rollout_samples(4))
    for command in commands_in(told(run)):
        parsed(command)
    assert shlex.split(told(run)["command"]) == ["trimtab", "report", f"./{name}"]
