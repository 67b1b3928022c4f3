"""A disk that refuses is answered with a sentence, and what was there before is whole."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trimtab.core.errors import EngineError
from trimtab.core.files import check_out, disk_problem, json_lines, json_text, write_out, write_whole, writing
from trimtab.runs.run import Run

SETTINGS = {"model": "m"}


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may become larger, which the system says as it does of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_much(path: Path) -> None:
    (path / "weights.bin").write_bytes(b"x" * 100_000)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with small_disk(1000), pytest.raises(EngineError, match="could not be written: File too large"):
        write_out(path, "new" * 1000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_is_followed_and_stays(tmp_path: Path):
    target, link = tmp_path / "there" / "x.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    for text in ("one", "two"):
        write_out(link, text)
        assert link.is_symlink()
        assert target.read_text() == text


def test_a_pipe_gets_the_text(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_out(pipe)
    write_out(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    write_out(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_standard_output_that_is_a_file_keeps_what_it_holds(tmp_path: Path):
    code = "from pathlib import Path; from trimtab.core.files import write_out; write_out(Path('/dev/stdout'), 'two')"
    (tmp_path / "log").write_text("one ")
    with (tmp_path / "log").open("a") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "one two"


def test_a_place_is_checked_and_what_lies_there_stays(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("before")
    check_out(tmp_path / "a.jsonl")
    check_out(tmp_path / "new" / "b.jsonl")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.jsonl", "new"]
    assert (tmp_path / "a.jsonl").read_text() == "before"
    for place in ("/proc/nope/x.jsonl", tmp_path / "a.jsonl" / "x.jsonl"):
        with pytest.raises(EngineError, match="could not be written"):
            check_out(Path(place))


def test_whatever_a_run_writes_ends_with_a_sentence_and_nothing_damaged(tmp_path: Path):
    with Run.open(tmp_path / "run", stage="sft", settings=SETTINGS) as run:
        run.log(1, {"loss/train": 1.0})
        run.save_checkpoint(1, lambda path: (path / "a.txt").write_text("one"))
        run.save_model(lambda path: (path / "a.txt").write_text("one"))
        long = {f"metric/{i}": 1.0 for i in range(1000)}
        for write in (
            lambda: run.log(2, long),
            lambda: run.add_samples(2, [{"response": "x" * 10_000}]),
            lambda: run.add_data("x" * 10_000, "00", 1),
            lambda: run.save_checkpoint(2, write_much),
            lambda: run.save_model(write_much),
            lambda: run.finish({"text": "x" * 10_000}),
            lambda: run.note_path("sampler", "x" * 10_000),
        ):
            with small_disk(2000), pytest.raises(EngineError) as caught:
                write()
            assert "could not be written: File too large" in caught.value.problem
            assert "make room" in caught.value.fix
    with Run.open(tmp_path / "run", stage="sft", settings=SETTINGS) as run:
        assert not run.finished
        assert run.load_checkpoint() == (1, tmp_path / "run" / "checkpoints" / "step-00000001")
        run.rewind(1)
        assert [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()] == [1]
        assert (run.model_dir / "a.txt").read_text() == "one"
    assert not list(tmp_path.rglob(".writing-*"))


def test_a_directory_below_a_file_is_answered(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="Not a directory"):
        Run.open(tmp_path / "file" / "run", stage="sft", settings=SETTINGS)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a/b"), "No space left on device: a/b"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), "PytorchStreamWriter failed"),
        (ValueError("no"), ""),
        (ConnectionResetError(104, "reset"), ""),
    ],
)
def test_what_the_disk_refuses_is_told_from_other_errors(error: Exception, said: str):
    assert disk_problem(error).startswith(said)
    assert bool(disk_problem(error)) == bool(said)


def test_other_errors_travel_on(tmp_path: Path):
    with pytest.raises(KeyError), writing("it", tmp_path):
        raise KeyError("bug")


@pytest.mark.parametrize(
    "words",
    [
        ["world", "arithmetic", "--rows", "3", "--out", "file/below"],
        ["world", "arithmetic", "--rows", "3", "--out", "/proc/trimtab"],
        ["report", "run", "--out", "file/below/page.html"],
    ],
)
def test_a_command_that_cannot_write_says_so_in_a_sentence(words: list[str], tmp_path: Path):
    (tmp_path / "file").write_text("")
    with Run.open(tmp_path / "run", stage="sft", settings=SETTINGS) as run:
        run.finish({})
    code = "from trimtab.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert f"where: {words[-1]}" in done.stderr
    assert "Traceback" not in done.stderr


def test_half_a_character_is_written_as_a_question_mark(tmp_path: Path):
    found = {"rows\udcff.jsonl": 1, "text": "Zürich 😀"}  # the name of a file that is not UTF-8
    write_out(tmp_path / "found.json", json_text(found))
    write_out(tmp_path / "found.jsonl", json_lines([found]))
    for name in ("found.json", "found.jsonl"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert json.loads(text) == {"rows?.jsonl": 1, "text": "Zürich 😀"}
