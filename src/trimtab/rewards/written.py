"""Compares answers as people and models write them: amounts, lists, choices and texts in LaTeX or in Markdown.

Everything here is a function of texts. `trimtab.rewards.amounts` says which texts are one number with its unit. A text
with several numbers is not read as a number, so that listing guesses earns nothing.
"""

from __future__ import annotations

import re
import unicodedata

from trimtab.rewards.amounts import ALTERNATIVES, DENIALS, HEDGES, amount_of, may_stand_before, same_amount, unit_name

_SPACE = "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textsc|textnormal|emph|underline|mathrm|mathbf|mathit|mathsf|mathtt"
    r"|mbox|hbox|boxed|fbox|bm|boldsymbol|operatorname)\s*\{"
)
# \bf, \large and colours, in braces or not, and an arrow before an answer
_LOOK = re.compile(
    r"\\(?:bf|it|rm|sf|tt|tiny|small|large|Large|huge|bfseries)(?![A-Za-z])\s*|\\(?:text)?color\s*\{\w+\}"
)
_ARROW = re.compile(r"^(?:=>|->|[→⇒∴]|\\(?:Rightarrow|rightarrow|therefore|implies|to)(?![A-Za-z]))\s*")
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
# "**72** apples" in Markdown, but no power such as 10**3.
_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)|(?<=\S)\*\*(?![\w(])")
# "$72$ apples", but not the dollars of "$10 - $5 = $5".
_FORMULA = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$(?!\d)")
# Raised digits: behind a letter, ² and ³ may be those of a unit and stay.
_RAISED = re.compile(r"(?<=\d)[⁻⁰¹²³⁴-⁹]+|(?<=[\w)])(?:[⁻⁰¹⁴-⁹][⁻⁰¹²³⁴-⁹]*|[²³][⁻⁰¹²³⁴-⁹]+)")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_SAME_SIGNS = str.maketrans({"⁄": "/", "∕": "/", "－": "-", "‑": "-", "∶": ":"})
_VULGAR = re.compile(r"(?:(\d) ?)?([¼-¾⅐-⅞])")
_QUOTED = re.compile(r"^(?:[\"“]([^\"“”]+)[\"”]|['‘]([^'‘’]+)['’]|__(\w[^_]*)__)$")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_LABELLED = re.compile(r"^\(?[A-E]\)[.:]?\s*(?=\S)")
_OR = re.compile(r",?\s+or\s+")
_AND = re.compile(r",?\s+and\s+")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|smallmatrix)\}(.*?)\\end\{\1\}", re.DOTALL)
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))|(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_FACTOR = r"\\sqrt\{[^{}]*\}|\\[A-Za-z]+(?![A-Za-z])"
# A fraction that reads the same as A/B: a product of simple factors over a single one.
_SIMPLE_FRACTION = re.compile(rf"\\frac\{{((?:[\d.A-Za-z]|{_FACTOR})+)\}}\{{(\d+|[A-Za-z]|{_FACTOR})\}}")
_TIMES_FACTOR = re.compile(r"(?<=\d)\s*(?:\*|\\cdot|\\times)\s*(?=\\(?:sqrt|pi)(?![A-Za-z]))")
_UNIT_BEHIND = re.compile(r"(.*?\S)\s+(?:(?:square|cubic|sq)\s+)?([A-Za-z]{2,}[²³]?)")
_OPENING, _CLOSING = "([{", ")]}"

_SYMBOLS = {
    "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "∞": "\\infty ", "√": "\\sqrt ", "±": "\\pm ",
    "×": "\\times ", "·": "\\cdot ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "²": "^2", "³": "^3",
    "∪": "\\cup ", "∩": "\\cap ", "−": "-", "–": "-", "ℝ": "\\mathbb{R}", "∅": "\\emptyset ", ">=": "\\ge ",
    "<=": "\\le ", "!=": "\\ne ", "+/-": "\\pm ", "\\lvert": "|", "\\rvert": "|", "**": "^",
    **{digit: f"_{{{i}}}" for i, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}  # fmt: skip
_FUNCTIONS = "ln|log|sin|cos|tan|exp"
_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])")
# \\ln(2), \\ln{2} and \\log_2(3): brackets around an argument that needs none
_BRACKETED = re.compile(rf"(\\(?:{_FUNCTIONS})(?:_(?:\w|\{{\w+\}}))?)\s*(?:\((\w+)\)|\{{(\w+)\}})")
_INFINITY = re.compile(r"(?<![\\A-Za-z])inf(?:inity)?(?![A-Za-z])")
# A product of which one side is a letter, as 3*x is
_PRODUCT = re.compile(r"(?<=[\dA-Za-z])(?:\*|\\cdot(?![A-Za-z])) ?(?=[A-Za-z])")
_LONG_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_SAME_COMMANDS = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "geq": "ge", "neq": "ne"}
# \\sqrt2, \\frac\\pi2 and the second argument of \\frac{\\pi}2, which have no braces.
_BARE_ARGUMENT = re.compile(r"(\\sqrt|\\frac(?:\{(?:[^{}]|\{[^{}]*\})*\})?)\s*(\d|(?<![A-Za-z])[A-Za-z]|\\[A-Za-z]+)")
_BARE_EXPONENT = re.compile(r"([\^_])\s*(-?\d+|[A-Za-z]|\\[A-Za-z]+)")
# A choice in an answer: words such as "Option", the letter, and what stands behind "B)", "B." or "B:".
_CHOICE = re.compile(r"((?:[^\W\d_]+[ :,]+)*?)[(\[]?([A-Z])(?:[)\]]?|(?:\)[.:]?|[.:]| [-–—])\s(.*))", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?<![\w'])[B-HJ-Z](?![\w'])|\b[A-Z]\)|\b(?:wait|wrong|incorrect|false|instead)\b")
# Another choice before the letter, as in "A, B" and "A B"; "A" is also an article.
_LETTER_BEFORE = re.compile(r"(?<![\w'])(?:[B-HJ-Z](?![\w'])|[A-Z](?=\s*(?:[,:]|$)))")
_TURNS = DENIALS | ALTERNATIVES | HEDGES | {"is", "isn"}


