"""The page of a pipeline or a loop: its rounds one after the other, live, with its stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.reports.fabricate import write_pipeline, write_run
from tests.reports.test_run_page import Page
from tests.ui.fabricated import Reader, append, rows_of, write_loop
from trimtab.runs.run import Run, holding


def test_the_page_of_a_loop_shows_its_rounds(tmp_path: Path):
    loop = write_loop(tmp_path / "loop", rounds=2)
    append(loop / "dpo_2" / "metrics.jsonl", {"step": 31, "loss/train": None})
    reader = Reader(tmp_path)
    assert '<a href="/pipeline?name=loop">loop</a>' in reader.text("/")
    text = reader.text("/pipeline", name="loop")
    rows = rows_of(text.replace('<td class="name">', '<td></td><td class="name">'))
    assert list(rows) == ["select_1", "dpo_1", "select_2", "dpo_2", "evaluate"]
    assert rows["dpo_1"].startswith("finished | preference | 30")
    assert rows["dpo_2"].startswith("failed | preference | 31")
    assert rows["evaluate"].startswith("not begun | evaluate")
    page = Page(text)
    assert "3 of 5 stages finished" in page.text
    assert "dpo_2: not a finite number at some step: loss/train" in page.text
    assert "select_2, step 0" in page.text
    assert page.text.index("reply 2") < page.text.index("reply 1")  # the newest round first
    assert "[stages.dpo_2]" in page.text
    assert f"trimtab run {loop}/pipeline.toml --out {loop}" in page.text
    assert "step 60: " in text  # the second round is drawn after the 30 steps of the first
    assert "all of loop</a>" in reader.text("/run", name="loop/dpo_2")


def test_runs_that_start_from_the_same_model_are_drawn_over_one_another(tmp_path: Path):
    write_pipeline(tmp_path / "whole")
    text = Reader(tmp_path).text("/pipeline", name="whole")
    assert "6 of 6 stages finished" in Page(text).text
    assert "step 200: " in text
    assert "step 400: " not in text


def test_what_a_loop_writes_reaches_its_page_as_it_does_that_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trimtab.ui import app

    loop = write_loop(tmp_path / "loop", rounds=1)
    monkeypatch.setattr(app, "EVERY_SECONDS", 0.25)
    reader = Reader(tmp_path)
    looks = []

    def ending() -> bool:
        """After each look the loop goes on: a new sample, a new stage, a new step of it; then the server ends."""
        looks.append(len(looks))
        if len(looks) == 1:
            append(loop / "select_1" / "samples.jsonl", {"step": 0, "prompt": "new", "response": "new <b>reply</b>"})
        elif len(looks) == 2:
            write_run(loop / "evaluate", stage="evaluate")
        return len(looks) > 3

    reader.watch.ending = ending
    events = [line for line in reader.client.get("/live/pipeline", params={"name": "loop"}).text.split("\n\n") if line]
    found = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: ")]
    assert set(found[0]) == {"state", "alarms", "curves", "guard", "samples", "file"}
    assert "new &lt;b&gt;reply" in found[1]["samples"]
    assert "not begun" in found[0]["state"]
    assert "not begun" not in found[2]["state"]
    assert reader.watch.num_streams == 0


def test_a_running_stage_can_be_asked_to_stop_from_the_page_of_its_loop(tmp_path: Path):
    loop = write_loop(tmp_path / "loop", rounds=1)
    with holding(loop), Run.open(loop / "evaluate", stage="evaluate", settings={}):
        text = Reader(tmp_path).text("/pipeline", name="loop")
    assert 'name="name" value="loop/evaluate"' in text
    assert f'name="process" value="{os.getpid()}"' in text
    assert '<span class="chip running"' in text
    assert "later stages of its pipeline do not begin" in text
