"""The owner's side of `sandbox.judges`: asks, waits for a limited time, and starts a new process after no answer."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

_START = f"import sys; sys.path.append({str(Path(__file__).parents[1])!r}); from sandbox.judges import main; main()"
_LOADING_SECONDS = 120.0
"""Time to load the libraries of a new process: sympy alone takes a second or two, more on a busy machine."""

_PATIENCE = 20.0
"""A judgement may take this many times its processor time by the clock, because it may have to wait for a processor."""


class Helper:
    """One process that judges texts. It must not be used by several threads at once."""

    def __init__(self, *, seconds: float, memory_mb: int = 2048) -> None:
        """`seconds` is the processor time for one judgement."""
        self.seconds = seconds
        self.memory_mb = memory_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Helper] | None = None

    def ask(self, kind: str, *arguments: str) -> Any:
        """The answer of `sandbox.judges.JUDGES[kind]`. Raises RuntimeError with its error, or TimeoutError if the time
        is up."""
        if self._process is None:
            self._process = self._start()
            self._exchange(self._process, ["load", kind], _LOADING_SECONDS)
        answer = self._exchange(self._process, [kind, *arguments], _PATIENCE * (self.seconds + 1))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process; another starts with the next question."""
        if self._end is not None:
            self._end()
        self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, str(self.memory_mb), str(self.seconds)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, process)
        return process

    def _exchange(self, process: subprocess.Popen[bytes], request: list[str], seconds: float) -> dict[str, Any]:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(_read_line(process, seconds))
        except (TimeoutError, BrokenPipeError) as error:
            self.close()
            raise TimeoutError(f"no judgement within {self.seconds:g} s and {self.memory_mb} MB") from error
        return answer


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    assert process.stdout is not None
    deadline, line = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                raise BrokenPipeError
            line += part
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # what is still unwritten does not matter
                stream.close()
