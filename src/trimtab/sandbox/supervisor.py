"""The process that builds the sandbox, starts what runs in it, and ends all of it.

It is started as `python -I -S -c "…; main()" SPEC`, with its standard input open for as long as the sandbox is wanted.
Its standard output is a report of JSON lines: the walls that were put up or why they could not be, or an error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from . import isolation, syscalls, test_runner

ENDED_BY_ITSELF, OUT_OF_TIME, NOT_WANTED, NO_WALLS, BROKEN = 0, 10, 11, 12, 13
"""How the sandbox ended, as the supervisor's exit status."""


def main() -> NoReturn:
    """Runs the sandbox that `sys.argv[1]` describes and exits with one of the statuses above."""
    spec = json.loads(sys.argv[1])
    _exit_with(lambda: _run(spec))


def _exit_with(work: Callable[[], int]) -> NoReturn:
    """Does `work` and ends this process with the status that it gives. The process also ends when its parent does."""
    status = BROKEN
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        status = work()
    except OSError as error:
        _report({"error": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(status)


def _run(spec: dict[str, Any]) -> int:
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != spec["owner"]:
        return NOT_WANTED
    if not syscalls.can_filter():
        _report({"why_not": "there is no filter of system calls for this processor"})
    elif (status := _behind_walls(spec, isolation.readable_paths(spec["packages"]))) != NO_WALLS:
        return status
    if not spec["allow_unisolated"]:
        return NO_WALLS
    _report({"walls": "none"})
    return _keep_watch(spec, "none", [])


def _behind_walls(spec: dict[str, Any], readable: list[str]) -> int:
    for walls in spec["walls"]:
        if walls == "namespaces":
            # In a child: if the kernel refuses some of the namespaces, this process would be left in the others.
            status = _in_child(lambda: _enter_namespaces(spec, readable))
            if status != NO_WALLS:
                return status
        elif isolation.has_landlock():
            _report({"walls": "landlock"})
            return _keep_watch(spec, "landlock", readable)
        else:
            _report({"why_not": "the kernel has no Landlock, or one older than version 3 (Linux 6.2)"})
    return NO_WALLS


def _enter_namespaces(spec: dict[str, Any], readable: list[str]) -> int:
    try:
        isolation.enter_namespaces(readable, file_mb=spec["file_mb"])
    except OSError as error:
        _report({"why_not": f"no namespaces: {error}"})
        return NO_WALLS
    _report({"walls": "namespaces"})
    # Entering the namespaces has reset this.
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    # Other processes that the kernel counts: the one that keeps watch, an examiner, and this process if it is the same
    # user inside.
    spec["num_others"] = 1 + (spec["mode"] == "tests") + (os.getuid() != 0)
    return _in_child(lambda: _first_process(spec, readable))


def _first_process(spec: dict[str, Any], readable: list[str]) -> int:
    """Keeps watch as the first process of the namespaces: when it ends, however it ends, all others there end too."""
    isolation.become_nobody()
    isolation.check_readable([os.path.dirname(json.__file__), *spec["packages"]])
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return _keep_watch(spec, "namespaces", readable)


def _in_child(work: Callable[[], int]) -> int:
    """Runs `work` in a process of its own; returns the status that it gives."""
    child = os.fork()
    if child == 0:
        _exit_with(work)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256


def _keep_watch(spec: dict[str, Any], walls: str, readable: list[str]) -> int:
    """Starts the processes, and ends them when the first has ended, the time is up, or the owner is gone."""
    started = time.monotonic()
    ours, theirs = socket.socketpair() if spec["mode"] == "tests" else (None, None)
    processes = []
    if ours is not None and theirs is not None:

        def examine() -> None:
            with os.fdopen(spec["tests"], encoding="utf-8") as file:
                tests = json.load(file)
            test_runner.run_examiner(tests, ours.fileno(), spec["verdict"])

        def answer() -> None:
            with os.fdopen(spec["code"], encoding="utf-8") as file:
                source = file.read()
            test_runner.run_candidate(source, theirs.fileno())

        keep = [spec["tests"], spec["verdict"], ours.fileno()]
        processes.append(_start(examine, spec, walls, readable, keep=keep))
        processes.append(_start(answer, spec, walls, readable, keep=[spec["code"], theirs.fileno()]))
        ours.close()
        theirs.close()
    else:
        processes.append(_start(lambda: _run_program(spec), spec, walls, readable, keep=spec["program_files"]))
    try:
        status = _wait(processes[0], started + spec["seconds"])
        if status == ENDED_BY_ITSELF:
            end = os.waitid(os.P_PID, processes[0], os.WEXITED | os.WNOWAIT)
            _report({"ended_well": end is not None and (end.si_code, end.si_status) == (os.CLD_EXITED, 0)})
        return status
    finally:
        _end(processes, walls)


def _start(work: Callable[[], None], spec: dict[str, Any], walls: str, readable: list[str], *, keep: list[int]) -> int:
    """Starts `work` in a process behind the walls. Raises OSError if the walls could not be put up."""
    heard, said = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            _shut_in(spec, walls, readable, keep=[*keep, said])
            os.write(said, b"\0")
            os.close(said)
            work()
        except BaseException as error:
            os.write(said, str(error).encode())
        finally:
            os._exit(1)
    os.close(said)
    answer = os.read(heard, 1000)
    os.close(heard)
    if answer != b"\0":
        raise OSError(f"a process could not be started: {answer.decode(errors='replace') or 'it ended at once'}")
    return process


def _shut_in(spec: dict[str, Any], walls: str, readable: list[str], *, keep: list[int]) -> None:
    """Puts up the walls around this process."""
    os.setpgid(0, 0)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    _close_all_but(keep)
    if walls == "landlock":
        isolation.restrict_files(readable)
        syscalls.drop_capabilities()
    isolation.set_limits(
        cpu_seconds=math.ceil(spec["seconds"]) + 1,
        memory_mb=spec["memory_mb"],
        file_mb=spec["file_mb"],
        # Without namespaces the kernel would count the user's own processes, and behind Landlock there can be no
        # second process anyway.
        num_processes=spec["num_processes"] + spec["num_others"] if walls == "namespaces" else None,
    )
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path += spec["packages"]
    if walls != "none":
        syscalls.install_filter(in_the_open=walls == "landlock")


def _run_program(spec: dict[str, Any]) -> None:
    """Runs the code as a script, with the files for input and output that the owner has passed."""
    code, given, output = spec["program_files"]
    with os.fdopen(code, encoding="utf-8") as file:
        source = file.read()
    os.dup2(given, 0)
    os.dup2(output, 1)
    _close_all_but([])
    status = 0
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        status = 1
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(status & 0xFF)


def _wait(process: int, deadline: float) -> int:
    """Waits for the end of a process, the deadline, or the end of standard input; returns the status."""
    fd = os.pidfd_open(process)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return OUT_OF_TIME
        ready, _, _ = select.select([0, fd], [], [], left)
        if ready:
            return NOT_WANTED if 0 in ready else ENDED_BY_ITSELF


def _end(processes: list[int], walls: str) -> None:
    """Kills the processes and waits until they are gone. With namespaces, the kernel does so when this process ends."""
    if walls == "namespaces":
        return
    for process in processes:
        os.kill(process, signal.SIGKILL)
        if walls == "none":
            _kill_group(process)
    while True:
        try:
            os.waitpid(-1, 0 if walls == "landlock" else os.WNOHANG)
        except ChildProcessError:
            return
        if walls == "none":
            for child in _children():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _children() -> list[int]:
    """The children of this process, with adopted ones."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def _close_all_but(kept: list[int]) -> None:
    edges = [2, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for low, high in itertools.pairwise(edges):
        os.closerange(low + 1, high)


def _report(row: dict[str, Any]) -> None:
    os.write(1, (json.dumps(row) + "\n").encode())
