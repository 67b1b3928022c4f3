"""What may differ when a run is resumed: how it is computed, where its directory is, and its length; nothing else."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import ConfigError

HOW = frozenset(
    {
        *("token_budget", "checkpoint_every", "checkpoint_activations", "validate_every", "reference_cache"),
        *("keep_checkpoints", "sample_every", "num_samples", "trackers", "engine", "num_parallel"),
        *("sampling.batch_size", "sampling.cache_gb"),
    }
)
"""Settings that say how a run is computed, kept and watched, and not what it computes: a resumed run may change them.
Each name is that of a key, or of a table with all that is in it."""


@dataclass(frozen=True)
class RunPlace:
    """The directory of a run, and the directory that its command was given in: relative paths in its settings are
    relative to the latter."""

    directory: str
    cwd: str

    @classmethod
    def of(cls, directory: Path) -> RunPlace:
        """The place of a run opened now."""
        return cls(os.path.abspath(directory), os.getcwd())

    def resolved(self, path: str) -> str:
        """The path as an absolute path."""
        return os.path.realpath(os.path.join(self.cwd, path))

    def beside(self, path: str) -> str | None:
        """The path as seen from the run, if it lies in the run's directory or in that of a run beside it."""
        relative = os.path.relpath(self.resolved(path), os.path.realpath(self.directory))
        return None if relative.startswith(f"..{os.sep}..") or relative == ".." else relative


@dataclass(frozen=True)
class Changes:
    """The settings that differ when a run goes on, as key to (before, now): `{"token_budget": (4096, 8192)}`."""

    how: Mapping[str, tuple[Any, Any]]
    length: Mapping[str, tuple[Any, Any]]
    moved: bool
    """Whether paths are written in another way because the run was moved or is called from elsewhere."""

    def __bool__(self) -> bool:
        return bool(self.how or self.length or self.moved)

    @property
    def recorded(self) -> dict[str, Any]:
        """The changes as environment.json keeps them."""
        return {key: {"before": then, "now": now} for key, (then, now) in {**self.how, **self.length}.items()}

    @property
    def said(self) -> str:
        """The changes as the console shows them."""
        return ", ".join(f"{key} {_word(a)} → {_word(b)}" for key, (a, b) in {**self.how, **self.length}.items())


def changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    grows: Sequence[str],
    then: RunPlace | None,
    here: RunPlace,
    num_done: int,
    finished: bool,
) -> Changes:
    """The differences between the settings that a run began with and those that it is to go on with.

    `grows` are the settings that say how long it is. `num_done` is the step of its newest checkpoint. Raises a
    ConfigError that names every key that must not differ, and every length below what is done.
    """
    old, new = dict(flat(before)), dict(flat(now))
    how, length, moved = {}, {}, False
    wrong: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        pair = (old.get(key), new.get(key))
        if pair[0] == pair[1]:
            if others := _two_places(key, pair[0], then=then, here=here):
                wrong[key] = others
            continue
        if _same_place(*pair, then=then, here=here):
            moved = True
        elif is_how(key):
            how[key] = pair
        elif key in grows and may_become(key, *pair, num_done=num_done, finished=finished):
            length[key] = pair
        else:
            wrong[key] = pair
    if wrong:
        listed = "".join(f"\n  - {k}: {_quoted(a)} there, {_quoted(b)} now" for k, (a, b) in wrong.items())
        growing = f"; {' and '.join(grows)} may grow" if set(wrong) & set(grows) else ""
        raise ConfigError(
            f"{here.directory if then is None else _shown(here)} holds a run with other settings:{listed}",
            where=str(Path(_shown(here)) / "settings.toml"),
            fix=f"give another directory with --out, or begin again there with --fresh{growing}",
        )
    return Changes(how, length, moved)


def refuse_own_inputs(settings: Mapping[str, Any], directory: Path) -> None:
    """Raises ConfigError if a setting names a file or directory in the run directory that is to be emptied."""
    here, place = RunPlace.of(directory), os.path.realpath(directory)
    lost = {key: value for key, value in flat(settings) if _names_path(key, value) and not is_how(key)}
    for key, value in lost.items():
        for name in value.partition("?")[0].split(","):
            path = here.resolved(name)
            if os.path.commonpath([path, place]) == place and (os.path.exists(path) or glob.glob(path)):
                raise ConfigError(
                    f"{key} = {value!r} lies in {_shown(here)}, which --fresh is to empty",
                    where="the run directory",
                    fix="give another directory with --out, or move what the run reads out of this one",
                )


def is_how(key: str) -> bool:
    """Whether a key path says how a run is computed and not what it computes."""
    parts = key.split(".")
    return any(".".join(parts[i:j]) in HOW for i in range(len(parts)) for j in range(i + 1, min(i + 3, len(parts) + 1)))


def may_become(key: str, before: Any, now: Any, *, num_done: int, finished: bool) -> bool:
    """Whether this length of a run may change like this: it may always grow, and it may shrink if the run has not come
    so far yet (but `num_epochs` may only grow)."""
    unlimited = key == "max_steps"  # unset is the whole run
    old, new = (float("inf") if unlimited and not isinstance(v, int | float) else v for v in (before, now))
    if not isinstance(old, int | float) or not isinstance(new, int | float):
        return False
    return new > old or (not finished and key != "num_epochs" and new >= num_done)


def _same_place(before: Any, now: Any, *, then: RunPlace | None, here: RunPlace) -> bool:
    """Whether two settings are one path: the same file or directory, or the same place beside a run that was moved."""
    if not isinstance(before, str) or not isinstance(now, str) or "\n" in before + now:
        return False
    if os.sep not in before + now and not os.path.exists(here.resolved(now)):
        return False
    if (then or here).resolved(before) == here.resolved(now):
        return True
    beside = here.beside(now)
    return then is not None and beside is not None and then.beside(before) == beside


def _two_places(key: str, value: Any, *, then: RunPlace | None, here: RunPlace) -> tuple[str, str] | None:
    """What a relative path meant before and what it means now, if both exist and differ, because the command is given
    from elsewhere; else None. A run that was copied together with everything around it reads its own copies."""
    if then is None or not _names_path(key, value):
        return None
    before, now = then.resolved(value), here.resolved(value)
    if before == now or not os.path.exists(before) or not os.path.exists(now):
        return None
    moved_along = os.path.relpath(then.cwd, then.directory) == os.path.relpath(here.cwd, here.directory)
    return None if moved_along else (before, now)


_PATHS = frozenset(
    {"model", "reference", "baseline", "reward_model", "path", "data", "held_out_data", "prompts", "demonstrations"}
)
"""Settings that may name a file or directory without a separator."""


def _names_path(key: str, value: Any) -> bool:
    """Whether a setting may name a file or directory."""
    if not isinstance(value, str) or "\n" in value:
        return False
    return os.sep in value or key.rpartition(".")[2] in _PATHS


def flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The key paths of nested tables with their values; entries of a list of tables have their number in the path:
    `rewards.0.name`."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flat(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list | tuple) and values and all(isinstance(v, Mapping) for v in values):
        for number, value in enumerate(values):
            yield from flat(value, f"{path}.{number}")
    else:
        yield path, list(values) if isinstance(values, tuple) else values


def _shown(here: RunPlace) -> str:
    relative = os.path.relpath(here.directory, here.cwd)
    return here.directory if relative.startswith("..") else relative


def _word(value: Any) -> str:
    return "unset" if value is None else str(value)


def _quoted(value: Any) -> str:
    return repr("unset" if value is None else value)
