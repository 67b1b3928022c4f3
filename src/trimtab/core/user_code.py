"""Code of the user's own that a run file names, as "path/to/file.py:Name" or "package.module:Name"."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from trimtab.core.errors import ConfigError

_PREFIX = "trimtab_user_"
"""Before the path of a file in the name of its module: the file may be called like an installed module."""


class NamedOutput(io.TextIOBase):
    """Writes whole lines to stderr behind a name, so that what a user's code prints never mixes with the output of a
    command."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = f"{self.line}{text}".split("\n")
        for line in lines:
            sys.stderr.write(f"{self.name}: {line}\n")
        return len(text)


def user_module(place: str, *, where: str) -> ModuleType:
    """The module of a file, which is run once in a process and sees its neighbours, or an importable one.

    Raises ConfigError with what the code raised and the line in which it did; `where` is what named it.
    """
    is_file = place.endswith(".py") or "/" in place
    if is_file and not Path(place).is_file():
        raise ConfigError(
            f"there is no file {place!r} in {os.getcwd()}",
            where=where,
            fix=f"did you mean {Path(place)}.py?" if Path(f"{place}.py").is_file() else "correct path/to/file.py:Name",
        )
    directory = str(Path(place).resolve().parent) if is_file else os.getcwd()
    try:
        with _first_on_path(directory), contextlib.redirect_stdout(NamedOutput(place)):
            return _module_of_file(Path(place)) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever the code raises is its author's to read
        raise ConfigError(
            f"{place!r} cannot be imported: {type(error).__name__}: {error}{_line_of(error, place)}",
            where=where,
            fix="name a file that `python` can run as path/to/file.py:Name, or an importable module as "
            "package.module:Name",
        ) from error


def place_of(module: str) -> str:
    """What a run file calls a module that `user_module` gave: the path of its file, or its name."""
    return module.removeprefix(_PREFIX)


def _module_of_file(path: Path) -> ModuleType:
    name = f"{_PREFIX}{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _line_of(error: BaseException, place: str) -> str:
    """Where in the user's file it went wrong: "" for what has no line there, or says it itself."""
    if isinstance(error, SyntaxError):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == Path(place).resolve()]
    return f" (line {lines[-1]})" if lines else ""


@contextlib.contextmanager
def _first_on_path(directory: str) -> Iterator[None]:
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
