"""A world as a data source: `data = "world:helpdesk?split=train&num=1000&seed=0"`."""

from __future__ import annotations

import re
from typing import Any

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.core.source import FoundRecords, Source, options_in
from trimtab.core.types import Demonstration, Prompt, records_hash
from trimtab.worlds.world import SPLITS

PREFIX = "world:"
_DEFAULTS = {"split": "train", "num": "1000", "seed": "0"}


def is_world(source: object) -> bool:
    """True for "world:…"."""
    return str(source).startswith(PREFIX)


def read_world(source: str, *, demonstrations: bool) -> list[Prompt] | list[Demonstration]:
    """Prompts, or prompts with their replies, of "world:helpdesk?split=train&num=1000&seed=0" (those are the defaults).

    `seed` says which prompts are drawn; the rules of a world do not depend on it. Raises DataError for an unknown
    option, and what `trimtab.worlds.load` raises for an unknown name.
    """
    name, options = options_in(source.removeprefix(PREFIX), _DEFAULTS, where=source)
    if options["split"] not in SPLITS:
        raise DataError(f"no split is called {options['split']!r}", where=source, fix=f"use {', '.join(SPLITS)}")
    try:
        num, seed = int(options["num"]), int(options["seed"])
    except ValueError:
        raise DataError(
            f"num={options['num']!r} and seed={options['seed']!r} must be whole numbers",
            where=source,
            fix="write for instance 'world:helpdesk?num=1000&seed=0'",
        ) from None
    world = worlds.load(name)
    draw: Any = world.demonstrations if demonstrations else world.prompts
    records: list[Any] = draw(options["split"], num, seed=seed)
    return records


def records(kind: type, source: str) -> FoundRecords:
    """The prompts or demonstrations of a world; it has no other records."""
    if kind not in (Prompt, Demonstration):
        raise DataError(
            f"a world gives Prompt and Demonstration, not {kind.__name__}",
            where=source,
            fix="make comparisons with the compare stage, which asks the world's annotators",
        )
    found = read_world(source, demonstrations=kind is Demonstration)
    return list(found), records_hash(found), {}


def check(kind: type, source: str) -> None:
    """Checks the source by drawing a single record."""
    records(kind, re.sub(r"\bnum=\d+", "num=1", source))


SOURCE = Source(title="a world", natural=Demonstration, live=False, read=records, check=check)
