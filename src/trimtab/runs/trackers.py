"""Trackers: where a run's metrics are shown besides its own directory."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from trimtab.core.errors import EngineError, install
from trimtab.core.registry import register


class Writer(Protocol):
    """An open connection to a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Passes the values of one step on."""

    def close(self) -> None:
        """Sends what is left."""


class Tracker(Protocol):
    """The settings of a tracker, as a run file names them."""

    def start(self, directory: Path, settings: Mapping[str, Any]) -> Writer:
        """A writer for the run in `directory`, which may be a resumed one. Raises EngineError without its library."""


@register("tracker", "tensorboard")
@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Event files in tensorboard/ of the run directory; `tensorboard --logdir runs` shows them."""

    def start(self, directory: Path, settings: Mapping[str, Any]) -> Writer:
        """A writer. Steps that are repeated after a resume replace the earlier ones."""
        _library("tensorboard")
        return _TensorBoardWriter(directory / "tensorboard")


class _TensorBoardWriter:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:  # the first step says from which step on an earlier attempt is to be hidden
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            self._writer = tensorboard.SummaryWriter(str(self._directory), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@register("tracker", "wandb")
@dataclass(frozen=True, kw_only=True)
class WeightsAndBiases:
    """A Weights & Biases run, named after the run directory and stored in its wandb/."""

    project: str = "trimtab"
    """The project that the run is shown in."""
    mode: Literal["online", "offline"] = "offline"
    """Offline needs no account and no network; `wandb sync` sends it later."""

    def start(self, directory: Path, settings: Mapping[str, Any]) -> Writer:
        """A writer that goes on with the same W&B run after a resume."""
        wandb = _library("wandb")
        identity = directory / "wandb" / "id"
        if not identity.exists():
            identity.parent.mkdir(exist_ok=True)
            identity.write_text(secrets.token_hex(8), encoding="utf-8")
        # W&B ignores steps it has seen; those repeated after a resume are identical, so nothing is lost.
        run = wandb.init(
            project=self.project,
            mode=self.mode,
            dir=str(directory),
            name=directory.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow" if self.mode == "online" else None,
            config=dict(settings),
        )
        return _WandbWriter(run)


class _WandbWriter:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _library(name: Literal["tensorboard", "wandb"]) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(
            f"the tracker {name!r} needs the library {name}, which is not installed",
            where="trackers",
            fix=f"{install(name)}; or remove the tracker from the run file",
        ) from error
