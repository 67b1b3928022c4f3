"""Reads answers as people and models write them: the number that a text stands for, and whether two texts say the same.

Everything here is a function of texts. A number may come with a currency, a unit or words behind it, in LaTeX or in
Markdown. A text that holds more than one number is not read as a number, so that listing guesses earns nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MINUS = "-−–"
_SIGN = r"[+\-−–]"
_SPACE = "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_NUMBER = re.compile(
    rf"[$€£¥]?\s*(?P<sign>{_SIGN}?)\s*[$€£¥]?\s*(?P<digits>\d[\d,]*(?:\.\d*)?|\.\d+)(?:\s*/\s*(?P<under>\d+))?\s*%?"
)
_GROUPED = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")
_LONGEST_NUMBER = 200
"""The most characters of a number; a longer text is not read as a number."""

_IN_LATEX = {"\\$": "$", "\\%": "%", "{,}": ",", "\\!": "", "\\,": ""}
"""How a plain number is written in LaTeX."""
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed|fbox|boldsymbol|operatorname)\s*\{"
)
_FRACTION = re.compile(r"(\d*)\s*\\[dtc]?frac\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))")
_POWER_OF_TEN = re.compile(
    r"(.*\d)\s*(?:\\times|\\cdot|[x×*·])\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))\s*(.*)", re.DOTALL
)
_SPACED_GROUPS = re.compile(rf"(?<![\d.,/])\d{{1,3}}(?:[ {_SPACE}'_]\d{{3}})+(?![\d/])")
_ONE_NUMBER = re.compile(
    rf"(?!\s){_SIGN}?\s*[$€£¥]?\s*{_SIGN}?\s*(?:\d+ \d+/\d+|\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+)"
)
_TIMES = re.compile(r"(?<=\d)\s*(?:x|\\times|\\cdot)\s*(?=\d)")
# What may stand before the last "=": a name, a calculation, or both.
_CALCULATION = re.compile(r"(?:[^\W\d]\w*(?: [^\W\d]+)*\s*=?)?(?:\d,\d{3}|[\d\s+*/×·().$%^=\-−–])*")
_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{([23])\}|([23])(?!\d))")
_MIXED = re.compile(rf"({_SIGN}?)(\d+) (\d+)/(\d+)")
# "x =" and "x \\in" before a value.
_NAMED = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?|\(\w\))?\s*(?:=|\\in\b|∈)\s*(?=[^=])")
_OPENING, _CLOSING = "([{", ")]}"

# Words that turn a number into another claim: "more than 72", "72 or 73", "not 72".
_QUALIFIERS = frozenset(
    {
        "not", "no", "never", "neither", "nor", "or", "and", "either", "between", "less", "more", "fewer", "than",
        "least", "most", "over", "under", "above", "below", "about", "around", "approximately", "approx", "almost",
        "nearly", "roughly", "to", "without", "except", "minus", "negative", "times", "half", "twice", "if", "unless",
        "maybe", "perhaps", "wrong", "false", "hundred", "thousand", "million", "billion", "dozen", "squared", "root",
    }
)  # fmt: skip
_MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_UNITS = {
    "$": "dollar", "usd": "dollar", "dollars": "dollar", "€": "euro", "eur": "euro", "euros": "euro", "£": "sterling",
    "¥": "yen", "%": "percent", "percent": "percent", "°": "degree", "degrees": "degree", "cents": "cent", "¢": "cent",
    "m": "metre", "meters": "metre", "meter": "metre", "metres": "metre", "km": "kilometre", "kilometers": "kilometre",
    "kilometres": "kilometre", "cm": "centimetre", "centimeters": "centimetre", "centimetres": "centimetre",
    "mm": "millimetre", "kg": "kilogram", "kilograms": "kilogram", "g": "gram", "grams": "gram", "mg": "milligram",
    "l": "litre", "liters": "litre", "litres": "litre", "ml": "millilitre", "s": "second", "sec": "second",
    "seconds": "second", "min": "minute", "mins": "minute", "minutes": "minute", "h": "hour", "hr": "hour",
    "hrs": "hour", "hours": "hour", "ft": "foot", "feet": "foot", "inches": "inch", "lb": "pound", "lbs": "pound",
    "pounds": "pound", "oz": "ounce", "ounces": "ounce", "mph": "mile per hour", "mi": "mile",
}  # fmt: skip
"""Units by their usual forms. A unit that is not listed is compared as its word without a plural s."""


@dataclass(frozen=True)
class Amount:
    """A number and what it counts, such as 72 and "apple"; the unit is "" if none is written."""

    value: Fraction
    unit: str


def same_text(right: str, given: str) -> bool:
    """Whether two answers say the same, without computing: numbers, tuples, sets, choices, then plain text."""
    right, given = clean(right), clean(given)
    names = _NAMED.match(right), _NAMED.match(given)
    if names[0] and names[1] and _letters(names[0][0]) != _letters(names[1][0]):
        return False
    right, given = _NAMED.sub("", right, count=1), _NAMED.sub("", given, count=1)
    amounts = amount_of(right), amount_of(given)
    if amounts[0] is not None:
        return amounts[1] is not None and _same_amount(amounts[0], amounts[1])
    lists = _elements(right), _elements(given)
    if lists[0] is not None and lists[1] is not None:
        return _same_elements(*lists[0], *lists[1])
    return _letters(right) == _letters(given) or _choice(right, given)


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
    return -value if match["sign"] in tuple(_MINUS) else value


def amount_of(text: str) -> Amount | None:
    """The one number of a cleaned text with its unit: "72 apples", "x = 72", "5 thousand", "1 1/2". None if the text
    holds no number, several numbers, or words that turn the number into another claim, such as "more than 72"."""
    if len(text) > _LONGEST_NUMBER:
        return None
    named, equals, text = text.rpartition("=")
    text = text.strip()
    if equals and not _CALCULATION.fullmatch(_TIMES.sub("*", named)):
        return None
    power = _POWER_OF_TEN.fullmatch(text)
    if power is not None and abs(int(power[2] or power[3])) <= _LONGEST_NUMBER:
        front = amount_of(f"{power[1]} {power[4]}".strip())
        return front and Amount(front.value * Fraction(10) ** int(power[2] or power[3]), front.unit)
    found = list(_ONE_NUMBER.finditer(text)) if "\\" not in text else []
    if len(found) != 1:
        return None
    before, number, behind = text[: found[0].start()], found[0][0], text[found[0].end() :]
    value = _mixed(number)
    if value is None or re.search(r"\w$", before) or not _may_stand_before(before):
        return None
    return _with_unit(value, number, behind)


def clean(text: str) -> str:
    """The text without the marks of LaTeX and Markdown that change nothing, with fractions as 1/2 and numbers without
    separators between groups of digits."""
    text = re.sub(r"(?<=\d)(?:\\[,!; ]|\{,\})(?=\d)", "", text.strip().strip("*`"))
    text = re.sub(r"\\[;:, ]|\\q?quad\b|~", " ", text).replace("\\!", "").replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])", "", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", "°", text)
    text = _FRACTION.sub(_as_ratio, _unwrapped(text))
    text = _POWER.sub(lambda match: "²³"[int(match[1] or match[2]) - 2], text)
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and text.count(opening) + text.count(closing) in (2, 4):
            text = text[len(opening) : -len(closing)]
    text = _SPACED_GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
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


def _mixed(text: str) -> Fraction | None:
    """The value of a mixed number such as "1 1/2"; any other text is read by `as_number`."""
    match = _MIXED.fullmatch(" ".join(text.split()))
    if match is None or not int(match[4]):
        return as_number(text)
    value = int(match[2]) + Fraction(int(match[3]), int(match[4]))
    return -value if match[1] in tuple(_MINUS) else value


def _may_stand_before(text: str) -> bool:
    """Whether these words before a number leave its meaning as it is: "The answer is" does, "less than" does not."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return re.fullmatch(r"[\w\s:,'()]*", text) is not None and _QUALIFIERS.isdisjoint(words)


def _with_unit(value: Fraction, number: str, behind: str) -> Amount | None:
    """The amount, if the text behind the number can only be a unit or words about it; else None."""
    sign = next((s for s in "$€£¥" if s in number), "")
    words = re.findall(r"[^\W\d_]+|[%°¢]", behind.lower())
    if re.fullmatch(r"[\s\w%°¢().,:'/²³^-]*", behind) is None:
        return None
    if words and words[0] in _MULTIPLES:
        value, words = value * _MULTIPLES[words[0]], words[1:]
    if behind[:1].isalpha() and (not words or words[0] not in _UNITS) and behind[:1] != " ":
        return None
    if any(len(word) == 1 and word not in _UNITS and word != "a" for word in words):
        return None
    if not _QUALIFIERS.isdisjoint(words):
        return None
    return Amount(value, _UNITS[sign] if sign else _unit(words))


def _unit(words: list[str]) -> str:
    if not words:
        return ""
    return " ".join(_UNITS.get(word, word.removesuffix("s")) for word in words)


def _same_amount(right: Amount, given: Amount) -> bool:
    """Equal values; units count only if both are written, and then one may say more than the other."""
    units = set(right.unit.split()), set(given.unit.split())
    return right.value == given.value and (units[0] <= units[1] or units[1] <= units[0])


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
    """The text without spaces that mean nothing; plain words in lower case."""
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    text = text[1:-1] if re.fullmatch(r"\(\w\)", text) else text
    return text.casefold() if re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]+)*", text) else text


def _choice(right: str, given: str) -> bool:
    """Whether "B) Paris" or "(B). Paris" gives the choice that is right, "B"."""
    letter = re.fullmatch(r"\(?([A-Z])\)?", right)
    said = re.match(r"\(?([A-Z])(?:\)[.:]?|[.:])\s", given)
    return letter is not None and said is not None and letter[1] == said[1]
