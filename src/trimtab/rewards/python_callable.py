"""A function of the user as a reward."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import inspect
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.core.metrics import Metrics
from trimtab.core.registry import register
from trimtab.core.types import Prompt, Rollout
from trimtab.core.user_code import NamedOutput, user_module
from trimtab.rewards.each import Score, score_each

RewardFunction = Callable[[Prompt, str, Mapping[str, Any]], float]


@register("reward", "callable")
@dataclass(frozen=True, kw_only=True)
class PythonCallable:
    """The number that `function(prompt, response, facts)` returns for one reply. It runs in this process, as it is."""

    function: str
    """The function as "module:name" (the module is searched where Python finds modules, and in the current directory)
    or as "path/to/file.py:name". What it prints goes to stderr after its name."""
    seconds: float = 60.0
    """Time by the clock for one reply; a reply that takes longer is not judged."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds = {self.seconds} leaves no time to judge a reply; give more than 0")

    def load(self, *, token_budget: int) -> PythonCallableScorer:
        """The scorer with the imported function. Raises ConfigError if there is no function that can be called so."""
        return PythonCallableScorer(load_function(self.function), name=self.function, seconds=self.seconds)


class PythonCallableScorer:
    """Calls the function for every reply."""

    def __init__(self, function: RewardFunction, *, name: str, seconds: float) -> None:
        self.function = function
        self.name = name
        self.seconds = seconds

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] the numbers that the function returns."""
        with contextlib.redirect_stdout(NamedOutput(self.name)):
            return score_each("callable", rollouts, self._judge)

    def _judge(self, rollout: Rollout) -> Score:
        here = os.getcwd()
        try:
            with _at_most(self.seconds):
                # a copy, since a function that changes its facts would change those of later steps
                value: Any = self.function(rollout.prompt, rollout.response, copy.deepcopy(rollout.prompt.facts))
        except _TimeIsUp:
            raise TimeoutError(f"{self.name} gave no answer within {self.seconds:g} s") from None
        except SystemExit as error:
            raise RuntimeError(f"{self.name} called sys.exit({error.code!r}) instead of returning a number") from error
        finally:
            moved = os.getcwd()
            os.chdir(here)
        if moved != here:  # paths of the run may be relative
            raise RuntimeError(f"{self.name} changed the working directory to {moved}, and the run writes into {here}")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        # A text is refused even if it could be read as a number.
        if isinstance(value, str | bytes) or not math.isfinite(number):
            raise ValueError(f"the function returned {str(value)[:100]!r}, which is no finite number")
        return Score(number)


class _TimeIsUp(BaseException):
    """Not an Exception, so that a function that catches every Exception ends too."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises _TimeIsUp in the code that runs inside when the time is up. Signals reach only the main thread: in another
    thread, or if a timer of somebody else runs, there is no limit."""
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


def load_function(name: str) -> RewardFunction:
    """The function that "module:name" or "file.py:name" names. Raises a ConfigError that says which part is wrong."""
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(
            f"{name!r} names no function; it is not of the form module:name or path/to/file.py:name",
            where="rewards, callable",
            fix="write for instance my_rewards:brevity or rewards/mine.py:brevity",
        )
    found: Any = user_module(module_name, where="rewards, callable")
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
    if problem := _other_parameters(found):
        raise ConfigError(
            f"{name!r} takes {problem}; it is called for one reply, with the prompt, the text of the reply, and a "
            "mapping of all facts of the prompt",
            where="rewards, callable",
            fix="define it as def name(prompt, response, facts): and read a fact as facts['answer']",
        )
    function: RewardFunction = found
    return function


def file_digest(name: str) -> str:
    """The beginning of the SHA-256 of the file that defines the function "module:name"; "" if it has no file."""
    file = getattr(user_module(name.rpartition(":")[0], where="rewards, callable"), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else ""


_PROMPTS = frozenset({"prompt", "question", "query", "instruction"})
_REPLIES = frozenset({"response", "completion", "reply", "output", "generation"})
_FACTS = frozenset({"facts", "label", "answer", "ground_truth", "reference", "target", "solution", "gold"})
_FOREIGN = frozenset({"prompts", "queries", "responses", "completions", "outputs", "labels", "answers", "data_source",
                      "solution_str", "ground_truths"})  # fmt: skip
"""Parameters of reward functions of verl, OpenRLHF and TRL, which get lists or other things in the same places."""


def _other_parameters(function: Callable[..., Any]) -> str:
    """The names of the first three parameters, if by one of them the function expects something else in its place."""
    try:
        names = list(inspect.signature(function).parameters)[:3]
    except ValueError:
        return ""
    expected = (_REPLIES | _FACTS, _PROMPTS | _FACTS, _PROMPTS | _REPLIES | (_FACTS - {"facts"}))
    wrong = any(name.lower() in others | _FOREIGN for name, others in zip(names, expected, strict=False))
    return ", ".join(names) if wrong else ""


def _takes_three(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True
