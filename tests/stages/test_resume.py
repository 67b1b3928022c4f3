"""A run killed at any instant and started again ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stages.commands import FAST, online_settings, rows, run_stage, without_times, write_run_file

COMMAND = [sys.executable, "-c", "from trimtab.cli import main; main()"]
EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "data" / "kills.json"
NUM_STEPS = 6


@pytest.fixture(scope="module")
def settings(base, other, reward_run, pairs):
    """All the state there is: running moments, an adapted coefficient, a critic, a mix, schedules."""
    cosine = FAST | {"schedule": "cosine", "warmup_fraction": 0.3}
    supervised = {"model": str(base), "optimizer": cosine, "checkpoint_every": 1, "validate_every": 2}
    return {
        "online": online_settings(
            base,
            reward_run / "model",
            reference=str(other),
            num_steps=NUM_STEPS,
            checkpoint_every=1,
            group_size=2,
            optimizer=cosine,
            critic={"init": "reward", "optimizer": cosine, "warmup_steps": 1},
            shaping={"normalize": True, "clip": 2.0},
            kl={"name": "adaptive", "coef": 0.1, "target": 0.5, "horizon": 30.0},
            pretraining_mix={"data": "world:arithmetic?num=6", "batch_size": 4},
        ),
        "sft": supervised | {"data": "world:arithmetic?num=24", "held_out": 0.2, "batch_size": 4},
        "reward": supervised | {"data": str(pairs), "held_out": 0.3, "batch_size": 3},
    }


def start(stage: str, run_file: Path, out: Path) -> subprocess.Popen:
    """The stage in a process of its own, which has its own hash seed and address space."""
    return subprocess.Popen(
        [*COMMAND, stage, run_file, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def kill_after(process: subprocess.Popen, seconds: float) -> bool:
    """SIGKILL once the seconds are over; whether the process was still at work."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 0, "it must end well by itself"
    return False


def num_rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(process: subprocess.Popen, out: Path, num: int) -> None:
    while num_rows(out) < num and process.poll() is None:
        time.sleep(0.002)


def differences(one: Path, other: Path) -> list[str]:
    """Files of two finished runs that differ in more than times."""

    def content(directory: Path, name: str) -> bytes | None:
        path = directory / name
        return path.read_bytes() if path.exists() else None

    names = ("model/model.safetensors", "model/config.json", "samples.jsonl", "data.json", "summary.json")
    found = [name for name in names if content(one, name) != content(other, name)]
    return found if without_times(rows(one)) == without_times(rows(other)) else [*found, "metrics.jsonl"]


@pytest.mark.parametrize("stage", ["online", "sft", "reward"])
def test_killed_once_and_run_again_it_ends_with_the_same_bits(tmp_path, settings, stage):
    undisturbed = run_stage(stage, tmp_path / "undisturbed", **settings[stage])
    run_file, out = write_run_file(tmp_path / "run.toml", settings[stage]), tmp_path / "run"
    process = start(stage, run_file, out)
    wait_for_rows(process, out, 2)
    assert kill_after(process, random.Random(stage).uniform(0, 0.05)), "it was to be killed at work"
    done = num_rows(out)
    assert done >= 2
    run_stage(stage, out, **settings[stage])
    assert not differences(undisturbed, out)
    assert len(rows(out)) >= max(done, 5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["online"])
def test_killed_many_times_it_ends_with_the_same_bits(tmp_path, settings, stage):
    """Thirty kills (TRIMTAB_KILLS) at random moments: while the process loads, samples, updates, writes a checkpoint,
    the model or the summary. A run that finishes is compared and the next one begun."""
    wanted = int(os.environ.get("TRIMTAB_KILLS", "30"))
    draw = random.Random(0)
    run_file, undisturbed = write_run_file(tmp_path / "run.toml", settings[stage]), tmp_path / "undisturbed"
    began = time.perf_counter()
    process = start(stage, run_file, undisturbed)
    wait_for_rows(process, undisturbed, 1)
    loading = time.perf_counter() - began
    wait_for_rows(process, undisturbed, NUM_STEPS)
    one_step = (time.perf_counter() - began - loading) / (NUM_STEPS - 1)
    _, said = process.communicate()
    assert process.returncode == 0, said
    finishing = time.perf_counter() - began - loading - one_step * (NUM_STEPS - 1)

    rows_at_kill: list[int] = []
    phases: dict[str, int] = {}
    different: dict[str, list[str]] = {}
    num_runs = 0
    while len(rows_at_kill) < wanted:
        out = tmp_path / f"run-{num_runs}"
        while len(rows_at_kill) < wanted:
            before, more_steps = num_rows(out), draw.choice((0, 1, 1, 2))
            process = start(stage, run_file, out)
            if before >= NUM_STEPS:  # only the end is left
                length = loading + 2 * finishing
            elif more_steps == 0:
                length = loading
            else:
                wait_for_rows(process, out, min(before + more_steps, NUM_STEPS))
                length = one_step if before + more_steps < NUM_STEPS else finishing
            if not kill_after(process, draw.uniform(0, length)):
                break
            rows_at_kill.append(num_rows(out))
            phase = phase_of(out)
            phases[phase] = phases.get(phase, 0) + 1
        else:
            _, said = start(stage, run_file, out).communicate()
            assert (out / "summary.json").exists(), said
        num_runs += 1
        if found := differences(undisturbed, out):
            different[out.name] = found

    figures = {
        "stage": stage,
        "num_steps": NUM_STEPS,
        "kills": len(rows_at_kill),
        "runs": num_runs,
        "rows_logged_at_each_kill": rows_at_kill,
        "left_behind_by_kills": dict(sorted(phases.items())),
        "identical": not different,
        "compared": "model/ config.json and model.safetensors, samples, data and summary, metrics without time/",
        "different": different,
    }
    print(json.dumps(figures, indent=2))
    if os.environ.get("TRIMTAB_EVIDENCE") == "1":
        EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
        EVIDENCE.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    assert not different
    assert any(rows_at_kill), "no kill came after the first step; the machine is too busy to tell"


def phase_of(out: Path) -> str:
    """What the kill left: the newest thing on disk says how far the process had come."""
    checkpoints = sorted(path.name for path in (out / "checkpoints").glob("*")) if out.exists() else []
    if (out / "model").exists():
        return "model written, no summary"
    if any(path.name.startswith(".writing-") for path in out.glob(".writing-*")):
        return "half a model"
    if any(name.startswith(".writing-") for name in checkpoints):
        return "half a checkpoint"
    if not checkpoints:
        return "no checkpoint yet" if num_rows(out) else "no step yet"
    newest = int(checkpoints[-1].removeprefix("step-"))
    return "a step logged that no checkpoint holds" if num_rows(out) > newest else "within a step"
