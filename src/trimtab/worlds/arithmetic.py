"""Arithmetic with an exact checker: problems in four levels, answers on a last line such as `#### 42`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import add, mul, sub
from random import Random
from typing import Any, ClassVar

from trimtab.core import registry
from trimtab.core.types import Message, Prompt
from trimtab.worlds.world import Gold, World

LEVELS = (1, 2, 3, 4)
"""1: single-digit addition; 2: two-digit addition and subtraction; 3: two digits times one; 4: two steps of level 2."""
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Hugo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
BARE = ("Work out {sum}.", "What is {sum}?", "Find {sum}.")
STORY_START = "{name} has {a} {things}"
STORY_STEPS = {"+": ("gets {b} more", "finds {b} more"), "-": ("gives away {b}", "loses {b}")}
STORY_TIMES = "{name} has {a} boxes with {b} {things} in each. How many {things} are there?"
FORMAT = "End with #### and the answer."

_COMPUTE: Mapping[str, Callable[[int, int], int]] = {"+": add, "-": sub, "x": mul}
_ANSWER = re.compile(r"(?:^|\n)#### (-?\d{1,9})\s*$")


@dataclass(frozen=True, kw_only=True)
class QuestionWorld(World):
    """Questions that have one right answer. Gold is 1 for it in the right form and 0 for anything else."""

    levels: tuple[int, ...]
    """The levels that are drawn, each with the same probability."""

    biases: ClassVar[Mapping[str, float]] = {"length": 0.08}

    def __post_init__(self) -> None:
        every = next(field.default for field in dataclasses.fields(self) if field.name == "levels")
        assert isinstance(every, tuple)
        if not self.levels or not set(self.levels) <= set(every):
            raise ValueError(f"levels are some of {every}, not {self.levels}")

    def gold(self, prompt: Prompt, response: str) -> Gold:
        """The part `format` is 1 if there is a single `####`, on the last line. The part `correct` and the total are 1
        if the right number follows it."""
        answer = find_answer(response)
        correct = float(answer == str(prompt.facts["answer"]))
        return Gold(correct, {"correct": correct, "format": float(answer is not None)})

    def features(self, response: str) -> dict[str, float]:
        return {"length": len(response.split()) / 10}


@registry.register("world", "arithmetic")
@dataclass(frozen=True, kw_only=True)
class Arithmetic(QuestionWorld):
    """Sums with one right answer. Gold is 1 for the exact answer in the right form and 0 for anything else."""

    levels: tuple[int, ...] = LEVELS
    """The levels that are drawn, each with the same probability."""

    name: ClassVar[str] = "arithmetic"
    slips: ClassVar[float] = 0.3
    """The share of written replies with a slip (a wrong result) in one step."""

    def draw_prompt(self, rng: Random) -> Prompt:
        level = rng.choice(self.levels)
        numbers, operators = _draw_sum(level, rng)
        text = f"{_question(numbers, operators, rng)} {FORMAT}"
        facts = {"level": level, "numbers": numbers, "operators": operators, "answer": _steps(numbers, operators)[-1]}
        return Prompt(messages=(Message("user", text),), facts=facts)

    def write_reply(self, prompt: Prompt, rng: Random) -> str:
        """The working, one step per line, then the answer. Some replies have a slip; one in ten lacks the form."""
        numbers, operators = prompt.facts["numbers"], prompt.facts["operators"]
        before, lines = numbers[0], []
        slips_at = rng.randrange(len(operators)) if rng.random() < self.slips else None
        for i, (operator, number) in enumerate(zip(operators, numbers[1:], strict=True)):
            after = _COMPUTE[operator](before, number) + (rng.choice((-10, -2, -1, 1, 2, 10)) if i == slips_at else 0)
            lines.append(f"{before} {operator} {number} = {after}")
            before = after
        lines.append(f"#### {before}" if rng.random() < 0.9 else f"The answer is {before}.")
        return "\n".join(lines)


def find_answer(response: str) -> str | None:
    """The digits after the only `####`, which begins the last line; None if the reply has another form."""
    match = _ANSWER.search(response)
    return match[1] if match and response.count("####") == 1 else None


def _draw_sum(level: int, rng: Random) -> tuple[list[int], list[str]]:
    """Numbers and the operators between them, computed from left to right; no step goes below zero."""
    if level == 1:
        return [rng.randint(0, 9), rng.randint(0, 9)], ["+"]
    if level == 3:
        return [rng.randint(10, 99), rng.randint(2, 9)], ["x"]
    numbers, operators = [rng.randint(10, 99)], list[str]()
    total = numbers[0]
    for _ in range(1 if level == 2 else 2):
        operator = rng.choice("+-") if total > 10 else "+"
        number = rng.randint(10, 99 if operator == "+" else min(99, total))
        total = _COMPUTE[operator](total, number)
        numbers.append(number)
        operators.append(operator)
    return numbers, operators


def _question(numbers: list[int], operators: list[str], rng: Random) -> str:
    if rng.random() < 0.3:
        pairs = zip(operators, numbers[1:], strict=True)
        return rng.choice(BARE).format(sum=" ".join([str(numbers[0]), *(f"{o} {n}" for o, n in pairs)]))
    values: dict[str, Any] = {"name": rng.choice(NAMES), "things": rng.choice(THINGS), "a": numbers[0]}
    if operators == ["x"]:
        return STORY_TIMES.format(**values, b=numbers[1])
    steps = [rng.choice(STORY_STEPS[o]).format(b=n) for o, n in zip(operators, numbers[1:], strict=True)]
    return f"{' and then '.join([STORY_START.format(**values), *steps])}. How many {values['things']} are there now?"


def _steps(numbers: list[int], operators: list[str]) -> list[int]:
    results = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        results.append(_COMPUTE[operator](results[-1], number))
    return results
