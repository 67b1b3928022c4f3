"""Files written whole or not at all, and what a disk refuses said in a sentence."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError, EngineError

WRITING = ".writing-"
"""Prefix of what is not yet whole. Never read, and removed when a run is opened."""

NUM_SUGGESTED = 3


def files_like(path: Path) -> list[Path]:
    """The files beside a missing one whose names are most like its own, the likest first."""
    if not path.parent.is_dir():
        return []
    names = [other.name for other in path.parent.iterdir() if other.is_file()]
    return [path.parent / name for name in difflib.get_close_matches(path.name, names, n=NUM_SUGGESTED)]


_OF_THE_DISK = re.compile(r"os error (\d+)|PytorchStreamWriter failed")


def disk_problem(error: BaseException) -> str:
    """What the disk refused, such as "No space left on device: runs/a"; "" for any other error.

    Libraries that write in another language than Python (safetensors, tokenizers, torch) raise errors of their own
    kinds, which quote the system's.
    """
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        return f"{error.strerror or type(error).__name__}{': ' if places else ''}{' to '.join(places)}"
    if isinstance(error, Exception) and (found := _OF_THE_DISK.search(str(error))):
        return os.strerror(int(found[1])) if found[1] else str(error)
    return ""


@contextmanager
def writing(what: str, place: Path, *, kept: str = "what was there before is as it was") -> Iterator[None]:
    """Within, what the disk refuses becomes an EngineError about `what`. `kept` says what is not lost."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EngineError) or not (problem := disk_problem(error)):
            raise
        raise unwritable(what, problem, place, kept) from error


def unwritable(what: str, problem: str, place: Path, kept: str) -> EngineError:
    """The error for something that the disk did not take."""
    return EngineError(
        f"{what} could not be written: {problem}",
        where=str(place),
        fix=f"make room, correct the permissions or give another place with --out; {kept}",
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within, the place where a new file or directory is made, which then takes the name `path`.

    Whoever reads `path`, now or after a power cut, sees all of the old or all of the new.
    """
    aside = path.with_name(WRITING + path.name)
    remove(aside)
    try:
        yield aside
        sync_tree(aside)
        if aside.is_dir():
            discard(path)  # no call replaces a directory that holds something
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            remove(aside)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file at once; see `replacing`."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Replaces a JSON lines file at once; see `replacing`. Returns the number of rows."""
    num = 0
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num += 1
    return num


def write_out(path: Path, text: str) -> None:
    """A file that the user asked for by name, its folders made. Raises EngineError where the disk does not take it."""
    with writing(str(path), path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def json_text(value: Any) -> str:
    """The value as a JSON document; numbers that are not finite become null, since JSON has no word for them."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """The object in a JSON file that this package wrote. Raises DataError, with the way out, where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path.name} is damaged: {error}", where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise DataError(f"{path.name} is damaged: it holds no table", where=str(path), fix=fix)
    return value


def append_rows(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Adds rows to a JSON lines file, numbers that are not finite as null."""
    finite = json.loads(json.dumps(rows), parse_constant=lambda _: None)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finite))


def discard(path: Path) -> None:
    """Removes a file or tree that may not exist; one half removed never shows under its own name."""
    if path.exists():
        aside = path.with_name(f"{WRITING}old-{path.name}")
        remove(aside)
        path.rename(aside)
        remove(aside)


def remove(path: Path) -> None:
    """Removes a file or tree that may not exist."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Sees that a file, or a directory and all below it, are on the disk."""
    for inner in [*path.rglob("*"), path]:
        sync(inner)


def sync(path: Path) -> None:
    """Sees that a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
