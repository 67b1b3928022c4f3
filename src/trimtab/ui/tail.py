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


@dataclass(frozen=True)
class NewRows:
    """Rows that were not read before."""

    rows: list[dict[str, Any]]
    from_start: bool
    """Whether the rows read before no longer count, because the file was cut, replaced or removed."""


class Tail:
    """The place that reading one file has reached.

    With `last_bytes`, reading begins so many bytes before the end of the file, at the next whole line.
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
        self._mark = b""
        self._inode = -1

    @property
    def share_read(self) -> float:
        """How much of the file is read, in [0, 1]; a line that is still being written counts as read."""
        return 1.0 if self._at_end else self.offset / max(self.size, 1)

    def read(self, until: float) -> NewRows:
        """The rows of new whole lines. Stops after the chunk in which `until` passes, a time of `time.monotonic`; what
        is left comes with the next call."""
        self._at_end = True
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            had = self.offset > 0
            self._begin_again()
            self.size = 0
            return NewRows([], had)
        rows: list[dict[str, Any]] = []
        with file:
            status = os.fstat(file.fileno())
            restarted = self.offset > 0 and not self._goes_on(file, status)
            if restarted:
                self._begin_again()
            self._inode, self.size = status.st_ino, status.st_size
            if not self.offset and self.last_bytes is not None and self.size > self.last_bytes:
                file.seek(self.size - self.last_bytes)
                self.offset = self.size - self.last_bytes + len(file.readline())
            file.seek(self.offset)
            left = b""
            while chunk := file.read(CHUNK):
                whole, line_end, left = (left + chunk).rpartition(b"\n")
                self._take(whole + line_end, rows)
                if line_end and time.monotonic() > until:  # a line that is longer than a chunk must come to its end
                    self._at_end = len(chunk) < CHUNK
                    break
        return NewRows(rows, restarted)

    def _goes_on(self, file: IO[bytes], status: os.stat_result) -> bool:
        """Whether the file is the one read before, with what was read still in it."""
        if status.st_ino != self._inode or status.st_size < self.offset:
            return False
        file.seek(self.offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _take(self, lines: bytes, rows: list[dict[str, Any]]) -> None:
        self.offset += len(lines)
        self._mark = (self._mark + lines)[-MARK:] if len(lines) < MARK else lines[-MARK:]
        for line in lines.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                self.num_damaged += 1


def last_row(path: Path, num_bytes: int = 16 * 1024) -> Mapping[str, Any]:
    """The last whole row of a file, read from its end alone; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            lines = file.read().rpartition(b"\n")[0].split(b"\n")
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}
