"""An online run with a guard, and ends that a guarded run may come to."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from tests.stages.commands import online_settings, rows
from trimtab.runs.run import Run

FUNCTIONS = Path(__file__).with_name("reward_functions.py")
CHECKS = "world:arithmetic?split=test&num=16"
LADDER = ["raise_kl", "roll_back", "stop"]
TAKEN = [(1, "raise_kl"), (2, "roll_back"), (3, "stop")]

KILLED_AT = """
import os, signal, sys
from trimtab.cli import main
from trimtab.runs.run import Run
written = Run.add_rows
def add_rows(self, name, step, rows):
    written(self, name, step, rows)
    if any(row.get("event") == sys.argv[1] for row in rows):
        os.kill(os.getpid(), signal.SIGKILL)
Run.add_rows = add_rows
main(sys.argv[2:])
"""


def judge(name):
    return {"name": "callable", "function": f"{FUNCTIONS}:{name}"}


def hacked(base, *, guard, **changed):
    """Eight steps that learn to write longer replies, with a guard that prefers brief ones."""
    guard = {"measure": [judge("brief")], "prompts": CHECKS, "every": 1, "patience": 1} | guard
    return (
        online_settings(base, base)
        | {
            "rewards": [judge("length")],
            "advantage": {"name": "rloo"},
            "loss": {"name": "reinforce"},
            "kl": {"name": "fixed", "coef": 0.0},
            "prompts_per_step": 8,
            "group_size": 4,
            "num_epochs": 1,
            "num_minibatches": 1,
            "num_steps": 8,
            "checkpoint_every": 3,
            "optimizer": {"learning_rate": 1e-2},
            "guard": guard,
        }
        | changed
    )


def scripted(path, values):
    """A measure that gives check i the mean `values[i]`, whatever the replies are; 16 replies are a check."""
    path.write_text(
        f"values, calls = {values}, []\n"
        "def judge(prompt, response, facts):\n"
        "    calls.append(1)\n"
        "    return values[(len(calls) - 1) // 16] + 0.01 * (facts['answer'] % 3)\n"
    )
    return {"name": "callable", "function": f"{path}:judge"}


def actions(out):
    return [(row["step"], row["event"]) for row in rows(out, "guard.jsonl") if row["event"] != "check"]


def checks(out):
    return [row for row in rows(out, "guard.jsonl") if row["event"] == "check"]


def weights(model):
    return load_file(model / "model.safetensors")


def same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    return all((ours[name] == theirs[name]).all() for name in ours)


def decision(out):
    return json.loads((out / "decision.json").read_text(encoding="utf-8"))


class Crash(BaseException):
    """The end of the process, but for what it has in memory."""


def damaging(monkeypatch, step):
    saved = Run.save_checkpoint

    def damaged(self, number, *args, **options):
        saved(self, number, *args, **options)
        if number == step:
            (self.directory / "checkpoints" / f"step-{step:08d}" / "policy.safetensors").write_bytes(b"")

    monkeypatch.setattr(Run, "save_checkpoint", damaged)
