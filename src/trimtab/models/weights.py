"""Checks weight files before they are loaded, and reports a mistake in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.core.errors import EngineError
from trimtab.core.hub import read_json
from trimtab.data.tokenizers import first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


def check_weights(directory: str | Path) -> None:
    """Raises EngineError unless all safetensors files of a model directory exist and are complete. A hub id is not
    checked, because the library that downloads the files checks them."""
    path = Path(directory)
    if not path.is_dir():
        return
    if (path / INDEX).exists():
        found = read_json(path / INDEX).get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
            raise EngineError(
                f"{INDEX} does not say which file holds which weight",
                where=str(path / INDEX),
                fix="copy or download the directory again",
            )
        names = sorted(set(found.values()))
        if (path / WEIGHTS).exists() and WEIGHTS not in names:
            raise EngineError(
                f"there are two sets of weights, {WEIGHTS} and the {len(names)} files of {INDEX}: some libraries read "
                "the one and some the other",
                where=str(path),
                fix="remove the set that is not the model's, usually the older one",
            )
        if missing := [name for name in names if not (path / name).exists()]:
            raise EngineError(
                f"{len(missing)} of {len(names)} files of weights are not there: {', '.join(missing[:3])}",
                where=str(path),
                fix="copy or download the directory again",
            )
    elif (path / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        raise _no_safetensors(path)
    for name in names:
        check_file(path / name)


def check_file(file: Path) -> None:
    """Raises EngineError unless the file is a complete safetensors file."""
    again = "copy or download it again"
    if file.stat().st_size == 0:
        raise EngineError(f"{file.name} is empty", where=str(file), fix=again)
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise EngineError(
                f"{file.name} is no file of weights but a pointer of Git LFS to one",
                where=str(file),
                fix="fetch what it points to: git lfs install && git lfs pull, in the directory of the model",
            )
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise EngineError(
            f"{file.name} is damaged or cut short: {first_line(error)}",
            where=f"{file}, {file.stat().st_size} bytes",
            fix=again,
        ) from error


def damaged_among(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the weights that hold nan or infinity."""
    return [name for name, weight in weights if weight.is_floating_point() and not weight.isfinite().all()]


def refuse_damage(weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raises EngineError if a named weight that was read holds nan or infinity."""
    if damaged := damaged_among(weights):
        raise EngineError(
            f"{len(damaged)} of its weights hold nan or infinity, such as {damaged[0]}: the file is damaged, or its "
            "training broke down",
            where=where,
            fix="copy or download it again, or name an earlier checkpoint",
        )


def refuse_unused(model: nn.Module, names: Iterable[str], where: str) -> None:
    """Raises EngineError if weights of the file that the model has no place for, by their `names`, belong into its
    blocks or layers. The model would then compute something else than the one that was trained: a configuration without
    biases, with fewer blocks or of another architecture leaves them out without an error.

    Weights beside the blocks may be left out: another head, or parts that predict further tokens or see images.
    """
    unused = sorted(name for name in names if _belongs_to(model, name))
    if unused:
        raise EngineError(
            f"the model of its config.json has no place for {len(unused)} of the weights in the file, such as "
            f"{unused[0]}",
            where=where,
            fix="use the config.json that belongs to the weights (compare num_hidden_layers, attention_bias and "
            "model_type); an adapter inside the file has to be merged by the library that wrote it",
        )


_IN_BLOCK = re.compile(r"(.*?)\.(\d+)\.")
_BUFFERS = ("inv_freq", "masked_bias", "k_scale", "v_scale", "q_scale")
"""The last names of what earlier releases kept in files and nobody trains, and of scales for other engines' caches."""


def _belongs_to(model: nn.Module, name: str) -> bool:
    """Whether a weight of this name would be part of a layer of the model, or of a block among its blocks."""
    parts = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    full = name if name.split(".")[0] in dict(model.named_children()) else prefix + name
    owner, _, last = full.rpartition(".")
    if last in _BUFFERS:
        return False
    if owner in parts:  # a mask that was saved with an attention belongs to no layer with weights
        return any(True for _ in parts[owner].parameters(recurse=False))
    found = _IN_BLOCK.match(full)
    blocks = parts.get(found[1]) if found else None
    if found is None or not isinstance(blocks, nn.ModuleList):
        return False
    further = getattr(getattr(model, "config", None), "num_nextn_predict_layers", None) or 0
    return int(found[2]) < len(blocks) or int(found[2]) >= len(blocks) + further


def refuse_to_write(weights: Iterable[tuple[str, Tensor]], where: Path, dtype: torch.dtype) -> None:
    """Raises EngineError if a named weight that is to be written in this dtype holds nan or infinity."""
    if damaged := damaged_among(weights):
        small = dtype == torch.float16
        raise EngineError(
            f"{len(damaged)} weights hold nan or infinity in {str(dtype).removeprefix('torch.')}, such as "
            f"{damaged[0]}, so the model was not written",
            where=str(where),
            fix="write it in bfloat16 or float32, which hold larger numbers"
            if small
            else "the training broke down: lower the learning rate and begin again, or use an earlier checkpoint",
        )


def stored_dtype(directory: str | Path) -> torch.dtype | None:
    """The dtype of most numbers in the weights of a model directory; None for a hub id."""
    path = Path(directory)
    if not path.is_dir():
        return None
    sizes: dict[str, int] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + int(torch.tensor(part.get_shape()).prod())
    return _DTYPES.get(max(sizes, key=lambda d: sizes[d])) if sizes else None


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _no_safetensors(path: Path) -> EngineError:
    pickles = sorted(file.name for kind in _PICKLES for file in path.glob(kind))
    if pickles:
        return EngineError(
            f"the weights are {', '.join(pickles[:3])}, a format that can run code or that is not read; "
            "safetensors are needed",
            where=str(path),
            fix="if you trust the file, convert it once, in Python: AutoModelForCausalLM.from_pretrained(directory)"
            ".save_pretrained(directory)",
        )
    return EngineError(
        f"there is no {WEIGHTS}",
        where=str(path),
        fix="copy or download the weights into the directory, as safetensors",
    )
