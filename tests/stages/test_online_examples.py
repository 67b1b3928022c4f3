"""The shipped run files of the online family: each is read, and its stage and its evaluation run cut down."""

from __future__ import annotations

import tomllib

import pytest

from tests.stages.commands import rows, summary, trimtab
from trimtab import cli
from trimtab.core import config
from trimtab.stages.pipeline import resolve_stages

EXAMPLES = cli.examples_dir() / "online"
ALGORITHMS = ("cispo", "dapo", "dr_grpo", "gspo", "grpo", "reinforce_pp", "rloo")
PAGE = EXAMPLES.parents[1] / "docs" / "algorithms" / "online.md"


def test_there_is_a_run_file_for_each_algorithm():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_shipped_run_file_is_valid_and_its_stage_has_its_name(tmp_path, name):
    stages = resolve_stages(config.load_run_file(EXAMPLES / f"{name}.toml"), tmp_path, where=name)
    assert list(stages) == [name, "evaluate"]
    assert stages[name][0] == "online"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_shipped_run_file_runs_when_cut_down(tmp_path, base, reward_run, name):
    """One step with the tiny models; everything that makes the algorithm stays as it is."""
    stage = f"stages.{name}"
    overrides = [f"variables.policy={base}", f"variables.reward_model={reward_run / 'model'}"]
    overrides += [f"{stage}.limit=20", f"{stage}.prompts_per_step=4", f"{stage}.num_steps=1"]
    overrides += [f"{stage}.sampling.max_new_tokens=8", "stages.evaluate.num_prompts=4"]
    overrides += ["stages.evaluate.sampling.max_new_tokens=8"]
    result = trimtab("run", EXAMPLES / f"{name}.toml", *overrides, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (row,) = rows(tmp_path / "out" / name)
    assert (
        row["optimizer/policy_updates"]
        == config.load_run_file(EXAMPLES / f"{name}.toml")["stages"][name]["num_minibatches"]
    )
    assert "critic/loss" not in row
    assert "gold_final" in summary(tmp_path / "out")["policy"]


def blocks():
    """The run-file lines of docs/algorithms/online.md, each under its heading."""
    heading, found, lines = "", [], None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line == "```toml":
            lines = []
        elif line == "```" and lines is not None:
            found.append(pytest.param("\n".join(lines), id=heading))
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


@pytest.mark.parametrize("text", blocks())
def test_the_lines_that_the_page_shows_are_settings(tmp_path, text):
    shared = {"stage": "online", "model": "m", "prompts": "world:helpdesk?num=8", "rewards": [{"name": "gold"}]}
    shared["rewards"][0]["world"] = "helpdesk"
    stages = {"stages": {"shown": shared | {"group_size": 4} | tomllib.loads(text)}}
    resolve_stages(stages, tmp_path, where="docs/algorithms/online.md")
