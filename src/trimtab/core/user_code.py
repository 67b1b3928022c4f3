"""Loads the user's own code that a run file names as "path/to/file.py:Name" or "package.module:Name"."""

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
"""Prefix of the module name of a user's file, which may have the same name as an installed module."""


class NamedOutput(io.TextIOBase):
    """Writes whole lines to stderr, each after a name, so that what a user's code prints never mixes with the output
    of a command."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = f"{self.line}{text}".split("\n")
        for line in lines:
            sys.stderr.write(f"{self.name}: {line}\n")
        return len(text)


def user_module(place: str, *, where: str) -> ModuleType:
    """The module at `place`, which is a file or the name of an importable module.

    A file is run once in a process and can import the files beside it. Raises ConfigError with the exception of the
    user's code and its line; `where` says what named the module.
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
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise ConfigError(
            f"{place!r} cannot be imported: {type(error).__name__}: {error}{_line_of(error, place)}",
            where=where,
            fix="name a file that `python` can run as path/to/file.py:Name, or an importable module as "
            "package.module:Name",
        ) from error


def place_of(module: str) -> str:
    """How a run file names a module that `user_module` returned: by the path of its file, or by the module's name."""
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
    """The line of the user's file that raised the error, or "" if there is none or the message has it already."""
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
