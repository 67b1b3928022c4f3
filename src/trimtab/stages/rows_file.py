"""A file of JSON lines that a stage writes step by step, and from which a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict


class RowsFile:
    """Rows in the order in which they were made. If steps leave nothing else, the file is the state of the loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_bytes = 0

    @property
    def num_rows(self) -> int:
        """The number of rows in the file."""
        return len(self.path.read_bytes().splitlines())

    def append_rows(self, rows: Iterable[JsonDict]) -> None:
        """Adds rows after the last row that counts; rows that a killed process left behind it are removed."""
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._num_bytes)
            file.seek(self._num_bytes)
            for row in rows:
                # JSON cannot write nan: null stands for it.
                finite = json.loads(json.dumps(row), parse_constant=lambda _: None)
                file.write(json.dumps(finite, ensure_ascii=False).encode() + b"\n")
            self._num_bytes = file.tell()

    def save(self, path: Path) -> None:
        """Writes the length of the file into the directory `path`, once the file's content is on disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        (path / f"{self.path.stem}.json").write_text(json.dumps({"num_bytes": self._num_bytes}), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Cuts the file to its length when `save` was called. Raises DataError if the file has lost rows since."""
        noted = path / f"{self.path.stem}.json"
        self._num_bytes = json.loads(noted.read_text(encoding="utf-8"))["num_bytes"]
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < self._num_bytes:
            raise DataError(
                f"{self.path.name} holds {found} bytes, and {self._num_bytes} were written",
                where=str(self.path),
                fix="restore the file, or begin again with --fresh",
            )
        os.truncate(self.path, self._num_bytes)
