"""Averages the weights of models that began as one: whole models in float32, adapters by their products.

The change that an adapter makes is the product B A. The mean of B times the mean of A is another matrix than the mean
of the products, so the products are averaged: all A one below the other and all weighted B side by side have exactly
that product, at the sum of the ranks. A lower rank is found by a singular value decomposition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.hub import ADAPTER_FILE, ADAPTER_WEIGHTS, base_of, find_model, lasting_name, read_json, same_model
from trimtab.data.templates import template_of
from trimtab.data.tokenizers import load_tokenizer
from trimtab.models.adapters import adapter_config, adapter_weights, further_parts, is_head, write_beside
from trimtab.models.vocabulary import vocabulary_difference
from trimtab.models.weights import refuse_to_write

HEAD_START = "reward_head_start"
"""The entry of a reward model's configuration that tells from which score head its training began."""
_OF_FILES = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "pad_token_id", "eos_token_id"}
    | {"bos_token_id", "use_cache", "_attn_implementation"}
)
"""Entries of a configuration that do not change what the weights compute."""


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a model by name, tied ones once. They are the model's own, not copies."""
    return {name: p.data for name, p in model.named_parameters()}


def copies_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the weights of a model."""
    return {name: weight.clone() for name, weight in weights_of(model).items()}


@torch.no_grad()
def weighted_sum(members: Sequence[Callable[[], PreTrainedModel]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The sum of the members' weights, each times its share. Members are loaded one after the other, in float32."""
    total: dict[str, Tensor] = {}
    for load, share in zip(members, shares, strict=True):
        for name, weight in weights_of(load()).items():
            if name in total:
                total[name].add_(weight, alpha=share)
            else:
                total[name] = share * weight
    return total


@torch.no_grad()
def set_between(model: PreTrainedModel, start: Mapping[str, Tensor], end: Mapping[str, Tensor], part: float) -> None:
    """Sets the weights of a model to (1 - part) start + part end."""
    for name, weight in weights_of(model).items():
        torch.lerp(start[name], end[name], part, out=weight)


# --- which models can be averaged ---


def refuse_unlike(paths: Sequence[str]) -> None:
    """Raises EngineError unless all these models are adapters of one base or none is an adapter, and have the same
    vocabulary, chat template and, as far as they say, score head to begin with."""
    bases = [base_of(path) for path in paths]
    first, first_base = paths[0], bases[0]
    tokenizer = load_tokenizer(first)
    for path, base in zip(paths[1:], bases[1:], strict=True):
        if (base is None) != (first_base is None):
            raise _unlike(first, path, "one is an adapter and the other a whole model", f"merge it first: {_EXPORT}")
        if base is not None and first_base is not None and not same_model(base, first_base):
            raise _unlike(first, path, f"they are adapters of {first_base} and {base}", f"merge them first: {_EXPORT}")
        other = load_tokenizer(path)
        if difference := vocabulary_difference(tokenizer, other):
            raise _unlike(first, path, f"they have other vocabularies: {difference}", _ONE_START)
        if template_of(tokenizer) != template_of(other):
            raise _unlike(first, path, "they have other chat templates", _ONE_START)


def refuse_other_architecture(path: str, model: PreTrainedModel, other_path: str, other: PreTrainedModel) -> None:
    """Raises EngineError unless two models have weights of the same names and shapes, the same configuration and, if
    they say from which score head they began, the same one."""
    if type(model) is not type(other):
        raise _unlike(path, other_path, f"they are a {type(model).__name__} and a {type(other).__name__}", _ONE_START)
    shapes, other_shapes = ({n: tuple(w.shape) for n, w in weights_of(m).items()} for m in (model, other))
    for name in sorted(shapes.keys() | other_shapes.keys()):
        if (a := shapes.get(name)) != (b := other_shapes.get(name)):
            raise _unlike(path, other_path, f"their weight {name} has the shapes {a} and {b}", _ONE_START)
    ours, theirs = _facts(model), _facts(other)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise _unlike(
                path, other_path, f"their configurations have {key} = {ours.get(key)} and {theirs.get(key)}", _ONE_START
            )
    heads = [getattr(m.config, HEAD_START, None) for m in (model, other)]
    if None not in heads and heads[0] != heads[1]:
        raise _unlike(
            path,
            other_path,
            f"their training began with different score heads ({heads[0]} and {heads[1]})",
            "train them with one head_seed and different seeds",
        )


_EXPORT = "trimtab export --model MODEL --out DIRECTORY"
_ONE_START = "average models that were trained from one model, such as runs of one file with different seeds"


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    found = model.config.to_dict()
    return {key: value for key, value in found.items() if key not in _OF_FILES and not key.startswith("reward_")}


def _unlike(path: str, other: str, why: str, fix: str) -> EngineError:
    return EngineError(f"these models cannot be averaged: {why}", where=f"{path} and {other}", fix=fix)


# --- adapters ---


