"""Maps names in run files to settings classes: `name = "ppo"` to one of this package, `name = "mine.py:MyLoss"` to a
user's own."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from trimtab.core.errors import ConfigError, nearest
from trimtab.core.user_code import place_of, user_module

T = TypeVar("T")

# The modules of a kind are imported when it is first asked for: naming a reward must not import every model library.
_HOMES: dict[str, tuple[str, ...]] = {
    "policy_loss": ("trimtab.math.losses.policy",),
    "preference_loss": ("trimtab.math.losses.preference",),
    "reward_loss": ("trimtab.math.losses.reward", "trimtab.math.losses.graded"),
    "advantage": ("trimtab.math.advantages",),
    "kl_controller": ("trimtab.math.kl",),
    "combination": ("trimtab.math.combining",),
    "reward": ("trimtab.rewards",),
    "environment": ("trimtab.environments",),
    "world": ("trimtab.worlds",),
    "tracker": ("trimtab.runs.trackers",),
}
# Attributes or fields that every class of a kind has: a user's class of another kind is refused before it is used.
_OFFERS: dict[str, tuple[str, ...]] = {
    "policy_loss": ("weight", "__call__", "aggregation", "length"),
    "reward_loss": ("weight", "__call__", "coef", "needs_ranking"),
    "advantage": ("__call__", "needs_critic", "needs_greedy", "needs_group", "whiten"),
    "kl_controller": ("initial", "update"),
    "combination": ("total", "refusal", "normalize", "whiten", "flag"),
    "reward": ("load", "weight"),
    "environment": ("load",),
    "world": ("draw_prompt", "write_reply", "gold", "features"),
}
# Kinds whose members are modules. A module is imported only when that member is needed, and holds its descriptor under
# the kind's name in capitals (`STAGE`, `SOURCE`, `SUITE`). Stages are listed in the order in which they are used.
_MODULES: dict[str, dict[str, str]] = {
    "stage": {
        "pretrain": "trimtab.stages.pretrain",
        "sft": "trimtab.stages.sft",
        "compare": "trimtab.stages.compare",
        "steps": "trimtab.stages.steps",
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
    "suite": {
        "ifeval": "trimtab.evals.suites.ifeval",
        "truthful_qa": "trimtab.evals.suites.truthful_qa",
        "hhh": "trimtab.evals.suites.hhh",
        "traits": "trimtab.evals.suites.traits",
        "xstest": "trimtab.evals.suites.xstest",
        "red_team": "trimtab.evals.suites.red_team",
        "gsm8k": "trimtab.evals.suites.gsm8k",
        "sycophancy": "trimtab.evals.suites.sycophancy",
        "diversity": "trimtab.evals.suites.diversity",
    },
}
_REGISTERED: dict[str, dict[str, type]] = {}


def register(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator that registers a class. `kind` is a key such as "policy_loss", `name` what a run file writes."""

    def add(cls: type[T]) -> type[T]:
        known = _REGISTERED.setdefault(kind, {})
        assert name not in known or known[name].__qualname__ == cls.__qualname__, f"two classes named {name} for {kind}"
        known[name] = cls
        return cls

    return add


def modules(kind: str) -> Mapping[str, str]:
    """Maps the name of each member of "stage", "source" or "suite" to its module. Imports nothing."""
    return _MODULES[kind]


def descriptor(kind: str, name: str) -> Any:
    """The member's descriptor: the `STAGE`, `SOURCE` or `SUITE` of its module. Imports the module."""
    return getattr(importlib.import_module(_MODULES[kind][name]), kind.upper())


def names(kind: str) -> tuple[str, ...]:
    """Every name that the package registers for a kind, sorted. Classes in a user's files ("file.py:Class") are left
    out."""
    for module in _HOMES.get(kind, ()):
        importlib.import_module(module)
    return tuple(sorted(name for name in _REGISTERED.get(kind, {}) if ":" not in name))


def find(kind: str, name: str, *, where: str) -> type:
    """The class registered under `name`. A class given as "file.py:Class" or "package.module:Class" is loaded and
    registered under that name. Raises ConfigError with the nearest known name if there is none."""
    known = names(kind)
    if name in _REGISTERED.get(kind, {}):
        return _REGISTERED[kind][name]
    if ":" in name:
        return register(kind, name)(_of_kind(kind, _named_class(name, where=where), name, where=where))
    raise unknown_name(kind, name, known, where=where)


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str) -> ConfigError:
    """The error for a name that no class of this kind has. It suggests the nearest known one."""
    fix = f"{nearest(name, known)}known names: {', '.join(sorted(known))}"
    return ConfigError(f"no {kind.replace('_', ' ')} is called {name!r}", where=where, fix=fix)


def _named_class(name: str, *, where: str) -> type:
    """The user's dataclass that "file.py:Class" or "package.module:Class" names."""
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
    if "__dataclass_fields__" not in vars(cls):  # a base's do not count: the class's own fields would be ignored
        raise ConfigError(
            f"{attribute!r} in {place!r} is no dataclass",
            where=where,
            fix="put @dataclass(frozen=True, kw_only=True) above the class; its fields are what the run file may set",
        )
    return cls


def _of_kind(kind: str, cls: type, name: str, *, where: str) -> type:
    """Returns the class if it has every attribute that its kind needs; raises ConfigError if not."""
    has = {attribute for base in cls.__mro__ for attribute in vars(base)} | {f.name for f in dataclasses.fields(cls)}
    if missing := [wanted for wanted in _OFFERS.get(kind, ()) if wanted not in has]:
        raise ConfigError(
            f"{name!r} is no {kind.replace('_', ' ')}: it has no {', no '.join(missing)}",
            where=where,
            fix="docs/extending.md shows what a class of each kind offers",
        )
    return cls


def name_of(kind: str, cls: type) -> str:
    """The name by which a run file finds `cls`: its registered name, or its place as "package.module:Class".

    Raises ConfigError for a class that no run file could name, such as one defined in a notebook: its run could not be
    recorded, resumed or repeated.
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
