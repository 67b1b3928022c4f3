"""Names to classes: how a run file's `name = "ppo"` finds its settings class."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import TypeVar

from trimtab.errors import ConfigError

T = TypeVar("T")

# A kind is loaded when it is first asked for: naming a reward must not import every model library.
_HOMES: dict[str, tuple[str, ...]] = {
    "policy_loss": ("trimtab.math.losses.policy",),
    "preference_loss": ("trimtab.math.losses.preference",),
    "advantage": ("trimtab.math.advantages",),
    "kl_controller": ("trimtab.math.kl",),
    "reward": ("trimtab.rewards",),
    "world": ("trimtab.worlds",),
    "tracker": ("trimtab.runs.trackers",),
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


def names(kind: str) -> tuple[str, ...]:
    """Every registered name of a kind, sorted."""
    for module in _HOMES.get(kind, ()):
        importlib.import_module(module)
    return tuple(sorted(_REGISTERED.get(kind, {})))


def find(kind: str, name: str, *, where: str) -> type:
    """The class registered under `name`. Raises ConfigError with the nearest known name."""
    known = names(kind)
    if name in known:
        return _REGISTERED[kind][name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"no {kind.replace('_', ' ')} is called {name!r}", where=where, fix=f"{hint}known names: {', '.join(known)}"
    )


def name_of(kind: str, cls: type) -> str:
    """The name `cls` is registered under."""
    return next(name for name in names(kind) if _REGISTERED[kind][name] is cls)
