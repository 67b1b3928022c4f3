"""Processes that are there already: torchrun or srun has started the same command several times.

Rank 0 runs the command, and is the controller of all its stages. The others are agents (`agents.py`): each starts a
worker for every stage, and ends with the command. The rule by which a command joins, so that variables left over in a
shell or a notebook make nothing join by surprise:

- torchrun: TORCHELASTIC_RUN_ID, RANK and WORLD_SIZE are set, and WORLD_SIZE is over 1;
- srun: SLURM_PROCID and SLURM_STEP_NUM_TASKS are set, and the latter, the tasks of this *step*, is over 1. In a batch
  script and in the shell of salloc it is unset or 1, where SLURM_NTASKS may be anything.

On one machine rank 0 writes the port and a key into a file that only this user can read. On several machines the key is
a secret that all processes have in their environment, TRIMTAB_GROUP_KEY, and the port follows from the job.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.files import write_whole
from trimtab.engines import launchers
from trimtab.engines.agents import AgentLauncher, serve
from trimtab.engines.links import KEY, LinkListener, connect

PORT = "TRIMTAB_GROUP_PORT"
"""The variable that sets the port on which rank 0 listens, if there are several machines."""
MOST_PORT = 65_535
"""The highest port that there is."""
LEAST_KEY = 16
"""The characters that a key has at least."""
MEET_SECONDS = 120.0
"""The processes of a command find each other within this time."""
_FAIL_SECONDS = 2.0
"""An agent ends so long after a controller that failed: the launcher names the first process that fails."""
_CONSUMED = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""The variables that make a command join. They are removed then, so that no program it starts joins as well."""


@dataclass(frozen=True)
class Membership:
    """This process as one of several that run the same command."""

    started_by: str
    """"torchrun" or "srun"."""
    rank: int
    size: int
    host: str
    """The machine of rank 0."""
    port: int
    """The port of rank 0 if there are several machines."""
    one_machine: bool
    name: str
    """The same for all its processes, and for no others on this machine."""
    num_sharing: int
    """How many of them share the processors that this one may use."""


