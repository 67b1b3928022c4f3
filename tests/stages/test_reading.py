"""What a run keeps of a source that lives on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
