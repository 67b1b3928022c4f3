"""Low-rank adapters: several roles as small changes to one frozen base (Hu et al., arXiv:2106.09685).

Adapters and the format of their directories are those of `peft`. A role names its adapter, which is active while the
role runs; a role without an adapter uses the base alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core import seeds
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.errors import ConfigError, EngineError, nearest
from trimtab.core.hub import ADAPTER_FILE as CONFIG_FILE
from trimtab.core.hub import ADAPTER_WEIGHTS as WEIGHTS_FILE
from trimtab.core.hub import BESIDE_FILE, base_of, find_model, lasting_name, read_json
from trimtab.data.tokenizers import first_line
from trimtab.models.quantized import Bits, quantize
from trimtab.models.weights import check_file, refuse_damage, refuse_to_write

_PREFIX = "base_model.model."
"""The prefix that peft puts before the names of a model's own weights in a file."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank change B A to the weight of each chosen linear layer. B starts at zero, so at first nothing
    changes."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The change is scaled by alpha / rank."""
    modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as "q_proj"; empty means all but the output head."""
    last_blocks: int | None = None
    """Only the last so many blocks get an adapter, so that several adapters share the blocks below; None means all."""
    base_bits: Bits = 32
    """Bits for each weight of the frozen linear layers: 32, or rounded to 8 or 4 (needs `trimtab[quantized]`)."""

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "rank", "alpha")


def is_adapted(module: nn.Module) -> bool:
    """Whether the layer has adapters. peft is loaded only when the first adapter is made, since it takes 130 MB and
    seconds that most runs do not need; before that no layer has any."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


def adapter_weights(path: str | Path) -> dict[str, Tensor]:
    """All weights in the file of an adapter directory, by the names of peft. Embeddings that peft repeats there under
    the names of its wrappers are left out. Raises EngineError if the file is damaged."""
    file = Path(find_model(path)) / WEIGHTS_FILE
    check_file(file)
    weights = load_file(file)
    refuse_damage(weights.items(), str(path))
    repeated = (".original_module.", ".modules_to_save.")
    return {k: v for k, v in weights.items() if not any(r in k and k.replace(r, ".") in weights for r in repeated)}


def is_reward_adapter(path: str | Path) -> bool:
    """Whether an adapter directory was made for a sequence classifier, as the adapter of a reward model is."""
    return read_json(Path(find_model(path)) / CONFIG_FILE).get("task_type") == "SEQ_CLS"


def add_adapter(model: PreTrainedModel, name: str, settings: LoRA, *, seed: int) -> None:
    """Adds a new adapter, which changes no output yet, and freezes the base."""
    from peft import LoraConfig

    model.requires_grad_(False)
    names = _known_layers(model, settings.modules) if settings.modules else linear_layers(model)
    if settings.last_blocks is not None:
        names = _in_last_blocks(model, names, settings.last_blocks)
    _refuse_rank(model, settings.rank, names)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=names,
    )
    _inject(config, model, name, seed)


