"""Sums of two steps with one-digit numbers, and texts that are full of them: small enough for a base of under a million
parameters and two minutes."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from trimtab.core.types import Message, Prompt
from trimtab.worlds import Arithmetic
from trimtab.worlds.arithmetic import NAMES, THINGS

WORKED = 5
"""Problems in one document beside the last."""


@dataclass(frozen=True, kw_only=True)
class Sums(Arithmetic):
    """Replies and gold are those of `arithmetic`: a line for each step, then "#### " and the answer. More than half of
    the replies have a slip, so that imitation stays below 40%."""

    slips: ClassVar[float] = 0.55

    def draw_prompt(self, rng: Random) -> Prompt:
        """Such as "Emma counts eggs: 7 - 3 + 9."; nothing goes below zero."""
        numbers, operators = [rng.randint(0, 9)], list[str]()
        total = numbers[0]
        for _ in range(2):
            operator = rng.choice("+-")
            number = rng.randint(0, 9 if operator == "+" else min(9, total))
            total += number if operator == "+" else -number
            numbers.append(number)
            operators.append(operator)
        steps = " ".join(f"{o} {n}" for o, n in zip(operators, numbers[1:], strict=True))
        text = f"{rng.choice(NAMES)} counts {rng.choice(THINGS)}: {numbers[0]} {steps}."
        facts = {"numbers": numbers, "operators": operators, "answer": total}
        return Prompt(messages=(Message("user", text),), facts=facts)

    def write_document(self, prompt: Prompt, rng: Random) -> str:
        """Some problems worked without a slip, then one with a reply of mixed quality."""
        worked = [_worked(self.draw_prompt(rng)) for _ in range(WORKED)]
        return "\n\n".join([*worked, super().write_document(prompt, rng)])


def _worked(prompt: Prompt) -> str:
    lines, before = [prompt.text], prompt.facts["numbers"][0]
    for operator, number in zip(prompt.facts["operators"], prompt.facts["numbers"][1:], strict=True):
        after = before + number if operator == "+" else before - number
        lines.append(f"{before} {operator} {number} = {after}")
        before = after
    return "\n".join([*lines, f"#### {before}"])
