"""One process that draws replies, as its controller sees it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trimtab
from trimtab.core.errors import EngineError
from trimtab.engines.launch import PYTHON, start_child
from trimtab.engines.links import KEY, LinkListener
from trimtab.engines.messages import decode, encode
from trimtab.engines.samplers.weights import SamplerStart

PORT = "TRIMTAB_SAMPLER_PORT"
_LAST_LINES = 12
_END_SECONDS = 1.0
"""A process whose link has closed ends within this time, if it ends."""


class ProcessLost(Exception):
    """The process has ended, or does not answer; the message says which."""


class SamplerProcess:
    """Runs `serve.py` on the controller's machine. A call is `call` and then `answer`, so that several processes can
    work at a time."""

    def __init__(self, start: SamplerStart, *, number: int, python: str | None, scratch: Path, limit: float) -> None:
        """Starts the process and waits until it has loaded its model.

        `number` names it in messages, `python` is its interpreter (this one by default), and a wait of more than
        `limit` seconds is too long. Raises EngineError if the process cannot start.
        """
        self.number = number
        self._limit = limit
        self._log = scratch / f"sampler-{number}.log"
        self._link: Connection | None = None
        key = secrets.token_hex(32)
        with LinkListener("127.0.0.1", key) as listener:
            variables = {
                **_path(python, scratch),
                "OMP_NUM_THREADS": str(start.threads),
                PORT: str(listener.port),
                KEY: key,
            }
            command = [PYTHON if python is None else _found(python), "-m", "trimtab.engines.samplers.serve"]
            with self._log.open("ab") as log:
                try:
                    self._process = start_child(command, variables, scratch, log=log)
                except OSError as error:
                    raise EngineError(
                        f"the sampler process cannot be started: {error.strerror}",
                        where=f"engine.sampler.python = {python!r}",
                        fix="name the interpreter of an environment with vLLM, such as /opt/vllm/bin/python",
                    ) from error
            try:
                self._begin(listener, {"start": start, "scratch": str(scratch)})
            except BaseException:  # Ctrl-C too
                self.close()
                raise

    def _begin(self, listener: LinkListener, message: Mapping[str, Any]) -> None:
        """Waits for the process to call, and until it has loaded its model."""
        deadline = time.monotonic() + self._limit
        while (link := listener.accept(0.2)) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._not_started()
        self._link = link
        try:
            link.send_bytes(encode(message))
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
        said = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        lines = said.strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-_LAST_LINES:] or ["none"])

    def kill(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends the process and the link to it."""
        self.kill()
        if self._link is not None:
            self._link.close()

    def _lost(self) -> ProcessLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        code = self._process.poll()
        how = "closed its link" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        return ProcessLost(f"sampler {self.number} {how}")

    def _not_started(self) -> EngineError:
        code = self._process.poll()
        how = f"did not start within {self._limit:g} s" if code is None else f"ended with exit code {code}"
        return EngineError(
            f"sampler {self.number} {how} before it was ready; its last words:\n{self.last_words()}",
            where="engine.sampler",
            fix="the last words say why. If it was killed for want of memory, lower sampling.cache_gb; if it needs "
            "longer, raise engine.timeout_seconds",
        )


def _found(python: str) -> str:
    """The interpreter as it is found from the directory in which the process starts. A link, as environments have it,
    stays one."""
    return os.path.abspath(python) if os.sep in python else python


def _path(python: str | None, scratch: Path) -> Mapping[str, str]:
    """The variable by which another interpreter finds this package and nothing else of this environment."""
    if python is None:
        return {}
    place = Path(tempfile.mkdtemp(prefix="package-", dir=scratch))
    (place / "trimtab").symlink_to(Path(trimtab.__file__).parent)
    return {"PYTHONPATH": str(place)}
