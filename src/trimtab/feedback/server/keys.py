"""Keyboard keys of the pages: the usual ones, and a person's own."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.core.errors import DataError

ACTIONS: dict[str, tuple[str, str]] = {
    **{f"pick_{i}": (str(i), f"answer {i}, reply {i} or step mark {i}") for i in range(1, 10)},
    "tie": ("t", "equally good; in a ranking: tied with the one before"),
    "both_bad": ("b", "both bad"),
    "cannot_judge": ("c", "cannot judge"),
    "first_error": ("x", "this step is the first wrong one"),
    "skip": ("s", "skip"),
    "flag": ("f", "flag"),
    "undo": ("u", "undo"),
    "rationale": ("r", "say why"),
    "write": ("w", "write the reply"),
    "next": ("j", "next step"),
    "previous": ("k", "previous step"),
    "view": ("v", "side by side or stacked"),
    "diff": ("d", "words that differ"),
    "source": ("m", "as written"),
    "guideline": ("g", "guideline"),
    "help": ("?", "all keys"),
}
"""Each action with its usual key and what it does. Enter confirms, Escape leaves a field, Backspace takes back the last
of a ranking: these are the same for everyone."""
FIXED = ("Enter", "Escape", "Backspace", "Tab", " ")
"""Keys that nobody can give to an action."""


def keys_for(own: Mapping[str, str]) -> dict[str, str]:
    """The key of every action: a person's own if they have one, else the usual one."""
    return {action: own.get(action, usual) for action, (usual, _) in ACTIONS.items()}


def checked_keys(wanted: Mapping[str, str]) -> dict[str, str]:
    """A person's own keys: those that differ from the usual. Raises DataError for a wrong key, or one used twice."""
    own = {}
    for action, key in wanted.items():
        if action not in ACTIONS:
            raise DataError(f"no action is called {action!r}", where="your keys", fix="reload the page")
        if len(key) != 1 or not key.isprintable() or key in FIXED:
            raise DataError(
                f"{key!r} for {ACTIONS[action][1]!r}", where="your keys", fix="use one letter, digit or sign for each"
            )
        if key != ACTIONS[action][0]:
            own[action] = key
    taken: dict[str, str] = {}
    for action, key in keys_for(own).items():
        if key in taken:
            raise DataError(
                f"{key!r} is used for {ACTIONS[taken[key]][1]!r} and {ACTIONS[action][1]!r}",
                where="your keys",
                fix="give one of them another key",
            )
        taken[key] = action
    return own
