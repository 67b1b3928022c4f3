"""Errors meant for people: each says what was wrong with a value, where the value came from and what to do."""

from __future__ import annotations

import difflib
import importlib.util
import signal
from collections.abc import Iterable
from pathlib import Path


class TrimtabError(Exception):
    """A mistake that a person can repair. The command line prints it without a traceback.

    `problem` names the value and what is wrong with it, `where` says where it came from (a file and row, a key path, a
    command), and `fix` says what to do next.
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


def nearest(name: str, known: Iterable[str]) -> str:
    """The beginning of a fix, such as "did you mean 'sft'? ", with the known name closest to a wrong one; "" if none is
    close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("torch", "transformers", "tokenizers", "safetensors", "datasets", "peft", "accelerate"),
    "feedback": (
        *("fastapi", "uvicorn", "sqlalchemy", "alembic", "markdown_it", "mdit_py_plugins", "nh3"),
        *("latex2mathml", "pyarrow"),
    ),
    "postgresql": ("psycopg",),
    "math": ("math_verify", "latex2sympy2_extended"),
    "json": ("jsonschema",),
    "quantized": ("bitsandbytes",),
    "ray": ("ray",),
    "lm-eval": ("lm_eval",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
"""The modules that each extra of the package brings."""


def install(extra: str) -> str:
    """The command that installs an extra, by the package's name and, if this is a checkout, also from its path."""
    checkout = Path(__file__).parents[3]
    by_name = f"pip install 'trimtab[{extra}]'"
    if not (checkout / "pyproject.toml").is_file():
        return by_name
    return f"{by_name}, or from this checkout: pip install '{checkout}[{extra}]'"


def need(module: str, *, extra: str, setting: str, where: str) -> None:
    """Raises EngineError with the install command if an optional library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise not_installed(module, extra=extra, needed_by=setting, where=where)


def not_installed(module: str, *, extra: str, needed_by: str, where: str) -> EngineError:
    """The error for an extra's library that is not installed."""
    name = module.replace("_", "-")
    return EngineError(f"{needed_by} needs {name}, which is not installed", where=where, fix=install(extra))


class Interrupted(Exception):
    """The run was stopped on request; the message says what was saved."""

    def __init__(self, message: str, *, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM when there is nothing to finish first. It stops the program as Ctrl-C does."""
