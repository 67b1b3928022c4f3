"""Checks what a run reads before anything is trained: files and their columns, models, functions, libraries.

Without these checks, a pipeline would stop at a missing file of its last stage only after hours. Only beginnings are
read here; the stage itself reads the whole, and has the last word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import worlds
from trimtab.core import config, registry
from trimtab.core.errors import EXTRAS, ConfigError, DataError, EngineError, TrimtabError, need
from trimtab.core.types import Demonstration, Prompt
from trimtab.data.layouts import load
from trimtab.data.sources import read_rows, records_source
from trimtab.rewards.gold import GoldReward
from trimtab.rewards.model import RewardModel
from trimtab.rewards.python_callable import PythonCallable, load_function
from trimtab.stages.stage import ModelKind, Stage

NUM_ROWS = 1000
"""How many rows of a file are checked."""


@dataclass(frozen=True)
class DataUse:
    """Data that a stage reads, for example `DataUse("data", "pairs.jsonl", (PreferencePair,))`."""

    key: str
    source: str
    kinds: tuple[type, ...]
    """The kinds of record, any one of which will do; empty if any text will do."""


@dataclass(frozen=True)
class ModelUse:
    """A model that a stage loads, for example `ModelUse("baseline", "runs/sft/model", "policy")`."""

    key: str
    path: str
    kind: ModelKind


def check(stages: Mapping[str, tuple[str, Any]], out: Path, *, where: str) -> None:
    """Raises one error with all that is missing or does not fit in the stages of a pipeline in `out`, by their names.
    Finished stages are not checked."""
    earlier: dict[str, str] = {}
    found: list[tuple[str, TrimtabError]] = []
    for name, (stage, settings) in stages.items():
        if not (out / name / "summary.json").exists():
            made = {str(out / before): kind for before, kind in earlier.items()}
            found += [(f"stages.{name}.{key}", error) for key, error in _problems(stage, settings, made)]
        earlier[name] = stage
    _raise(found, where)


def check_stage(stage: str, settings: Any, *, where: str) -> None:
    """Raises one error with all that is missing or does not fit in a single stage."""
    _raise(list(_problems(stage, settings, {})), where)


def describe(stage: str) -> Stage:
    """The descriptor of a stage."""
    found: Stage = registry.descriptor("stage", stage)
    return found


def _raise(found: list[tuple[str, TrimtabError]], where: str) -> None:
    if not found:
        return
    if len(found) > 1:
        lines = [f"{key}: {error.problem} ({error.where}); {error.fix}" for key, error in found]
        raise config.refused(lines, where=where)
    key, error = found[0]
    raise type(error)(error.problem, where=f"{error.where} ({key})", fix=error.fix)


def _problems(stage: str, settings: Any, made: Mapping[str, str]) -> Iterator[tuple[str, TrimtabError]]:
    """Every key whose value cannot be used, and why. `made` maps earlier stages' directories to their stages."""
    looks: list[DataUse | ModelUse] = [*_sources(stage, settings), *models_of(stage, settings)]
    for look in looks:
        try:
            if isinstance(look, DataUse):
                _check_source(look, settings, made)
            else:
                _check_model(look, made)
        except TrimtabError as error:
            yield look.key, error
    for key, name in _worlds(settings):
        try:
            worlds.load(name)
        except TrimtabError as error:
            yield key, error
    for number, reward in enumerate(getattr(settings, "rewards", ())):
        if isinstance(reward, PythonCallable):
            try:
                load_function(reward.function)
            except TrimtabError as error:
                yield f"rewards.{number}.function", error
    for tracker in getattr(settings, "trackers", ()):
        name = registry.name_of("tracker", type(tracker))
        try:
            if name in EXTRAS:
                need(name, extra=name, setting=f"the tracker {name!r}", where="trackers")
        except TrimtabError as error:
            yield "trackers", error


# --- data ---


def _sources(stage: str, settings: Any) -> Iterator[DataUse]:
    """The data that the stage reads, and the kinds of record it may hold."""
    data = describe(stage).data(settings)
    kinds: dict[str, tuple[type, ...]] = {
        "data": data,
        "held_out_data": data,
        "prompts": (Prompt,),
        "demonstrations": (Demonstration,),
    }
    for key, wanted in kinds.items():
        if (source := getattr(settings, key, None)) is not None:
            yield DataUse(key, source, wanted)
    if (mix := getattr(settings, "pretraining_mix", None)) is not None:
        yield DataUse("pretraining_mix.data", mix.data, (Demonstration,))


