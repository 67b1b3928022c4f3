"""The descriptor of a source of records.

Files and hub data sets give rows, which layouts turn into records. A world or a feedback project gives records
directly; the registry names its module.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.core.errors import DataError

FoundRecords = tuple[list[Any], str, dict[str, int]]
"""Records, their SHA-256, and how many items were left out for each reason."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of records, found by the word before the colon: "world:helpdesk?num=100" is read by the `SOURCE` of the
    module that the registry names for "world"."""

    title: str
    """For example "a world"; shown in `data show`, data.json and messages."""
    natural: type
    """The record type that it gives if none is asked for."""
    live: bool
    """Whether the source may grow during a run; if so, the run keeps what it read first."""
    read: Callable[[type, str], FoundRecords]
    """All records of a type. Raises DataError if it has none of that type, or an option does not exist."""
    check: Callable[[type, str], None]
    """Raises the errors that `read` would raise, as far as they can be found quickly."""


def query_options(query: str, *, where: str) -> dict[str, str]:
    """The options of "key=value&key=value". Lists of columns that are given twice, as "ignore=a&ignore=b", are put
    together. Raises DataError for another option with two values."""
    found: dict[str, str] = {}
    for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if name in found and name not in ("columns", "ignore") and found[name] != value:
            raise DataError(f"{name} is {found[name]!r} and {value!r}", where=where, fix="leave one of the two out")
        found[name] = f"{found[name]},{value}" if name in found and name in ("columns", "ignore") else value
    return found


def options_in(text: str, defaults: Mapping[str, str], *, where: str) -> tuple[str, dict[str, str]]:
    """The name and the options of "name?key=value&key=value". Raises DataError for an option without a default."""
    name, _, query = text.partition("?")
    given = query_options(query, where=where)
    unknown = sorted(set(given) - set(defaults))
    if unknown or not name:
        raise DataError(
            f"no option is called {', '.join(map(repr, unknown))}" if unknown else "the source has no name",
            where=where,
            fix=f"write NAME?key=value&key=value with the keys {', '.join(defaults)}",
        )
    return name, {**defaults, **given}
