"""What a run keeps of a source that lives on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.stages.commands import run_stage, summary, trimtab, write_run_file
from trimtab.core import registry
from trimtab.core.source import Source
from trimtab.core.types import Demonstration, Message, Prompt, records_hash
from trimtab.runs.run import Run
from trimtab.stages.reading import read


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the source `growing:`, which is live."""
    texts = ["one", "two", "three"]

    def records(kind: type, source: str) -> tuple[list[Prompt], str, dict[str, int]]:
        found = [Prompt(messages=(Message("user", text),)) for text in texts]
        return found, records_hash(found), {}

    module = ModuleType("trimtab_growing")
    module.SOURCE = Source(title="texts", natural=Prompt, live=True, read=records, check=lambda kind, source: None)
    monkeypatch.setitem(sys.modules, "trimtab_growing", module)
    monkeypatch.setitem(registry.modules("source"), "growing", "trimtab_growing")
    return texts


def test_a_run_keeps_what_it_read_first_of_a_live_source(growing: list[str], tmp_path: Path):
    with Run.open(tmp_path / "run", stage="sft", settings={}) as run:
        first = read(Prompt, "growing:", run).records
        growing.append("four")
        assert read(Prompt, "growing:", run).records == first
    with Run.open(tmp_path / "another", stage="sft", settings={}) as run:
        assert len(read(Prompt, "growing:", run).records) == 4


def test_another_limit_is_kept_apart(growing: list[str], tmp_path: Path):
    with Run.open(tmp_path / "one", stage="sft", settings={}) as run:
        assert len(read(Prompt, "growing:", run, limit=1).records) == 1
    (kept,) = (tmp_path / "one" / "snapshots").iterdir()
    with Run.open(tmp_path / "all", stage="sft", settings={}) as run:
        assert len(read(Prompt, "growing:", run).records) == 3
    assert not (tmp_path / "all" / "snapshots" / kept.name).exists()


def test_a_source_read_as_two_kinds_of_record_is_two_sources(tmp_path: Path):
    """A world gives prompts and demonstrations, which have hashes of their own: a run of both was refused."""
    for _ in range(2):  # and again, as when it is resumed
        with Run.open(tmp_path / "run", stage="online", settings={}) as run:
            for kind in (Prompt, Demonstration):
                read(kind, "world:arithmetic?num=4", run)
    names = json.loads((tmp_path / "run" / "data.json").read_text()).keys()
    assert names == {"world:arithmetic?num=4", "world:arithmetic?num=4 as Demonstration"}


def test_prompts_that_are_judged_and_trained_on_are_counted_and_said(tmp_path, base, pairs, capsys):
    held_out = tmp_path / "held_out.jsonl"
    other = json.dumps({"prompt": "What is 1000 + 1?", "chosen": "1001", "rejected": "No."}) + "\n"
    held_out.write_text("".join(pairs.read_text().splitlines(keepends=True)[:5]) + other)
    for stage, more in (("reward", {"max_steps": 1}), ("preference", {"loss": "dpo", "max_steps": 1})):
        values = {"model": str(base), "data": str(pairs), "held_out_data": str(held_out), **more}
        done = trimtab(stage, write_run_file(tmp_path / f"{stage}.toml", values), "--out", tmp_path / stage)
        assert done.exit_code == 0, done.output
        assert f"{held_out}: 5 of 6 held-out prompts are trained on too" in done.stderr
        assert summary(tmp_path / stage)["counts"]["held_out_prompts_trained_on"] == 5
    held_out.write_text(other)
    run_stage("reward", tmp_path / "apart", model=str(base), data=str(pairs), held_out_data=str(held_out), max_steps=1)
    assert "held_out_prompts_trained_on" not in summary(tmp_path / "apart")["counts"]
