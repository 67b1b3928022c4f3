"""Plain data between the processes of a run: JSON with the tensors beside it.

Unlike a pickle, a message can hold no code: numbers, texts, lists, tables, tensors, and dataclasses of such values. The
class of a dataclass is named; it is one of this package, or one of the user's own that a run file could name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from trimtab.batches.trees import Branch, TokenTrees, Tree
from trimtab.core.user_code import place_of, user_module

_OURS = "trimtab."


def encode(value: Any) -> bytes:
    """The value as bytes, for example `encode({"do": "update", "work": [(batch, [PPO()])]})`."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    # A copy, since tensors that share memory cannot be written together.
    body = save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}) if tensors else b""
    return len(text).to_bytes(8, "little") + text + body


def decode(message: bytes) -> Any:
    """The value that `encode` was given. Tuples stay tuples, and named classes are made again, checks included."""
    length = int.from_bytes(message[:8], "little")
    body = message[8 + length :]
    return _value(json.loads(message[8 : 8 + length]), load(body) if body else {})


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold. Everything but plain values becomes a table of one entry, whose key says what it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, TokenTrees):
        return {"trees": _plain(_columns(value), tensors)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"class": _name(type(value)), "fields": _plain(fields, tensors)}
    if isinstance(value, Mapping):
        return {"table": [[_plain(k, tensors), _plain(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_plain(v, tensors) for v in value]
    raise TypeError(f"a {type(value).__name__} cannot be sent to another process")


def _value(found: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(found, list):
        return [_value(v, tensors) for v in found]
    if not isinstance(found, dict):
        return found
    if "tensor" in found:
        return tensors[found["tensor"]]
    if "trees" in found:
        return _trees(_value(found["trees"], tensors))
    if "class" in found:
        return _class(found["class"])(**_value(found["fields"], tensors))
    if "table" in found:
        return {_value(k, tensors): _value(v, tensors) for k, v in found["table"]}
    return tuple(_value(v, tensors) for v in found["tuple"])


def _name(cls: type) -> str:
    if cls.__module__.startswith(_OURS):
        return f"{cls.__module__}:{cls.__qualname__}"
    return f"{place_of(cls.__module__)}:{cls.__qualname__}"


def _class(name: str) -> Any:
    place, _, attribute = name.rpartition(":")
    ours = place.startswith(_OURS)
    module = importlib.import_module(place) if ours else user_module(place, where="a message between processes")
    cls = getattr(module, attribute)
    assert isinstance(cls, type), name
    assert dataclasses.is_dataclass(cls), name
    return cls


def _columns(trees: TokenTrees) -> dict[str, Tensor]:
    """The trees as few tensors: lengths of prompts, numbers and lengths of branches, ids and masks."""
    branches = [b for tree in trees.trees for b in tree.branches]
    ids = [i for tree in trees.trees for part in (tree.prompt, *(b.ids for b in tree.branches)) for i in part]
    return {
        "prompts": torch.tensor([len(tree.prompt) for tree in trees.trees], dtype=torch.int64),
        "branches": torch.tensor([len(tree.branches) for tree in trees.trees], dtype=torch.int64),
        "lengths": torch.tensor([len(b.ids) for b in branches], dtype=torch.int64),
        "ids": torch.tensor(ids, dtype=torch.int64),
        "mask": torch.tensor([m for b in branches for m in b.mask], dtype=torch.bool),
    }


def _trees(columns: Mapping[str, Tensor]) -> TokenTrees:
    lengths, ids, mask = (iter(columns[name].tolist()) for name in ("lengths", "ids", "mask"))

    def take(values: Any, n: int) -> tuple[Any, ...]:
        return tuple(next(values) for _ in range(n))

    trees = []
    for num_prompt, num_branches in zip(columns["prompts"].tolist(), columns["branches"].tolist(), strict=True):
        prompt = take(ids, num_prompt)
        sizes = take(lengths, num_branches)
        trees.append(Tree(prompt, tuple(Branch(take(ids, n), take(mask, n)) for n in sizes)))
    return TokenTrees.build(trees)
