"""A stage and a source of records are added with one file and one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from trimtab import cli
from trimtab.core import registry
from trimtab.core.source import Source
from trimtab.core.types import Message, Prompt, records_hash
from trimtab.data.layouts import load

STAGE = '''
"""Count the words of prompts."""

from dataclasses import dataclass

from trimtab.core.types import Prompt
from trimtab.runs.run import Run
from trimtab.stages.reading import read
from trimtab.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class CountSettings:
    """Settings of the count stage."""

    prompts: str
    """Prompts: a file, a hub id or a world."""


def run(settings: CountSettings, run: Run) -> None:
    """Writes the number of words to summary.json."""
    found = read(Prompt, settings.prompts, run)
    run.finish({"num_words": sum(len(prompt.text.split()) for prompt in found.records)})


STAGE = Stage(settings=CountSettings, run=run, about="Words were counted.")
'''


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage `count`: its file beside the others, and its line in the table."""
    package = tmp_path / "trimtab_count.py"
    package.write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.modules("stage"), "count", "trimtab_count")
    monkeypatch.setattr("trimtab.core.settings_help._source_of", lambda module: package)
    monkeypatch.setattr(cli.main, "commands", {**cli.main.commands, "count": cli.stage_command("count")})


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source `lines:a|b`: its module, and its line in the table."""

    def read(kind: type, source: str) -> tuple[list[Prompt], str, dict[str, int]]:
        texts = source.removeprefix("lines:").split("|")
        found = [Prompt(messages=(Message("user", text),)) for text in texts]
        return found, records_hash(found), {}

    module = ModuleType("trimtab_lines")
    module.SOURCE = Source(  # type: ignore[attr-defined]
        title="lines", natural=Prompt, live=False, read=read, check=lambda kind, source: None
    )
    monkeypatch.setitem(sys.modules, "trimtab_lines", module)
    monkeypatch.setitem(registry.modules("source"), "lines", "trimtab_lines")


def test_a_source_is_a_module_and_a_line(lines: None):
    found = load(Prompt, "lines:one two|three")
    assert [prompt.text for prompt in found.records] == ["one two", "three"]
    assert found.layout == "lines"


def test_a_stage_is_a_module_and_a_line(count: None, lines: None, tmp_path: Path):
    run_file = tmp_path / "count.toml"
    run_file.write_text('prompts = "lines:one two|three"\n')
    out = tmp_path / "run"
    result = CliRunner().invoke(cli.main, ["count", str(run_file), "--out", str(out)], prog_name="trimtab")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "summary.json").read_text()) == {"num_words": 3}
    page = (out / "report.html").read_text()
    assert "Words were counted." in page
    told = CliRunner().invoke(cli.main, ["count", "--help"], prog_name="trimtab").output
    assert "Count the words of prompts." in told
    assert "prompts: str, required" in told
    wrong = CliRunner().invoke(cli.main, ["count", str(run_file), "promts=x"], prog_name="trimtab")
    assert "did you mean prompts" in wrong.output


def test_a_pipeline_knows_a_stage_that_was_added(count: None, lines: None, tmp_path: Path):
    run_file = tmp_path / "pipeline.toml"
    run_file.write_text('[stages.words]\nstage = "count"\nprompts = "lines:one two|three"\n')
    out = tmp_path / "runs"
    result = CliRunner().invoke(cli.main, ["run", str(run_file), "--out", str(out)], prog_name="trimtab")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "words" / "summary.json").read_text())["num_words"] == 3
