"""Compares answers as people and models write them: amounts, lists, choices and texts in LaTeX or in Markdown.

Everything here is a function of texts. `trimtab.rewards.amounts` says which texts are one number with its unit. A text
with several numbers is not read as a number, so that listing guesses earns nothing.
"""

from __future__ import annotations

import re

from trimtab.rewards.amounts import ALTERNATIVES, DENIALS, HEDGES, amount_of, may_stand_before, same_amount

_SPACE = "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed|fbox|boldsymbol|operatorname)\s*\{"
)
_FRACTION = re.compile(r"(\d*)\s*\\[dtc]?frac\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))")
_SPACED_GROUPS = re.compile(rf"(?<![\d.,/])\d{{1,3}}(?:[ {_SPACE}'_]\d{{3}})+(?![\d/])")
_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{([23])\}|([23])(?!\d))")
# "The answer is" and "Answer:" before any kind of answer.
_CLAIM = re.compile(
    r"^(?:(?:so|thus|hence|therefore)[, ]+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct|right)\s+)*"
    r"(?:answer|result|solution)\s*(?:is\b|:)\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
# "x =", "(x, y) =" and "x \\in" before a value.
_NAMED = re.compile(
    r"^\s*(?:[A-Za-z](?:_\{?\w+\}?|\(\w\))?|\([A-Za-z](?:\s*,\s*[A-Za-z])+\))\s*(?:=|\\in\b|∈)\s*(?=[^=])"
)
_OPENING, _CLOSING = "([{", ")]}"

_SYMBOLS = {
    "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "∞": "\\infty ", "√": "\\sqrt ", "±": "\\pm ",
    "×": "\\times ", "·": "\\cdot ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "²": "^2", "³": "^3",
}  # fmt: skip
_SAME_COMMANDS = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "geq": "ge", "neq": "ne"}
# \\sqrt2, \\frac\\pi2 and the second argument of \\frac{\\pi}2, which have no braces.
_BARE_ARGUMENT = re.compile(r"(\\sqrt|\\frac(?:\{(?:[^{}]|\{[^{}]*\})*\})?)\s*(\d|(?<![A-Za-z])[A-Za-z]|\\[A-Za-z]+)")
_BARE_EXPONENT = re.compile(r"([\^_])\s*(-?\d+|[A-Za-z]|\\[A-Za-z]+)")
# A choice in an answer: words such as "Option", the letter, and what stands behind "B)", "B." or "B:".
_CHOICE = re.compile(r"((?:[^\W\d_]+[ :,]+)*?)\(?([A-Z])(?:\)?|(?:\)[.:]?|[.:])\s(.*))", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?<![\w'])[B-HJ-Z](?![\w'])|\b[A-Z]\)|\b(?:wait|wrong|incorrect|false|instead)\b")
_TURNS = DENIALS | ALTERNATIVES | HEDGES | {"is", "isn"}


def same_text(right: str, given: str) -> bool:
    """Whether two answers say the same, without computing: numbers, tuples, sets, choices, then plain text."""
    right, given = _CLAIM.sub("", clean(right)), _CLAIM.sub("", clean(given))
    names = _NAMED.match(right), _NAMED.match(given)
    if names[0] and names[1] and _letters(names[0][0]) != _letters(names[1][0]):
        return False
    right, given = _NAMED.sub("", right, count=1), _NAMED.sub("", given, count=1)
    amounts = amount_of(right), amount_of(given)
    if amounts[0] is not None:
        return amounts[1] is not None and same_amount(amounts[0], amounts[1])
    lists = _elements(right), _elements(given)
    if lists[0] is not None and lists[1] is not None:
        return _same_elements(*lists[0], *lists[1])
    return _letters(right) == _letters(given) or _choice(right, given)


def clean(text: str) -> str:
    """The text without the marks of LaTeX and Markdown that change nothing, with fractions as 1/2 and numbers without
    separators between groups of digits. A tie "~" is a blank behind what it ties; before a number it means "about"."""
    text = re.sub(r"(?<=\d)(?:\\[,!; ]|\{,\})(?=\d)", "", text.strip().strip("*`"))
    text = re.sub(r"\\[;:, ]|\\q?quad\b|(?<=[\w}).,:;])~", " ", text).replace("\\!", "")
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])", "", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", "°", text)
    text = _FRACTION.sub(_as_ratio, _unwrapped(text))
    text = _POWER.sub(lambda match: "²³"[int(match[1] or match[2]) - 2], text)
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and text.count(opening) + text.count(closing) in (2, 4):
            text = text[len(opening) : -len(closing)]
    text = _SPACED_GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = re.sub(r"^\{([^{},]*)\}$", r"\1", text.strip())
    return " ".join(text.strip().rstrip(".,;").strip("*`").split())


def _unwrapped(text: str) -> str:
    """The text without \\text{...} and similar marks around words; what they hold stays."""
    while (match := _WRAPPERS.search(text)) is not None:
        end, depth = match.end(), 1
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        if depth:
            return text
        text = f"{text[: match.start()]} {text[match.end() : end - 1]} {text[end:]}"
    return text.strip()


def _as_ratio(match: re.Match[str]) -> str:
    whole, over, under = match[1], int(match[2] or match[3]), int(match[4] or match[5])
    ratio = f"{'-' if (over < 0) != (under < 0) else ''}{abs(over)}/{abs(under)}"
    return f"{whole} {ratio}" if whole else ratio


def _elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets and the parts of a tuple, interval, set or bare list; None for a text without a comma."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    brackets = ""
    if text[:1] in tuple(_OPENING) and text[-1:] in tuple(_CLOSING):
        brackets, text = text[0] + text[-1], text[1:-1]
    parts, depth = [""], 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth < 0:
            return None
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return (brackets, [part.strip() for part in parts]) if len(parts) > 1 else None


def _same_elements(right_in: str, right: list[str], given_in: str, given: list[str]) -> bool:
    if right_in != given_in or len(right) != len(given):
        return False
    if right_in != "{}":
        return all(same_text(a, b) for a, b in zip(right, given, strict=True))
    left = list(given)
    for part in right:
        equal = next((other for other in left if same_text(part, other)), None)
        if equal is None:
            return False
        left.remove(equal)
    return True


def _letters(text: str) -> str:
    """The text without spaces that mean nothing, with LaTeX written in one way; plain words in lower case."""
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    text = re.sub(r"\\([A-Za-z]+)", lambda match: f"\\{_SAME_COMMANDS.get(match[1], match[1])}", text)
    text = _BARE_ARGUMENT.sub(r"\1{\2}", _BARE_ARGUMENT.sub(r"\1{\2}", text))  # \frac has two
    text = _BARE_EXPONENT.sub(r"\1{\2}", text)
    text = re.sub(r"(\\[A-Za-z]+)\s+(?![A-Za-z])", r"\1", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    text = text[1:-1] if re.fullmatch(r"\(\w\)", text) else text
    return text.casefold() if re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]+)*", text) else text


def _choice(right: str, given: str) -> bool:
    """Whether "B) Paris", "(B). Paris" or "Option B" gives the choice that is right, "B". What stands behind the letter
    may neither deny it nor name another choice."""
    letter, said = re.fullmatch(r"\(?([A-Z])\)?", right), _CHOICE.fullmatch(given)
    if letter is None or said is None or letter[1] != said[2] or not may_stand_before(said[1]):
        return False
    first = re.match(r"\W*([^\W\d_]*)", said[3] or "")
    return not (first and first[1] in _TURNS) and not _OTHER_CHOICE.search(said[3] or "")