def same_text(right: str, given: str) -> bool:
    """Whether two answers say the same, without computing: numbers, times of day, matrices, tuples, sets, alternatives,
    choices, then plain text."""
    matrices = _cells(right), _cells(given)
    if matrices[0] is not None and matrices[1] is not None:
        return _same_cells(matrices[0], matrices[1])
    right, given = _CLAIM.sub("", clean(right)), _CLAIM.sub("", clean(given))
    equations = _equations(right), _equations(given)
    if equations[0] and equations[1]:
        values, others = equations[0], equations[1]
        return values.keys() == others.keys() and all(same_text(values[name], others[name]) for name in values)
    names = _NAMED.match(right), _NAMED.match(given)
    if names[0] and names[1] and _letters(names[0][0]) != _letters(names[1][0]):
        return False
    right, given = _NAMED.sub("", right, count=1), _NAMED.sub("", given, count=1)
    if not re.match(r"\(?[A-Z]\b", right):
        given = _LABELLED.sub("", given, count=1)  # "(B) 72" says what the choice is
    times = _CLOCK.fullmatch(right), _CLOCK.fullmatch(given)
    if times[0] and times[1]:
        return _time(times[0]) == _time(times[1])
    amounts = amount_of(right), amount_of(given)
    if amounts[0] is not None:
        return amounts[1] is not None and same_amount(amounts[0], amounts[1])
    alternatives = _OR.split(right), _OR.split(given)
    if len(alternatives[0]) > 1:
        return _same_elements("{}", alternatives[0], "{}", alternatives[1])
    lists = _elements(right), _elements(given)
    if lists[0] is not None and lists[1] is not None:
        return _same_elements(*lists[0], *lists[1])
    return _letters(right) == _letters(given) or _same_but_for_unit(right, given) or _choice(right, given)


def clean(text: str) -> str:
    """The text without the marks of LaTeX and Markdown that change nothing, with fractions as 1/2 and numbers without
    separators between groups of digits. A tie "~" is a blank behind what it ties; before a number it means "about"."""
    text = _ARROW.sub("", _BOLD.sub("", text.strip()).strip("*`").lstrip())
    text = re.sub(r"(?<=\d)(?:\\[,!; ]|\{,\})(?=\d)", "", text)
    text = re.sub(r"(?<!\\)\\[()\[\]]|(?<!\\)\\[;:, ]|\\q?quad\b|(?<=[\w}).,:;])~", " ", text).replace("\\!", "")
    text = _FORMULA.sub(r"\1", text)
    text = _LOOK.sub("", text).translate(_SAME_SIGNS).replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])", "", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", "°", text)
    text = _VULGAR.sub(_as_written_out, _RAISED.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text))
    text = re.sub(r"°\s+(?=[CF](?![A-Za-z]))", "°", _FRACTION.sub(_as_ratio, _unwrapped(text)))
    text = _POWER.sub(lambda match: "²³"[int(match[1] or match[2]) - 2], text)
    text = text.strip()
    if text.startswith("$") and text.endswith("$") and text.count("$") == 2:
        text = text[1:-1]
    text = _SPACED_GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = re.sub(r"^\{([^{},]*)\}$", r"\1", text.strip())
    text = " ".join(text.strip().rstrip(".,;。").strip("*`").split())
    return _QUOTED.sub(lambda match: match[match.lastindex or 0], text)


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


