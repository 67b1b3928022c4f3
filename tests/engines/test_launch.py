"""Who starts the processes of a run: who is let in, and how processes end."""

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
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from trimtab.core.errors import ConfigError, EngineError
from trimtab.engines import launchers, links
from trimtab.engines.agents import AgentLauncher, serve
from trimtab.engines.device import EngineSettings
from trimtab.engines.launch import PYTHON, ChildLauncher
from trimtab.engines.links import KEY, LinkListener, connect
from trimtab.stages.plan import plan

SECRET = "a secret of this test"


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


# --- what is refused ---


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
