"""Processes on other machines: an agent on each starts what the controller asks for, and reports how it ends.

torchrun, srun or Ray starts the agents, each for one rank. An agent does nothing by itself. It has one link to the
controller, and when that closes it kills what it has started: nothing outlives the controller.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL
from typing import Any

import trimtab
from trimtab.core.errors import EngineError
from trimtab.engines.launch import Process, start_child
from trimtab.engines.links import KEY, LinkListener, receive

_LOOK_SECONDS = 0.1
"""How often an agent looks whether a process has ended."""
_START_SECONDS = 30.0
"""An agent that does not start a process within this time has hung."""
_END_SECONDS = 5.0
"""An agent that is told to end has done so within this time."""
_ENDED = "the controller ended as it should"


def serve(link: Connection, rank: int, key: str, arguments: Sequence[str] = ()) -> bool:
    """Starts and ends processes as the controller says, until it ends. Returns whether it said so, or just ended.
    `arguments` are those of the command that this process was started for, which all agents have to share."""
    _send(link, {"rank": rank, "machine": platform.node(), "runs": _runs(arguments)})
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        while True:
            message = receive(link, _LOOK_SECONDS)
            if message is not None and (found := json.loads(message)) == _ENDED:
                return True
            if message is not None:
                _obey(link, found, processes, key)
            for number, process in list(processes.items()):
                if (code := process.poll()) is not None:
                    del processes[number]
                    _send(link, {"process": number, "code": code})
    except (EOFError, OSError):
        return False
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
        link.close()


def _obey(link: Connection, message: Mapping[str, Any], processes: dict[int, Any], key: str) -> None:
    number = message["process"]
    if message["do"] == "kill":
        if number in processes:
            processes[number].kill()
        return
    try:
        variables = {KEY: key, **message["variables"]}
        processes[number] = start_child(message["command"], variables, Path(message["directory"]))
        _send(link, {"process": number, "started": True})
    except OSError as error:
        _send(link, {"process": number, "started": False, "problem": str(error)})


def _runs(arguments: Sequence[str]) -> str:
    """What is the same in all processes of a command."""
    return shlex.join(["trimtab", *arguments]) + f" (version {trimtab.__version__})"


def _send(link: Connection, message: Any) -> None:
    link.send_bytes(json.dumps(message).encode())


@dataclass(frozen=True)
class _Agent:
    """An agent as the controller sees it."""

    link: Connection
    rank: int
    machine: str
    codes: dict[int, int] = field(default_factory=dict)
    """How the processes ended that have ended."""
    starts: dict[int, str] = field(default_factory=dict)
    """"" for each process that was started, else the problem."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, message: Any) -> bool:
        """Sends a message; whether the agent is there."""
        with self.lock:
            try:
                _send(self.link, message)
            except OSError:
                return False
        return True

    def hear(self, seconds: float = 0.0) -> bool:
        """Takes in what the agent says; whether it is there."""
        with self.lock:
            try:
                while (message := receive(self.link, seconds)) is not None:
                    found = json.loads(message)
                    if "code" in found:
                        self.codes[found["process"]] = found["code"]
                    else:
                        self.starts[found["process"]] = found.get("problem", "")
                    seconds = 0.0
            except (EOFError, OSError):
                return False
        return True


