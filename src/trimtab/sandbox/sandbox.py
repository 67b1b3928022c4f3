"""Runs untrusted Python code in processes of its own, which can reach nothing else and are always ended."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from trimtab.core.errors import EngineError
from trimtab.sandbox.supervisor import BROKEN, ENDED_BY_ITSELF, NO_WALLS, OUT_OF_TIME

Walls = Literal["namespaces", "landlock", "none"]
WALLS: tuple[Walls, ...] = ("namespaces", "landlock")

# The supervisor runs without this package's imports: there, the folder is a package of its own, looked for last.
_HERE = str(Path(__file__).parents[1])
_START = f"import sys; sys.path.append({_HERE!r}); from sandbox.supervisor import main; sys.path.pop(); main()"
_GRACE_SECONDS = 10.0
"""The supervisor itself is ended this long after its own deadline."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources that one piece of code may use."""

    seconds: float = 5.0
    """Time by the clock, from start to end; processor time of each process is held a second or two above it."""
    memory_mb: int = 512
    """Address space of each process."""
    num_processes: int = 4
    """Processes and threads at a time, the first one included. Together with up to three processes of the sandbox
    itself, they may use that many times memory_mb."""
    file_mb: int = 16
    """Largest file, and all files together; also of what a program prints."""

    def __post_init__(self) -> None:
        for name, least in {"seconds": 0.05, "memory_mb": 64, "num_processes": 1, "file_mb": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class TestReport:
    """The findings of the examiner."""

    passed: tuple[bool, ...]
    """For each test, whether it passed; false for tests that were not reached."""
    message: str
    """Why the first test failed, or ''."""
    refused: str
    """Why the tests cannot judge any code, or ''."""
    timed_out: bool


@dataclass(frozen=True)
class Output:
    """The output of a program until it ended or was ended."""

    stdout: str
    timed_out: bool
    ended_well: bool
    """Whether it ended by itself, with the exit status 0."""


class Sandbox:
    """Makes one sandbox for each piece of code. Its methods may be called from several threads."""

    def __init__(
        self,
        limits: Limits,
        *,
        packages: Sequence[str] = (),
        allow_unisolated: bool = False,
        walls: Sequence[Walls] = WALLS,
    ) -> None:
        """`walls` are tried in order. Raises EngineError if none of them is available and `allow_unisolated` is
        false."""
        self.limits = limits
        self.packages = [str(Path(p).resolve()) for p in packages]
        self.allow_unisolated = allow_unisolated
        self.allowed_walls = list(walls)
        self.walls: Walls = self._find_walls()

    def examine(
        self, code: str, tests: Sequence[str], *, setup: str = "", entry_points: Sequence[str] = ()
    ) -> TestReport:
        """Which of `tests` hold for what `code` defines. Raises EngineError if the sandbox itself failed."""
        questions = {"tests": list(tests), "setup": setup, "entry_points": list(entry_points)}
        with _file(code) as source, _file(json.dumps(questions)) as asked, _file("") as verdict:
            files = {"code": source.fileno(), "tests": asked.fileno(), "verdict": verdict.fileno()}
            status, _ = self._run({"mode": "tests", **files}, list(files.values()))
            lines = [json.loads(line) for line in _read(verdict).splitlines()]
        refused = next((line["message"] for line in lines if line["result"] == "refused"), "")
        if not lines and status != OUT_OF_TIME:
            raise EngineError(
                "the examiner ended before it began",
                where="the sandbox",
                fix="raise memory_mb; the interpreter itself needs about 100",
            )
        passed = [line["result"] == "passed" for line in lines if line["result"] in ("passed", "failed")]
        failures = [line["message"] for line in lines if line["result"] == "failed"]
        unfinished = "" if len(passed) == len(tests) else "the code did not come back within its limits"
        return TestReport(
            tuple(passed + [False] * (len(tests) - len(passed))),
            failures[0] if failures else unfinished,
            refused,
            status == OUT_OF_TIME,
        )

    def run(self, code: str, stdin: str = "") -> Output:
        """The output of `code`, run as a program. Raises EngineError if the sandbox itself failed."""
        with _file(code) as source, _file(stdin) as given, _file("") as output:
            files = [source.fileno(), given.fileno(), output.fileno()]
            status, report = self._run({"mode": "program", "program_files": files}, files)
            return Output(_read(output), status == OUT_OF_TIME, report.get("ended_well", False))

    def _find_walls(self) -> Walls:
        if sys.platform != "linux":
            raise EngineError(
                f"code cannot be run apart from your files and network on {sys.platform}",
                where="the sandbox",
                fix="run this in a Linux container or virtual machine",
            )
        with _file("") as source, _file("") as given, _file("") as output:
            files = [source.fileno(), given.fileno(), output.fileno()]
            status, report = self._run({"mode": "program", "program_files": files}, files)
        if status == NO_WALLS:
            raise EngineError(
                f"code cannot be run apart from your files and network here: {'; '.join(report['why_not'])}",
                where="the sandbox",
                fix="use Linux 6.2 or newer, or allow user namespaces (in a container, an unconfined seccomp profile); "
                "or, where losing this machine and what it can reach is acceptable, set allow_unisolated = true",
            )
        walls: Walls = report["walls"]
        self.allowed_walls = [w for w in self.allowed_walls if w == walls]  # the others need not be tried again
        return walls

    def _run(self, work: dict[str, Any], files: list[int]) -> tuple[int, dict[str, Any]]:
        spec = work | asdict(self.limits)
        spec |= {
            "owner": os.getpid(),
            "packages": self.packages,
            "walls": self.allowed_walls,
            "allow_unisolated": self.allow_unisolated,
        }
        interpreter = os.path.realpath(sys.executable)
        with _file("") as report:
            supervisor = subprocess.Popen(
                [interpreter, "-I", "-S", "-B", "-X", "utf8", "-c", _START, json.dumps(spec)],
                stdin=subprocess.PIPE,  # closed when this process ends, however it ends
                stdout=report,
                stderr=report,
                pass_fds=files,
                env={"HOME": "/work", "TMPDIR": "/work", "LANG": "C.UTF-8", "PATH": ""},
                cwd="/",
                start_new_session=True,
            )
            status = _wait(supervisor, self.limits.seconds + _GRACE_SECONDS)
            said = _read(report)
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        if status not in (ENDED_BY_ITSELF, OUT_OF_TIME, NO_WALLS):
            raise EngineError(
                f"the sandbox ended with status {status}: {said.strip()[-500:] or 'it said nothing'}",
                where="the sandbox",
                fix="if this machine is short of memory or processes, lower num_parallel"
                if status == BROKEN
                else "report this as a bug",
            )
        why_not = [row["why_not"] for row in rows if "why_not" in row]
        found = {name: value for row in rows for name, value in row.items()}
        return status, found | {"why_not": why_not or ["no walls were asked for"]}


def _wait(supervisor: subprocess.Popen[bytes], seconds: float) -> int:
    assert supervisor.stdin is not None
    watch = os.pidfd_open(supervisor.pid)  # Popen.wait with a limit looks only every 50 ms
    try:
        ended, _, _ = select.select([watch], [], [], seconds)
    finally:
        os.close(watch)
        supervisor.stdin.close()  # which asks the supervisor to end the sandbox, if it has not yet
        try:
            status = supervisor.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            status = supervisor.wait()
    return status if ended else BROKEN


def _file(text: str) -> IO[bytes]:
    """A file in memory, without a name, that holds `text` and can be passed to another process."""
    file = os.fdopen(os.memfd_create("trimtab"), "w+b")
    file.write(text.encode("utf-8", "surrogatepass"))
    file.seek(0)
    return file


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
