"""Atomic file writing, and disk errors turned into one-sentence messages."""

from __future__ import annotations

import dataclasses
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
"""Name prefix of a file or directory that is still being written. It is never read, and is removed when a run is
opened."""

NUM_SUGGESTED = 3


def files_like(path: Path) -> list[Path]:
    """The files in a missing file's directory whose names are most similar to its name, most similar first."""
    if not path.parent.is_dir():
        return []
    names = [other.name for other in path.parent.iterdir() if other.is_file()]
    return [path.parent / name for name in difflib.get_close_matches(path.name, names, n=NUM_SUGGESTED)]


_OF_THE_DISK = re.compile(
    r"os error (\d+)|PytorchStreamWriter failed"
    r"|(database or disk is full|unable to open database file|disk I/O error|a readonly database|database is locked)"
)


def disk_problem(error: BaseException) -> str:
    """The message of a disk error, such as "No space left on device: runs/a"; "" for any other error.

    Libraries with native code (safetensors, tokenizers, torch) raise error types of their own that quote the system's
    error, so their messages are searched for it.
    """
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        return f"{error.strerror or type(error).__name__}{': ' if places else ''}{' to '.join(places)}"
    if isinstance(error, Exception) and (found := _OF_THE_DISK.search(str(error))):
        return os.strerror(int(found[1])) if found[1] else found[2] or str(error)
    return ""


UNCHANGED = "what was there before is as it was"


@contextmanager
def writing(what: str, place: Path, *, kept: str = UNCHANGED) -> Iterator[None]:
    """Inside this block a disk error becomes an EngineError about `what`. `kept` says what is not lost."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EngineError) or not (problem := disk_problem(error)):
            raise
        raise unwritable(what, problem, place, kept) from error


def unwritable(what: str, problem: str, place: Path, kept: str) -> EngineError:
    """The error for something that could not be written to disk."""
    return EngineError(
        f"{what} could not be written: {problem}",
        where=str(place),
        fix=f"make room, correct the permissions or give another place with --out; {kept}",
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path for a new file or directory, and renames it to `path` at the end of the block.

    A reader of `path`, now or after a power cut, sees the complete old file or the complete new one. A directory is
    removed before its replacement is renamed, so there `path` may also be missing for a moment.
    """
    aside = path.with_name(WRITING + path.name)
    remove(aside)
    try:
        yield aside
        sync_tree(aside)
        if aside.is_dir():
            discard(path)  # no system call replaces a directory that is not empty
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            remove(aside)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file atomically; see `replacing`."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, kept: str = UNCHANGED) -> None:
    """Replaces a JSON file atomically; a disk error becomes an EngineError that says what is `kept`."""
    with writing(path.name, path, kept=kept):
        write_whole(path, json_text(value))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Replaces a JSON lines file atomically; see `replacing`. Returns the number of rows."""
    num = 0
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num += 1
    return num


def write_out(path: Path, text: str, *, kept: str = UNCHANGED) -> None:
    """Writes a file that the user named and makes its folders; a link is followed to its file. What is no file, such as
    /dev/stdout, gets the text appended. Raises EngineError, which says what is `kept`, if the disk refuses it."""
    with writing(str(path), path, kept=kept):
        if _is_device(path):
            with path.open("a", encoding="utf-8") as device:
                device.write(text)
        else:
            file = Path(os.path.realpath(path))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, text)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary path for a directory that the user named, and renames it to that at the end of the block, whole
    or not at all. Its parents are made, and a link is followed."""
    place = Path(os.path.realpath(path))
    with writing(str(path), path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as aside:
            yield aside


def check_out(*paths: Path | None) -> None:
    """Raises EngineError if `write_out` could not write to one of the paths, before anything is computed. Makes the
    folders. None stands for a file that is not asked for."""
    for path in paths:
        if path is None or _is_device(path):
            continue
        file = Path(os.path.realpath(path))
        with writing(str(path), path):
            file.parent.mkdir(parents=True, exist_ok=True)
            with (aside := file.with_name(WRITING + file.name)).open("w"):
                aside.unlink()


def _is_device(path: Path) -> bool:
    """Whether the path is a pipe, a terminal or the like. What lies in /dev may be an open file behind a link, which
    must not be replaced by another."""
    return path.exists() and (not path.is_file() or path.is_relative_to("/dev"))


def finite(value: Any) -> Any:
    """The value as JSON holds it: records as objects, and null for numbers that are not finite, which it has not."""
    return json.loads(json.dumps(value, default=dataclasses.asdict), parse_constant=lambda _: None)


def json_text(value: Any) -> str:
    """The value as a JSON document. Numbers that are not finite become null, since JSON cannot express them."""
    return _encodable(json.dumps(finite(value), ensure_ascii=False, sort_keys=True, indent=2) + "\n")


def json_lines(rows: Iterable[Any]) -> str:
    """Rows as JSON lines, as they are."""
    return "".join(_encodable(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def _encodable(text: str) -> str:
    """The text with a question mark for half a character, which a JSON string and the name of a file may hold and UTF-8
    cannot."""
    return text.encode("utf-8", "replace").decode()


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """The object in a JSON file that this package wrote. Raises DataError with `fix` if the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path.name} is damaged: {error}", where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise DataError(f"{path.name} is damaged: it holds no table", where=str(path), fix=fix)
    return value


def append_rows(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Appends rows to a JSON lines file. Numbers that are not finite become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_lines(finite(rows)))


def discard(path: Path) -> None:
    """Removes a file or tree that may not exist. It is renamed first, so `path` never holds half of it."""
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
    """Flushes a file, or a directory and everything below it, to the disk."""
    for inner in [*path.rglob("*"), path]:
        sync(inner)


def sync(path: Path) -> None:
    """Flushes a file, or the list of names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
