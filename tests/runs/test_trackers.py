"""Trackers show what metrics.jsonl holds, resumed runs included."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from trimtab.core.errors import EngineError
from trimtab.runs.run import Run
from trimtab.runs.trackers import TensorBoard, WeightsAndBiases


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, value in [(1, 5, 1.0), (4, 7, 2.0)]:  # killed after step 5, resumed from a checkpoint of step 3
        with Run.open(tmp_path, stage="sft", settings={}, trackers=[TensorBoard()]) as run:
            run.rewind(first - 1)
            for step in range(first, last):
                run.log(step, {"loss/train": value, "reward/mean": 0.0})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert "reward/mean" in events.Tags()["scalars"]


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is not None, reason="wandb is installed; uninstall it to see this"
)
def test_a_missing_tracker_library_is_answered_with_the_command_that_installs_it(tmp_path: Path):
    with pytest.raises(EngineError) as caught:
        Run.open(tmp_path, stage="sft", settings={}, trackers=[WeightsAndBiases()])
    assert "pip install 'trimtab[wandb]'" in caught.value.fix
    Run.open(tmp_path, stage="sft", settings={}).close()  # and the directory is not left locked
