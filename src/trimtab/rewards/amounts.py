r"""Reads amounts: one number, as people and models write it, with its unit and the few words that may stand around it.

A policy is trained on what is accepted here, so the whole text has to fit this grammar. A text with a second number, an
unknown mark or a word that changes the value ("double 5", "5 pi", "not 5") is not an amount.

    amount   = {left "="} [before] number {multiple} [unit] ["is the answer"]
    left     = names of values, such as "x", "f(2)", "\theta" and "a + b", or a calculation of numbers, such as "5!"
    before   = words such as "so" and "the answer", or any words with a verb or a colon last, such as "Anna has"
    number   = 72, -72, $1,200.50, 3/4, 1 1/2, 2.5e-3, 3 x 10^4, 10^4, minus 3
    multiple = "million", "dozens", "tenths", and k, M, B and T directly behind the number
    unit     = "apples", "cm²", "km/h", "dollars per day"
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MINUS = "-−–"
_CURRENCIES = "$€£¥₹₱₩₽"
_SIGN = r"[+\-−–]"
_NUMBER = re.compile(
    rf"[{_CURRENCIES}]?\s*(?P<sign>{_SIGN}?)\s*[{_CURRENCIES}]?\s*"
    r"(?P<digits>\d[\d,]*(?:\.\d*)?|\.\d+)(?:\s*/\s*(?P<under>\d+))?\s*%?"
)
_GROUPED = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")
_LONGEST_NUMBER = 200
"""The most characters of a number and the largest power of ten; longer texts are not read as numbers."""

_IN_LATEX = {"\\$": "$", "\\%": "%", "{,}": ",", "\\!": "", "\\,": ""}
"""How a plain number is written in LaTeX."""
_POWER = r"10\s*(?:\^|\*\*)\s*(?:\{\s*([+\-−–]?\d+)\s*\}|([+\-−–]?\d+))"
TIMES_POWER_OF_TEN = re.compile(rf"(?<=\d)\s*(?:\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|[x×*·])\s*{_POWER}")
_POWER_OF_TEN = re.compile(rf"(?<![\w.,^]){_POWER}")
_ONE_NUMBER = re.compile(
    rf"(?P<front>(?!\s){_SIGN}?\s*[{_CURRENCIES}]?\s*{_SIGN}?\s*"
    r"(?:\d+ \d+/\d+|\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+))(?:[eE](?P<exponent>[+\-−–]?\d+))?"
)
_MIXED = re.compile(rf"({_SIGN}?)(\d+) (\d+)/(\d+)")
_NEGATIVE_WORD = re.compile(rf"\b(?:negative|minus)\s+(?=[\d.{_CURRENCIES}])", re.IGNORECASE)

# What may stand on the left of "=": a calculation, and the marks and commands of LaTeX in the name of a value.
_CALCULATION = re.compile(
    r"(?:\d+(?:,\d{3})*(?:\.\d+)?|(?<=[\d)}])!|(?<=[\d ])x(?=[\d ])|[\s+*/×·÷()$%^|{}°√−–-]"
    r"|(?:\\?(?:sqrt|log|ln|sin|cos|tan|exp)|\\(?:[dt]?frac|d?binom|times|cdot|div))(?![A-Za-z])"
    r"(?:_(?:\d|\{\d+\}))?)+"
)
_NAMING_COMMANDS = re.compile(
    r"\\(?:angle|triangle|overline|widehat|hat|bar|vec|times|cdot|alpha|beta|gamma|delta|epsilon|varepsilon|theta|kappa"
    r"|lambda|mu|rho|sigma|tau|phi|varphi|psi|omega|Delta|Gamma|Theta|Omega|Phi)(?![A-Za-z])"
)
_ARGUMENT = re.compile(r"_(?:\w|\{[\w, ]+\})|(?<=[^\W\d_])'*\([\w\s,.+-]*\)|(?<=[^\W\d_])'+")
_LEADING_WORDS = re.compile(r"(?:[^\W\d_]{2,}[:, ]+)*")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")

_MULTIPLES = {
    "ten": Fraction(10), "hundred": Fraction(100), "thousand": Fraction(10**3), "million": Fraction(10**6),
    "billion": Fraction(10**9), "trillion": Fraction(10**12), "mil": Fraction(10**6), "mn": Fraction(10**6),
    "bil": Fraction(10**9), "bn": Fraction(10**9), "grand": Fraction(10**3), "lakh": Fraction(10**5),
    "crore": Fraction(10**7), "dozen": Fraction(12), "score": Fraction(20), "gross": Fraction(144),
    "half": Fraction(1, 2), "halve": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4),
    "fourth": Fraction(1, 4), "fifth": Fraction(1, 5), "sixth": Fraction(1, 6), "seventh": Fraction(1, 7),
    "eighth": Fraction(1, 8), "ninth": Fraction(1, 9), "tenth": Fraction(1, 10), "twelfth": Fraction(1, 12),
    "hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000), "millionth": Fraction(1, 10**6),
}  # fmt: skip
"""Words directly behind a number that multiply it, without a plural s."""
_MULTIPLE_LETTERS = {"k": Fraction(10**3), "m": Fraction(10**6), "b": Fraction(10**9), "t": Fraction(10**12)}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words that turn a number into another claim, wherever they stand.
DENIALS = _set(
    "not no never neither nor none nothing without except excluding but wrong false incorrect untrue impossible cannot"
    " cant dont isnt wait instead rather unlike doubt exclude deny"
)
ALTERNATIVES = _set("or and either between both versus vs to through")
HEDGES = _set(
    "about around approximately approx almost nearly roughly circa maybe perhaps possibly probably might could may"
    " guess if unless whether suppose assume assuming close"
)
_COMPARISONS = _set("less more fewer than least most over under above below beyond exceed exceeds exceeding")
_ARITHMETIC = _set(
    "plus minus negative times divided multiplied squared cubed root double twice half triple thrice reciprocal inverse"
    " opposite abs sqrt log ln sin cos tan exp hundred thousand million billion trillion dozen lakh crore hundreds"
    " thousands millions billions trillions dozens lakhs crores"
)
_NUMERALS = _set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
_CHANGING = DENIALS | ALTERNATIVES | HEDGES | _COMPARISONS | _ARITHMETIC
_CHANGING_BEHIND = (
    _CHANGING
    | _NUMERALS
    | _set(
        "greater bigger smaller larger higher lower minimum maximum before after until up within short too square sq"
        " cubic cu factorial mod modulo base choose pi tau infinity point doubled tripled halved inverted reversed"
        " raised hex binary octal"
    )
)
"""These words change a number before them, and do nothing in "The smaller base is 72"."""
_SPELLED = rf"(?:(?:{'|'.join(sorted(_NUMERALS))})[ -]?)+"
_SPELLED_BEHIND = re.compile(rf"\({_SPELLED}\)", re.IGNORECASE)
_SPELLED_BEFORE = re.compile(rf"^{_SPELLED}(?=\()", re.IGNORECASE)

# Words that may stand before a number by themselves; any other words need one of the verbs behind them.
_PLAIN_WORDS = _set(
    "so thus hence therefore then finally the my our a final correct right answer ans result solution total sum value"
    " exactly just only precisely simply option choice"
)
_VERBS = _set(
    "is are was were be has have had equals equal it's that's there's makes make made gives give gave gets get got"
    " costs cost needs need needed takes take took earns earn earned pays pay paid spends spend spent sells sell sold"
    " buys buy bought saves save saved uses use used eats eat ate yields obtain find contains becomes received receives"
)
_AFTER_VERB = re.compile(r"(?: (?:exactly|just|only|precisely|simply|therefore|thus|now|still|a total of|equal to))*$")
_BE = frozenset({"is", "are", "was", "were"})
_AFTER_BE = _set("the my our final correct right answer result solution total left needed required")

_CURRENCY_CODES = {"USD": "$", "US$": "$", "EUR": "€", "GBP": "£", "INR": "₹", "Rs": "₹", "Rs.": "₹"}
_CURRENCY_CODE = re.compile(r"\b(USD|US\$|EUR|GBP|INR|Rs\.?)\s*(?=[\d.])")
_UNITS = {
    "$": "dollar", "usd": "dollar", "dollars": "dollar", "€": "euro", "eur": "euro", "euros": "euro",
    "£": "pound sterling", "gbp": "pound sterling", "¥": "yen", "₹": "rupee", "inr": "rupee", "rupees": "rupee",
    "₱": "peso", "₩": "won", "₽": "rouble", "%": "percent", "percent": "percent", "°": "degree",
    "degrees": "degree", "°c": "degree celsius", "°f": "degree fahrenheit", "cents": "cent", "¢": "cent",
    "m": "metre", "meters": "metre", "meter": "metre", "metres": "metre", "metre": "metre", "km": "kilometre",
    "kilometers": "kilometre", "kilometer": "kilometre", "kilometres": "kilometre", "kilometre": "kilometre",
    "cm": "centimetre", "centimeters": "centimetre", "centimeter": "centimetre", "centimetres": "centimetre",
    "mm": "millimetre", "millimeters": "millimetre", "kg": "kilogram", "kilograms": "kilogram", "g": "gram",
    "grams": "gram", "mg": "milligram", "l": "litre", "L": "litre", "liters": "litre", "liter": "litre",
    "litres": "litre", "ml": "millilitre", "s": "second", "sec": "second", "seconds": "second", "second": "second",
    "min": "minute", "mins": "minute", "minutes": "minute", "minute": "minute", "h": "hour", "hr": "hour",
    "hrs": "hour", "hours": "hour", "hour": "hour", "days": "day", "weeks": "week", "years": "year", "ft": "foot",
    "feet": "foot", "foot": "foot", "in": "inch", "inches": "inch", "inch": "inch", "yards": "yard", "yd": "yard",
    "lb": "pound weight", "lbs": "pound weight", "pounds": "pound", "oz": "ounce", "ounces": "ounce",
    "mi": "mile", "miles": "mile", "mile": "mile", "deg": "degree", "degree": "degree", "cc": "centimetre³",
    "millimeter": "millimetre", "millimetre": "millimetre", "millimetres": "millimetre", "centimetre": "centimetre",
    "milliliter": "millilitre", "milliliters": "millilitre", "millilitre": "millilitre", "millilitres": "millilitre",
    "gal": "gallon", "gallons": "gallon", "gallon": "gallon", "yr": "year", "yrs": "year", "year": "year",
    "wk": "week", "wks": "week", "week": "week", "day": "day", "yard": "yard", "kilogram": "kilogram",
    "gram": "gram", "pct": "percent", "hz": "hertz", "hertz": "hertz", "joule": "joule", "joules": "joule",
    "newton": "newton", "newtons": "newton", "watt": "watt", "watts": "watt", "volt": "volt", "volts": "volt",
    "kgs": "kilogram", "kms": "kilometre", "cms": "centimetre", "mls": "millilitre", "Ω": "ohm", "ohm": "ohm",
    "ohms": "ohm",
}  # fmt: skip
"""Units by their usual forms. A unit that is not listed is compared as its word without a plural s."""
_RATES = {
    "mph": "miles per hour", "kph": "km per hour", "kmh": "km per hour", "kmph": "km per hour", "per cent": "percent",
}  # fmt: skip
_SYMBOLS = {"N": "newton", "J": "joule", "W": "watt", "V": "volt"}
"""Units of one letter that count behind a blank only: "5N" may be five times N."""
_POWERS = {"square": "²", "sq": "²", "cubic": "³", "cu": "³"}
_FILLERS = _set("a an the of in all total altogether left us each full whole")


@dataclass(frozen=True)
class Amount:
    """A number and what it counts, such as 72 and {"apple"}, or 5 and {"metre"} per {"second"}; sets may be empty."""

    value: Fraction
    unit: frozenset[str] = frozenset()
    per: frozenset[str] = frozenset()


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
    """The amount that a cleaned text stands for: "72 apples", "x = 72", "5 thousand", "1 1/2". None if the text does
    not fit the grammar of this module."""
    if len(text) > _LONGEST_NUMBER:
        return None
    *left, text = text.split("=")
    if not all(_may_equal(part.strip()) for part in left):
        return None
    text = _NEGATIVE_WORD.sub("-", _without_brackets(text.strip()))
    text = _CURRENCY_CODE.sub(lambda match: _CURRENCY_CODES[match[1]], text)
    text = TIMES_POWER_OF_TEN.sub(_as_exponent, text)
    text = _POWER_OF_TEN.sub(lambda match: "1" + _as_exponent(match), text)
    found = list(_ONE_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, behind = text[: found[0].start()], text[found[0].end() :]
    value = _value(found[0])
    if value is None or re.search(r"\w$", before) or not may_stand_before(before):
        return None
    if any(as_number(part) not in (None, value) for part in left):  # "73 = 72"
        return None
    return _with_unit(value, found[0]["front"], behind)


def same_amount(right: Amount, given: Amount) -> bool:
    """Equal values. Units count only if both are written: then one may say more than the other, as "red apples" does,
    and both have to be per the same unit."""
    if right.value != given.value:
        return False
    if not (right.unit or right.per) or not (given.unit or given.per):
        return True
    return right.per == given.per and (right.unit <= given.unit or given.unit <= right.unit)


def may_stand_before(text: str) -> bool:
    """Whether these words before a value leave it as it is: "The answer is" does, "less than" and "double" do not."""
    if not re.fullmatch(r"(?:[^\W\d_]|[\s:,.'’])*", text):
        return False
    words = _words(text)
    if not _CHANGING.isdisjoint(words) or any(_is_negated(word) for word in words):
        return False
    if _PLAIN_WORDS.issuperset(words) or text.rstrip().endswith(":") or words in (["a", "total", "of"], ["altogether"]):
        return True
    until_verb = _AFTER_VERB.sub("", " ".join(words))
    return until_verb.rpartition(" ")[2] in _VERBS


def _words(text: str) -> list[str]:
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def _is_negated(word: str) -> bool:
    return word.endswith("n't")


def _multiple(word: str) -> Fraction | None:
    word = word.lower()
    return _MULTIPLES.get(word) or _MULTIPLES.get(word.removesuffix("s"))


def _may_equal(left: str) -> bool:
    """Whether the text on the left of "=" only names the value or computes it. An equation that is still to be solved,
    such as "2x = 72" or "x + 1 = 72", does neither."""
    calculation = _LEADING_WORDS.sub("", left, count=1)
    if _CALCULATION.fullmatch(calculation) and re.search(r"\d", calculation):
        return may_stand_before(left.removesuffix(calculation))
    names = _NAMING_COMMANDS.sub(" n ", _ARGUMENT.sub("", left)).strip()
    if not re.fullmatch(r"(?:[^\W\d_{](?:[^\W\d_]|[\s{}+*/·×-])*(?<![+*/·×-]))?", names):
        return False
    words = re.findall(r"\w+", names.lower())
    return _CHANGING.isdisjoint(words) and all(word.isalpha() for word in words)


def _without_brackets(text: str) -> str:
    """The text without round brackets that stand free, such as "(5)" and "72 (apples)", and without a number spelled
    out beside the digits, such as "72 (seventy-two)". Brackets around a list stay. Hyphens in words become blanks."""
    text = _SPELLED_BEFORE.sub("", _SPELLED_BEHIND.sub("", text))
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", re.sub(r"(?<=[a-z])\((e?s)\)", r"\1", text))
    return re.sub(r"(?<!\S)\(([^(),]*)\)(?!\S)", lambda match: match[1].strip(), text).strip()


def _as_exponent(match: re.Match[str]) -> str:
    return f"e{match[1] or match[2]}"


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `_ONE_NUMBER`; a fraction with an exponent could be read in two ways and has none."""
    if match["exponent"] and "/" in match["front"]:
        return None
    value = _mixed(match["front"])
    exponent = int(re.sub("[−–]", "-", match["exponent"] or "0"))
    return value * Fraction(10) ** exponent if value is not None and abs(exponent) <= _LONGEST_NUMBER else None


