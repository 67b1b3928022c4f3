"""What is shipped for clusters and a GPU is read as their programs read it, and its commands are right."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import click
import pytest

from tests.docs.test_pages import check_trimtab
from trimtab import cli
from trimtab.core import config
from trimtab.engines.joined import find
from trimtab.stages.pipeline import resolve_stages

SCALE = cli.examples_dir() / "scale"
FILES = {"one_gpu.toml", "ray.toml", "sky.yaml", "slurm.sbatch", "torchrun.sh"}
ON_PATH = """#!/bin/sh
exec '{python}' -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {name} "$@"
"""


def text_of(name):
    return (SCALE / name).read_text(encoding="utf-8")


def run_script(text, tmp_path, **variables):
    """The commands that a shell script runs, each with its words; the programs themselves are played by others."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("srun", "torchrun", "trimtab"):
        (programs / name).write_text(ON_PATH.format(python=sys.executable, name=name))
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", **variables}
    done = subprocess.run(["bash", "-e", "-c", text], capture_output=True, text=True, env=environment, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def command_in(words):
    """The trimtab command that torchrun or srun is given."""
    at = words.index("trimtab")
    return words[at + 1 :]


def test_nothing_else_is_shipped():
    assert {path.name for path in SCALE.iterdir()} == FILES


def test_the_files_say_how_they_are_used_and_none_asks_for_several_gpus():
    for name in FILES:
        text = text_of(name)
        assert f"examples/scale/{name}" in text
        assert not re.search(r"--gpus|cuda:1|gres|gpus-per|H100:[2-9]", text)


def test_the_run_files_are_valid(tmp_path):
    values = config.load_run_file(SCALE / "one_gpu.toml")
    settings = resolve_stages({"stages": {"run": values | {"stage": "online"}}}, tmp_path, where="one_gpu.toml")["run"][
        1
    ]
    assert settings.engine.device == "cuda"
    assert settings.engine.workers == 1
    stages = resolve_stages(config.load_run_file(SCALE / "ray.toml"), tmp_path, where="ray.toml")
    assert stages["grpo"][1].engine.ray == "auto"
    assert stages["grpo"][1].engine.workers == 4


def test_the_batch_script_of_slurm(tmp_path):
    variables = {"SLURM_CPUS_PER_TASK": "8"}
    script = text_of("slurm.sbatch").replace("$(openssl rand -hex 32)", "1234567890123456")
    (words,) = run_script(script + '\ntest "$OMP_NUM_THREADS" = 8 -a -n "$TRIMTAB_GROUP_KEY"', tmp_path, **variables)
    assert words[:3] == ["srun", "--label", "--kill-on-bad-exit=1"]
    check_trimtab(command_in(words), tmp_path)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == 4
    assert options["signal"].startswith("TERM@")  # not B:, which only the script itself would get
    assert find({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None  # the script joins nothing


@pytest.mark.parametrize(
    ("variables", "nodes"), [({"PROCESSES": "4"}, "1"), ({"NODES": "2", "NODE": "1", "HEAD": "10.0.0.1"}, "2")]
)
def test_the_script_of_torchrun(tmp_path, variables, nodes):
    (words,) = run_script(text_of("torchrun.sh"), tmp_path, **variables)
    options = parsed_by_torchrun(words)
    assert options.nnodes == nodes
    assert options.nproc_per_node == variables.get("PROCESSES", "2")
    assert options.node_rank == int(variables.get("NODE", "0"))
    assert options.master_addr == variables.get("HEAD", "127.0.0.1")
    check_trimtab(command_in(words), tmp_path)


def test_the_task_of_skypilot(tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; transformers brings it")
    task = yaml.safe_load(text_of("sky.yaml"))
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "secrets", "setup", "run"}
    assert task["secrets"] == {"TRIMTAB_GROUP_KEY": None}  # asked for when it is launched
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}
    (words,) = run_script(task["run"], tmp_path, **node)
    options = parsed_by_torchrun(words)
    assert (options.nnodes, options.node_rank, options.master_addr) == ("2", 1, "10.0.0.4")
    command = command_in(words)
    check_trimtab(command, tmp_path)
    (mounted,) = task["volumes"]
    assert command[command.index("--out") + 1].startswith(mounted)
    assert shlex.split(task["setup"]) == ["pip", "install", ".[train]"]


def parsed_by_torchrun(words):
    """The options as torchrun itself reads them."""
    from torch.distributed.run import parse_args

    options = parse_args(words[1:])
    assert options.module
    assert options.training_script == "trimtab"
    return options


def test_a_wrong_command_would_be_found(tmp_path):
    with pytest.raises(click.UsageError):
        check_trimtab(["run", "examples/online/grpo.toml", "--outt", "runs/x"], tmp_path)
