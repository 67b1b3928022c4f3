"""Which launcher a run has: that of its settings, or that of the program which has started its processes already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from trimtab.core.errors import ConfigError, need
from trimtab.engines.launch import ChildLauncher, Launcher


class ProcessSettings(Protocol):
    """What the settings of an engine say of its processes."""

    @property
    def workers(self) -> int:
        """The number of processes."""

    @property
    def ray(self) -> str:
        """The Ray cluster that starts them, or ""."""


_joined: tuple[Launcher, int, str] | None = None
"""The launcher of the processes that torchrun or srun has started, their number, and which of the two it was."""
_one_machine = True
"""Whether these processes are all on this machine."""


def join(launcher: Launcher, size: int, name: str, *, one_machine: bool = True) -> None:
    """From now on `find_launcher` gives this launcher, whose processes are there already. `name` is that of the program
    that started them."""
    global _joined, _one_machine
    _joined, _one_machine = (launcher, size, name), one_machine


def refuse_other_machines() -> None:
    """Raises ConfigError if processes are there on several machines, for what would start all its own on this one."""
    if _joined is not None and not _one_machine:
        raise ConfigError(
            f"a rehearsal runs on one machine, and {_joined[2]} has started {_joined[1]} processes on several",
            where="trimtab plan",
            fix=f"start it without {_joined[2]} and with --workers for the processes of one machine, or plan on paper "
            "with --on",
        )


def leave() -> None:
    """Undoes `join`."""
    global _joined
    _joined = None


def with_workers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run file. engine.workers, if left out, is the number of processes that were started."""
    engine = values.get("engine", {})
    if _joined is None or not isinstance(engine, Mapping):  # what it is instead is refused when settings are checked
        return dict(values)
    return {**values, "engine": {"workers": _joined[1], **engine}}


def find_launcher(engine: ProcessSettings) -> Launcher:
    """The launcher for these settings. Raises what `check_launcher` does, and EngineError for a cluster that is not
    there."""
    check_launcher(engine)
    if _joined is not None:
        return _joined[0]
    if engine.ray:
        from trimtab.engines.ray_cluster import RayLauncher

        return RayLauncher(engine.ray, engine.workers)
    return ChildLauncher()


def check_launcher(engine: ProcessSettings) -> None:
    """Raises ConfigError if the processes that are there are not those that the settings ask for, and EngineError if a
    library is missing."""
    if _joined is not None and engine.ray:
        raise ConfigError(
            f"ray = {engine.ray!r}, but {_joined[2]} has started the processes already",
            where="engine.ray",
            fix=f"start the command without {_joined[2]}, or leave engine.ray out",
        )
    if _joined is not None and engine.workers != _joined[1]:
        raise ConfigError(
            f"workers = {engine.workers}, but {_joined[2]} has started {_joined[1]} processes",
            where="engine.workers",
            fix="leave engine.workers out: it is then their number",
        )
    most = 8 * max(8, os.cpu_count() or 1)
    if _joined is None and not engine.ray and engine.workers > most:
        raise ConfigError(
            f"workers = {engine.workers} on a machine of {os.cpu_count()} cores: each is a process with a whole model",
            where="engine.workers",
            fix=f"give at most {most}, usually one for each core or fewer, or start them on several machines",
        )
    if engine.ray:
        need("ray", extra="ray", setting="engine.ray", where="engine.ray")
