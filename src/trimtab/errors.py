"""Errors meant for people: what was wrong with the value seen, where it came from, what to do."""

from __future__ import annotations

import importlib.util


class TrimtabError(Exception):
    """A mistake a person can repair. Printed by the command line without a traceback.

    `problem` names the value seen and what is wrong with it, `where` its origin (a file and row, a key path, a
    command), `fix` the next thing to do.
    """

    def __init__(self, problem: str, *, where: str, fix: str) -> None:
        super().__init__(f"{problem}\n  where: {where}\n  fix:   {fix}")
        self.problem = problem
        self.where = where
        self.fix = fix


class ConfigError(TrimtabError):
    """A run file, override or combination of settings that cannot be run."""


class DataError(TrimtabError):
    """A file or row that cannot be used."""


class EngineError(TrimtabError):
    """A model, device or library that cannot do what was asked, or a computation that went wrong."""


def need(module: str, *, extra: str, setting: str, where: str) -> None:
    """Raises EngineError with the command to type where an optional library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise EngineError(
            f"{setting} needs {module.replace('_', '-')}, which is not installed",
            where=where,
            fix=f"pip install 'trimtab[{extra}]'",
        )


class Interrupted(Exception):
    """The run was stopped on request after saving its state; the message says how to go on."""
