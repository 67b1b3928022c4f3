"""Runs whose processes are started by torchrun, srun or Ray: the bits of `--workers 2`, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.engines.models_of_tests import with_ray
from tests.stages.commands import run_stage, summary, trimtab, write_run_file
from tests.stages.test_resume import differences, num_rows, wait_for_rows
from tests.stages.test_workers import assert_near, children, is_there, settings_of
from trimtab.core import config

SRUN = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
SECRET = {"TRIMTAB_GROUP_KEY": "a secret of this test"}
TRIMTAB = ["-m", "trimtab"]
LAUNCHERS = [
    pytest.param("torchrun", id="torchrun"),
    pytest.param("srun", id="srun", marks=pytest.mark.slow),
    pytest.param("ray", id="ray", marks=[with_ray, pytest.mark.slow]),
]


class Machines:
    """Two machines with a network between them, played by network namespaces. The name of each is known to no other."""

    def __init__(self):
        self.num_local, self.hosts, self.master = (1, 1), (), "10.77.0.1"
        self.names = [f"trimtab-{os.getpid()}-{rank}" for rank in range(2)]
        interfaces = [f"trimtab{rank}" for rank in range(2)]
        self._ip("link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
        for rank, (name, interface) in enumerate(zip(self.names, interfaces, strict=True)):
            self._ip("netns", "add", name)
            self._ip("link", "set", interface, "netns", name)
            self._ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", interface)
            self._ip("-n", name, "link", "set", interface, "up")
            self._ip("-n", name, "link", "set", "lo", "up")

    def torchruns(self):
        for rank, name in enumerate(self.names):
            hosts = f"mount --bind {self.hosts[rank]} /etc/hosts; " if self.hosts else ""
            named = ["unshare", "--uts", "--mount", "sh", "-c", f'hostname machine{rank}; {hosts}exec "$@"', "sh"]
            nodes = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", str(self.num_local[rank])]
            master = ["--master-addr", self.master, "--master-port", "29500"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, *master]
            yield ["ip", "netns", "exec", name, *named, *torchrun]

    def listened_to(self, rank):
        """The addresses at which processes of a machine wait for connections."""
        read = ["ip", "netns", "exec", self.names[rank], "cat", "/proc/net/tcp"]
        rows = subprocess.run(read, check=True, capture_output=True, text=True).stdout.splitlines()[1:]
        places = [row.split()[1].partition(":")[0] for row in rows if row.split()[3] == "0A"]
        return {socket.inet_ntoa(bytes.fromhex(place)[::-1]) for place in places}

    def part(self):
        """Takes the network away without a word."""
        self._ip("-n", self.names[0], "link", "set", "trimtab0", "down")

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)

    @staticmethod
    def _ip(*arguments):
        subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def machines():
    may = shutil.which("ip") and subprocess.run(
        ["ip", "netns", "add", "trimtab-may"], check=False, stderr=subprocess.DEVNULL
    )
    if not may or may.returncode != 0:
        pytest.skip("two machines are played by network namespaces, which need iproute2 and the rights of root")
    subprocess.run(["ip", "netns", "del", "trimtab-may"], check=True)
    made = Machines()
    yield made
    made.remove()


class Started:
    """A command under a launcher, in two processes; srun is played by two processes with its variables."""

    def __init__(self, launcher, *arguments):
        arguments = [*TRIMTAB, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        if launcher == "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            self.processes = [self._start([*torchrun, *arguments], environment)]
        elif launcher == "srun":
            ranks = [environment | SRUN | {"SLURM_PROCID": str(rank)} for rank in range(2)]
            self.processes = [self._start(command, variables) for variables in ranks]
        elif isinstance(launcher, Machines):
            self.processes = [self._start([*on, *arguments], environment | SECRET) for on in launcher.torchruns()]
        else:
            ray = ["--workers", "2", "--ray", "local"] if launcher == "ray" else []
            self.processes = [self._start([*command, *ray], environment)]
        self.first = self.processes[0]

    @staticmethod
    def _start(command, environment):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    def finish(self, timeout=120):
        """The exit codes and what was printed; a hang is an error."""
        outputs = [process.communicate(timeout=timeout) for process in self.processes]
        return [process.returncode for process in self.processes], "".join(e for _, e in outputs)

    def descendants(self):
        """All processes that the command has started by now."""
        found, new = [], [process.pid for process in self.processes]
        while new:
            new = [child for pid in new for child in children_of(pid)]
            found += new
        return found


def children_of(pid):
    class Of:
        pass

    found = Of()
    found.pid = pid
    try:
        return children(found)
    except (FileNotFoundError, ProcessLookupError):
        return []


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def workers_of(descendants):
    return [pid for pid in descendants if "trimtab.engines.worker" in command_of(pid)]


def all_gone(pids, seconds=15):
    deadline = time.monotonic() + seconds
    while any(map(is_there, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_there, pids))


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory, base, reward_run):
    """Four steps in two processes that the controller started."""
    out = tmp_path_factory.mktemp("launchers") / "two"
    return run_stage("online", out, **settings_of(base, reward_run, engine={"workers": 2}))


@pytest.fixture
def run_file(tmp_path, base, reward_run):
    return write_run_file(tmp_path / "run.toml", settings_of(base, reward_run))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_has_the_bits_of_two_workers(launcher, tmp_path, run_file, two_workers):
    started = Started(launcher, "online", run_file, "--out", tmp_path / "run")
    wait_for_rows(started.first, tmp_path / "run", 1)
    there = started.descendants()
    assert len(workers_of(there)) == 1
    codes, printed = started.finish()
    assert codes == [0] * len(codes), printed
    assert not differences(two_workers, tmp_path / "run")
    assert "workers = 2" in (tmp_path / "run" / "settings.toml").read_text()
    assert all_gone(there)
    if launcher != "torchrun":  # which says something itself
        assert re.fullmatch(r"(online: .*\n)+", printed), printed


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_mistake_is_said_once_and_ends_all(launcher, tmp_path, run_file):
    started = Started(launcher, "online", run_file, "--out", tmp_path / "run", "num_stps=3")
    codes, printed = started.finish(60)
    assert 2 in codes or launcher == "torchrun"
    assert all(codes)
    assert printed.count("did you mean num_steps") == 1


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), *LAUNCHERS[1:]])
def test_a_killed_worker_is_named_and_the_run_goes_on_in_one_process(launcher, tmp_path, run_file, two_workers):
    out = tmp_path / "run"
    started = Started(launcher, "online", run_file, "--out", out)
    wait_for_rows(started.first, out, 2)
    there = started.descendants()
    (worker,) = workers_of(there)
    os.kill(worker, signal.SIGKILL)
    codes, printed = started.finish(60)
    assert all(codes)
    assert re.search(r"worker 1 on \S+ was killed by SIGKILL", printed), printed
    assert all_gone(there)
    result = trimtab("online", run_file, "--out", out, "engine.workers=1")
    assert result.exit_code == 0, result.output
    assert_near(out, two_workers)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_nothing_outlives_a_killed_controller(launcher, tmp_path, run_file, two_workers):
    out = tmp_path / "run"
    started = Started(launcher, "online", run_file, "--out", out)
    wait_for_rows(started.first, out, 2)
    there = started.descendants()
    workers = workers_of(there)
    assert len(workers) == 1
    started.first.kill()
    codes, _ = started.finish(60)
    assert codes[0] == -signal.SIGKILL
    assert all(codes)
    assert all_gone(workers)
    assert all_gone(there, 120 if launcher == "ray" else 15)  # two helpers of Ray itself wait a minute for its head
    codes, printed = Started(launcher, "online", run_file, "--out", out).finish()
    assert codes == [0] * len(codes), printed
    assert not differences(two_workers, out)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_all_processes_saves_the_step(launcher, tmp_path, base, reward_run, two_workers):
    out = tmp_path / "run"
    slow = settings_of(base, reward_run, num_steps=400, checkpoint_every=1000)
    started = Started(launcher, "online", write_run_file(tmp_path / "long.toml", slow), "--out", out)
    wait_for_rows(started.first, out, 2)
    for process in started.processes:
        process.terminate()
    codes, printed = started.finish(60)
    assert all(codes)
    assert codes[0] == 143 or launcher == "torchrun"
    again = "trimtab online" if launcher == "ray" else f"start the same {launcher} command again"
    assert f"to go on: {again}" in printed
    assert list((out / "checkpoints").iterdir())
    assert num_rows(out) < 400


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_pipeline_has_workers_for_one_stage_after_the_other(launcher, tmp_path, base):
    trained = {"stage": "sft", "data": "world:arithmetic?num=12", "batch_size": 4, "max_steps": 2}
    stages = {"sft": trained | {"model": str(base)}, "more": trained | {"model": "@sft"}}
    pipeline = write_run_file(tmp_path / "pipeline.toml", {"stages": stages})
    codes, printed = Started(launcher, "run", pipeline, "--out", tmp_path / "run").finish()
    assert codes == [0] * len(codes), printed
    result = trimtab("run", pipeline, "--out", tmp_path / "plain", "--workers", 2)
    assert result.exit_code == 0, result.output
    for stage in stages:
        assert set(differences(tmp_path / "plain" / stage, tmp_path / "run" / stage)) <= {"summary.json"}  # seconds
    assert summary(tmp_path / "run")["stages"].keys() == stages.keys()


@pytest.mark.slow
@with_ray
def test_a_run_goes_on_under_every_launcher(tmp_path, base, reward_run, two_workers):
    out = tmp_path / "run"
    for steps, launcher in enumerate(["torchrun", "ray", "srun"], start=1):
        run_file = write_run_file(tmp_path / "run.toml", settings_of(base, reward_run, num_steps=steps))
        codes, printed = Started(launcher, "online", run_file, "--out", out).finish()
        assert codes == [0] * len(codes), printed
    run_stage("online", out, **settings_of(base, reward_run, engine={"workers": 2}))
    assert not differences(two_workers, out)


@pytest.mark.slow
@with_ray
def test_a_cluster_that_is_not_there_or_too_small_is_said(tmp_path, run_file):
    for options, problem in (
        (["--workers", "2", "--ray", "auto"], "no Ray cluster could be joined"),
        (["--workers", "99", "--ray", "local"], "98 workers of 1 processors each do not find them among the"),
    ):
        command = [sys.executable, *TRIMTAB, "online", str(run_file), "--out", str(tmp_path / "run"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        assert problem in done.stderr, done.stderr
        assert "ray start --head" in done.stderr or "ray status" in done.stderr


@pytest.mark.slow
@with_ray
def test_a_cluster_that_exists_is_used_left_as_it_is_and_may_lose_a_machine(tmp_path, run_file, two_workers):
    """Two machines played by two of Ray's nodes; the worker fits the second only."""
    cluster_of = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
node = cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(node, allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    cluster = subprocess.Popen([sys.executable, "-c", cluster_of], **pipes)
    try:
        address = cluster.stdout.readline().strip()
        start = partial(Started, None, "online", run_file, "--workers", "2", "--ray", address)
        codes, printed = start("--out", tmp_path / "whole").finish()
        assert codes == [0], printed
        assert not differences(two_workers, tmp_path / "whole")
        started = start("--out", out := tmp_path / "run")  # the cluster is still there
        wait_for_rows(started.first, out, 2)
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        codes, printed = started.finish(60)
        assert codes == [2]
        assert re.search(r"worker 1 on \S+ was killed by SIGKILL", printed), printed
        assert cluster.stdout.readline() == "removed\n"
    finally:
        cluster.stdin.close()
        cluster.wait(60)
        cluster.stdout.close()
    run_stage("online", out, **config.load_run_file(run_file), engine={"workers": 2})
    assert not differences(two_workers, out)


@pytest.mark.slow
def test_two_machines_have_the_bits_of_two_workers(tmp_path, run_file, two_workers, machines):
    codes, printed = Started(machines, "online", run_file, "--out", tmp_path / "run").finish()
    assert codes == [0, 0], printed
    assert not differences(two_workers, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_of_a_machine_that_knows_itself_by_loopback_reach_a_third(tmp_path, base, reward_run, machines):
    others = "127.0.0.1 localhost\n127.0.1.1 machine{own}\n10.77.0.{address} machine{other}\n"
    for own, other in ((0, 1), (1, 0)):
        (tmp_path / f"hosts{own}").write_text(others.format(own=own, other=other, address=other + 1))
    machines.num_local, machines.master = (2, 1), "machine0"
    machines.hosts = [tmp_path / "hosts0", tmp_path / "hosts1"]
    file = write_run_file(tmp_path / "run.toml", settings_of(base, reward_run))
    started, listened_to = Started(machines, "online", file, "--out", tmp_path / "run"), set()
    while started.first.poll() is None:
        listened_to |= machines.listened_to(0)
        time.sleep(0.2)
    codes, printed = started.finish()
    assert codes == [0, 0], printed
    # Whether gloo calls or waits to be called depends on the numbers of ports: at 127.0.1.1 half of the runs succeed.
    assert "10.77.0.1" in listened_to
    assert "127.0.1.1" not in listened_to
    three = run_stage("online", tmp_path / "three", **settings_of(base, reward_run, engine={"workers": 3}))
    assert not differences(three, tmp_path / "run")


@pytest.mark.slow
def test_a_machine_that_vanishes_ends_the_run_on_both(tmp_path, base, reward_run, machines):
    long = settings_of(base, reward_run, num_steps=4000, engine={"timeout_seconds": 10})
    started = Started(machines, "online", write_run_file(tmp_path / "long.toml", long), "--out", tmp_path / "run")
    wait_for_rows(started.first, tmp_path / "run", 2)
    there = started.descendants()
    machines.part()
    codes, printed = started.finish(120)
    assert all(codes)
    assert "worker 1 on machine1 does not answer" in printed
    assert all_gone(there)
