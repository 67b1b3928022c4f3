"""Who starts the processes of a run, and where: a `Launcher`. There are three.

`ChildLauncher` starts children of the controller. `AgentLauncher` (`agents.py`) asks agents that torchrun or srun has
started on the machines of a job (`joined.py`), or actors of a Ray cluster (`ray_cluster.py`). Whatever is started calls
the controller back (`links.py`), so nothing above this file depends on which it was.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from trimtab.core.process import end_with
from trimtab.engines.links import KEY

PYTHON = "<python>"
"""As the first word of a command: the interpreter that runs trimtab on the machine where it is started."""
_PARENT = "TRIMTAB_PARENT"
_WATCH_SECONDS = 0.2


class Process(Protocol):
    """A process that was started, on whatever machine. `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it; None while it runs."""

    def kill(self) -> None:
        """Ends it by SIGKILL, if it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns what `poll` does then. Raises subprocess.TimeoutExpired."""


class Launcher(Protocol):
    """Starts processes, and says where they find the controller: `LinkListener(launcher.interface, launcher.key)` hears
    them, and they call `connect(launcher.host, port, key)`."""

    host: str
    """The controller's machine, as the processes know it."""
    interface: str
    """Where the controller listens: "127.0.0.1", or "" for every interface."""
    key: str
    """The key of every link of this run. Each process that is started has it in its variable TRIMTAB_GROUP_KEY."""

    def launch(self, command: Sequence[str], variables: Mapping[str, str], rank: int) -> Process:
        """Starts a command with these variables beside those of its machine, where the process with this rank is to
        stand (0 is the controller); for example `launch([PYTHON, "-m", "trimtab.engines.worker", "1"], {}, rank=1)`. A
        process that calls `end_with_parent` ends with the controller, however that ends."""

    def num_threads(self, own: int, size: int) -> int:
        """The threads of each of `size` processes, the controller among them, if the controller alone would take
        `own`."""

    def place(self, rank: int) -> str:
        """Where the processes of a rank stand, for messages: " on node7", or "" for the controller's own machine."""

    def close(self) -> None:
        """Lets go of what this launcher alone holds. What it started was ended before."""


class ChildLauncher:
    """Starts children of this process."""

    host = interface = "127.0.0.1"

    def __init__(self) -> None:
        self.key = secrets.token_hex(32)

    def launch(self, command: Sequence[str], variables: Mapping[str, str], rank: int) -> subprocess.Popen[bytes]:
        """Starts the command."""
        return start_child(command, {KEY: self.key, **variables})

    def num_threads(self, own: int, size: int) -> int:
        """An equal share."""
        return max(1, own // size)

    def place(self, rank: int) -> str:
        """The controller's own machine."""
        return ""

    def close(self) -> None:
        """Holds nothing."""


def start_child(
    command: Sequence[str], variables: Mapping[str, str], directory: Path | None = None, *, log: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a child of this process, whose output goes to `log` if that is given. Raises OSError if the program or the
    directory is missing."""
    words = [sys.executable, *command[1:]] if command[0] == PYTHON else list(command)
    environment = {**os.environ, **variables, _PARENT: str(os.getpid())}
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    return subprocess.Popen(words, env=environment, cwd=directory, **options)


def end_with_parent() -> None:
    """From now on this process, which `start_child` began, is killed when its parent ends."""
    end_with(int(os.environ[_PARENT]))


def when_parent_ends(act: Callable[[], None]) -> None:
    """Calls `act` in a thread of its own once the parent has ended, which began this process by `start_child`. For a
    process that any thread of the parent may have started: the signal of `end_with_parent` is sent when that thread
    ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        act()

    parent = int(os.environ[_PARENT])
    threading.Thread(target=watch, daemon=True).start()
