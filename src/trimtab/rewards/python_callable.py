"""A function of the user's own as a reward."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.core.metrics import Metrics
from trimtab.core.registry import register
from trimtab.core.types import Prompt, Rollout
from trimtab.rewards.each import Score, score_each

RewardFunction = Callable[[Prompt, str, Mapping[str, Any]], float]


@register("reward", "callable")
@dataclass(frozen=True, kw_only=True)
class PythonCallable:
    """What `function(prompt, response, facts)` returns: a number for one reply. It runs in this process, as it is."""

    function: str
    """The function as "module:name" (looked for where Python finds modules and in the current directory) or as
    "path/to/file.py:name". What it prints goes to stderr behind its name."""
    seconds: float = 60.0
    """Time by the clock for one reply; a reply that takes longer is not judged."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds = {self.seconds} leaves no time to judge a reply; give more than 0")

    def load(self, *, token_budget: int) -> PythonCallableScorer:
        """The function, imported. Raises ConfigError where there is none that can be called so."""
        return PythonCallableScorer(load_function(self.function), name=self.function, seconds=self.seconds)


class PythonCallableScorer:
    """Calls the function for every reply."""

    def __init__(self, function: RewardFunction, *, name: str, seconds: float) -> None:
        self.function = function
        self.name = name
        self.seconds = seconds

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] what the function says."""
        with contextlib.redirect_stdout(_Named(self.name)):
            return score_each("callable", rollouts, self._judge)

    def _judge(self, rollout: Rollout) -> Score:
        try:
            with _at_most(self.seconds):
                value: Any = self.function(rollout.prompt, rollout.response, rollout.prompt.facts)
        except _TimeIsUp:
            raise TimeoutError(f"{self.name} gave no answer within {self.seconds:g} s") from None
        except SystemExit as error:
            raise RuntimeError(f"{self.name} called sys.exit({error.code!r}) instead of returning a number") from error
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        # A text is no number even where it could be read as one.
        if isinstance(value, str | bytes) or not math.isfinite(number):
            raise ValueError(f"the function returned {str(value)[:100]!r}, which is no finite number")
        return Score(number)


class _TimeIsUp(BaseException):
    """Not an Exception, so that a function that catches those ends too."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises _TimeIsUp in what runs here when the time is up. Signals reach the main thread only; in another, and if
    somebody else's timer runs, there is no limit."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Named(io.TextIOBase):
    """Writes whole lines to stderr behind a name, so that a function's prints never mix with what a command prints."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = f"{self.line}{text}".split("\n")
        for line in lines:
            sys.stderr.write(f"{self.name}: {line}\n")
        return len(text)


def load_function(name: str) -> RewardFunction:
    """The function that "module:name" or "file.py:name" names. Raises ConfigError that says which part is wrong."""
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(
            f"{name!r} names no function; it is not of the form module:name or path/to/file.py:name",
            where="rewards, callable",
            fix="write for instance my_rewards:brevity or rewards/mine.py:brevity",
        )
    is_file = module_name.endswith(".py") or "/" in module_name
    with contextlib.redirect_stdout(_Named(module_name)):
        module = _import_file(Path(module_name)) if is_file else _import_module(module_name)
    found: Any = module
    for step in attribute.split("."):
        if not hasattr(found, step):
            close = difflib.get_close_matches(step, dir(found), 1)
            raise ConfigError(
                f"{module_name!r} has no {attribute!r}",
                where="rewards, callable",
                fix=f"did you mean {close[0]!r}?" if close else "name a function that it defines",
            )
        found = getattr(found, step)
    if not callable(found) or not _takes_three(found):
        raise ConfigError(
            f"{name!r} cannot be called with a prompt, a response and facts",
            where="rewards, callable",
            fix="define it as def name(prompt, response, facts): and return a number",
        )
    function: RewardFunction = found
    return function


def _import_module(name: str) -> ModuleType:
    with _first_on_path(os.getcwd()):
        try:
            return importlib.import_module(name)
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever the module raises while it is loaded is its author's to read
            raise ConfigError(
                f"the module {name!r} cannot be imported: {type(error).__name__}: {error}",
                where="rewards, callable",
                fix="run the command where the module's file is, install it, or name the file: path/to/file.py:name",
            ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"there is no file {str(path)!r} in {os.getcwd()}",
            where="rewards, callable",
            fix=f"did you mean {path}.py?" if path.with_name(f"{path.name}.py").is_file() else "correct the path",
        )
    # A name of its own: the file may be called like an installed module.
    name = f"trimtab_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} is no Python file", where="rewards, callable", fix="name a file.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _first_on_path(str(path.resolve().parent)):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # as above
            del sys.modules[name]
            raise ConfigError(
                f"the file {str(path)!r} cannot be run: {type(error).__name__}: {error}",
                where="rewards, callable",
                fix="correct the file: `python` must be able to run it",
            ) from error
    return module


@contextlib.contextmanager
def _first_on_path(directory: str) -> Iterator[None]:
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


def _takes_three(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # some functions in C do not say
        return True
    return True