def find(environment: Mapping[str, str]) -> Membership | None:
    """What these variables say of this process; None if it is alone."""
    if {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= environment.keys():
        given = _Variables(environment, "torchrun")
        size = given.number("WORLD_SIZE")
        if size > 1:
            local, port = given.number("LOCAL_WORLD_SIZE"), given.number("MASTER_PORT")
            return Membership(
                started_by=given.started_by,
                rank=given.number("RANK"),
                size=size,
                host=given["MASTER_ADDR"],
                port=_port(environment, port + 1 if port < MOST_PORT else port - 1),  # torchrun listens on `port`
                one_machine=local == size,
                name=f"torchrun-{port}-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
                num_sharing=_num_sharing(environment, local),
            )
    if {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        given = _Variables(environment, "srun")
        size = given.number("SLURM_STEP_NUM_TASKS")
        if size > 1:
            job, step = given.number("SLURM_JOB_ID"), given.number("SLURM_STEP_ID")
            told = "SLURM_STEP_TASKS_PER_NODE" in environment  # such as "2(x3),1"
            local = given.number("SLURM_STEP_TASKS_PER_NODE", rest=r"(\D.*)?") if told else 1
            return Membership(
                started_by=given.started_by,
                rank=given.number("SLURM_PROCID"),
                size=size,
                host=first_host(given["SLURM_STEP_NODELIST"]),
                port=_port(environment, 10_000 + (7 * job + step) % 20_000),
                one_machine=given["SLURM_STEP_NUM_NODES"] == "1",
                name=f"srun-{job}-{step}",
                num_sharing=_num_sharing(environment, local),
            )
    return None


@dataclass(frozen=True)
class _Variables:
    """The variables that a program sets for the processes it starts. Raises ConfigError for what it would not set."""

    environment: Mapping[str, str]
    started_by: str

    def __getitem__(self, name: str) -> str:
        if name not in self.environment:
            raise ConfigError(f"{name} is not set", where="environment", fix=self._fix)
        return self.environment[name]

    def number(self, name: str, *, rest: str = "") -> int:
        """A whole number that is not negative. `rest` is a pattern of what may stand behind it and does not count."""
        found = re.fullmatch(f"([0-9]{{1,12}}){rest}", self[name])
        if found is None:
            raise ConfigError(
                f"{name} = {self[name]!r}; {self.started_by} sets it to a number", where="environment", fix=self._fix
            )
        return int(found[1])

    @property
    def _fix(self) -> str:
        return (
            f"start the command with {self.started_by}, which sets its variables itself, or run it with none of them: "
            f"env {' '.join(f'-u {name}' for name in _CONSUMED if name in self.environment)} trimtab …"
        )


def _port(environment: Mapping[str, str], otherwise: int) -> int:
    """The port that the environment sets, or another. Raises ConfigError for what is none."""
    given = environment.get(PORT, str(otherwise))
    if not re.fullmatch(r"[0-9]{1,5}", given) or not 0 < int(given) <= MOST_PORT:
        raise ConfigError(
            f"{PORT} = {given!r}; a port is a number from 1 to {MOST_PORT}",
            where="environment",
            fix=f"export {PORT}=29600, or leave it out; the same for all processes",
        )
    return int(given)


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: "gpu007" of "gpu[007-009,12],cpu1"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _num_sharing(environment: Mapping[str, str], num_local: int) -> int:
    """1 if this process has been given threads, or processors of its own; else all processes here share them."""
    bound = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1)
    return 1 if bound or "OMP_NUM_THREADS" in environment else num_local


class JoinedLauncher(AgentLauncher):
    """Starts processes by the agents that torchrun or srun has started."""

    def __init__(self, member: Membership) -> None:
        """Waits for the agents of a membership whose rank is 0."""
        self._num_sharing = member.num_sharing
        interface = "127.0.0.1" if member.one_machine else ""
        key = shared_key(member) or secrets.token_hex(32)
        super().__init__(host=interface or member.host, interface=interface, key=key)
        try:
            with _listener(member, interface, key) as listener, _announced(member, json.dumps([listener.port, key])):
                how: dict[str, Any] = {"started_by": member.started_by, "seconds": MEET_SECONDS}
                self.gather(listener, member.size, arguments=sys.argv[1:], **how)
        except BaseException:
            self.dismiss(success=False)
            raise

    def num_threads(self, own: int, size: int) -> int:
        """What torchrun or srun gave to a process."""
        return max(1, own // self._num_sharing)

    def close(self) -> None:
        """Holds nothing of its own: the agents serve the next stage, until they are dismissed."""


def _listener(member: Membership, interface: str, key: str) -> LinkListener:
    if member.one_machine:
        return LinkListener(interface, key)
    try:
        return LinkListener(interface, key, port=member.port)
    except OSError as error:
        raise EngineError(
            f"port {member.port} of {member.host} cannot be used: {error.strerror}",
            where=member.started_by,
            fix=f"set {PORT} to a free port, for all processes",
        ) from error


@contextmanager
def _announced(member: Membership, text: str) -> Iterator[None]:
    """Inside this block the other processes of this machine find the text; those of several machines need none."""
    if not member.one_machine:
        yield
        return
    file = _meeting_file(member)
    write_whole(file, text)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def shared_key(member: Membership) -> str | None:
    """The secret of all processes; None if there is none. Raises ConfigError if it is too short, or if there are
    several machines and no secret."""
    key = os.environ.get(KEY)
    fix = f"before {member.started_by} starts: export {KEY}=$(openssl rand -hex 32), the same on all machines"
    if key is None and not member.one_machine:
        raise ConfigError(f"processes on several machines, and {KEY} is not set", where=member.started_by, fix=fix)
    if key is not None and len(key) < LEAST_KEY:
        raise ConfigError(f"{KEY} has {len(key)} characters; {LEAST_KEY} are the least", where="environment", fix=fix)
    return key


def _meeting_file(member: Membership) -> Path:
    """The file by which processes of one machine find each other, in a directory that only this user can use."""
    directory = Path(tempfile.gettempdir()) / f"trimtab-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o77:
        raise EngineError(
            f"{directory} is not this user's alone",
            where="the directory by which processes find each other",
            fix="remove it, or set TMPDIR to a directory of your own",
        )
    return directory / member.name


def _connect(member: Membership) -> tuple[Connection, str]:
    """The link of an agent to rank 0, and the key. Rank 0 may begin later."""
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        try:
            if member.one_machine:
                port, key = json.loads(_meeting_file(member).read_text(encoding="utf-8"))
                return connect("127.0.0.1", port, key), key
            key = shared_key(member) or ""
            return connect(member.host, member.port, key), key
        except (OSError, ValueError) as error:  # not there yet, or the file of a command that was killed
            if time.monotonic() > deadline:
                raise EngineError(
                    f"rank 0 on {member.host} was not found within {MEET_SECONDS:g} s ({error})",
                    where=f"rank {member.rank}, started by {member.started_by}",
                    fix=f"see what rank 0 says; between machines, port {member.port} must be open (or set {PORT})",
                ) from error
        time.sleep(0.1)


@contextmanager
def together() -> Iterator[None]:
    """Around a command: runs it in rank 0 if several processes were started for it. The others serve until it ends and
    then exit, with 0 if it succeeded."""
    if (member := find(os.environ)) is None:
        yield
        return
    for name in _CONSUMED:
        os.environ.pop(name, None)
    if member.rank > 0:
        link, key = _connect(member)
        os.environ.pop(KEY, None)
        for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the controller says when to stop
            signal.signal(number, signal.SIG_IGN)
        if serve(link, member.rank, key, sys.argv[1:]):
            sys.exit(0)
        time.sleep(_FAIL_SECONDS)
        sys.exit(1)
    launcher = JoinedLauncher(member)
    os.environ.pop(KEY, None)  # rewards and programs that a run starts have no need of it
    launchers.join(launcher, member.size, member.started_by, one_machine=member.one_machine)
    success = False
    try:
        yield
        success = True
    except SystemExit as stop:
        success = not stop.code
        raise
    finally:
        launchers.leave()
        launcher.dismiss(success=success)
