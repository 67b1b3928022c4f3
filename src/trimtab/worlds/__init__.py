"""Synthetic tasks whose true reward is a program, so that the whole loop can be run and checked without downloads."""

from __future__ import annotations

from typing import cast

from trimtab.core import registry
from trimtab.worlds.arithmetic import Arithmetic
from trimtab.worlds.catalogue import Catalogue
from trimtab.worlds.helpdesk import Helpdesk
from trimtab.worlds.helpdesk_harm import HelpdeskHarm
from trimtab.worlds.sets import write_sets
from trimtab.worlds.world import SPLITS, Gold, Split, World, split_of

__all__ = [
    "SPLITS",
    "Arithmetic",
    "Catalogue",
    "Gold",
    "Helpdesk",
    "HelpdeskHarm",
    "Split",
    "World",
    "load",
    "split_of",
    "write_sets",
]


def load(name: str, seed: int = 0) -> World:
    """The world of that name. Raises ConfigError with the nearest known name."""
    return cast(World, registry.find("world", name, where="the name of a world")(seed=seed))