def load_adapter(model: PreTrainedModel, name: str, path: str | Path, *, with_head: bool = False) -> dict[str, Tensor]:
    """Loads the adapter of a directory, under the given name, onto its base `model`, which is frozen and may be shared.
    The adapter's dropout is off. Returns the weights of the score head stored beside it if `with_head`, else {}.

    Raises EngineError, with the names, if the adapter contains more than low-rank changes of linear layers: other
    changes would affect every role that shares the base.
    """
    from peft import set_peft_model_state_dict

    if not with_head and is_reward_adapter(path):
        raise reward_model_as_policy(path, "the adapter of a reward model")
    config, weights = read_adapter(model, path)
    head = {key.removeprefix(_PREFIX): value for key, value in weights.items() if is_head(key)} if with_head else {}
    own = {key.removeprefix(_PREFIX): value for key, value in weights.items() if _changes_a_layer(key)}
    beside = {key.removeprefix(_PREFIX) for key in weights} - set(own) - set(head) - _of_base(model, weights)
    if parts := [*further_parts(config), *([f"weights beside the LoRA ({some(beside)})"] if beside else [])]:
        raise EngineError(
            f"the adapter brings more than low-rank changes of linear layers: {', '.join(parts)}",
            where=str(path),
            fix=f"make a whole model of it with `trimtab export --model {path} --out DIRECTORY`, and name that",
        )
    model.requires_grad_(False)
    config.modules_to_save, config.inference_mode, config.lora_dropout = None, False, 0.0
    try:
        _inject(config, model, name, seed=0)
        loaded: Any = set_peft_model_state_dict(model, own, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise does_not_fit(
            path, f"peft cannot put it onto its base: {type(error).__name__}, {first_line(error)}"
        ) from error
    refuse_misfit(path, loaded.unexpected_keys, lacking=[key for key in loaded.missing_keys if f".{name}." in key])
    return head


def start_adapter(
    model: PreTrainedModel, name: str, path: str, settings: LoRA, *, seed: int, with_head: bool = False
) -> dict[str, Tensor]:
    """Puts onto `model` an adapter to train: that of the directory `path`, or a new one if `path` is no adapter. The
    base is rounded first if the settings ask for that. Returns the same as `load_adapter`."""
    quantize(model, settings.base_bits)
    if base_of(path) is None:
        add_adapter(model, name, settings, seed=seeds.derive(seed, "adapter", name))
        return {}
    refuse_other_shape(path, settings)
    return load_adapter(model, name, path, with_head=with_head)


def refuse_other_shape(path: str | Path, settings: LoRA) -> None:
    """Raises ConfigError if the settings ask for another shape than that of the adapter directory, which is trained on
    with its own. Values that are the defaults ask for nothing."""
    own = read_json(Path(find_model(path)) / CONFIG_FILE)
    modules = own.get("target_modules")
    usual = LoRA()
    asked: dict[str, tuple[Any, Any, Any]] = {
        "last_blocks": (settings.last_blocks, None, None),
        "rank": (settings.rank, int(own.get("r") or 1), usual.rank),
        "alpha": (settings.alpha, float(own.get("lora_alpha") or 1.0), usual.alpha),
        "modules": (sorted(settings.modules), sorted(modules) if isinstance(modules, list) else [], []),
    }
    for name, (wanted, there, default) in asked.items():
        if wanted not in (there, default):
            raise ConfigError(
                f"adapter.{name} = {wanted}, and the adapter that is trained on has {there or 'its own'}",
                where=str(path),
                fix=f"leave adapter.{name} out, or make a whole model of it first: trimtab export --model {path}",
            )


def save_adapter(
    model: PreTrainedModel, name: str, directory: Path, *, base: str, head: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter as a directory that peft, transformers and vLLM load. `head` holds weights to store beside
    it."""
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config[name]
    config.base_model_name_or_path = lasting_name(base)
    config.task_type = "SEQ_CLS" if head else "CAUSAL_LM"
    config.modules_to_save = sorted({key.split(".")[0] for key in head}) if head else None
    config.inference_mode = True
    state = get_peft_model_state_dict(model, adapter_name=name)
    tensors = {key: value for key, value in state.items() if "lora_" in key} | (head or {})
    refuse_to_write(tensors.items(), directory, torch.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({_PREFIX + k: v.detach().contiguous().clone() for k, v in tensors.items()}, directory / WEIGHTS_FILE)
    config.save_pretrained(str(directory))
    config.modules_to_save = None
    write_beside(directory, base)


def write_beside(directory: Path, base: str) -> None:
    """Writes the way from an adapter's directory to that of its base, so that both can be moved together."""
    if Path(base).is_dir():
        beside = os.path.relpath(Path(base).resolve(), directory.resolve())
        (directory / BESIDE_FILE).write_text(json.dumps({"beside": beside}) + "\n", encoding="utf-8")


@contextmanager
def using(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Inside this block the adapter `name` is active, and no other; None means the base alone.

    This changes only which adapter is applied. peft's own switches also set which weights require gradients, and a
    graph whose leaves lose that flag between forward and backward silently gets no gradients.
    """
    layers: list[Any] = [m for m in model.modules() if is_adapted(m)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = ([name], False) if name else ([], True)
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def adapter_parameters(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter. From this call on they require gradients."""
    found = {n: p for n, p in model.named_parameters() if "lora_" in n and f".{name}." in n}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as it is applied now, with its active adapter if it has one. Without gradients."""
    layer: Any = linear
    if not is_adapted(linear):
        weight: Tensor = layer.weight.detach()
        return weight
    weight = layer.get_base_layer().weight.detach()
    if layer.disable_adapters:
        return weight
    with torch.no_grad():
        for name in layer.active_adapters:
            if name in layer.lora_variant:  # DoRA, which scales the rows of what it changes
                weight = layer.lora_variant[name].merge_safe(layer, name, weight)
            elif name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name)
    return weight.detach()


def trained_weight_of(linear: nn.Module, adapter: str | None) -> Tensor:
    """The weight of a linear layer with the adapter of this name, if the layer has it. Gradients reach the adapter."""
    layer: Any = linear
    if not is_adapted(linear):
        plain: Tensor = layer.weight
        return plain
    base: Tensor = layer.get_base_layer().weight
    if adapter is None or adapter not in layer.lora_A:
        return base
    changed: Tensor = base + layer.get_delta_weight(adapter)
    if adapter in layer.lora_magnitude_vector:  # DoRA: each row has a learned length (arXiv:2402.09353, equation 5)
        lengths: Tensor = layer.lora_magnitude_vector[adapter].weight
        changed = changed * (lengths / changed.norm(dim=1).detach())[:, None]
    return changed


def linear_layers(model: PreTrainedModel, *, with_output: bool = False) -> list[str]:
    """The names of the linear layers of the blocks, such as "q_proj", without their path; `with_output` adds that of
    the output head."""
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else None  # type: ignore[no-untyped-call]
    skipped = {id(getattr(model, "score", None))} | (set() if with_output else {id(head)})
    kinds = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    names = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if id(m) not in skipped and ((type(m).__name__ in kinds and "lora_" not in n) or is_adapted(m))
    }
    return sorted(names - {"base_layer"})


def _known_layers(model: PreTrainedModel, chosen: tuple[str, ...]) -> list[str]:
    """The chosen names. Raises ConfigError, with the existing names, if no linear layer has one of them."""
    known = linear_layers(model, with_output=True)
    wrong = [name for name in chosen if name.rsplit(".", 1)[-1] not in known]
    if not wrong:
        return list(chosen)
    raise ConfigError(
        f"no linear layer of this {type(model).__name__} is named {wrong[0]!r}",
        where="adapter.modules",
        fix=f"{nearest(wrong[0], known)}its layers: {', '.join(known)}",
    )


def _in_last_blocks(model: PreTrainedModel, names: list[str], num: int) -> list[str]:
    """The full names of those layers in the last `num` blocks. Raises ConfigError if there are not so many blocks, or
    if they hold no such layer."""
    total = int(model.config.get_text_config().num_hidden_layers)
    # The number of a block is the first number in the name of a layer: model.layers.3.mlp.up_proj.
    numbered = [(n, re.search(r"\.(\d+)\.", n)) for n, _ in model.named_modules() if "lora_" not in n]
    last = [n for n, number in numbered if number is not None and int(number[1]) >= total - num]
    found = [n for n in last if any(n.endswith(f".{one}") for one in names)]
    if num > total or not found:
        raise ConfigError(
            f"last_blocks = {num}, and this {type(model).__name__} has {total} blocks"
            + ("" if num > total else f", of which the last hold none of {', '.join(names)}"),
            where="adapter.last_blocks",
            fix=f"set it to at most {total}, or leave it out for all blocks",
        )
    return found


def _refuse_rank(model: PreTrainedModel, rank: int, names: list[str]) -> None:
    """Raises ConfigError for a rank above that of every chosen layer's own weight."""
    layers: list[Any] = [m for n, m in model.named_modules() if any(f".{n}".endswith(f".{one}") for one in names)]
    # GPT-2's layers call them nx and nf; rounded weights have other shapes than their layers
    sizes = [min(m.in_features, m.out_features) if hasattr(m, "in_features") else min(m.nx, m.nf) for m in layers]
    if sizes and rank > max(sizes):
        raise ConfigError(
            f"rank = {rank} is more than the weights of the chosen layers have: at most {max(sizes)}",
            where="adapter.rank",
            fix=f"set adapter.rank to at most {max(sizes)}; 8 to 64 are usual",
        )


# --- the contents of an adapter directory ---


def adapter_config(path: str | Path) -> Any:
    """The configuration of an adapter directory, as peft reads it."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(find_model(path))
    except Exception as error:
        raise does_not_fit(path, f"peft cannot read its configuration: {first_line(error)}") from error


def read_adapter(model: PreTrainedModel, path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and weights of an adapter. Those of an output head are left out if the model has none, as a
    scalar model."""
    base_of(path)
    config = adapter_config(path)
    if config.is_prompt_learning:
        raise EngineError(
            f"an adapter of the kind {config.peft_type.value} changes the prompt, not weights",
            where=str(path),
            fix="use a low-rank adapter (LoRA), or the base itself",
        )
    weights = adapter_weights(path)
    if hasattr(model, "lm_head") or model.get_output_embeddings() is not None:  # type: ignore[no-untyped-call]
        return config, weights
    for field in ("target_modules", "modules_to_save"):
        if isinstance(names := getattr(config, field, None), list | set):
            setattr(config, field, type(names)(n for n in names if n.rsplit(".", 1)[-1] not in _OUTPUTS) or None)
    return config, {key: value for key, value in weights.items() if not set(key.split(".")) & _OUTPUTS}


_OUTPUTS = {"lm_head", "embed_out"}
_LOW_RANK = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora"),
    *("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
    *("runtime_config", "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode"),
}
"""Settings of LoRA that affect only the low-rank matrices. Any other setting adds something beyond them."""


def further_parts(config: Any) -> list[str]:
    """The names of everything that an adapter adds beyond low-rank changes of linear layers."""
    from peft import LoraConfig

    if config.peft_type.value != "LORA":
        return [f"the kind {config.peft_type.value}"]
    plain, parts = LoraConfig(), []
    for name, value in vars(config).items():
        if name not in _LOW_RANK and value and value != getattr(plain, name, None):
            parts.append(f"{name} = {value!r:.60}")
    if not isinstance(config.init_lora_weights, bool) and str(config.init_lora_weights).lower() not in _INITS:
        parts.append(f"init_lora_weights = {config.init_lora_weights!r}, which changes the base")
    return parts


_INITS = ("gaussian", "orthogonal", "eva", "lora_ga", "mica")


def _changes_a_layer(key: str) -> bool:
    """Whether a name in an adapter file belongs to a low-rank change of a linear layer."""
    return "lora_" in key and "lora_embedding_" not in key


def _of_base(model: PreTrainedModel, weights: dict[str, Tensor]) -> set[str]:
    """The names of embeddings in an adapter file that are equal to the base's. peft writes them beside an adapter of an
    embedding."""
    there = {n.replace(".base_layer", ""): p for n, p in model.named_parameters(remove_duplicate=False)}
    names = {key.removeprefix(_PREFIX): value for key, value in weights.items() if ".base_layer." in key}
    found = {name: (there.get(name.replace(".base_layer", "")), value) for name, value in names.items()}
    return {name for name, (own, value) in found.items() if own is not None and torch.equal(own, value.to(own.dtype))}


def is_head(key: str) -> bool:
    """Whether a name in an adapter file belongs to a score head."""
    return key.removeprefix(_PREFIX).split(".")[0] in ("score", "classifier")


def reward_model_as_policy(path: str | Path, what: str) -> EngineError:
    """The error for a reward model that is named as a language model."""
    return EngineError(
        f"this is {what}, which writes no text",
        where=str(path),
        fix="name a causal language model here, such as one that `trimtab sft` wrote; "
        "a reward model belongs under rewards, reward_model or `trimtab score`",
    )


def does_not_fit(path: str | Path, why: str) -> EngineError:
    """The error for an adapter that does not fit its base."""
    return EngineError(
        f"the adapter cannot be used: {why}",
        where=str(path),
        fix="check that base_model_name_or_path in its adapter_config.json is the model it was trained on, or merge it "
        "with the library that wrote it and name the whole model",
    )


def refuse_misfit(path: str | Path, unexpected: Sequence[str], *, lacking: Sequence[str]) -> None:
    """Raises EngineError for an adapter with weights that its base has no place for, or that lacks some."""
    if unexpected:
        raise does_not_fit(path, f"it holds weights that its base has no place for: {some(unexpected)}")
    if lacking:
        raise does_not_fit(path, f"its file lacks weights that its configuration names: {some(lacking)}")


def some(names: Iterable[str]) -> str:
    """The first four of these names, and the number of the others, as text."""
    listed = sorted(name.removeprefix(_PREFIX) for name in names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _inject(config: Any, model: PreTrainedModel, name: str, seed: int) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # Several adapters are intended, and peft itself finds and sets the layout of GPT-2's weights.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`|fan_in_fan_out is set")
        inject_adapter_in_model(config, model, name)
    layers: list[Any] = [m for m in model.modules() if is_adapted(m)]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [], True