@dataclass(frozen=True)
class LowRank:
    """Low-rank changes of linear layers, as the files of peft name them."""

    matrices: dict[str, Tensor]
    """For each layer A [rank, in] and B [out, rank], under names that end with lora_A.weight and lora_B.weight."""
    rank: int
    kept_fraction: float
    """The share of the sum of squares of all changes that the rank has room for."""


def average_products(paths: Sequence[str], shares: Sequence[float], *, rank: int | None = None) -> LowRank:
    """The average of the changes that these adapters make, with A and B such that B A is the change itself.

    Without `rank` it is exact and has the sum of their ranks. Raises EngineError for adapters that are more than plain
    low-rank changes of the same layers, and ConfigError for a rank above that sum.
    """
    members = [_products(path) for path in paths]
    total = sum(member.rank for member in members)
    if rank is not None and rank > total:
        raise ConfigError(
            f"rank = {rank}, and the average of these adapters has rank {total}", where="--rank", fix="leave it out"
        )
    matrices: dict[str, Tensor] = {}
    squares = lost = 0.0
    for name in (name for name in members[0].matrices if name.endswith(".lora_A.weight")):
        of_b = name.replace(".lora_A.", ".lora_B.")
        a = torch.cat([member.matrices[name] for member in members])
        b = torch.cat([share * member.matrices[of_b] for share, member in zip(shares, members, strict=True)], 1)
        if rank is not None:
            a, b, of_all, of_rest = _of_rank(a, b, rank)
            squares, lost = squares + of_all, lost + of_rest
        matrices[name], matrices[of_b] = a, b
    kept = 1.0 if squares == 0 else 1 - lost / squares
    return LowRank(matrices, total if rank is None else rank, kept)


def _products(path: str) -> LowRank:
    """An adapter with the scale of its changes in B."""
    config = read_json(Path(find_model(path)) / ADAPTER_FILE)
    weights = {key: value.float() for key, value in adapter_weights(path).items() if not is_head(key)}
    odd = [key for key in weights if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    further = [key for key in ("use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    # Others change the base: an adapter that began as its largest singular vectors belongs to what is left of it.
    further += further_parts(adapter_config(path))
    if config.get("peft_type") != "LORA" or odd or further:
        raise EngineError(
            "the adapter is more than one low-rank change of each layer: "
            + ", ".join([str(config.get("peft_type")), *further, *odd[:3]]),
            where=path,
            fix=f"make whole models of all members first: {_EXPORT}",
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    matrices = {k: scale * v if k.endswith(".lora_B.weight") else v for k, v in weights.items()}
    return LowRank(matrices, rank, 1.0)


def refuse_other_layers(paths: Sequence[str]) -> None:
    """Raises EngineError unless all these adapters change the same layers."""
    first = {key for key in adapter_weights(paths[0]) if not is_head(key)}
    for path in paths[1:]:
        if odd := sorted(first ^ {key for key in adapter_weights(path) if not is_head(key)}):
            raise _unlike(paths[0], path, f"only one of them changes {odd[0]}", f"merge them first: {_EXPORT}")


def _of_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best A and B of this rank for the product B A, and the sums of squares of all and of what is left out. The
    product itself, which may be large, is never made."""
    left, upper = torch.linalg.qr(b.double())
    right, other_upper = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(upper @ other_upper.T, full_matrices=False)
    root = s[:rank].sqrt()
    new_b = left @ u[:, :rank] * root
    new_a = root[:, None] * (v[:rank] @ right.T)
    missing = rank - len(root)  # above 0 for a layer smaller than the rank
    new_a, new_b = pad(new_a, (0, 0, 0, missing)), pad(new_b, (0, missing))
    return new_a.float(), new_b.float(), float(s.square().sum()), float(s[rank:].square().sum())


def save_products(
    changes: LowRank, head: Mapping[str, Tensor], paths: Sequence[str], directory: Path, *, base: str
) -> None:
    """Writes averaged adapters as an adapter of `base`, with the averaged score head if the members bring one. Further
    settings are those of the first member."""
    config = read_json(Path(find_model(paths[0])) / ADAPTER_FILE)
    config |= {
        "r": changes.rank,
        "lora_alpha": changes.rank,  # the scale is in B
        "use_rslora": False,
        "base_model_name_or_path": lasting_name(base),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: value.contiguous() for name, value in {**changes.matrices, **head}.items()}
    refuse_to_write(tensors.items(), directory, torch.float32)
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    write_beside(directory, base)


def average_heads(paths: Sequence[str], shares: Sequence[float]) -> dict[str, Tensor]:
    """The average of the score heads that adapters bring, by the names in their files; empty if they bring none."""
    heads = [{k: v.float() for k, v in adapter_weights(path).items() if is_head(k)} for path in paths]
    return {
        key: torch.stack([share * head[key] for share, head in zip(shares, heads, strict=True)]).sum(0)
        for key in heads[0]
    }
