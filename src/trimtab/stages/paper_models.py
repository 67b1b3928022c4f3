"""The models of a plan on paper: the shapes of those on disk, and of those that earlier stages are to make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.core.errors import ConfigError
from trimtab.core.hub import ADAPTER_FILE, base_here, members_in, read_json, same_model
from trimtab.models.adapters import LoRA
from trimtab.models.shape import ModelShape, read_shape, shape_of


@dataclass(frozen=True, kw_only=True)
class ModelOnPaper:
    """What is known of a model directory, for example `ModelOnPaper(shape=shape, base="llama", adapter=4_000_000)`."""

    shape: ModelShape
    """That of the whole model; of an adapter, that of its base."""
    base: str | None = None
    """The model that an adapter belongs to; None for a model of its own."""
    adapter: int = 0
    """Weights of the adapter."""
    members: int = 1
    """Reward models of an ensemble, which are alike."""

    def is_adapter_of(self, base: str | None) -> bool:
        """Whether it is an adapter of this model; False if `base` is None."""
        return base is not None and self.base is not None and same_model(self.base, base)


@dataclass(frozen=True)
class ModelsOnPaper:
    """The models by their directories. Nothing is loaded and nothing is downloaded."""

    place: Path
    """The directory of the pipeline."""
    made: dict[str, ModelOnPaper] = field(default_factory=dict)
    """Those that the stages before are to make."""

    def add(self, name: str, settings: Any) -> None:
        """Notes the model that a stage makes from another or from nothing, if it makes one."""
        directory = str(self.place / name / "model")
        if (architecture := getattr(settings, "architecture", None)) is not None:
            shape = {
                "model_type": architecture.family,
                "hidden_size": architecture.hidden_size,
                "num_hidden_layers": architecture.num_layers,
                "num_attention_heads": architecture.num_heads,
                "intermediate_size": architecture.mlp_size,
                "vocab_size": settings.vocab_size,
                "tie_word_embeddings": True,
            }
            self.made[directory] = ModelOnPaper(shape=shape_of(shape, where=f"stages.{name}.architecture"))
        elif hasattr(settings, "adapter"):
            start, members = self.find(settings.model), getattr(settings, "members", 1)
            made = ModelOnPaper(shape=start.shape, members=members)
            if settings.adapter is not None:
                size = adapter_weights(start.shape, settings.adapter)
                made = replace(made, base=start.base or settings.model, adapter=size)
            self.made[directory] = made

    def find(self, path: str, *, scalar: bool = False) -> ModelOnPaper:
        """The model of a directory or of a config.json; with `scalar`, with a score head. Raises ConfigError if there
        is none on this machine, and EngineError for a damaged file."""
        if (model := self.made.get(path)) is not None:
            return replace(model, shape=replace(model.shape, scalar=scalar))
        place, members = Path(path).expanduser(), len(members_in(path))
        file = place / ADAPTER_FILE
        if not file.is_file():
            return ModelOnPaper(shape=read_shape(path, scalar=scalar), members=members)
        values = read_json(file)
        base = values.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ConfigError(
                f"base_model_name_or_path is {base!r}", where=str(file), fix="write there which model it was trained on"
            )
        base = base_here(place, base) or base
        shape = read_shape(base, scalar=scalar)
        size = _weights_in(values, shape, where=str(file))
        return ModelOnPaper(shape=shape, base=base, adapter=size, members=members)


def adapter_weights(shape: ModelShape, lora: LoRA) -> int:
    """The weights that such an adapter has on a model of this shape."""
    return shape.adapter_weights(lora.rank, lora.modules, blocks=lora.last_blocks)


def _weights_in(values: Mapping[str, Any], shape: ModelShape, *, where: str) -> int:
    """The weights of an adapter, from the values of its adapter_config.json. Its layers are named each for itself, with
    the number of the block, or by their last names for all blocks; a pattern stands for all layers."""
    rank, names = values.get("r"), values.get("target_modules")
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"r is {rank!r}; it is the rank, at least 1", where=where, fix="copy the directory again")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    blocks = {found[1] for name in names if (found := re.search(r"\.(\d+)\.", name))}
    return shape.adapter_weights(rank, [name.rpartition(".")[2] for name in names], blocks=len(blocks) or None)
