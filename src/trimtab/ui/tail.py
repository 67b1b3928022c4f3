"""Reads JSON-lines files while other processes append to them: only new bytes, and only whole lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 18
"""Bytes that are read at once."""
MARK = 4096
"""Bytes before the place reached that are compared when reading goes on. They hold the last row, with the seconds it
took, so a run that was cut back and has done the step again is noticed even if its file is as long as before."""


MOST_LINE = 32 * 2**20
"""Bytes of a line at most. Of a file with a longer one, what comes before it is read."""


@dataclass(frozen=True)
class NewRows:
    """Rows that were not read before."""

    rows: list[dict[str, Any]]
    from_start: bool
    """Whether the rows read before no longer count, because the file was cut, replaced or removed."""


class Tail:
    """The place that reading one file has reached.

    With `last_bytes`, reading begins so many bytes before the end of the file, at the next whole line; if no whole line
    begins there, at twice as many bytes.
    """

    def __init__(self, path: Path, *, last_bytes: int | None = None) -> None:
        self.path = path
        self.last_bytes = last_bytes
        self.size = 0
        """Bytes of the file when it was last looked at."""
        self._at_end = False
        self._begin_again()

    def _begin_again(self) -> None:
        self.offset = 0
        self.num_damaged = 0
        """Lines that are no JSON objects."""
        self.problem = ""
        """Why the file is not read, or not further; empty if it is."""
        self.skipped = False
        """Whether reading began after the beginning."""
        self._mark = b""
        self._inode = -1
        self._stuck = False
        """Whether a line is too long, so that nothing is read on."""

    @property
    def share_read(self) -> float:
        """How much of the file is read, in [0, 1]; a line that is still being written counts as read."""
        return 1.0 if self._at_end else self.offset / max(self.size, 1)

    def read(self, until: float) -> NewRows:
        """The rows of new whole lines. Stops after the chunk in which `until` passes, a time of `time.monotonic`; what
        is left comes with the next call."""
        self._at_end = True
        self.problem = self.problem if self._stuck else ""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            had = self.offset > 0
            self._begin_again()
            self.size = 0
            return NewRows([], had)
        except OSError as error:
            self.problem = f"{self.path.name} cannot be read: {error.strerror}"
            return NewRows([], False)
        rows: list[dict[str, Any]] = []
        with file:
            status = os.fstat(file.fileno())
            goes_on = self._goes_on(file, status)
            if self._stuck and goes_on:
                return NewRows([], False)
            restarted = self.offset > 0 and not goes_on
            if not goes_on:
                self._begin_again()
            self._inode, self.size = status.st_ino, status.st_size
            if not self.offset and self.last_bytes is not None:
                self._skip(file, self.last_bytes)
            file.seek(self.offset)
            begun: list[bytes] = []  # the parts of a line without an end; put together once, when it comes
            length = 0
            while chunk := file.read(CHUNK):
                whole, line_end, left = chunk.rpartition(b"\n")
                if line_end:
                    self._take(b"".join([*begun, whole, line_end]), rows)
                    begun, length = [], 0
                begun.append(left)
                length += len(left)
                if length > MOST_LINE:
                    self._stuck = True
                    self.problem = f"a line of {self.path.name} is longer than {MOST_LINE // 2**20} MB: not read on"
                    break
                if line_end and time.monotonic() > until:  # a line that is longer than a chunk must come to its end
                    self._at_end = len(chunk) < CHUNK
                    break
        return NewRows(rows, restarted)

    def _skip(self, file: IO[bytes], num_bytes: int) -> None:
        """Moves on to the first line that begins in the last bytes; none if only a line without an end does."""
        while num_bytes < min(self.size, 2 * MOST_LINE):
            file.seek(self.size - num_bytes)
            line = file.readline(num_bytes)
            if line.endswith(b"\n") and len(line) < num_bytes:
                self.offset, self.skipped = self.size - num_bytes + len(line), True
                return
            num_bytes *= 2

    def _goes_on(self, file: IO[bytes], status: os.stat_result) -> bool:
        """Whether the file is the one read before, with what was read still in it."""
        seen = self.size if self._stuck else self.offset  # a line that was too long may be cut off again
        if status.st_ino != self._inode or status.st_size < seen:
            return False
        file.seek(self.offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _take(self, lines: bytes, rows: list[dict[str, Any]]) -> None:
        self.offset += len(lines)
        self._mark = (self._mark + lines)[-MARK:] if len(lines) < MARK else lines[-MARK:]
        for line in lines.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                self.num_damaged += 1


def last_row(path: Path, problems: list[str], num_bytes: int = 16 * 1024) -> Mapping[str, Any]:
    """The last whole row of a file, read from its end alone; empty if there is none, or if the file cannot be read,
    which is added to `problems`."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            lines = file.read().rpartition(b"\n")[0].split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return row
    return {}
