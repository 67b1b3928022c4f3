"""Names to classes: how `name = "ppo"` in a run file finds its settings class, and `name = "mine.py:MyLoss"` yours."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from trimtab.core.errors import ConfigError
from trimtab.core.user_code import place_of, user_module

T = TypeVar("T")

# A kind is loaded when it is first asked for: naming a reward must not import every model library.
_HOMES: dict[str, tuple[str, ...]] = {
    "policy_loss": ("trimtab.math.losses.policy",),
    "preference_loss": ("trimtab.math.losses.preference",),
    "advantage": ("trimtab.math.advantages",),
    "kl_controller": ("trimtab.math.kl",),
    "reward": ("trimtab.rewards",),
    "environment": ("trimtab.environments",),
    "world": ("trimtab.worlds",),
    "tracker": ("trimtab.runs.trackers",),
}
# What a class of a kind has, by itself or as a field: a class of another kind is told apart before it is used.
_OFFERS: dict[str, tuple[str, ...]] = {
    "policy_loss": ("weight", "__call__", "aggregation", "length"),
    "advantage": ("__call__", "needs_critic", "needs_greedy", "needs_group", "whiten"),
    "kl_controller": ("initial", "update"),
    "reward": ("load", "weight"),
    "environment": ("load",),
    "world": ("draw_prompt", "write_reply", "gold", "features"),
}
# Kinds of which each member is a module, found by name and imported only when that one is needed: the module holds its
# descriptor under the kind's name in capitals (`STAGE`, `SOURCE`). Stages stand in the order of the work.
_MODULES: dict[str, dict[str, str]] = {
    "stage": {
        "pretrain": "trimtab.stages.pretrain",
        "sft": "trimtab.stages.sft",
        "compare": "trimtab.stages.compare",
        "reward": "trimtab.stages.reward",
        "preference": "trimtab.stages.preference",
        "online": "trimtab.stages.online",
        "select": "trimtab.stages.select",
        "evaluate": "trimtab.stages.evaluate",
    },
    "source": {
        "world": "trimtab.worlds.source",
        "feedback": "trimtab.feedback.source",
    },
}
_REGISTERED: dict[str, dict[str, type]] = {}


def register(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: `kind` is a key such as "policy_loss", `name` is what a run file says."""

    def add(cls: type[T]) -> type[T]:
        known = _REGISTERED.setdefault(kind, {})
        assert name not in known or known[name].__qualname__ == cls.__qualname__, f"two classes named {name} for {kind}"
        known[name] = cls
        return cls

    return add


def modules(kind: str) -> Mapping[str, str]:
    """The name and the module of each member of "stage" or "source". Nothing is imported."""
    return _MODULES[kind]


def descriptor(kind: str, name: str) -> Any:
    """What the member says of itself: the `STAGE` or `SOURCE` of its module, which is imported."""
    return getattr(importlib.import_module(_MODULES[kind][name]), kind.upper())


def names(kind: str) -> tuple[str, ...]:
    """Every name of a kind that the package registers, sorted; classes of a user's files have a place and no name."""
    for module in _HOMES.get(kind, ()):
        importlib.import_module(module)
    return tuple(sorted(name for name in _REGISTERED.get(kind, {}) if ":" not in name))


def find(kind: str, name: str, *, where: str) -> type:
    """The class registered under `name`, or the one that "file.py:Class" or "package.module:Class" names, which is then
    known by that name. Raises ConfigError with the nearest known name."""
    known = names(kind)
    if name in _REGISTERED.get(kind, {}):
        return _REGISTERED[kind][name]
    if ":" in name:
        return register(kind, name)(_of_kind(kind, _named_class(name, where=where), name, where=where))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"no {kind.replace('_', ' ')} is called {name!r}", where=where, fix=f"{hint}known names: {', '.join(known)}"
    )


def _named_class(name: str, *, where: str) -> type:
    """The dataclass that the user asked for by name."""
    place, _, attribute = name.rpartition(":")
    module = user_module(place, where=where)
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type):
        classes = [n for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__]
        raise ConfigError(
            f"{place!r} holds no class {attribute!r}",
            where=where,
            fix=f"name one of its classes: {', '.join(classes) or 'it has none'}",
        )
    if "__dataclass_fields__" not in vars(cls):  # a base's do not count: fields of its own would be passed over
        raise ConfigError(
            f"{attribute!r} in {place!r} is no dataclass",
            where=where,
            fix="put @dataclass(frozen=True, kw_only=True) above the class; its fields are what the run file may set",
        )
    return cls


def _of_kind(kind: str, cls: type, name: str, *, where: str) -> type:
    """The class, if it has what its kind has."""
    has = {attribute for base in cls.__mro__ for attribute in vars(base)} | {f.name for f in dataclasses.fields(cls)}
    if missing := [wanted for wanted in _OFFERS.get(kind, ()) if wanted not in has]:
        raise ConfigError(
            f"{name!r} is no {kind.replace('_', ' ')}: it has no {', no '.join(missing)}",
            where=where,
            fix="docs/extending.md shows what a class of each kind offers",
        )
    return cls


def name_of(kind: str, cls: type) -> str:
    """The name a run file finds `cls` by: the one it is registered under, or its place, as "package.module:Class".

    Raises ConfigError for a class that no run file could name, such as one made in a notebook: its run could not be
    recorded, and neither resumed nor repeated.
    """
    names(kind)  # loads the modules that register them
    for name, registered in sorted(_REGISTERED.get(kind, {}).items()):
        if registered is cls:
            return name
    module, where = cls.__module__, f"{cls.__module__}.{cls.__qualname__}"
    if module != "__main__" and getattr(sys.modules.get(module), cls.__qualname__, None) is cls:
        name = f"{place_of(module)}:{cls.__qualname__}"
        register(kind, name)(_of_kind(kind, cls, name, where=where))
        return name
    raise ConfigError(
        f"{cls.__qualname__} is a class of a notebook or a script, where no run file finds a {kind.replace('_', ' ')}",
        where=where,
        fix=f"put it into a file of its own and import it: %%writefile my_{kind}.py in a notebook, then "
        f"from my_{kind} import {cls.__qualname__}",
    )
