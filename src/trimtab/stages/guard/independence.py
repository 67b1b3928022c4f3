"""Whether a measure is independent of what a run trains on: of its rewards, and of its data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core import config, registry
from trimtab.rewards.model import ModelReward
from trimtab.runs.models import local_digest, model_digest


def refuse_trained_measure(measure: Sequence[Any], trained: Mapping[str, Any]) -> None:
    """Raises ValueError if a part of the measure is one of the rewards that are trained on, given by key paths: the
    same reward model, wherever it lies, or a reward of equal settings but for the weight."""
    keys = {_identity(reward): key for key, reward in trained.items()}
    for number, reward in enumerate(measure):
        if (key := keys.get(_identity(reward))) is not None:
            name = registry.name_of("reward", type(reward))
            raise ValueError(
                f"measure.{number}, {getattr(reward, 'path', name)!r}, is {key} that training moves, which shows no "
                "fall of its own; measure by the gold of a world, a verifier, or a reward model of other data"
            )


def refuse_empty_measure(measure: Sequence[Any]) -> None:
    """Raises ValueError if the measure has no part, or one that does not count."""
    if not measure:
        raise ValueError("measure is empty; name what decides, such as measure = [{ name = 'gold', world = '…' }]")
    for number, reward in enumerate(measure):
        if getattr(reward, "weight", 1.0) == 0:
            raise ValueError(f"measure.{number} has weight = 0 and decides nothing; leave it out, or give it a weight")


def same_source(one: str, other: str) -> bool:
    """Whether two names of data are the same, also if they name a file by two paths."""
    return os.path.realpath(one) == os.path.realpath(other)


def measure_digest(measure: Sequence[Mapping[str, Any]]) -> str:
    """The SHA-256 of a measure: of its settings, as `config.dump` gives them, and of the models and files of Python
    code that they name, by content."""
    digest = hashlib.sha256()
    for table in measure:
        for key, value in sorted(table.items()):
            if key == "path" and Path(str(value)).is_dir():
                content = model_digest(str(value))
            elif key == "function" and Path(file := str(value).rpartition(":")[0]).is_file():
                content = hashlib.sha256(Path(file).read_bytes()).hexdigest() + str(value).rpartition(":")[2]
            else:
                content = json.dumps(value, sort_keys=True)
            digest.update(json.dumps([key, content]).encode())
    return digest.hexdigest()


def _identity(reward: Any) -> str:
    """The same for two rewards that judge alike."""
    if isinstance(reward, ModelReward):
        return local_digest(reward.path) or os.path.realpath(reward.path)
    table = {key: value for key, value in config.dump(reward).items() if key != "weight"}
    return measure_digest([{"name": registry.name_of("reward", type(reward))} | table])
