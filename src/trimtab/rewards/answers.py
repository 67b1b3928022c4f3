"""Exact answers: the final answer of a reply is compared with the right one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal, Self

from trimtab.core.errors import DataError, need
from trimtab.core.registry import register
from trimtab.core.types import Prompt, Rollout
from trimtab.rewards.amounts import TIMES_POWER_OF_TEN, amount_of, as_number
from trimtab.rewards.each import HelpedReply, Score, fact
from trimtab.rewards.written import clean, same_text

AnswerForm = Literal["hashes", "boxed", "tag", "last_number"]

_IN_TEXT = re.compile(
    r"\\[dtc]?frac\s*\{\d+\}\s*\{\d+\}"
    r"|(?<![\w.^])(?<!\^\{)(?<!\*\*)"  # neither within a word nor an exponent
    r"(?:[-+−]|(?:\A|(?<=[=:(])|(?<=[=:(] )|(?<=\bis ))[-−] )?[$€£¥]?"  # "5 - 3" holds no negative number
    r"(?:\d+ \d+/\d+|\d{1,3}(?: \d{3})+(?!\d)|\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:[eE][-+]?\d+)?"
    rf"(?:{TIMES_POWER_OF_TEN.pattern}|\s*(?:\^|\*\*)\s*\{{?[-+−]?\d+\}}?)?"
    r"(?: (?:hundred|thousand|million|billion|trillion|dozen)s?\b)*"
)
"""A number within a reply, whole: 10^3 is one number, and so are 2.5e-3, 1 000 and 5 million."""
_MARK_BEHIND = re.compile(r"\n|</[A-Za-z]+>|<\|[a-z]")
"""Ends an answer behind hashes: its line, a closing tag, or a special token."""
_WORDS = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|frac|pi|sin|cos|tan|log|ln|exp)(?![A-Za-z]))[A-Za-z]{2,}")
_SEVERAL = ("$", "\\(", "\\)", "\\[", "\\]", "\\boxed", "\n")
"""Marks that would end one formula and begin another: an answer is a single formula."""

__all__ = ["ExactAnswer", "as_number", "find_answer"]


@register("reward", "exact_answer")
@dataclass(frozen=True, kw_only=True)
class ExactAnswer(HelpedReply):
    """1 for a reply whose final answer is the right one, 0 for any other reply. `reward/exact_answer_found` is the
    share of replies that give an answer at all."""

    fact: str = "answer"
    """The prompt's fact that holds the right answer."""
    forms: tuple[AnswerForm, ...] = ("hashes", "boxed", "tag")
    """How the final answer is written; the first form that occurs counts: "#### 42" to the end of that line,
    "\\boxed{42}", "<answer>42</answer>" (tag), or the last number of the reply. If one form occurs several times, the
    last one counts."""
    maths: bool = False
    """If answers differ as numbers, lists or text, also compare them as mathematics, by math-verify (the extra
    "math")."""
    seconds: float = 5.0
    """Processor time for one comparison of mathematics; a reply that takes longer is not judged."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.forms:
            raise ValueError("forms is empty; name at least one of 'hashes', 'boxed', 'tag' and 'last_number'")

    def load(self, *, token_budget: int) -> Self:
        """The reward itself. Raises EngineError if math-verify is wanted and not installed."""
        if self.maths:
            need("math_verify", extra="math", setting="maths = true", where="rewards")
        return self

    def _judge(self, rollout: Rollout) -> Score:
        right = self._right(rollout.prompt)
        given = find_answer(rollout.response, self.forms)
        return Score(float(given is not None and self._same(right, given)), {"found": float(given is not None)})

    def _right(self, prompt: Prompt) -> str:
        """The right answer as a text. Raises DataError for a fact that is no answer: empty, a list, not a number."""
        name = self.fact
        value = fact(prompt, name)
        text = str(value).strip() if isinstance(value, str | int) else ""
        if isinstance(value, float) and math.isfinite(value):
            text = f"{Decimal(repr(value)):f}"
        if "####" in text or "\\boxed" in text:
            text = find_answer(text, ("hashes", "boxed")) or ""
        if not text:
            raise DataError(
                f"the fact {name!r} is {str(value)[:80]!r}, which is no answer",
                where=f"prompt {prompt.id}",
                fix="give one text or number, such as 72; a worked answer may end with '#### 72' or hold \\boxed{72}",
            )
        return text

    def _same(self, right: str, given: str) -> bool:
        if same_text(right, given):
            return True
        if not self.maths or any(mark in _plain(given) for mark in _SEVERAL):
            return False
        # math-verify reads "5 millions" and "not 5" as 5, and 50% as 1/2.
        if amount_of(clean(right)) and (amount_of(clean(given)) or _WORDS.search(clean(given))):
            return False
        return bool(self.helper.ask("same_maths", _plain(right), _plain(given)))


def find_answer(reply: str, forms: Sequence[AnswerForm]) -> str | None:
    """The final answer as written, in the first of `forms` that occurs; None if none of them does. Hashes are a heading
    if a box or tag stands on a line below the last of them."""
    for form in forms:
        found = _FINDERS[form](reply)
        if found is not None and not (form == "hashes" and _is_heading(reply, forms)):
            return found
    return None


def _is_heading(reply: str, forms: Sequence[AnswerForm]) -> bool:
    """Whether the last hashes open a section in which the answer is given in a form of its own: "#### Step 2"."""
    section = reply.rpartition("####")[2].partition("\n")[2]
    return any(_FINDERS[form](section) is not None for form in forms if form in ("boxed", "tag"))


def _after_hashes(reply: str) -> str | None:
    _, hashes, rest = reply.rpartition("####")
    answer = _MARK_BEHIND.split(rest.lstrip(), maxsplit=1)[0].strip()
    return answer if hashes and answer else None


def _in_tag(reply: str) -> str | None:
    """The content of the last <answer>…</answer>."""
    before, closing, _ = reply.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() or None if closing and opening else None


def _boxed(reply: str) -> str | None:
    """The content of the braces of the last \\boxed or \\fbox, if they close; for "\\boxed 72", the word after it."""
    found = list(re.finditer(r"\\(?:boxed|fbox)(?:\s*(?=\{)|\s+(?P<word>[^\s{}$\\]+))", reply))
    if not found:
        return None
    if found[-1]["word"]:
        return found[-1]["word"]
    depth, first = 0, found[-1].end()
    for i, character in enumerate(reply[first:], first):
        depth += (character == "{") - (character == "}")
        if not depth:
            return reply[first + 1 : i].strip() or None
    return None


def _last_number(reply: str) -> str | None:
    found = [match[0] for match in _IN_TEXT.finditer(reply)]
    return found[-1].rstrip(",") if found else None


_FINDERS = {"hashes": _after_hashes, "boxed": _boxed, "tag": _in_tag, "last_number": _last_number}


def _plain(text: str) -> str:
    """The text without what surrounds mathematics, such as dollar signs."""
    return " ".join(text.strip().rstrip(".").removeprefix("$").removesuffix("$").split())
