"""The walk from a command to the backward pass: few frames of this package, in few files."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest
import torch

import trimtab
from tests.stages.commands import online_settings, run_stage
from trimtab.engines.local.learner import LocalLearner
from trimtab.stages import online

PACKAGE = Path(trimtab.__file__).parent


def frames_at_backward(monkeypatch: pytest.MonkeyPatch, run) -> list[str]:
    """The functions of this package that are active when the first backward pass begins, outermost first."""
    found: list[str] = []
    backward = torch.Tensor.backward

    def noted(self, *arguments, **options):
        if not found:
            frame = sys._getframe(1)
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(PACKAGE):
                    found.append(f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}")
                frame = frame.f_back
        return backward(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    run()
    return found[::-1]


@pytest.mark.parametrize("stage", ["online", "sft", "reward", "preference"])
def test_a_command_reaches_the_backward_pass_in_five_frames_and_three_files(
    stage, tmp_path, base, pairs, reward_run, monkeypatch
):
    settings = {
        "online": lambda: online_settings(base, reward_run / "model", num_steps=1),
        "sft": lambda: {"model": str(base), "data": "world:arithmetic?num=8", "max_steps": 1},
        "reward": lambda: {"model": str(base), "data": str(pairs), "max_steps": 1, "held_out": 0.3},
        "preference": lambda: {"model": str(base), "data": str(pairs), "max_steps": 1, "held_out": 0.3},
    }[stage]()
    frames = frames_at_backward(monkeypatch, lambda: run_stage(stage, tmp_path / "run", **settings))
    own = f"stages/{stage}/__init__.py" if stage == "online" else f"stages/{stage}.py"
    steps = [f"{own}:run", *([f"{own}:train_step"] if stage == "online" else [])]
    assert frames == ["cli/__init__.py:invoke", "cli/__init__.py:invoke", *steps, "engines/local/learner.py:update"]


def test_ppo_is_a_step_of_thirty_lines():
    source = inspect.getsource(online.train_step)
    (function,) = ast.parse(source).body
    body = function.body[1:]  # without its documentation
    lines = {n for node in body for n in range(node.lineno, node.end_lineno + 1)}
    assert len(lines) <= 30
    branches = [n for n in ast.walk(function) if isinstance(n, ast.If | ast.For | ast.While | ast.IfExp)]
    assert len(branches) <= 8


def test_the_learner_owns_the_one_backward_pass():
    calls = [
        path
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    ]
    assert calls == [Path(inspect.getsourcefile(LocalLearner))]
