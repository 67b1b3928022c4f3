"""Columns of numbers that are kept on disk and read through memory maps, bounded in all.

What is kept is named by a hash of everything it follows from, so nothing is ever out of date; it is only not found.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from trimtab.data.tokens import DTYPES, Array, Columns
from trimtab.errors import ConfigError, EngineError

BOUND = "TRIMTAB_DATA_CACHE_GB"
"""The environment variable that says how much may be kept, in GB of a thousand million bytes."""
DEFAULT_GB = 20.0
_ABANDONED_SECONDS = 24 * 3600
_META = "meta.json"


def folder() -> Path:
    """Where columns are kept: `trimtab/data` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "data"


def read(key: str) -> tuple[Columns, dict[str, Any]] | None:
    """What was kept under a name, and what was noted with it. None where there is nothing, or nothing whole."""
    directory = folder() / key
    try:
        meta: dict[str, Any] = json.loads((directory / _META).read_text(encoding="utf-8"))
        columns = {name: _mapped(directory / name, dtype, size) for name, (dtype, size) in meta["columns"].items()}
        os.utime(directory / _META)  # the last use, by which the oldest is found
    except (OSError, ValueError, KeyError):
        return None
    return columns, meta["note"]


def _mapped(path: Path, dtype: str, size: int) -> Array:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is cut off")
    return np.memmap(path, dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)


class Keeper:
    """Takes columns piece by piece: into files if there is a key and a place for them, else into memory."""

    def __init__(self, key: str | None) -> None:
        self._key = key
        self._sizes: dict[str, tuple[str, int]] = {}
        self._pieces: list[Columns] = []
        self._files: dict[str, IO[bytes]] = {}
        self._directory: Path | None = None
        if key is not None:
            try:
                _remove_abandoned()
                self._directory = folder() / f".writing-{os.getpid()}-{key}"
                self._directory.mkdir(parents=True, exist_ok=True)
                self._files = {name: (self._directory / name).open("wb") for name in DTYPES}
            except OSError as error:
                print(f"note: nothing can be kept in {folder()} ({error}); tokens stay in memory", file=sys.stderr)
                self._directory = None

    def add(self, columns: Columns) -> None:
        """Puts a piece behind those before. Raises EngineError where the disk does not take it."""
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
        """All pieces together, kept with a note of JSON values."""
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
            target = folder() / self._key
            shutil.rmtree(target, ignore_errors=True)
            self._directory.rename(target)
        except OSError as error:
            raise _no_room(error) from error
        bound(self._key)
        found = read(self._key)
        assert found is not None, f"{target} was written a moment ago"
        return found[0]

    def discard(self) -> None:
        """Removes what was not finished."""
        for file in self._files.values():
            file.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def bound(newest: str) -> None:
    """Removes what was not used for longest until the rest fits the bound. A map that is in use stays readable."""
    given = os.environ.get(BOUND, str(DEFAULT_GB))
    try:
        room = float(given) * 1e9
    except ValueError:
        raise ConfigError(
            f"{BOUND} is {given!r}, not a number", where="the environment", fix=f"set it to GB, such as {BOUND}=20"
        ) from None
    found = sorted(folder().glob(f"*/{_META}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for meta in sorted(found, key=lambda path: path.parent.name != newest):
        room -= sum(path.stat().st_size for path in meta.parent.iterdir())
        if room < 0 and meta.parent.name != newest:
            shutil.rmtree(meta.parent, ignore_errors=True)


def _remove_abandoned() -> None:
    for directory in folder().glob(".writing-*"):
        if time.time() - directory.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(directory, ignore_errors=True)


def _no_room(error: OSError) -> EngineError:
    return EngineError(
        f"the token ids could not be kept: {error}",
        where=str(folder()),
        fix="make room, or name a folder on another disk in XDG_CACHE_HOME",
    )
