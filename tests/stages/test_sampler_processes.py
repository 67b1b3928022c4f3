"""Online training whose replies are drawn by processes of their own, through the command line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.stages.commands import rows, run_stage, trimtab, write_run_file
from tests.stages.test_resume import start, wait_for_rows
from tests.stages.test_workers import assert_near, children, is_there, settings_of
from trimtab.core.errors import EngineError
from trimtab.engines.local.learner import LocalLearner

VLLM = os.environ.get("TRIMTAB_VLLM")
ENGINES = {"process": {"name": "process"}} | ({"vllm": {"name": "vllm", "python": VLLM}} if VLLM else {})


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose heads are wide enough for vLLM's attention on a CPU."""
    from tests import tiny

    return tiny.write_model_directory(tmp_path_factory.mktemp("wide") / "model", hidden_size=64)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, wide, reward_run):
    """Four steps in one process."""
    return run_stage("online", tmp_path_factory.mktemp("samplers") / "alone", **settings_of(wide, reward_run))


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_is_the_one_without_them(name, tmp_path, wide, reward_run, alone):
    run_file = write_run_file(tmp_path / "run.toml", settings_of(wide, reward_run, engine={"sampler": ENGINES[name]}))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert_near(tmp_path / "run", alone)
    result = trimtab("online", run_file, "--out", tmp_path / "run", "num_steps=5", "engine.sampler.name=local")
    assert f"engine.sampler.name {name} → local" in result.output


@pytest.mark.parametrize("name", ENGINES)
def test_a_killed_run_leaves_nothing_and_goes_on_to_the_same_end(name, tmp_path, wide, reward_run, alone):
    out = tmp_path / "run"
    settings = settings_of(wide, reward_run, engine={"sampler": ENGINES[name]})
    run_file = write_run_file(tmp_path / "run.toml", settings)
    process = start("online", run_file, out)
    wait_for_rows(process, out, 2)
    sampler = children(process)[0]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while (is_there(sampler) or weights_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_there(sampler)
    assert not weights_of(process.pid)
    assert trimtab("online", run_file, "--out", out).exit_code == 0
    assert_near(out, alone)


def test_a_request_to_stop_that_reaches_all_processes_saves_the_step(tmp_path, wide, reward_run, alone):
    """Batch systems and `timeout` send SIGTERM to every process of a job."""
    out = tmp_path / "run"
    run_file = write_run_file(
        tmp_path / "run.toml", settings_of(wide, reward_run, engine={"sampler": ENGINES["process"]})
    )
    process = start("online", run_file, out)
    wait_for_rows(process, out, 1)
    for pid in (*children(process), process.pid):
        os.kill(pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "saved in" in said
    assert "to go on" in said
    assert trimtab("online", run_file, "--out", out).exit_code == 0
    assert_near(out, alone)


def weights_of(pid: int) -> list[Path]:
    """The weights that a process sent to its samplers and that still take up memory."""
    return list(Path("/dev/shm").glob(f"trimtab-weights-{pid}-*"))


SHAPES = {
    "whole": {},
    "an adapter, whose reference is its base": {"adapter": {"rank": 2}},
    "two processes with shards": {"engine": {"workers": 2, "shard": True}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ENGINES)
def test_a_lag_is_the_one_of_the_local_sampler(name, shape, tmp_path, wide, reward_run):
    """The processes draw while the policy learns, and the local sampler before it: the same replies."""
    lagging = {"correction": {"kind": "truncate"}, "checkpoint_every": 100} | SHAPES[shape]
    engine = {"max_staleness": 1} | lagging.pop("engine", {})
    local, apart = (
        run_stage("online", tmp_path / str(n), **settings_of(wide, reward_run, engine=engine | more, **lagging))
        for n, more in enumerate([{}, {"sampler": ENGINES[name]}])
    )
    assert [row["rollout/version"] for row in rows(apart)] == [0, 0, 1, 2]
    assert all("time/wait_for_rollouts_seconds" in row for row in rows(apart))
    assert not any("time/wait_for_rollouts_seconds" in row for row in rows(local))
    assert_near(apart, local)


def test_a_failed_run_starts_no_sampler_again(tmp_path, wide, reward_run, monkeypatch, capfd):
    """The thread that draws loses its processes when the run ends."""
    update = LocalLearner.update

    def fails(self, work):
        if self.updates_done >= 4:
            raise EngineError("the loss is nan", where="here", fix="lower the rate")
        return update(self, work)

    monkeypatch.setattr(LocalLearner, "update", fails)
    slow = {"max_new_tokens": 200}  # so that it still draws
    settings = settings_of(wide, reward_run, engine={"max_staleness": 1, "sampler": ENGINES["process"]}, sampling=slow)
    settings |= {"correction": {"kind": "truncate"}, "checkpoint_every": 100, "group_size": 16}
    result = trimtab("online", write_run_file(tmp_path / "run.toml", settings), "--out", tmp_path / "run")
    assert "the loss is nan" in result.output
    assert "started again" not in result.output + capfd.readouterr().err
