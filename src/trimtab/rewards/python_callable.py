"""A function of the user's own as a reward."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.metrics import Metrics
from trimtab.registry import register
from trimtab.rewards.each import Score, score_each
from trimtab.types import Prompt, Rollout

RewardFunction = Callable[[Prompt, str, Mapping[str, Any]], float]


@register("reward", "callable")
@dataclass(frozen=True, kw_only=True)
class PythonCallable:
    """What `function(prompt, response, facts)` returns: a number for one reply. It runs in this process, as it is."""

    function: str
    """The function as "module:name"; modules are looked for where Python finds them and in the current directory."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    def load(self, *, token_budget: int) -> PythonCallableScorer:
        """The function, imported. Raises ConfigError where there is none that can be called so."""
        return PythonCallableScorer(load_function(self.function))


class PythonCallableScorer:
    """Calls the function for every reply."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] what the function says."""
        return score_each("callable", rollouts, self._judge)

    def _judge(self, rollout: Rollout) -> Score:
        value: Any = self.function(rollout.prompt, rollout.response, rollout.prompt.facts)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        # A text is no number even where it could be read as one.
        if isinstance(value, str | bytes) or not math.isfinite(number):
            raise ValueError(f"the function returned {str(value)[:100]!r}, which is no finite number")
        return Score(number)


def load_function(name: str) -> RewardFunction:
    """The function that "module:name" names. Raises ConfigError that says which part of it is wrong."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(
            f"{name!r} is not of the form module:name",
            where="rewards, callable",
            fix="write for instance my_rewards:brevity",
        )
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises while it is loaded is its author's to read
        raise ConfigError(
            f"the module {module_name!r} cannot be imported: {type(error).__name__}: {error}",
            where="rewards, callable",
            fix="run the command where the module's file is, or install it",
        ) from error
    finally:
        sys.path.remove(os.getcwd())
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


def _takes_three(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # some functions in C do not say
        return True
    return True
