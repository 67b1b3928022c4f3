"""What torchrun and srun have started: what makes a command join others, and how its processes meet."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from dataclasses import replace

import pytest

from trimtab.core.errors import ConfigError, EngineError
from trimtab.engines import joined, launchers
from trimtab.engines.agents import serve
from trimtab.engines.device import EngineSettings
from trimtab.engines.joined import Membership, find, first_host, together
from trimtab.engines.launch import ChildLauncher
from trimtab.engines.links import KEY

SECRET = "a secret of this test"
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "1",
}
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
BATCH_SCRIPT = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "7"}
SALLOC_SHELL = BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
SRUN = JOB | {
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


# --- what joins ---


def test_what_torchrun_and_srun_started_joins():
    assert find(TORCHRUN) == Membership("torchrun", 1, 2, "127.0.0.1", 29501, True, "torchrun-29500-0", 1)
    assert find(SRUN) == Membership("srun", 3, 4, "n1", 10_289, False, "srun-41-2", find(SRUN).num_sharing)
    assert find(SALLOC_SHELL | SRUN).rank == 3  # srun in the shell of salloc
    assert find(SRUN | TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}).one_machine is False  # torchrun on each node of srun
    assert find(SRUN | {joined.PORT: "7000"}).port == find(TORCHRUN | {joined.PORT: "7000"}).port == 7000


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},  # of a notebook's cell
        TORCHRUN | {"WORLD_SIZE": "1"},
        JOB,  # the shell of salloc on a login node
        BATCH_SCRIPT,
        SALLOC_SHELL,
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_variables_left_over_join_nothing(variables, monkeypatch):
    assert find(variables) is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with together():
        assert launchers.with_workers({"seed": 1}) == {"seed": 1}


@pytest.mark.parametrize("port", ["abc", "0", "65536", "70000", "-1", "", " 7000", "7_000", "²"])
def test_a_port_that_is_none_is_refused(port):
    for variables in (SRUN, TORCHRUN):
        with pytest.raises(ConfigError, match=r"_GROUP_PORT = .*; a port is a number from 1 to 65535") as refused:
            find(variables | {joined.PORT: port})
        assert repr(port) in refused.value.problem


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (TORCHRUN | {"WORLD_SIZE": "abc"}, "WORLD_SIZE = 'abc'; torchrun sets it to a number"),
        (TORCHRUN | {"WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2'"),
        (TORCHRUN | {"RANK": ""}, "RANK = ''"),
        (TORCHRUN | {"MASTER_PORT": "many"}, "MASTER_PORT = 'many'"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}, "LOCAL_WORLD_SIZE is not set"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS = 'two'; srun sets it to a number"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST is not set"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "some"}, "SLURM_STEP_TASKS_PER_NODE = 'some'"),
    ],
)
def test_variables_that_no_launcher_sets_are_refused(variables, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)) as wrong:
        find(variables)
    assert "-u " in wrong.value.fix


def test_beside_the_highest_port_is_the_one_before():
    assert find(TORCHRUN | {"MASTER_PORT": "65535"}).port == 65534
    assert find(TORCHRUN | {"MASTER_PORT": "65534"}).port == 65535
    assert find(TORCHRUN | {joined.PORT: "65535"}).port == 65535


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("a[3,5]-ib", "a3-ib"),
        ("r[1-2]c[3-4]", "r1c3"),
    ],
)
def test_the_first_machine_of_a_list_of_slurm(nodes, first):
    assert first_host(nodes) == first


def test_threads_are_shared_if_the_launcher_gave_none(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert find(SRUN).num_sharing == 2
    assert find({k: v for k, v in SRUN.items() if k != "SLURM_STEP_TASKS_PER_NODE"}).num_sharing == 1
    assert find(SRUN | {"OMP_NUM_THREADS": "4"}).num_sharing == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert find(SRUN).num_sharing == 1


# --- the processes of torchrun and srun ---


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Two processes of this machine, this being rank 0 in a thread's eyes."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(joined, "MEET_SECONDS", 0.5)
    monkeypatch.delenv(KEY, raising=False)
    return replace(find(TORCHRUN), rank=0)


def test_processes_of_one_machine_find_each_other_by_a_private_file(here, tmp_path, monkeypatch):
    monkeypatch.setattr(joined, "MEET_SECONDS", 20.0)
    agent = threading.Thread(target=lambda: serve(*joined._connect(here)[:1], 1, "", sys.argv[1:]))
    agent.start()  # it may begin before rank 0
    time.sleep(0.3)
    launcher = joined.JoinedLauncher(here)
    directory = tmp_path / f"trimtab-{os.getuid()}"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not list(directory.iterdir())
    launcher.dismiss(success=True)
    agent.join(10)


def test_a_key_with_blanks_is_one_key(here, monkeypatch):
    monkeypatch.setattr(joined, "MEET_SECONDS", 20.0)
    monkeypatch.setenv(KEY, key := "  twenty  and one words\t")
    keys = []

    def work():
        link, found = joined._connect(here)
        keys.append(found)
        serve(link, 1, found, sys.argv[1:])

    agent = threading.Thread(target=work)
    agent.start()
    launcher = joined.JoinedLauncher(here)
    launcher.dismiss(success=True)
    agent.join(10)
    assert keys == [launcher.key] == [key]


def test_a_file_left_over_by_a_killed_command_leads_nobody_astray(here, tmp_path):
    directory = tmp_path / f"trimtab-{os.getuid()}"
    directory.mkdir(mode=0o700)
    (directory / here.name).write_text('[1, "key"]')
    with pytest.raises(EngineError, match=r"rank 0 on 127.0.0.1 was not found within 0.5 s"):
        joined._connect(here)
    with pytest.raises(EngineError, match="rank 1 did not call"):
        joined.JoinedLauncher(here)
    assert not list(directory.iterdir())


def test_a_directory_that_others_may_use_is_refused(here, tmp_path):
    (tmp_path / f"trimtab-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(EngineError, match="not this user's alone"):
        joined.JoinedLauncher(here)


def test_several_machines_need_a_secret(here, monkeypatch):
    apart = replace(here, one_machine=False)
    for make in (joined.JoinedLauncher, joined._connect):
        with pytest.raises(ConfigError, match=f"processes on several machines, and {KEY} is not set") as missing:
            make(apart)
        assert "openssl rand" in missing.value.fix
    monkeypatch.setenv(KEY, "short")
    with pytest.raises(ConfigError, match="has 5 characters; 16 are the least"):
        joined.JoinedLauncher(apart)
    monkeypatch.setenv(KEY, SECRET)
    unusable = pytest.raises(EngineError, match=r"port \d+ of 127.0.0.1 cannot be used")
    with socket.create_server(("", 0)) as taken, unusable as refused:
        joined.JoinedLauncher(replace(apart, port=taken.getsockname()[1]))
    assert joined.PORT in refused.value.fix


def test_processes_of_several_machines_meet_at_a_port_with_the_secret(here, monkeypatch):
    monkeypatch.setattr(joined, "MEET_SECONDS", 20.0)
    monkeypatch.setenv(KEY, SECRET)
    with socket.create_server(("", 0)) as some:
        port = some.getsockname()[1]
    apart = replace(here, one_machine=False, port=port)
    agent = threading.Thread(target=lambda: serve(*joined._connect(apart)[:1], 1, "", sys.argv[1:]))
    agent.start()
    launcher = joined.JoinedLauncher(apart)
    assert (launcher.interface, launcher.host, launcher.key) == ("", "127.0.0.1", SECRET)
    launcher.dismiss(success=True)
    agent.join(10)


def test_settings_have_to_fit_the_processes_that_are_there(here):
    launchers.join(ChildLauncher(), 2, "torchrun")
    try:
        assert launchers.with_workers({"seed": 1}) == {"seed": 1, "engine": {"workers": 2}}
        assert launchers.with_workers({"engine": {"workers": 3}}) == {"engine": {"workers": 3}}
        assert launchers.with_workers({"engine": "cuda"}) == {"engine": "cuda"}
        with pytest.raises(ConfigError, match="workers = 3, but torchrun has started 2 processes") as wrong:
            launchers.check_launcher(EngineSettings(workers=3))
        assert "leave engine.workers out" in wrong.value.fix
        with pytest.raises(ConfigError, match="ray = 'auto', but torchrun has started the processes already"):
            launchers.check_launcher(EngineSettings(workers=2, ray="auto"))
        assert isinstance(launchers.find_launcher(EngineSettings(workers=2)), ChildLauncher)
    finally:
        launchers.leave()
