"""A cache of number columns on disk, read through memory maps; its total size is bounded.

Each entry is named by a hash of everything that it follows from, so no entry is ever out of date: if anything changes,
the entry is not found.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.files import sync_tree
from trimtab.core.terminal import note
from trimtab.data.tokens import DTYPES, Array, Columns

BOUND = "TRIMTAB_DATA_CACHE_GB"
"""The environment variable that says how much may be kept, in GB of 10^9 bytes."""
DEFAULT_GB = 20.0
_ABANDONED_SECONDS = 24 * 3600
_META = "meta.json"


def folder() -> Path:
    """Where columns are kept: `trimtab/data` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "data"


def read(key: str) -> tuple[Columns, dict[str, Any]] | None:
    """The columns kept under a key and the note kept with them. None if there is no entry or it is incomplete."""
    directory = folder() / key
    try:
        meta: dict[str, Any] = json.loads((directory / _META).read_text(encoding="utf-8"))
        columns = {name: _mapped(directory / name, dtype, size) for name, (dtype, size) in meta["columns"].items()}
        os.utime(directory / _META)  # records the last use, by which `bound` finds the oldest entries
    except (OSError, ValueError, KeyError):
        return None
    return columns, meta["note"]


def _mapped(path: Path, dtype: str, size: int) -> Array:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is cut off")
    return np.memmap(path, dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)


class Keeper:
    """Collects columns piece by piece: in files if there is a key and the folder can be written, else in memory."""

    def __init__(self, key: str | None) -> None:
        self._key = key
        self._sizes: dict[str, tuple[str, int]] = {}
        self._pieces: list[Columns] = []
        self._files: dict[str, IO[bytes]] = {}
        self._directory: Path | None = None
        if key is not None:
            room()  # refuses a bound that is not a number before the work begins
            try:
                _remove_abandoned()
                self._directory = folder() / f".writing-{uuid.uuid4().hex}"
                self._directory.mkdir(parents=True)
                self._files = {name: (self._directory / name).open("wb") for name in DTYPES}
            except OSError as error:
                note(f"nothing can be kept in {folder()} ({error}); tokens stay in memory")
                self._directory = None

    def add(self, columns: Columns) -> None:
        """Appends a piece. Raises EngineError if it cannot be written to disk."""
        if self._directory is None:
            self._pieces.append(columns)
            return
        for name, values in columns.items():
            dtype, size = self._sizes.get(name, (values.dtype.str, 0))
            self._sizes[name] = dtype, size + len(values)
            try:
                self._files[name].write(values.tobytes())
            except OSError as error:
                raise _no_room(error) from error

    def finish(self, note: Mapping[str, Any]) -> Columns:
        """All pieces joined. Keeps them with a note of JSON values, unless another process has kept them meanwhile."""
        if self._directory is None or self._key is None:
            names = self._pieces[0] if self._pieces else {}
            columns = {name: np.concatenate([piece[name] for piece in self._pieces]) for name in names}
            self._pieces = []
            return columns or {name: np.empty(0, dtype) for name, dtype in DTYPES.items()}
        try:
            for file in self._files.values():
                file.close()
            meta = {"columns": self._sizes, "note": note}
            (self._directory / _META).write_text(json.dumps(meta), encoding="utf-8")
            # The files are mapped before they get their final name: from then on another process may remove them, but
            # a map stays readable.
            columns = {
                name: _mapped(self._directory / name, dtype, size) for name, (dtype, size) in self._sizes.items()
            }
            if read(self._key) is None:
                sync_tree(self._directory)  # after a power cut, a complete name must not hold empty columns
                self._give_name()
        except OSError as error:
            raise _no_room(error) from error
        shutil.rmtree(self._directory, ignore_errors=True)  # if it was not renamed
        bound(self._key)
        return columns

    def _give_name(self) -> None:
        assert self._directory is not None
        assert self._key is not None
        target = folder() / self._key
        shutil.rmtree(target, ignore_errors=True)
        try:
            self._directory.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def discard(self) -> None:
        """Removes what was not finished."""
        for file in self._files.values():
            file.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def room() -> float:
    """How many bytes may be kept. Raises ConfigError if the bound is not a number."""
    given = os.environ.get(BOUND, str(DEFAULT_GB))
    try:
        return float(given) * 1e9
    except ValueError:
        raise ConfigError(
            f"{BOUND} is {given!r}, not a number", where="the environment", fix=f"set it to GB, such as {BOUND}=20"
        ) from None


def bound(newest: str) -> None:
    """Removes the least recently used entries, but never `newest`, until the rest fits the bound. A map that is in use
    stays readable."""
    left = room()
    for _, directory, size in sorted(_by_age(newest)):
        left -= size
        if left < 0 and directory.name != newest:
            shutil.rmtree(directory, ignore_errors=True)


def _by_age(newest: str) -> Iterator[tuple[float, Path, int]]:
    """For each entry: a sort key by its last use (`newest` first, then the most recent), its folder and its bytes."""
    for meta in folder().glob(f"*/{_META}"):
        with suppress(OSError):  # another process removed it
            age = -math.inf if meta.parent.name == newest else -meta.stat().st_mtime
            yield age, meta.parent, sum(path.stat().st_size for path in meta.parent.iterdir())


def _remove_abandoned() -> None:
    for directory in folder().glob(".writing-*"):
        with suppress(FileNotFoundError):  # another process has renamed it
            if time.time() - directory.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)


def _no_room(error: OSError) -> EngineError:
    return EngineError(
        f"the token ids could not be kept: {error}",
        where=str(folder()),
        fix="make room, or name a folder on another disk in XDG_CACHE_HOME",
    )
