"""Finds amounts of days in a text, in digits or in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_UNITS = {"day": 1, "days": 1, "week": 7, "weeks": 7}
OTHER_UNITS = frozenset(
    {"month", "months", "year", "years", "hour", "hours", "minutes", "dollars", "dollar", "euros", "euro", "percent"}
)
_SMALL_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TEN_WORDS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = {word: n for n, word in enumerate(_SMALL_WORDS)} | {w: 10 * n for n, w in enumerate(_TEN_WORDS, 2)}
_LARGE = {"dozen": 12, "hundred": 100, "thousand": 1000, "fortnight": 14}
_WORDS = _NUMBER_WORDS.keys() | _LARGE.keys()


def amounts(words: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yields, for every number in digits or in words: (its amount in days, the place of its first word, the place after
    it and its unit).

    "one" counts only before a unit. An amount in another unit than days or weeks is -1, which no ticket has.
    """
    if not any(map(str.isnumeric, words)) and _WORDS.isdisjoint(words):
        return
    place = 0
    while place < len(words):
        start = place
        total, seen = 0, False
        while place < len(words) and is_number(words[place]):
            total, seen, place = _add(total, words[place]), True, place + 1
        if not seen:
            place += 1
            continue
        unit = words[place] if place < len(words) else ""
        if list(words[start:place]) == ["one"] and unit not in _UNITS and unit not in OTHER_UNITS:
            continue
        if unit in OTHER_UNITS:
            total = -1
        if unit in _UNITS:
            total, place = total * _UNITS[unit], place + 1
        yield total, start, place


def is_number(word: str) -> bool:
    """Whether the word is a number or part of one."""
    return word.isnumeric() or word in _WORDS


def _add(total: int, word: str) -> int:
    if word.isdecimal():
        return total * 1000 + int(word[:6])
    if word in _LARGE:
        return max(total, 1) * _LARGE[word]
    return total + _NUMBER_WORDS.get(word, -1000)
