"""Runs the code of replies: the reward is the share of tests that it passes, or whether it passes them all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.errors import DataError
from trimtab.core.metrics import Metrics
from trimtab.core.registry import register
from trimtab.core.types import Rollout
from trimtab.data.messages import value_in
from trimtab.rewards.each import Score, fact, score_each
from trimtab.rewards.formats import last_fenced
from trimtab.sandbox.sandbox import Limits, Sandbox

_PYTHON = ("python", "python3", "py")


@register("reward", "unit_tests")
@dataclass(frozen=True, kw_only=True)
class UnitTests:
    """1 for a reply whose code passes every test of its prompt, else 0. The code runs in a sandbox."""

    fact: str = "tests"
    """The prompt's fact that holds the tests: Python to run, one text or several; or pairs of "input" and "output". A
    list may also be written as text. Tests that pass without any code judge nothing, and are refused."""
    setup_fact: str = "setup"
    """The fact, if there is one, with Python to run before each test, such as imports: a text, or a list of lines."""
    entry_point_fact: str = "entry_point"
    """The fact, if there is one, with the name (or names) of the code that the tests use; they then see no other
    name. It may also be a method, such as `Solution().two_sum`. `check` in the tests is called with each."""
    score: Literal["all", "share"] = "all"
    """Whether every test has to pass, or the reward is the share of tests that pass."""
    code: Literal["fenced", "whole"] = "fenced"
    """Whether the code is the reply's last block between lines of ```, or the last of those that say python, or all of
    the reply."""
    limits: Limits = field(default_factory=Limits)
    """Limits for the code of one reply. Each pair of input and output is a run of its own with these limits."""
    packages: tuple[str, ...] = ()
    """Directories with packages that the code may import; without any, it has only the standard library."""
    num_parallel: int | None = None
    """Sandboxes at a time; None is one for each processor core."""
    allow_unisolated: bool = False
    """Run the code even if it cannot be kept from your files and network. You have then allowed whatever it does."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "num_parallel")

    def load(self, *, token_budget: int) -> UnitTestsScorer:
        """The scorer, after a trial of the sandbox. Raises EngineError if there can be no sandbox."""
        return UnitTestsScorer(self)


@dataclass(frozen=True)
class TestVerdict:
    """Which tests passed, and whether time ran out."""

    passed: Sequence[bool]
    timed_out: bool


class UnitTestsScorer:
    """Runs the code of replies, in processes of their own."""

    thread_safe = True

    def __init__(self, settings: UnitTests) -> None:
        self.settings = settings
        self.sandbox = Sandbox(settings.limits, packages=settings.packages, allow_unisolated=settings.allow_unisolated)
        self.num_parallel = settings.num_parallel or os.cpu_count() or 1

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] in [0, 1]. `reward/unit_tests_passed` is the share of tests passed; `…_timed_out` and `…_no_code` are
        shares of replies."""
        return score_each("unit_tests", rollouts, self._judge, num_parallel=self.num_parallel)

    def _judge(self, rollout: Rollout) -> Score:
        facts = rollout.prompt.facts
        given: Any = fact(rollout.prompt, self.settings.fact)
        # JSON lines made from tables often hold a list as text, which Python would run and pass: it asserts nothing.
        if isinstance(given, str) and (listed := value_in(given)) is not None:
            given = listed
        tests: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
        code = rollout.response if self.settings.code == "whole" else last_fenced(rollout.response, _PYTHON)
        if code is None:
            return Score(0.0, {"passed": 0.0, "timed_out": 0.0, "no_code": 1.0})
        if tests and all(isinstance(test, str) for test in tests):
            verdict = self._examine(code, tests, facts)
        elif tests and all(isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests):
            verdict = self._run(code, tests)
        else:
            raise DataError(
                f"the fact {self.settings.fact!r} is {str(tests)[:100]}, which are no tests",
                where=f"prompt {rollout.prompt.id}",
                fix='give a list of Python texts, or of {"input": "…", "output": "…"}',
            )
        share = sum(verdict.passed) / len(verdict.passed)
        value = share if self.settings.score == "share" else float(all(verdict.passed))
        return Score(value, {"passed": share, "timed_out": float(verdict.timed_out), "no_code": 0.0})

    def _examine(self, code: str, tests: Sequence[str], facts: Mapping[str, Any]) -> TestVerdict:
        setup, entry_points = (
            _texts(facts, name) for name in (self.settings.setup_fact, self.settings.entry_point_fact)
        )
        report = self.sandbox.examine(code, tests, setup="\n".join(setup), entry_points=entry_points)
        if report.refused:
            raise DataError(
                f"the tests cannot judge any code: {report.refused}", where="the tests", fix="correct the tests"
            )
        return TestVerdict(report.passed, report.timed_out)

    def _run(self, code: str, tests: Sequence[Mapping[str, Any]]) -> TestVerdict:
        passed, timed_out = [], False
        for test in tests:
            output = self.sandbox.run(code, str(test["input"]))
            timed_out |= output.timed_out
            passed.append(output.ended_well and _tidy(output.stdout) == _tidy(str(test["output"])))
            if self.settings.score == "all" and not passed[-1]:
                break
        return TestVerdict(passed + [False] * (len(tests) - len(passed)), timed_out)


def _texts(facts: Mapping[str, Any], name: str) -> list[str]:
    """The texts of a fact that is one text, a list of texts, or missing. Raises DataError for anything else."""
    given = facts.get(name) or []
    if isinstance(given, str):
        given = value_in(given) or [given]
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise DataError(
            f"the fact {name!r} is {str(given)[:100]}, which is no text", where="the tests", fix="give a text or a list"
        )
    return list(given)


def _tidy(text: str) -> list[str]:
    """The lines without the white space at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
