"""What a source of records says of itself.

Files and hub data sets give rows, which layouts turn into records. A world or a feedback project has records of its
own, and the registry names its module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Records = tuple[list[Any], str, dict[str, int]]
"""Records, their SHA-256, and counts of what was left out."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of records, found by what stands before the colon: "world:helpdesk?num=100" is read by the `SOURCE` of
    the module that the registry names for "world"."""

    title: str
    """Such as "a world": in `data show`, data.json and messages."""
    natural: type
    """The record that it is for, where nothing else is asked."""
    live: bool
    """It may grow while a run goes on, so a run keeps what it read first."""
    read: Callable[[type, str], Records]
    """All records of a type. Raises DataError where it has none of that type, or an option does not exist."""
    check: Callable[[type, str], None]
    """Raises what `read` would raise, as far as that can be known at once."""
