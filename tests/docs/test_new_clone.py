"""The documented runs, as written, one after another in a new clone; only their sizes are cut down."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core import config

ROOT = Path(__file__).parents[2]
RUN_FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.toml"))
# What each stage is cut down by. Nothing here is a part of the algorithm.
SMALL = {
    "pretrain": ["num_documents=200", "num_epochs=1", "vocab_size=400", "architecture.num_layers=1",
                 "architecture.hidden_size=32", "architecture.mlp_size=32"],
    "sft": ["limit=600", "num_epochs=1"],
    "compare": ["num_prompts=60", "num_held_out_prompts=40", "replies_per_prompt=2", "sampling.max_new_tokens=12"],
    "reward": ["limit=40", "num_epochs=1"],
    "preference": ["limit=40", "num_epochs=1"],
    "online": ["limit=24", "num_steps=1", "sampling.max_new_tokens=12", "prompts_per_step=4"],
    "steps": ["limit=48", "num_completions=2"],
    "select": ["limit=40", "sampling.max_new_tokens=64"],
    "evaluate": ["num_prompts=4", "sampling.max_new_tokens=12"],
}  # fmt: skip
MORE = {
    "examples/quickstart/pipeline.toml": [
        *("stages.ppo.critic.warmup_steps=0", "stages.ppo_no_leash.critic.warmup_steps=0"),
        *("stages.evaluate.best_of=2", "stages.evaluate.best_of_prompts=2"),
        "stages.reward.demonstrations=world:helpdesk?num=20",
    ],
    "examples/hh/pipeline.toml": ["stages.ppo.critic.warmup_steps=0", "variables.rows=hh.jsonl.gz"],
    "examples/hh/dpo.toml": ["data=hh.jsonl.gz"],
    "examples/gsm8k/pipeline.toml": ["variables.rows=gsm8k.jsonl.gz"],
    "examples/gsm8k/grpo.toml": ["prompts=gsm8k.jsonl.gz"],
    "examples/gsm8k/evaluate.toml": ["prompts=gsm8k.jsonl.gz"],
    # Without the GPU and the cluster that they are for.
    "examples/scale/one_gpu.toml": ["prompts=gsm8k.jsonl.gz", "model=runs/gsm8k/sft/model", "engine.device=cpu"],
    "examples/scale/ray.toml": ['engine.ray=""', "engine.workers=2"],
}  # fmt: skip
# In this order: later ones start from what earlier ones have made.
COMMANDS = [
    "trimtab quickstart",
    *(f"trimtab run {path}" for path in RUN_FILES if path.parent.name in ("online", "reward", "selection")),
    "trimtab run examples/hh/pipeline.toml --out runs/hh",
    "trimtab preference examples/hh/dpo.toml",
    "trimtab run examples/gsm8k/pipeline.toml --out runs/gsm8k",
    "trimtab online examples/gsm8k/grpo.toml",
    "trimtab evaluate examples/gsm8k/evaluate.toml",
    "trimtab online examples/scale/one_gpu.toml",
    "trimtab run examples/scale/ray.toml",
    "trimtab run examples/arithmetic/grpo.toml --out runs/arithmetic",
    "trimtab run examples/arithmetic/process.toml --out runs/process",
    "trimtab run examples/tools/pipeline.toml",
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of the last commit, with copies of the two data sets' forms in place of the hub's."""
    where = tmp_path_factory.mktemp("new") / "trimtab"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(where)], check=True)
    talk = [
        {
            side: f"\n\nHuman: What is {i} and 1?\n\nAssistant: It is {i + off}."
            for side, off in (("chosen", 1), ("rejected", 2))
        }
        for i in range(60)
    ]
    sums = [{"question": f"What is {i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(60)]
    for name, table in (("hh", talk), ("gsm8k", sums)):
        with gzip.open(where / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)
    return where


def cut_down(file: str, command: str) -> list[str]:
    """The overrides that make the run small."""
    values = config.load_run_file(ROOT / file)
    if "stages" not in values:
        stage = shlex.split(command)[1]
        return [*SMALL[stage], *MORE.get(file, [])]
    stage_of = {
        name: table.get("stage") or values["stages"][table["like"]]["stage"] for name, table in values["stages"].items()
    }
    return [f"stages.{name}.{change}" for name, stage in stage_of.items() for change in SMALL[stage]] + MORE.get(
        file, []
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_run_ends_well_in_a_new_clone(command, clone):
    words = shlex.split(command)
    file = "examples/quickstart/pipeline.toml" if words[1] == "quickstart" else words[2]
    overrides = cut_down(file, command)
    environment = os.environ | {"PYTHONPATH": str(clone / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *words[1:], *overrides],
        cwd=clone, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} {' '.join(overrides)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_every_run_file_is_among_those_that_are_run():
    run = {word for command in COMMANDS for word in command.split() if word.endswith(".toml")}
    asked_for_by_people = {"examples/feedback/project.toml", "examples/feedback/reward.toml"}
    assert {str(path) for path in RUN_FILES} == run | asked_for_by_people | {"examples/quickstart/pipeline.toml"}


def test_no_hub_or_file_of_ours_is_needed_by_name():
    for path in RUN_FILES:
        assert not re.search(r"/(work|home|root)/", (ROOT / path).read_text(encoding="utf-8"))
