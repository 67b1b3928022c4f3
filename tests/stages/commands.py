"""Stages run as a user runs them: a run file, and the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from trimtab import cli
from trimtab.core import config

PROMPTS = "world:arithmetic?num=8"
SHORT = {"max_new_tokens": 8}
FAST = {"learning_rate": 1e-3}


def trimtab(*arguments: object, stdin: str | None = None) -> Result:
    """The command's result; a bug's traceback is raised, a mistake's message is in `output`."""
    result = CliRunner().invoke(cli.main, [*map(str, arguments)], prog_name="trimtab", input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_run_file(path: Path, settings: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_toml(settings), encoding="utf-8")
    return path


def run_stage(stage: str, out: Path, **settings: object) -> Path:
    """Runs a stage to its end and returns its run directory."""
    run_file = write_run_file(out.with_suffix(".toml"), settings)
    result = trimtab(stage, run_file, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def online_settings(base: Path, reward: Path, **changed: object) -> dict:
    """Two short steps of PPO against a reward model."""
    return {
        "model": str(base),
        "prompts": PROMPTS,
        "rewards": [{"name": "model", "path": str(reward)}],
        "world": "arithmetic",
        "critic": {"init": "policy", "optimizer": FAST},
        "sampling": SHORT,
        "prompts_per_step": 4,
        "num_steps": 2,
        "num_epochs": 2,
        "num_minibatches": 2,
        "optimizer": FAST,
        "sample_every": 1,
        "num_samples": 100,
    } | changed


def rows(directory: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


def without_times(found: list[dict]) -> list[dict]:
    """Rows of metrics.jsonl that must be equal in equal runs."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in found]
