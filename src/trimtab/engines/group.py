"""The processes that compute together. One of them, the controller, runs the stage; the others wait for its calls.

A launcher (`launch.py`) starts the workers. Each loads the models by the same function and from the same settings, so
no weights are sent, and then answers calls: the name of one of the methods of `Replica`, with plain data
(`messages.py`). Calls and answers travel over links (`links.py`), gradients through torch.distributed.

Nothing waits forever. A worker that ends is seen at once, because its sockets close, and one that hangs within the
limit; either way all processes end, and the error names the worker. Workers end with the controller.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from trimtab.core.errors import ConfigError, DataError, EngineError, TrimtabError
from trimtab.engines.launch import PYTHON, Launcher, Process, end_with_parent
from trimtab.engines.links import KEY, LinkListener, connect, interface_beyond, interface_of, receive
from trimtab.engines.messages import decode, encode

_ADDRESS = "TRIMTAB_GROUP"
_ERRORS: dict[str, type[TrimtabError]] = {e.__name__: e for e in (ConfigError, DataError, EngineError)}


class WorkerGroup:
    """The workers of a run as the controller sees them. Worker i has rank i; the controller itself is rank 0."""

    def __init__(
        self, size: int, *, launcher: Launcher, limit_seconds: float, load: str, settings: Any, directory: Path
    ) -> None:
        """Starts `size` - 1 workers by the launcher, which is closed with the group. Each gets its models by the
        function `load` ("package.module:function"), given the settings and the directory of the run. A call that takes
        longer than `limit_seconds` ends the run."""
        self.size = size
        self._launcher = launcher
        self._limit = limit_seconds
        self._processes: list[Process] = []
        self._links: list[Connection] = []
        self._close = weakref.finalize(self, _stop, self._processes, self._links, launcher)
        self._threads_before = torch.get_num_threads()
        threads = launcher.num_threads(self._threads_before, size)
        torch.set_num_threads(threads)
        store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        with LinkListener(launcher.interface, launcher.key) as listener:
            place = f"{launcher.host} {listener.port} {store.port} {size}"
            try:
                for rank in range(1, size):
                    command = [PYTHON, "-m", "trimtab.engines.worker", str(rank)]
                    self._processes.append(launcher.launch(command, {_ADDRESS: place}, rank))
            except BaseException:
                self.close()
                raise
            try:
                links = dict(self._accepted(listener) for _ in self._processes)
            except (OSError, EOFError) as error:
                raise self._ended("begin", error) from error
        self._links.extend(links[rank] for rank in sorted(links))
        self._interface = interface_beyond(self._links)
        begin = {
            "load": load,
            "settings": settings,
            "directory": str(directory),
            "threads": threads,
            "limit_seconds": limit_seconds,
            "interface": self._interface,
        }
        self._send("begin", [begin] * len(self._links))
        self._join_with_all(store)
        self.checksums: list[dict[str, float]] = self.answers("begin")
        """The checksums of the weights that each worker loaded, by role."""

    def _accepted(self, listener: LinkListener) -> tuple[int, Connection]:
        """The rank of the next worker that calls, and its link. Raises TimeoutError if one ended before it called, or
        if none calls."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if (link := listener.accept(0.2)) is not None and (rank := receive(link, _START_SECONDS)) is not None:
                return int.from_bytes(rank, "little"), link
            if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                raise TimeoutError("not every worker called")

    def _join_with_all(self, store: Any) -> None:
        """Finds the other processes. Finding one that has ended would last until the limit, so a thread does it, and is
        given up when a worker ends."""
        failed: list[BaseException] = []

        def join() -> None:
            try:
                _join(store, 0, self.size, self._limit, self._interface)
            except Exception as error:  # it is raised in the thread that waits
                failed.append(error)

        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        while thread.is_alive() and all(process.poll() is None for process in self._processes):
            thread.join(0.1)
        if failed or thread.is_alive():
            raise self._ended("begin", failed[0] if failed else "it ended before it was found")

    def call(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> None:
        """Begins a call of every worker; `arguments` are those of worker 1, 2 and so on. The caller then does its own
        share and asks for the `answers`."""
        self._send(method, [{"do": method, "arguments": dict(given)} for given in arguments])

    @contextlib.contextmanager
    def working(self, method: str) -> Any:
        """Around the controller's own share of a call: if it fails because a worker has, that worker is named."""
        try:
            yield
        except BaseException as error:
            if is_lost(error):
                raise self._ended(method, error) from error
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether the workers have been ended."""
        return not self._close.alive

    def close(self) -> None:
        """Ends the workers."""
        if self._close.alive:
            torch.set_num_threads(self._threads_before)
            if dist.is_initialized():
                dist.destroy_process_group()
        self._close()

    def _send(self, method: str, messages: Sequence[Mapping[str, Any]]) -> None:
        try:
            for link, message in zip(self._links, messages, strict=True):
                link.send_bytes(encode(message))
        except OSError as error:
            raise self._ended(method, error) from error

    def answers(self, method: str) -> list[Any]:
        """What each worker answered to the call that was begun, in their order. Raises the error of a worker that
        failed, and EngineError if one has ended or did not answer in time; the group is closed then."""
        found = []
        for rank, link in enumerate(self._links, start=1):
            try:
                if not link.poll(self._limit):
                    raise self._ended(method, f"worker {rank} did not answer within {self._limit:g} s")
                answer = decode(link.recv_bytes())
            except (OSError, EOFError) as error:
                raise self._ended(method, error) from error
            if "error" in answer:
                self.close()
                raise _error_of(answer["error"])
            found.append(answer["answer"])
        return found

    def _ended(self, method: str, error: BaseException | str) -> TrimtabError:
        """The error for a call that failed; the group is closed. It is the error that a worker reported, if one did."""
        time.sleep(_LAST_WORDS_SECONDS)
        for link in self._links:
            with contextlib.suppress(OSError, EOFError):
                while link.poll(0):
                    answer = decode(link.recv_bytes())
                    if "error" in answer:
                        self.close()
                        return _error_of(answer["error"])
        lost = self._lost(method, error)
        self.close()
        return lost

    def _lost(self, method: str, error: BaseException | str) -> EngineError:
        """The error for workers that ended or hang. One that only waited for another has ended by itself by now."""
        codes = {self._name(rank): process.poll() for rank, process in enumerate(self._processes, start=1)}
        killed = [
            f"{worker} was killed by {signal.Signals(-code).name}"
            for worker, code in codes.items()
            if code and code < 0
        ]
        hangs = [f"{worker} does not answer" for worker, code in codes.items() if code is None]
        said = str(error).splitlines()
        ended = [f"{worker} ended with exit code {code}" for worker, code in codes.items() if code is not None]
        return EngineError(
            f"{', '.join(killed or hangs or ended)} while {_DOING.get(method, method)}",
            where=f"engine.workers = {self.size} ({said[0] if said else type(error).__name__})",
            fix="start the same command again: it goes on from the last checkpoint. If a worker was killed for want of "
            "memory, use fewer workers or a smaller token_budget",
        )

    def _name(self, rank: int) -> str:
        return f"worker {rank}{self._launcher.place(rank)}"


_START_SECONDS = 180.0
"""A new process has this long to say that it is there, and as long to find the others. From a file system that many
machines share, importing torch for the first time takes a minute or two."""
_LAST_WORDS_SECONDS = 1.0
"""After a failure, the time in which workers that waited for the one that failed notice it."""
_END_SECONDS = 10.0
"""A killed process is waited for so long."""
_DOING = {
    "begin": "loading the models",
    "load": "loading a checkpoint",
    "update": "updating the weights",
    "score": "scoring",
    "sample": "sampling replies",
    "hold": "gathering the weights",
}


def _stop(processes: Sequence[Process], links: Sequence[Connection], launcher: Launcher) -> None:
    for link in links:
        link.close()
    for process in processes:
        process.kill()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its machine is gone, or its agent hangs
            process.wait(_END_SECONDS)
    launcher.close()


def _error_of(answer: Mapping[str, Any]) -> TrimtabError:
    kind = _ERRORS.get(answer["kind"], EngineError)
    return kind(answer["problem"], where=answer["where"], fix=answer["fix"])


def is_lost(error: BaseException) -> bool:
    """Whether torch.distributed raised this because another process is gone or late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _join(store: Any, rank: int, size: int, limit_seconds: float, interface: str | None) -> None:
    """Finds the other processes by this network interface, if there is one. Left alone, gloo asks what the machine's
    name stands for, which on many is only itself."""
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    hook = sys.excepthook
    start = timedelta(seconds=_START_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=start)
    _set_pg_timeout(timedelta(seconds=limit_seconds))
    sys.excepthook = hook  # torch's own writes the rank before each line of a traceback


class Caller:
    """The controller as a worker sees it."""

    def __init__(self, rank: int) -> None:
        """Connects to the controller for which this process was started, and with which it ends."""
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the controller says when to stop
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.rank = rank
        self._host, port, *numbers = os.environ[_ADDRESS].split()
        self._store_port, self._size = map(int, numbers)
        self._link = connect(self._host, int(port), os.environ.pop(KEY))
        self._link.send_bytes(rank.to_bytes(8, "little"))

    def begin(self) -> dict[str, Any]:
        """What loads the models, and from what. From now on this process is part of the group."""
        begin: dict[str, Any] = decode(self._link.recv_bytes())
        torch.set_num_threads(begin["threads"])
        store = TCPStore(self._host, self._store_port, self._size, is_master=False)
        # Beside the controller a link may stay within the machine; the controller knows by which others are reached.
        interface = interface_of(self._link) or begin["interface"]
        _join(store, self.rank, self._size, begin["limit_seconds"], interface)
        return begin

    def next_call(self) -> tuple[str, dict[str, Any]] | None:
        """The next method and its arguments; None once the controller has ended."""
        try:
            call = decode(self._link.recv_bytes())
        except (EOFError, OSError):
            return None
        return call["do"], call["arguments"]

    def answer(self, value: Any) -> None:
        """Sends the result of the last call."""
        self._link.send_bytes(encode({"answer": value}))

    def fail(self, error: BaseException) -> None:
        """Sends the error that ends this worker."""
        rank = f"worker {self.rank}"
        if isinstance(error, TrimtabError):
            said = {"problem": error.problem, "where": f"{error.where} ({rank})", "fix": error.fix}
        else:
            problem = f"{type(error).__name__}: {error}"
            said = {"problem": problem, "where": rank, "fix": "please report this with the lines above"}
        said["kind"] = type(error).__name__
        with contextlib.suppress(OSError):
            self._link.send_bytes(encode({"error": said}))