def _mixed(text: str) -> Fraction | None:
    """The value of a mixed number such as "1 1/2"; any other text is read by `as_number`."""
    match = _MIXED.fullmatch(" ".join(text.split()))
    if match is None or not int(match[4]):
        return as_number(text)
    value = int(match[2]) + Fraction(int(match[3]), int(match[4]))
    return -value if match[1] in tuple(_MINUS) else value


def _with_unit(value: Fraction, number: str, behind: str) -> Amount | None:
    """The amount, if the text behind the number can only be multiples, a unit and words about it; else None."""
    sign = next((s for s in _CURRENCIES if s in number), "")
    token = rf"°[CF]?|[%¢/{_CURRENCIES}]|{_WORD.pattern}"
    behind = re.sub(r"\^?'+$|^-(?=[^\W\d_]{2})|,(?= (?:in total|in all|altogether|each|left)$)", " ", behind)
    behind = re.sub(r"\b(sq|cu)\.(?= )", r"\1", behind.replace("U.S.", "US"))
    if not re.fullmatch(rf"(?:\s|{token})*", behind):
        return None
    for short, long in _RATES.items():
        behind = re.sub(rf"\b{short}\b", long, behind, flags=re.IGNORECASE)
    tokens = re.findall(token, behind)
    attached = behind[:1].isalpha()
    if tokens and (attached or sign) and (sign or tokens[0].isupper() or tokens[0] == "k"):
        letter = _MULTIPLE_LETTERS.get(tokens[0].lower())
        if letter:
            value, tokens, attached = value * letter, tokens[1:], False
    while tokens and (multiple := _multiple(tokens[0])):
        value, tokens, attached = value * multiple, tokens[1:], False
    if attached and unit_name(tokens[0]) is None:
        return None
    lowered = [word.lower() for word in tokens]
    be = next((i for i, word in enumerate(lowered) if word in _BE), len(lowered))
    if be < len(lowered) and (be == len(lowered) - 1 or not _AFTER_BE.issuperset(lowered[be + 1 :])):
        return None
    unit, _, per = (f" {' '.join(tokens[:be])} ").replace(" / ", " per ").partition(" per ")
    over, under = (
        _unit([_SYMBOLS.get(word, word) if behind[:1] == " " else word for word in named.split()])
        for named in (unit, per)
    )
    if over is None or under is None or (not per.strip() and not {"per", "/"}.isdisjoint(lowered)):
        return None
    return Amount(value, frozenset(_UNITS[sign].split()) | over if sign else over, under)


