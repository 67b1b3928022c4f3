"""Who starts the processes of a run: what makes a command join others, who is let in, and how processes end."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from trimtab.core.errors import ConfigError, EngineError
from trimtab.engines import joined, launchers, links
from trimtab.engines.agents import AgentLauncher, serve
from trimtab.engines.device import EngineSettings
from trimtab.engines.joined import Membership, find, first_host, together
from trimtab.engines.launch import PYTHON, ChildLauncher
from trimtab.engines.links import KEY, LinkListener, connect
from trimtab.stages.plan import plan

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
    assert find(SRUN | {"OMP_NUM_THREADS": "4"}).num_sharing == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert find(SRUN).num_sharing == 1


# --- who is let in ---


def test_a_caller_with_the_key_is_let_in_and_no_other(monkeypatch):
    monkeypatch.setattr(links, "_PROOF_SECONDS", 1.0)
    with LinkListener("127.0.0.1", SECRET) as listener:
        silent = socket.create_connection(("127.0.0.1", listener.port))
        began = time.monotonic()
        assert listener.accept(1) is None  # it says nothing, and is given up
        assert 0.5 < time.monotonic() - began < 4
        began = time.monotonic()
        slow = threading.Thread(target=trickle, args=[listener.port])
        slow.start()
        assert listener.accept(1) is None  # a byte now and then is no better
        assert time.monotonic() - began < 4
        slow.join()
        garbage = socket.create_connection(("127.0.0.1", listener.port))
        garbage.sendall(b"\xff" * 100)
        assert listener.accept(1) is None
        for key, welcome in (("another secret", False), (SECRET, True)):
            found = call(listener.port, key)
            link = listener.accept(5)
            assert (link is not None) is welcome
            assert isinstance(found(), Connection if welcome else ConnectionError)
        link.send_bytes(b"hello")
        assert found().recv_bytes() == b"hello"
        for open_ in (silent, garbage, link, found()):
            open_.close()
        assert listener.accept(0.01) is None


def test_the_interface_is_that_of_the_first_link_that_leaves_the_machine():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:  # nothing is sent
        if sys.platform != "linux" or asked.connect_ex(("192.0.2.1", 9)) != 0:
            pytest.skip("this machine has no network besides itself")
        address = asked.getsockname()[0]
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        sockets = [socket.create_connection((host, port)) for host in ("127.0.0.1", "127.0.0.1", address)]
        within, also, beyond = (Connection(caller.detach()) for caller in sockets)
        name = links.interface_of(beyond)
        assert name in [name for _, name in socket.if_nameindex()]
        assert name != "lo"
        assert links.interface_beyond([within, also, beyond]) == name
        assert links.interface_beyond([within, also]) is None
        for link in (within, also, beyond):
            link.close()


def trickle(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as caller:
        for _ in range(20):
            caller.sendall(b"\0")
            time.sleep(0.3)


def test_a_caller_is_told_if_what_listens_does_not_know_the_key():
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = call(other.getsockname()[1], SECRET)
        caller, _ = other.accept()
        caller.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        caller.close()
        assert "does not know the key" in str(found())


def call(port, key):
    """Connects in a thread; the result waits for it and gives the link or the error."""
    found = []

    def work():
        try:
            found.append(connect("127.0.0.1", port, key))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def result():
        thread.join(30)
        return found[0]

    return result


# --- processes ---


AGENT = """
import sys
from trimtab.engines.agents import serve
from trimtab.engines.links import connect
port, key, rank = sys.argv[1:]
sys.exit(0 if serve(connect("127.0.0.1", int(port), key), int(rank), key) else 1)
"""


@contextlib.contextmanager
def agents(num):
    """A launcher with some agents, and the agents."""
    started = []
    with LinkListener("127.0.0.1", SECRET) as listener:
        for rank in range(1, num + 1):
            started.append(subprocess.Popen([sys.executable, "-c", AGENT, str(listener.port), SECRET, str(rank)]))
        launcher = AgentLauncher(host="127.0.0.1", interface="127.0.0.1", key=SECRET)
        launcher.gather(listener, num + 1, started_by="a test", seconds=60)
    try:
        yield launcher, started
    finally:
        launcher.close()
        for agent in started:
            agent.kill()
            agent.wait()


def gone(pid, seconds=5):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.02)
                continue
        return True
    return False


def python(code):
    return [PYTHON, "-c", code]


SLEEP = "import time, os; open(os.environ['OUT'], 'w').write(str(os.getpid())); time.sleep(600)"


def pid_in(path):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError("it did not start")


def test_processes_of_agents_are_started_polled_killed_and_waited_for(tmp_path):
    with agents(2) as (launcher, started):
        right = f"os.environ['{KEY}'] == '{SECRET}' and os.getcwd() == {os.getcwd()!r}"
        ended = launcher.launch(python(f"import os, sys; sys.exit(0 if {right} else 9)"), {}, rank=2)
        assert ended.wait(30) == 0
        assert launcher.launch(python("import sys; sys.exit(3)"), {}, rank=1).wait(30) == 3
        beside = launcher.launch(python(f"import os, sys; sys.exit(os.getppid() != {os.getpid()})"), {}, rank=0)
        assert beside.wait(30) == 0
        assert (launcher.place(0), launcher.place(1)) == ("", f" on {platform.node()}")
        sleeping = [launcher.launch(python(SLEEP), {"OUT": str(tmp_path / str(rank))}, rank) for rank in (1, 2)]
        pids = [pid_in(tmp_path / str(rank)) for rank in (1, 2)]
        assert [process.poll() for process in sleeping] == [None, None]
        with pytest.raises(subprocess.TimeoutExpired):
            sleeping[0].wait(0.3)
        sleeping[0].kill()
        assert sleeping[0].wait(10) == -signal.SIGKILL
        assert gone(pids[0])
        assert sleeping[1].poll() is None
        launcher.launch(python("0"), {}, rank=1)
        time.sleep(0.5)  # its end is reported, and nobody has asked
        launcher.dismiss(success=True)
        assert [agent.wait(10) for agent in started] == [0, 0]
        assert gone(pids[1])  # it ended with its agent


def test_an_agent_that_ends_is_seen(tmp_path):
    with agents(1) as (launcher, (agent,)):
        process = launcher.launch(python(SLEEP), {"OUT": str(tmp_path / "pid")}, rank=1)
        agent.kill()
        assert process.wait(10) == -signal.SIGKILL
        with pytest.raises(EngineError, match="it does not answer"):
            launcher.launch(python("0"), {}, rank=1)
        os.kill(pid_in(tmp_path / "pid"), signal.SIGKILL)  # this one does not call end_with_parent


def test_agents_fail_if_the_controller_just_ends(tmp_path):
    with agents(1) as (launcher, (agent,)):
        launcher.launch(python(SLEEP), {"OUT": str(tmp_path / "pid")}, rank=1)
        pid = pid_in(tmp_path / "pid")
        launcher.dismiss(success=False)
        assert agent.wait(10) == 1
        assert gone(pid)


def test_what_cannot_be_started_is_said(monkeypatch):
    with agents(1) as (launcher, _):
        with pytest.raises(EngineError, match="no-such-program"):
            launcher.launch(["no-such-program"], {}, rank=1)
        monkeypatch.setattr(os, "getcwd", lambda: "/no/such/directory")
        with pytest.raises(EngineError, match="/no/such/directory") as missing:
            launcher.launch(python("0"), {}, rank=1)
        assert "shared file system" in missing.value.fix


def test_agents_of_another_command_are_refused():
    launcher = AgentLauncher(host="127.0.0.1", interface="127.0.0.1", key=SECRET)
    with LinkListener("127.0.0.1", SECRET) as listener:

        def other():
            serve(connect("127.0.0.1", listener.port, SECRET), 1, SECRET, ["sft", "b.toml"])

        thread = threading.Thread(target=other)
        thread.start()
        with pytest.raises(
            EngineError, match=r"rank 1 on \S+ runs trimtab sft b.toml .*, and rank 0 trimtab sft a.toml"
        ):
            launcher.gather(listener, 2, started_by="srun", seconds=20, arguments=["sft", "a.toml"])
        thread.join(10)
        with pytest.raises(EngineError, match=r"rank 1, rank 2 did not call within 0\.1 s"):
            launcher.gather(listener, 3, started_by="srun", seconds=0.1)


def calling(port, rank):
    """Calls as the agent of a rank; the result waits until it has ended."""
    thread = threading.Thread(target=lambda: serve(connect("127.0.0.1", port, SECRET), rank, SECRET, ["sft"]))
    thread.start()
    return thread


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_rank_that_is_none_of_the_others_is_refused(rank):
    launcher = AgentLauncher(host="127.0.0.1", interface="127.0.0.1", key=SECRET)
    with LinkListener("127.0.0.1", SECRET) as listener:
        agent = calling(listener.port, rank)
        said = rf"rank {rank} on \S+ called, and with 3 processes the others are ranks 1 to 2"
        with pytest.raises(EngineError, match=said):
            launcher.gather(listener, 3, started_by="srun", seconds=20, arguments=["sft"])
        agent.join(10)


def test_a_rank_that_calls_twice_is_refused():
    launcher = AgentLauncher(host="127.0.0.1", interface="127.0.0.1", key=SECRET)
    with LinkListener("127.0.0.1", SECRET) as listener:
        both = [calling(listener.port, 1) for _ in range(2)]
        with pytest.raises(EngineError, match=r"rank 1 called twice, on \S+ and on \S+\n") as refused:
            launcher.gather(listener, 3, started_by="torchrun", seconds=20, arguments=["sft"])
        assert "--node-rank" in refused.value.fix
        launcher.close()
        for agent in both:
            agent.join(10)


def test_children_end_with_their_parent_even_if_it_is_the_first_of_a_container(tmp_path):
    child = "from trimtab.engines.launch import end_with_parent; end_with_parent();" + SLEEP
    process = ChildLauncher().launch(python(child), {"OUT": str(tmp_path / "pid")}, rank=1)
    pid = pid_in(tmp_path / "pid")
    process.kill()
    process.wait()
    assert gone(pid)
    orphan = f"import os; os.environ['TRIMTAB_PARENT'] = '1'; {child}"
    assert ChildLauncher().launch(python(orphan), {"OUT": os.devnull}, rank=1).wait(30) == 1


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


def test_a_rehearsal_is_refused_on_several_machines():
    launchers.join(ChildLauncher(), 4, "srun", one_machine=False)
    try:
        with pytest.raises(ConfigError, match="on one machine, and srun has started 4 processes on several") as refused:
            plan({"stages": {}}, where="the test")
        assert "--on" in refused.value.fix
    finally:
        launchers.leave()
    with pytest.raises(ConfigError, match="without stages"):
        plan({"stages": {}}, where="the test")


def test_a_cluster_without_workers_or_with_a_strange_address_is_refused():
    with pytest.raises(ValueError, match="ray = 'auto' with workers = 1: there is no worker to start"):
        EngineSettings(ray="auto")
    with pytest.raises(ValueError, match="the address of its head"):
        EngineSettings(ray="ray://head:10001", workers=2)


def test_a_missing_ray_is_answered_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"engine\.ray needs ray, which is not installed") as missing:
        launchers.find_launcher(EngineSettings(ray="auto", workers=2))
    assert "trimtab[ray]" in missing.value.fix