@dataclass(frozen=True)
class AgentProcess:
    """A process that an agent started."""

    agent: _Agent
    number: int

    def poll(self) -> int | None:
        """The exit code; see `Process`. A process whose agent is gone has been killed with it."""
        there = self.agent.hear()
        return self.agent.codes.get(self.number, None if there else -SIGKILL)

    def kill(self) -> None:
        """Asks the agent to end it by SIGKILL."""
        self.agent.tell({"do": "kill", "process": self.number})

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; see `Process`."""
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired("a process of an agent", timeout)
            self.agent.hear(_LOOK_SECONDS)
        return code


class AgentLauncher:
    """Starts processes by the agents that have called; agent i is for rank i."""

    def __init__(self, *, host: str, interface: str, key: str) -> None:
        """No agent has called yet; see `Launcher` for the rest."""
        self.host, self.interface, self.key = host, interface, key
        self._agents: dict[int, _Agent] = {}
        self._numbers = iter(range(1 << 62))

    def gather(
        self,
        listener: LinkListener,
        size: int,
        *,
        started_by: str,
        seconds: float,
        arguments: Sequence[str] = (),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits until the agents of ranks 1 to `size` - 1 have called; `check` raises if one of them cannot. Raises
        EngineError if one does not call within `seconds`, or was started for another command than `arguments`."""
        deadline = time.monotonic() + seconds
        while missing := sorted(set(range(1, size)) - set(self._agents)):
            check()
            if (link := listener.accept(0.2)) is not None:
                self._welcome(link, size, _runs(arguments), started_by)
            elif time.monotonic() > deadline:
                raise EngineError(
                    f"{', '.join(f'rank {rank}' for rank in missing)} did not call within {seconds:g} s",
                    where=started_by,
                    fix=f"see that its machine reaches {self.host}, port {listener.port}, and that all machines have "
                    f"the same {KEY}",
                )

    def _welcome(self, link: Connection, size: int, runs: str, started_by: str) -> None:
        try:
            message = receive(link, _START_SECONDS)
        except (EOFError, OSError):
            message = None
        if message is None:
            link.close()
            return
        found = json.loads(message)
        agent = _Agent(link, found["rank"], found["machine"])
        here = f"rank {agent.rank} on {agent.machine}"
        if found["runs"] != runs:
            problem = f"{here} runs {found['runs']}, and rank 0 {runs}"
            fix = (
                "start the same command of the same version of trimtab in all processes; runs that have nothing to do "
                "with each other need a torchrun or srun each, or none"
            )
        elif not 0 < agent.rank < size:
            problem = f"{here} called, and with {size} processes the others are ranks 1 to {size - 1}"
            fix = "start all processes by one torchrun or srun, so that they agree on their number"
        elif (other := self._agents.get(agent.rank)) is not None:
            problem = f"rank {agent.rank} called twice, on {other.machine} and on {agent.machine}"
            fix = "give each machine a rank of its own, such as --node-rank, and end what is left of an earlier start"
        else:
            self._agents[agent.rank] = agent
            return
        link.close()
        raise EngineError(problem, where=started_by, fix=fix)

    def launch(self, command: Sequence[str], variables: Mapping[str, str], rank: int) -> Process:
        """Starts the command in the controller's working directory; for rank 0 beside the controller itself. Raises
        EngineError if it cannot be started."""
        if rank == 0:
            return start_child(command, {KEY: self.key, **variables})
        agent, number = self._agents[rank], next(self._numbers)
        where = {"variables": dict(variables), "directory": os.getcwd()}
        there = agent.tell({"do": "start", "process": number, "command": list(command), **where})
        deadline = time.monotonic() + _START_SECONDS
        while there and number not in agent.starts and time.monotonic() < deadline:
            there = agent.hear(_LOOK_SECONDS)
        if problem := agent.starts.get(number, "it does not answer"):
            raise EngineError(
                f"{agent.machine} cannot start a worker: {problem}",
                where=f"rank {rank}",
                fix="all machines need the run's directory and trimtab under the same paths: use a shared file system",
            )
        return AgentProcess(agent, number)

    def num_threads(self, own: int, size: int) -> int:
        """As many as the controller: each machine gives a process its own."""
        return own

    def place(self, rank: int) -> str:
        """The machine of the agent."""
        return f" on {self._agents[rank].machine}" if rank > 0 else ""

    def dismiss(self, *, success: bool) -> None:
        """Ends the agents, and what they have started. They learn whether the command was a success."""
        for agent in self._agents.values():
            deadline = time.monotonic() + _END_SECONDS
            there = success and agent.tell(_ENDED)
            while there and time.monotonic() < deadline:  # a link closed with words unread loses those on their way
                there = agent.hear(_LOOK_SECONDS)
            agent.link.close()

    def close(self) -> None:
        """Ends the agents, and what they have started."""
        self.dismiss(success=True)
