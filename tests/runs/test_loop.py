"""A run killed at any instant ends where an uninterrupted one ends."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs.hash_chain import Chain, run_chain, run_steps
from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.metrics import Mean, Metrics, Total
from trimtab.runs.loop import shown_with_progress
from trimtab.runs.run import Run

SCRIPT = Path(__file__).with_name("hash_chain.py")
STEPS = 60


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def digest_after(num_steps: int) -> str:
    digest = "start"
    for _ in range(num_steps):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows without their times."""
    lines = path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def check_whole(directory: Path, num_steps: int) -> None:
    """The run is what the chain's definition says, row by row."""
    digests = [digest_after(i) for i in range(1, num_steps + 1)]
    values = [int(digest[:12], 16) / 16**12 for digest in digests]
    assert json.loads((directory / "summary.json").read_text()) == {"digest": digests[-1]}
    assert (directory / "model" / "weights.txt").read_text() == digests[-1]
    assert rows(directory / "metrics.jsonl") == [
        {"step": i, "chain/value": value} for i, value in enumerate(values, start=1)
    ]
    assert rows(directory / "samples.jsonl") == [
        {"step": i, "value": value, "text": digest}
        for i, (value, digest) in enumerate(zip(values, digests, strict=True), start=1)
    ]
    assert not list(directory.rglob(".writing-*"))


def test_an_uninterrupted_run_is_what_its_definition_says(tmp_path: Path):
    run_chain(tmp_path / "run", STEPS, 7)
    check_whole(tmp_path / "run", STEPS)


def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path: Path):
    moments = random.Random(0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    kills = 0
    while kills < 6:
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = start(tmp_path / "run", STEPS, 3, 0.004)
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.1)
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert kills >= 2
    run_chain(tmp_path / "run", STEPS, 3)
    check_whole(tmp_path / "run", STEPS)


def test_a_run_killed_before_any_of_its_file_operations_ends_as_an_uninterrupted_one(tmp_path: Path):
    process = start("crash-points", tmp_path, 3, 1)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    directories = list(tmp_path.iterdir())
    assert len(directories) > 60  # opening, three checkpoints and a pruned one, rows, the model, the summary
    for directory in directories:
        check_whole(directory, 3)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_in_hand_and_the_same_command_goes_on(tmp_path: Path, sent: signal.Signals):
    process = start(tmp_path / "run", STEPS, 1000, 0.02)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(sent)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopping after this step" in errors
    done = len(rows(tmp_path / "run" / "metrics.jsonl"))
    assert 0 < done < STEPS
    assert f"stopped after step {done} of {STEPS}, saved in {tmp_path / 'run'}" in output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    run_chain(tmp_path / "run", STEPS, 1000)
    check_whole(tmp_path / "run", STEPS)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = tmp_path / "run"
    run_chain(directory, STEPS, 7)
    (directory / "summary.json").unlink()  # as if killed before the end
    damaged = directory / "checkpoints" / f"step-{STEPS:08d}" / "second.txt"
    content = bytearray(damaged.read_bytes())
    content[3] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    run_chain(directory, STEPS, 7)
    warning = capsys.readouterr().err
    assert f"step-{STEPS:08d} is damaged (second.txt does not match SHA256SUMS)" in warning
    assert (directory / "checkpoints" / f"damaged-{STEPS:08d}" / "second.txt").read_bytes() == content
    check_whole(directory, STEPS)


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path):
    first = start(tmp_path / "run", STEPS, 1000, 0.1)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    second = start(tmp_path / "run", STEPS, 1000, 0.1)
    _, errors = second.communicate(timeout=10)
    first.kill()
    first.communicate()
    assert second.returncode != 0
    assert f"is in use by process {first.pid}" in errors


def test_an_engine_error_names_the_last_good_checkpoint(tmp_path: Path):
    chain = Chain()

    def step(i: int) -> Metrics:
        chain.advance()
        if i == 5:
            raise EngineError("the loss is nan", where="the policy update", fix="lower the learning rate")
        return {}

    with Run.open(tmp_path / "run", stage="chain", settings={}) as run, pytest.raises(EngineError) as caught:
        run_steps(run, chain, num_steps=9, step=step, checkpoint_every=2)
    assert caught.value.problem == "the loss is nan"
    assert caught.value.where == f"the policy update, step 6 of {tmp_path / 'run'}"
    assert caught.value.fix.startswith("lower the learning rate; the last good checkpoint is ")
    assert caught.value.fix.endswith("step-00000004")


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path: Path):
    class FullAfterFour(Chain):
        def save(self, path: Path) -> None:
            super().save(path)
            if steps_done >= 4:
                raise OSError(28, os.strerror(28))

    chain = FullAfterFour()
    steps_done = 0

    def step(i: int) -> Metrics:
        nonlocal steps_done
        steps_done = i + 1
        chain.advance()
        return {}

    with Run.open(tmp_path / "run", stage="chain", settings={}) as run:
        with pytest.raises(EngineError, match=r"step 4 could not be written: .*No space left on device"):
            run_steps(run, chain, num_steps=9, step=step, checkpoint_every=2)
        assert run.load_checkpoint() == (2, tmp_path / "run" / "checkpoints" / "step-00000002")
        assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_progress_says_what_the_step_was_about():
    online = {
        "rollout/length_mean": Mean(30, 1),
        "time/step_seconds": Total(1.0),
        "reward/mean": Mean(3, 2),
        "policy/kl": Mean(0.25, 1),
    }
    assert shown_with_progress(online) == "  reward 1.5  KL 0.25  length 30"
    assert shown_with_progress({"chain/value": Mean(1, 2)}) == "  chain/value 0.5"
    assert shown_with_progress({"time/step_seconds": Total(1.0)}) == ""


def test_a_run_that_has_come_further_than_is_asked_is_refused(tmp_path: Path):
    with Run.open(tmp_path, stage="chain", settings={}) as run:
        run_steps(run, Chain(), num_steps=4, step=lambda i: {}, checkpoint_every=1)
        with pytest.raises(ConfigError, match="has done 4 steps, and 3 are asked for"):
            run_steps(run, Chain(), num_steps=3, step=lambda i: {}, checkpoint_every=1)