def unit_name(word: str) -> str | None:
    """The name of a known unit, such as "centimetre²" for "cm²". The case of single letters counts: M is no metre."""
    power = word[-1] if word[-1] in "²³" else ""
    word = word.removesuffix(power) if power else word
    known = _UNITS.get(word) or (_UNITS.get(word.lower()) if len(word) > 1 else None)
    return known + power if known else None


def _unit(words: list[str]) -> frozenset[str] | None:
    """The unit that the words name; None if a word among them changes the number. A word before a known unit makes
    another unit, so that light years are not years."""
    names: list[str] = []
    kind = power = ""
    for word in words:
        lowered, known = word.lower(), unit_name(word)
        if lowered in _FILLERS and not (lowered == "in" and len(words) == 1):
            continue
        if lowered in ("squared", "cubed") and names and names[-1] in _UNITS.values():
            names[-1] += "²" if lowered == "squared" else "³"
        elif known:
            names += f"{kind}{known}{power}".split()
            kind = power = ""
        elif lowered in _POWERS and word is not words[-1]:
            power = _POWERS[lowered]
        elif lowered in _CHANGING_BEHIND or _is_negated(lowered) or _multiple(lowered) or len(word) == 1:
            return None
        else:
            names += kind.rstrip("-").split()
            kind, power = f"{lowered.removesuffix('s')}-", ""
    return frozenset([*names, *kind.rstrip("-").split()])