def _as_written_out(match: re.Match[str]) -> str:
    """A fraction that is one character, such as ½, as 1/2; behind a whole number with a blank between."""
    ratio = unicodedata.normalize("NFKC", match[2]).replace("\N{FRACTION SLASH}", "/")
    return f"{match[1]} {ratio}" if match[1] else ratio


def _time(match: re.Match[str]) -> tuple[int, int, str]:
    return int(match[1]), int(match[2] or 0), match[3].lower()


def _cells(text: str) -> list[list[str]] | None:
    """The rows of a matrix in LaTeX; None for any other text."""
    found = _MATRIX.search(text)
    if found is None or re.sub(r"\\[()\[\]]|[\s$.*`]", "", _MATRIX.sub("", text, count=1)):
        return None
    rows = [row.split("&") for row in found[2].split("\\\\")]
    return rows if any(cell.strip() for cell in rows[-1]) else rows[:-1]


def _same_cells(right: list[list[str]], given: list[list[str]]) -> bool:
    if [len(row) for row in right] != [len(row) for row in given]:
        return False
    return all(same_text(a, b) for x, y in zip(right, given, strict=True) for a, b in zip(x, y, strict=True))


def _same_but_for_unit(right: str, given: str) -> bool:
    """Whether one of two texts that are no amounts is the other with a unit behind it: "2\\sqrt{3} cm"."""
    bare = _without_unit(right), _without_unit(given)
    return (bare[0] is None) != (bare[1] is None) and _letters(bare[0] or right) == _letters(bare[1] or given)


def _without_unit(text: str) -> str | None:
    found = _UNIT_BEHIND.fullmatch(text)
    if found is None or not re.search(r"[\d\\π√]", found[1]):
        return None
    return found[1] if found[2] in ("unit", "units") or unit_name(found[2]) else None


def _equations(text: str) -> dict[str, str]:
    """The values of a list of equations, "x = 1, y = 2", by their names; nothing for other texts, or if two have one
    name."""
    found = _elements(text)
    parts = found[1] if found is not None and not found[0] else []
    names = [_NAMED.match(part) for part in parts]
    if not all(names):
        return {}
    values = {_letters(name[0]): part[name.end() :] for name, part in zip(names, parts, strict=True) if name}
    return values if len(values) == len(parts) else {}


def _elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets and the parts of a tuple, interval, set or bare list ("1, 2 and 3"); None for any other text."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    brackets = ""
    if text[:1] in tuple(_OPENING) and text[-1:] in tuple(_CLOSING):
        brackets, text = text[0] + text[-1], text[1:-1]
    else:
        text = _AND.sub(", ", text)
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
    text = _ROOT.sub(lambda match: f"\\sqrt{{{next(filter(None, match.groups()), '')}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    text = _INFINITY.sub(r"\\infty ", _FUNCTION.sub(r"\\\1 ", text))
    text = re.sub(r"\\([A-Za-z]+)", lambda match: f"\\{_SAME_COMMANDS.get(match[1], match[1])}", text)
    text = _BRACKETED.sub(lambda match: f"{match[1]} {match[2] or match[3]}", re.sub(r"\^\(([^()]*)\)", r"^{\1}", text))
    text = _BARE_ARGUMENT.sub(r"\1{\2}", _BARE_ARGUMENT.sub(r"\1{\2}", text))  # \frac has two
    text = _BARE_EXPONENT.sub(r"\1{\2}", text)
    text = re.sub(r"(\\[A-Za-z]+)\s+(?![A-Za-z])", r"\1", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    text = _SIMPLE_FRACTION.sub(r"\1/\2", _PRODUCT.sub("", _TIMES_FACTOR.sub("", text)))
    text = _LONG_FRACTION.sub(_as_quotient, text)
    text = text[1:-1] if re.fullmatch(r"\(\w\)", text) else text
    return text.casefold() if re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]+)*", text) else text


def _as_quotient(match: re.Match[str]) -> str:
    r"""\frac{x+1}{2} as (x+1)/2, with brackets around what is more than one factor."""
    over, under = (part if re.fullmatch(r"\d+|[A-Za-z]", part) else f"({part})" for part in match.groups())
    return f"{over}/{under}"


def _choice(right: str, given: str) -> bool:
    """Whether "B) Paris", "(B). Paris" or "Option B" gives the choice that is right, "B". What stands behind the letter
    may neither deny it nor name another choice."""
    letter, said = re.fullmatch(r"\(?([A-Z])\)?", right), _CHOICE.fullmatch(given)
    if letter is None or said is None or letter[1] != said[2] or not may_stand_before(said[1]):
        return False
    if _LETTER_BEFORE.search(said[1]):
        return False
    first = re.match(r"\W*([^\W\d_]*)", said[3] or "")
    return not (first and first[1] in _TURNS) and not _OTHER_CHOICE.search(said[3] or "")
