"""One process that draws replies, as its controller sees it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import trimtab
from trimtab.core.errors import EngineError
from trimtab.engines.messages import decode, encode
from trimtab.engines.samplers.weights import SamplerStart

KEY, PORT = "TRIMTAB_SAMPLER_KEY", "TRIMTAB_SAMPLER_PORT"
_LAST_LINES = 12


class ProcessLost(Exception):
    """The process has ended, or does not answer; the message says which."""


class SamplerProcess:
    """Runs `serve.py`. A call is `call` and then `answer`, so that several processes can work at a time."""

    def __init__(self, start: SamplerStart, *, number: int, python: str | None, scratch: Path, limit: float) -> None:
        """Begins the start of the process; `ready` waits for it.

        `number` names it in messages, `python` is its interpreter (this one by default), and a wait of more than
        `limit` seconds is too long."""
        self.number = number
        self._limit = limit
        self.log = scratch / f"sampler-{number}.log"
        key = secrets.token_bytes(32)
        self._listener = Listener(("127.0.0.1", 0), authkey=key)
        variables = {
            **os.environ,
            **_path(python, scratch),
            "OMP_NUM_THREADS": str(start.threads),
            PORT: str(self._listener.address[1]),
            KEY: key.hex(),
        }
        command = [python or sys.executable, "-m", "trimtab.engines.samplers.serve"]
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=scratch
                )
            except OSError as error:
                raise EngineError(
                    f"the sampler process cannot be started: {error.strerror}",
                    where=f"engine.sampler.python = {python!r}",
                    fix="name the interpreter of an environment with vLLM, such as /opt/vllm/bin/python",
                ) from error
        self._begin = {"start": start, "scratch": str(scratch)}
        self._link: Connection | None = None

    def ready(self) -> None:
        """Waits until the process has loaded its model. Raises EngineError if it cannot."""
        self._listener._listener._socket.settimeout(0.2)  # type: ignore[attr-defined]
        deadline = time.monotonic() + self._limit
        while self._link is None:
            with contextlib.suppress(TimeoutError, AuthenticationError):  # a stranger without the key is sent away
                self._link = self._listener.accept()
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._not_started()
        self._listener.close()
        try:
            self._link.send_bytes(encode(self._begin))
            self.answer()
        except (ProcessLost, OSError) as lost:
            raise self._not_started() from lost

    def call(self, method: str, **arguments: Any) -> None:
        """Begins a call of a method of `SamplerServer`. Raises ProcessLost if the process has ended."""
        assert self._link is not None
        try:
            self._link.send_bytes(encode({"do": method, "arguments": arguments}))
        except OSError as error:
            raise self._lost() from error

    def answer(self) -> Any:
        """What the process answered to the last call. Raises its error if it failed, and ProcessLost if it has ended or
        does not answer in time."""
        assert self._link is not None
        try:
            if not self._link.poll(self._limit):
                raise ProcessLost(f"sampler {self.number} did not answer within {self._limit:g} s")
            answer = decode(self._link.recv_bytes())
        except (OSError, EOFError) as error:
            raise self._lost() from error
        if "error" in answer:
            raise EngineError(**answer["error"])
        return answer["answer"]

    def last_words(self) -> str:
        """The last lines that the process printed."""
        said = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines = said.strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-_LAST_LINES:] or ["none"])

    def close(self) -> None:
        """Ends the process."""
        if self._link is not None:
            self._link.close()
        self._listener.close()
        self._process.kill()
        self._process.wait()

    def _lost(self) -> ProcessLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.poll()
        how = "closed its connection" if code is None else f"ended with exit code {code}"
        return ProcessLost(
            f"sampler {self.number} " + (f"was killed by {signal.Signals(-code).name}" if code and code < 0 else how)
        )

    def _not_started(self) -> EngineError:
        code = self._process.poll()
        self.close()
        what = (
            f"did not start within {self._limit:g} s"
            if code is None
            else f"ended with exit code {code} while it started"
        )
        return EngineError(
            f"sampler {self.number} {what}; its last words:\n{self.last_words()}",
            where="engine.sampler",
            fix='with name = "vllm", engine.sampler.python must be the interpreter of an environment with vLLM',
        )


def _path(python: str | None, scratch: Path) -> Mapping[str, str]:
    """The variable by which another interpreter finds this package and nothing else of this environment."""
    if python is None:
        return {}
    place = Path(tempfile.mkdtemp(prefix="package-", dir=scratch))
    (place / "trimtab").symlink_to(Path(trimtab.__file__).parent)
    return {"PYTHONPATH": str(place)}