def _check_source(look: DataUse, settings: Any, made: Mapping[str, str]) -> None:
    """Raises an error if the data cannot be read as any of the kinds of record that it may hold."""
    if (step := _made_by(look.source, made)) is not None:
        stage, file = step
        if file not in (writes := describe(stage).writes):
            raise DataError(
                f"the stage {stage} writes no {file!r}",
                where=look.source,
                fix=f"it writes {', '.join(writes)}",
            )
        return
    own = records_source(look.source)
    if not look.kinds and own is None:
        read_rows(look.source, limit=NUM_ROWS)
        return
    drops = getattr(settings, "on_bad_row", "stop") == "drop"
    limit = min(getattr(settings, "limit", None) or NUM_ROWS, NUM_ROWS)
    errors = []
    for kind in look.kinds or (Prompt,):
        try:
            if own is not None:
                own.check(kind, look.source)
            else:
                load(kind, look.source, on_bad_row="drop" if drops else "stop", limit=limit)
            return
        except DataError as error:
            errors.append(error)
    # If bad rows may be dropped, the rows at the beginning say nothing about the others.
    if not (drops and "rows cannot be used" in errors[-1].problem):
        raise errors[-1]


def _worlds(settings: Any) -> Iterator[tuple[str, str]]:
    """The worlds that the settings name."""
    if (name := getattr(settings, "world", None)) is not None:
        yield "world", name
    for number, reward in enumerate(getattr(settings, "rewards", ())):
        if isinstance(reward, GoldReward):
            yield f"rewards.{number}.world", reward.world


# --- models ---


def models_of(stage: str, settings: Any) -> Iterator[ModelUse]:
    """The models that the stage loads, and the kind that each has to be."""
    kinds: dict[str, ModelKind] = {
        "model": describe(stage).model,
        "reference": "policy",
        "baseline": "policy",
        "reward_model": "reward model",
    }
    for key, kind in kinds.items():
        if (path := getattr(settings, key, None)) is not None:
            yield ModelUse(key, path, kind)
    for number, reward in enumerate(getattr(settings, "rewards", ())):
        if isinstance(reward, RewardModel):
            yield ModelUse(f"rewards.{number}.path", reward.path, "reward model")
    critic = getattr(settings, "critic", None)
    if critic is not None and critic.path is not None and settings.advantage.needs_critic:
        yield ModelUse("critic.path", critic.path, "any")


def _check_model(look: ModelUse, made: Mapping[str, str]) -> None:
    """Raises an error if a model directory is missing, is not a model directory, or holds a model of another kind."""
    if (step := _made_by(look.path, made)) is not None:
        stage, file = step
        makes = describe(stage).makes
        if file != "model" or makes is None:
            able = [name for name in registry.modules("stage") if describe(name).makes is not None]
            raise ConfigError(
                f"the stage {stage} writes no model {file!r}" if makes else f"the stage {stage} writes no model",
                where=look.path,
                fix=f"name a stage that does, as @NAME: {', '.join(able)}",
            )
        _require_kind(look, makes)
        return
    path = Path(look.path)
    if not path.exists():
        if _is_a_path(look.path):
            raise EngineError(f"there is no directory {look.path!r}", where=look.path, fix=_near(path))
        return  # a hub id
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            return
        inner = path / "model"
        meant = f"did you mean {str(inner)!r}? " if (inner / "config.json").exists() else ""
        raise EngineError(
            f"{look.path!r} is no model: it has no config.json",
            where=look.path,
            fix=f"{meant}a model directory holds config.json, model.safetensors and a tokenizer",
        )
    try:
        described = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architectures = described.get("architectures") or [""]
    except (ValueError, AttributeError) as error:
        raise EngineError(
            f"config.json is damaged: {error}", where=str(path / "config.json"), fix="copy or download the model again"
        ) from error
    if architectures[0].endswith("ForSequenceClassification"):
        _require_kind(look, "reward model")
    elif architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
        _require_kind(look, "policy")


def _require_kind(look: ModelUse, kind: ModelKind) -> None:
    if look.kind in ("any", kind):
        return
    made_by = " or ".join(name for name in registry.modules("stage") if describe(name).makes == look.kind)
    raise EngineError(
        f"{look.path!r} is a {kind}, and {look.key} is to be a {look.kind}",
        where=look.path,
        fix=f"name a {look.kind}, such as model/ of a run of {made_by}",
    )


def _is_a_path(name: str) -> bool:
    """Whether a name that does not exist can only be a path: a hub id is "org/name"."""
    parts = name.split("/")
    return len(parts) != 2 or name.startswith((".", "/", "~")) or Path(parts[0]).is_dir()


def _near(path: Path) -> str:
    """A fix that names the nearest existing directory and what it holds."""
    below = next(parent for parent in (path.parent, *path.parents) if parent.exists())
    names = sorted(p.name for p in below.iterdir() if p.is_dir() and not p.name.startswith("."))[:8]
    there = f"; {str(below)!r} holds {', '.join(names)}" if names else f"; {str(below)!r} holds no directory"
    return f"check the path, which is read from {os.getcwd()}{there}"


def _made_by(path: str, made: Mapping[str, str]) -> tuple[str, str] | None:
    """The stage that is to write this path, and the path below its directory; None if no earlier stage writes it."""
    for directory, stage in made.items():
        if path.startswith(directory + os.sep):
            return stage, path.removeprefix(directory + os.sep)
    return None
