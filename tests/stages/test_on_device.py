"""Every stage with its models on a pretend device: no operation mixes devices, and the metrics are those of the CPU."""

import contextlib

import pytest
import torch

from tests.engines import pretend
from tests.stages.commands import FAST, PROMPTS, SHORT, online_settings, rows, run_stage, summary
from trimtab.engines.device import EngineSettings

WORLD = "world:arithmetic?num=12"
ADAPTER = {"rank": 2}


@contextlib.contextmanager
def on_pretend_device(monkeypatch):
    """Inside this block every model is loaded to the pretend device."""
    to = torch.nn.Module.to

    def place(module, *args, **options):
        return pretend.on_device(module) if args == (pretend.DEVICE,) else to(module, *args, **options)

    with monkeypatch.context() as patch, pretend.watched() as log:
        patch.setattr(EngineSettings, "find_device", lambda _self: pretend.DEVICE)
        patch.setattr(torch.nn.Module, "to", place)
        yield log


def both(tmp_path, monkeypatch, stage, **settings):
    """The run directories of a stage on the CPU and on the device."""
    on_cpu = run_stage(stage, tmp_path / "cpu", **settings)
    with on_pretend_device(monkeypatch) as log:
        on_device = run_stage(stage, tmp_path / "device", **settings)
    assert log.operations > 100
    assert not log.mixed
    return on_cpu, on_device


ONLY_ROUNDING = "rollout/logprob_difference"
"""What sampler and learner say of one token, less each other: each side rounds in its own way, so both are small."""


def assert_same_numbers(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        numbers = {k: v for k, v in other.items() if isinstance(v, int | float) and not k.startswith("time/")}
        for side in (mine, numbers):
            assert side.get(ONLY_ROUNDING, 0) < 1e-5
        numbers.pop(ONLY_ROUNDING, None)
        assert {k: mine[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_sft(tmp_path, monkeypatch, base, adapter):
    settings = {"model": str(base), "data": WORLD, "batch_size": 4, "max_steps": 2, "held_out": 0.2, "optimizer": FAST}
    on_cpu, on_device = both(tmp_path, monkeypatch, "sft", **settings, **({"adapter": adapter} if adapter else {}))
    assert_same_numbers(rows(on_device), rows(on_cpu))


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_reward(tmp_path, monkeypatch, base, pairs, adapter):
    settings = {"model": str(base), "data": str(pairs), "batch_size": 4, "max_steps": 2, "optimizer": FAST}
    on_cpu, on_device = both(tmp_path, monkeypatch, "reward", **settings, **({"adapter": adapter} if adapter else {}))
    assert_same_numbers(rows(on_device), rows(on_cpu))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_preference(tmp_path, monkeypatch, base, other, pairs, loss):
    # Against another model as reference no pair is a tie, which rounding would decide.
    settings = {"model": str(base), "reference": str(other), "data": str(pairs), "batch_size": 4, "held_out": 0.2}
    on_cpu, on_device = both(tmp_path, monkeypatch, "preference", **settings, max_steps=2, loss=loss, optimizer=FAST)
    assert_same_numbers(rows(on_device), rows(on_cpu))


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_online(tmp_path, monkeypatch, base, reward_run, adapter):
    changed = {"adapter": adapter} if adapter else {}
    settings = online_settings(base, reward_run / "model", kl_estimator="exact", entropy_coef=0.01, **changed)
    on_cpu, on_device = both(tmp_path, monkeypatch, "online", **settings)
    assert_same_numbers(rows(on_device), rows(on_cpu))


def test_stages_that_sample(tmp_path, monkeypatch, base, reward_run):
    judged = {"prompts": PROMPTS, "sampling": SHORT, "rewards": [{"name": "model", "path": str(reward_run / "model")}]}
    for name, stage, settings in (
        ("select", "select", {**judged, "replies_per_prompt": 2, "max_steps": 1, "prompts_per_step": 4}),
        ("evaluate", "evaluate", {**judged, "num_prompts": 4, "baseline": str(base)}),
        ("compare", "compare", {"world": "arithmetic", "num_prompts": 24, "agreement": 0.6, "sampling": SHORT}),
    ):
        (tmp_path / name).mkdir()
        on_cpu, on_device = both(tmp_path / name, monkeypatch, stage, model=str(base), **settings)
        assert_same_numbers([summary(on_device)], [summary(on_cpu)])
