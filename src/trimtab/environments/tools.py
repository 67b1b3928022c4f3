"""Tools that a policy can call with a line of text: a calculator and a search over a local corpus."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from operator import add, floordiv, mod, mul, sub, truediv

MAX_EXPRESSION = 200
"""The most characters of an expression."""
MAX_DEPTH = 40
"""The most parentheses and signs within each other."""
MAX_NUMBER = 10**30
"""No number, numerator or denominator goes beyond it."""

_TOKEN = re.compile(r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<operator>\*\*|//|[-+*/%()]))")
_POWER = 4
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "**": _POWER}
_SIGN = 3
"""A sign binds closer than a product and looser than a power: -2 ** 2 is -4."""


class ToolError(Exception):
    """A call that cannot be answered; its text is for the policy to read."""


def calculate(expression: str) -> str:
    """The value of an expression in numbers, + - * / // % ** and parentheses: exact if it is whole, otherwise with
    twelve digits. Raises ToolError for anything else, for division by zero, and for numbers beyond MAX_NUMBER."""
    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"the expression is longer than {MAX_EXPRESSION} characters")
    parser = _Parser(expression)
    value = parser.expression(0, 0)
    if parser.token is not None:
        raise ToolError(f"what is {parser.token!r} doing there?")
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"


class _Parser:
    """Precedence climbing over exact fractions; nothing is ever handed to the interpreter."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise ToolError(f"cannot read {text[at:].strip()[:20]!r}")
            self._tokens.append(match[0].strip())
            at = match.end()
        self._at = 0

    @property
    def token(self) -> str | None:
        """The next token; None at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def expression(self, binding: int, depth: int) -> Fraction:
        """The longest expression from here whose operators bind closer than `binding`."""
        left = self._operand(depth)
        while self.token in _BINDING and _BINDING[self.token] > binding:
            operator = self._take()
            right_binding = _BINDING[operator] - (operator == "**")  # powers are computed from the right
            left = _apply(left, operator, self.expression(right_binding, depth + 1))
        return left

    def _operand(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ToolError("too many parentheses or signs within each other")
        token = self._take()
        if token == "(":
            value = self.expression(0, depth + 1)
            if self._take() != ")":
                raise ToolError("a parenthesis is not closed")
            return value
        if token in ("+", "-"):
            value = self.expression(_SIGN, depth + 1)
            return -value if token == "-" else value
        if token in _BINDING or token == ")":
            raise ToolError(f"a number is missing before {token!r}")
        return _bounded(Fraction(token))

    def _take(self) -> str:
        token = self.token
        if token is None:
            raise ToolError("the expression ends too early")
        self._at += 1
        return token


_OPERATIONS: Mapping[str, Callable[[Fraction, Fraction], Fraction | int]] = {
    "+": add,
    "-": sub,
    "*": mul,
    "/": truediv,
    "//": floordiv,
    "%": mod,
}


def _apply(left: Fraction, operator: str, right: Fraction) -> Fraction:
    if operator in ("/", "//", "%") and not right:
        raise ToolError("division by zero")
    return _power(left, right) if operator == "**" else _bounded(Fraction(_OPERATIONS[operator](left, right)))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("exponents have to be whole numbers")
    if not base and exponent < 0:
        raise ToolError("division by zero")
    # The size is judged by logarithms before anything large is computed. The 1 is room for rounding; _bounded is exact.
    largest = max(abs(base.numerator), base.denominator)
    if abs(exponent) * math.log(largest or 1) > 1 + math.log(MAX_NUMBER):
        raise ToolError("the result is too large")
    if largest == 1 or not base:  # 0, 1 and -1, whatever the exponent
        return base**2 if exponent % 2 == 0 and exponent else base if exponent else Fraction(1)
    return _bounded(Fraction(base ** int(exponent)))


def _bounded(value: Fraction) -> Fraction:
    if abs(value.numerator) > MAX_NUMBER or value.denominator > MAX_NUMBER:
        raise ToolError("the result is too large")
    return value


class BM25:
    """A ranking of passages by the words that they share with a query (Robertson & Zaragoza, 2009, "The Probabilistic
    Relevance Framework", section 3.4; 1 is added in the logarithm so that no word counts against a passage)."""

    def __init__(self, passages: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        self.passages = list(passages)
        counts = [Counter(words(p)) for p in passages]
        lengths = [sum(c.values()) for c in counts]
        mean = sum(lengths) / max(1, len(lengths)) or 1.0
        found_in = Counter(word for c in counts for word in c)
        self._postings: dict[str, list[tuple[int, float]]] = {}
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, num in count.items():
                rarity = math.log(1 + (len(counts) - found_in[word] + 0.5) / (found_in[word] + 0.5))
                amount = rarity * num * (k1 + 1) / (num + k1 * (1 - b + b * length / mean))
                self._postings.setdefault(word, []).append((i, amount))

    def search(self, query: str, num: int) -> list[str]:
        """The `num` best passages that share a word with the query, the best first; if two are equal, the earlier
        one first."""
        scores: dict[int, float] = {}
        for word in sorted(set(words(query))):
            for i, amount in self._postings.get(word, ()):
                scores[i] = scores.get(i, 0.0) + amount
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:num]
        return [self.passages[i] for i, _ in best]


def words(text: str) -> list[str]:
    """The words that are compared: runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())
