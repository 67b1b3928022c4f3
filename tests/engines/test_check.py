"""`trimtab check` says what a machine is, and finds a way of computing that gives other numbers."""

import pytest
import torch

from tests.stages.commands import trimtab
from trimtab.engines import check
from trimtab.engines.local.scorer import LocalScorer
from trimtab.engines.machines import find_machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(check, "SECONDS", 0.01)


def test_a_machine_that_is_right(tmp_path):
    result = trimtab("check", "--workers", 1, "--out", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    for line in ("products in float32", "memory", "replies, fused", "replies, lockstep", f"disk at {tmp_path}"):
        assert line in result.output
    assert result.output.endswith("all agree\n")
    (file,) = (tmp_path / "runs").iterdir()
    constants = find_machine(str(file)).constants
    measured = {name for name, constant in constants.items() if constant.origin == "measured"}
    assert measured == {"float32_products", "bfloat16_products", "bandwidth", "memory", "context"}
    assert f"trimtab plan FILE --on {file}" in result.output


def test_log_probabilities_that_differ_are_found(tmp_path, monkeypatch):
    right = LocalScorer.logprobs
    monkeypatch.setattr(LocalScorer, "logprobs", lambda *args: right(*args) + 0.01)
    result = trimtab("check", "--workers", 1, "--out", tmp_path)
    assert result.exit_code == 1
    assert "0.01 nats from the scorer's" in result.output
    assert result.output.endswith("something is wrong\n")
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    result = trimtab("check", "--workers", 1, "--out", tmp_path / "file" / "runs")
    assert result.exit_code == 1
    assert "cannot be written" in result.output


def test_a_device_that_is_not_there_is_said_and_nothing_of_processes():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the refusal needs one without")
    result = trimtab("check", "--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no GPU" in result.output
    assert "workers" not in result.output


@pytest.mark.slow
def test_several_processes_are_started_and_make_the_update_of_one(tmp_path):
    result = trimtab("check", "--workers", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "an update in 2 processes" in result.output


def test_sampler_processes_are_started_and_draw_the_same(tmp_path):
    result = trimtab("check", "--workers", 1, "--sampler", "process", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "samplers, process                started in" in result.output
    assert "replies, process                 32 of 32 replies as drawn first" in result.output


def test_overrides_are_those_of_the_engine(tmp_path):
    result = trimtab("check", "engine.sampler.nme=vllm", "--out", tmp_path)
    assert result.exit_code == 2
    assert "did you mean 'name'" in result.output or "engine.sampler.nme" in result.output
    result = trimtab("check", "engine.sampler.name=vllm", f"engine.sampler.python={tmp_path}/none", "--out", tmp_path)
    assert result.exit_code == 2
    assert "cannot be run" in result.output
