"""Which process writes a run, how a run ended, and the request to stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.errors import ConfigError, EngineError, Interrupted
from trimtab.runs.loop import stepping
from trimtab.runs.run import Run, holding
from trimtab.runs.state import LOCK, STATE, holder_of, note_state, read_state, stop_holder

# Deaf to the signal of Ctrl-C, as what a script begins in the background is.
HOLD = """
import signal, sys, time
from trimtab.cli.helpers import sigterm_raised
from trimtab.runs.run import Run
signal.signal(signal.SIGINT, signal.SIG_IGN)
with sigterm_raised(), Run.open(sys.argv[1], stage="probe", settings={}) as run:
    print("open", flush=True)
    time.sleep(60)
"""


def opened(directory: Path) -> Run:
    return Run.open(directory, stage="probe", settings={})


@pytest.fixture
def held(tmp_path: Path):
    """A run that another process writes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield tmp_path / "run", process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_process_that_writes_a_run_is_known_and_stops_also_in_the_background(held):
    directory, process = held
    assert holder_of(directory) == process.pid
    assert stop_holder(directory) == process.pid
    process.wait(timeout=20)
    assert holder_of(directory) is None
    assert read_state(directory)["ended"] == "stopped"


def test_looking_does_not_keep_a_run_from_being_opened(tmp_path: Path):
    opened(tmp_path / "run").close()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert holder_of(tmp_path / "run") is None
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_another_process_with_the_number_of_the_lock_is_not_signalled(tmp_path: Path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / LOCK).write_text(str(stranger.pid))
        assert holder_of(tmp_path) is None
        with pytest.raises(ConfigError, match="no process of this machine writes"):
            stop_holder(tmp_path)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_directory_is_held_by_one_at_a_time(tmp_path: Path):
    with holding(tmp_path):
        assert holder_of(tmp_path) == os.getpid()
        with pytest.raises(ConfigError, match="is in use by process"), holding(tmp_path):
            pass
    assert holder_of(tmp_path) is None
    with holding(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "no number", "-1", "999999999"])
def test_a_lock_that_names_no_process_has_no_holder(tmp_path: Path, text: str):
    (tmp_path / LOCK).write_text(text)
    assert holder_of(tmp_path) is None
    with pytest.raises(ConfigError):
        stop_holder(tmp_path)


@pytest.mark.parametrize(
    ("error", "ended", "said"),
    [
        (Interrupted("stopped after step 3"), "stopped", "stopped after step 3"),
        (EngineError("the loss is not finite", where="a", fix="b"), "failed", "the loss is not finite"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
    ],
)
def test_a_run_records_how_its_process_ended_until_it_is_opened_again(tmp_path: Path, error, ended, said):
    def fail() -> None:
        with opened(tmp_path):
            note_state(tmp_path, num_steps=7)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert read_state(tmp_path) == {"num_steps": 7, "ended": ended, "said": said}
    with opened(tmp_path):
        assert read_state(tmp_path) == {}


def test_a_finished_run_does_not_fail_afterwards(tmp_path: Path):
    def fail() -> None:
        with opened(tmp_path) as run:
            run.finish({})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read_state(tmp_path) == {}


def test_the_loop_records_how_many_steps_there_are_to_be(tmp_path: Path):
    class Nothing:
        def save(self, path: Path) -> None: ...

        def load(self, path: Path) -> None: ...

    with (
        opened(tmp_path) as run,
        stepping(run, Nothing(), num_steps=2, checkpoint_every=1, description="probe") as steps,
    ):
        for _ in steps:
            steps.log({})
    assert read_state(tmp_path) == {"num_steps": 2}


def test_a_damaged_record_says_nothing(tmp_path: Path):
    (tmp_path / STATE).write_text("[1]")
    assert read_state(tmp_path) == {}
    (tmp_path / STATE).write_text("{")
    assert read_state(tmp_path) == {}
