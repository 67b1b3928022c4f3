"""Exact answers: the final answer of a reply against the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor

from trimtab.errors import need
from trimtab.metrics import Metrics
from trimtab.registry import register
from trimtab.rewards.each import Score, fact, score_each
from trimtab.rewards.helper import Helper
from trimtab.types import Rollout

Form = Literal["hashes", "boxed", "last_number"]

_NUMBER = re.compile(
    r"[$€£¥]?\s*(?P<sign>[-+−]?)\s*[$€£¥]?\s*(?P<digits>\d[\d,]*(?:\.\d*)?|\.\d+)(?:\s*/\s*(?P<under>\d+))?\s*%?"
)
_GROUPED = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")
_IN_TEXT = re.compile(r"(?<![\w.])[-+−]?[$€£¥]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_IN_LATEX = {"\\$": "$", "\\%": "%", "{,}": ",", "\\!": "", "\\,": ""}
"""How a plain number is written in LaTeX."""
_SEVERAL = ("$", "\\(", "\\)", "\\[", "\\]", "\\boxed", "\n")
"""What would end one formula and begin another: an answer is one."""
_LONGEST_NUMBER = 200
"""Characters; more is no number, however many digits it has."""


@register("reward", "exact_answer")
@dataclass(frozen=True, kw_only=True)
class ExactAnswer:
    """1 for a reply whose final answer is the right one, 0 for any other reply."""

    fact: str = "answer"
    """The prompt's fact that holds the right answer."""
    forms: tuple[Form, ...] = ("hashes", "boxed")
    """Where the final answer stands, the first form that occurs: "#### 42" to the end of that line, "\\boxed{42}", or
    the last number of the reply. The last of several in one form counts."""
    maths: bool = False
    """Compare what are not two plain numbers as mathematics, by math-verify (the extra "math"); else as texts."""
    seconds: float = 5.0
    """Processor time for one comparison of mathematics; a reply that takes longer is not judged."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    def __post_init__(self) -> None:
        if not self.forms:
            raise ValueError("forms is empty; name at least one of 'hashes', 'boxed' and 'last_number'")

    def load(self, *, token_budget: int) -> ExactAnswerScorer:
        """The scorer. Raises EngineError where math-verify is wanted and not installed."""
        if self.maths:
            need("math_verify", extra="math", setting="maths = true", where="rewards")
        return ExactAnswerScorer(self)


class ExactAnswerScorer:
    """Finds final answers and compares them."""

    def __init__(self, settings: ExactAnswer) -> None:
        self.settings = settings
        self.helper = Helper(seconds=settings.seconds)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] 1 or 0; `reward/exact_answer_found` is the share of replies that give an answer at all."""
        return score_each("exact_answer", rollouts, self._judge)

    def _judge(self, rollout: Rollout) -> Score:
        right = str(fact(rollout.prompt, self.settings.fact))
        given = find_answer(rollout.response, self.settings.forms)
        return Score(float(given is not None and self._same(right, given)), {"found": float(given is not None)})

    def _same(self, right: str, given: str) -> bool:
        numbers = as_number(right), as_number(given)
        if None not in numbers:
            return numbers[0] == numbers[1]
        if _plain(right) == _plain(given):
            return True
        if not self.settings.maths or any(mark in _plain(given) for mark in _SEVERAL):
            return False
        return bool(self.helper.ask("same_maths", _plain(right), _plain(given)))


def find_answer(reply: str, forms: Sequence[Form]) -> str | None:
    """The final answer as written, in the first of `forms` that occurs; None where none does."""
    for form in forms:
        found = _FINDERS[form](reply)
        if found is not None:
            return found
    return None


def as_number(text: str) -> Fraction | None:
    """The exact value of a plain number: 1,234.50, $5, 3/4, 50% (which is 50), 1{,}000; None for anything else."""
    for latex, plain in _IN_LATEX.items():
        text = text.replace(latex, plain)
    text = text.strip().rstrip(".")
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is None or ("," in match["digits"] and not _GROUPED.fullmatch(match["digits"])):
        return None
    under = int(match["under"] or 1)
    if not under:
        return None
    value = Fraction(match["digits"].replace(",", "")) / under
    return -value if match["sign"] in ("-", "−") else value


def _after_hashes(reply: str) -> str | None:
    _, hashes, rest = reply.rpartition("####")
    answer = rest.lstrip().partition("\n")[0].strip()
    return answer if hashes and answer else None


def _boxed(reply: str) -> str | None:
    """What the braces of the last \\boxed hold, if they close."""
    start = reply.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len("\\boxed")
    for i, character in enumerate(reply[first:], first):
        depth += (character == "{") - (character == "}")
        if not depth:
            return reply[first + 1 : i].strip() or None
    return None


def _last_number(reply: str) -> str | None:
    found = _IN_TEXT.findall(reply)
    return found[-1].rstrip(",") if found else None


_FINDERS = {"hashes": _after_hashes, "boxed": _boxed, "last_number": _last_number}


def _plain(text: str) -> str:
    """Without what surrounds mathematics in a text."""
    return " ".join(text.strip().rstrip(".").removeprefix("$").removesuffix("$").split())
