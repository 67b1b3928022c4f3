"""What a run's directory says of its process: which one writes it, how long it is to be, and how the last one ended.

`.state` in the run's directory is a small JSON record for people who watch, for example
`{"num_steps": 200, "ended": "failed", "said": "the loss is not finite"}`. While a process is in the steps of the run,
`stepping` is its number, and `stopping` too once it was asked to stop. A run does not depend on it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from trimtab.core.errors import ConfigError, Interrupted, TrimtabError
from trimtab.core.files import json_text, write_whole

LOCK = ".lock"
"""The file that the process of a run keeps open and locked. It holds the number of the process."""
STATE = ".state"
RunStanding = Literal["running", "finished", "stopped", "failed", "damaged"]
"""Running: a process of this machine holds the directory. Stopped: ended by Ctrl-C or SIGTERM. Failed: ended by an
error, or killed. Damaged: a record that is needed to go on cannot be read."""


def read_state(directory: Path) -> dict[str, Any]:
    """The record in `.state`; empty if there is none or if it cannot be read."""
    try:
        found = json.loads((directory / STATE).read_bytes().decode(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def note_state(directory: Path, **values: Any) -> None:
    """Replaces the record in `.state`. If the disk refuses it, the run goes on without: what it writes itself will
    fail with an error of its own."""
    with suppress(OSError):
        write_whole(directory / STATE, json_text(values))


def note_end(directory: Path, error: BaseException) -> None:
    """Records that the process of a run ends by this error."""
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    said = error.problem if isinstance(error, TrimtabError) else str(error) or type(error).__name__
    num_steps = read_state(directory).get("num_steps")
    note_state(directory, num_steps=num_steps, ended="stopped" if stopped else "failed", said=said)


def is_stepping(directory: Path, process: int | None) -> bool:
    """Whether this process is in the steps of the run, where a first signal lets it finish the step at work. Elsewhere
    one ends it at once."""
    return process is not None and read_state(directory).get("stepping") == process


def is_stopping(directory: Path, process: int | None) -> bool:
    """Whether this process has been asked to stop, by whomever, so that a further signal would end it at once."""
    return process is not None and read_state(directory).get("stopping") == process


def holder_of(directory: Path) -> int | None:
    """The number of the process that holds the run's directory now; None if none of this machine does.

    The process that the lock names must have the lock open, so that another process with the same number is not taken
    for it. Nothing is locked or written. Needs /proc, and a process of the same user.
    """
    try:
        number = int((directory / LOCK).read_text(encoding="ascii"))
        lock = (directory / LOCK).stat()
        opened = list(Path(f"/proc/{number}/fd").iterdir())
    except (OSError, ValueError):
        return None
    for path in opened:
        with suppress(OSError):
            if os.path.samestat(path.stat(), lock):
                return number
    return None


def stop_holder(directory: Path) -> int:
    """Asks the process that holds the run to stop, and returns its number.

    SIGTERM is sent, which every command takes as Ctrl-C: a process that a script began in the background ignores the
    signal of Ctrl-C itself where nothing handles it. It cannot reach another process that gets the same number in
    between. Raises ConfigError if no process of this machine holds the run.
    """
    with _opened_process(holder_of(directory)) as (number, descriptor):
        if number is None or holder_of(directory) != number:
            raise ConfigError(
                f"no process of this machine writes {directory}",
                where=str(directory / LOCK),
                fix="if the run goes on elsewhere, stop it there with Ctrl-C; else there is nothing to stop",
            )
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    return number


@contextmanager
def _opened_process(number: int | None) -> Iterator[tuple[int | None, int]]:
    """Gives a process with a descriptor that stays its own; (None, -1) if there is no such process."""
    try:
        descriptor = -1 if number is None else os.pidfd_open(number)
    except ProcessLookupError:
        number, descriptor = None, -1
    try:
        yield number, descriptor
    finally:
        if descriptor >= 0:
            os.close(descriptor)
