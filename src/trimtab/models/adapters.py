"""Low-rank adapters: several roles as small changes to one frozen base (Hu et al., arXiv:2106.09685).

Adapters are those of `peft`, and so is the format of their directories. A role names its adapter and has it active
while it runs; the base alone is what no adapter is active for.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.errors import EngineError
from trimtab.models.quantized import Bits

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What peft puts before the names of a model's own weights in a file."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank change B A to the weight of each chosen linear layer. B starts at zero: at first nothing changes."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The change is scaled by alpha / rank."""
    modules: tuple[str, ...] = ()
    """Names of the linear layers that get one, such as "q_proj"; empty takes all but the output head."""
    base_bits: Bits = 32
    """Bits of a weight of the frozen linear layers: 32, or rounded to 8 or 4 (needs `trimtab[quantized]`)."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank = {self.rank}, alpha = {self.alpha}; rank is at least 1 and alpha above 0")


def is_adapted(module: nn.Module) -> bool:
    """Whether the layer has adapters. No layer has any before peft is loaded, which happens when the first is made:
    it takes 130 MB and seconds that most runs can do without."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


def base_of(path: str | Path) -> str | None:
    """The base model that an adapter directory names; None for a directory that is a model of its own."""
    file = Path(path) / CONFIG_FILE
    if not file.exists():
        return None
    if not (Path(path) / WEIGHTS_FILE).exists():
        raise EngineError(
            f"{CONFIG_FILE} without {WEIGHTS_FILE}",
            where=str(path),
            fix="save the adapter as safetensors; other formats can run code and are not read",
        )
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise EngineError(
            "the adapter does not say which base model it belongs to",
            where=str(file),
            fix="set base_model_name_or_path in it",
        )
    return str(base)


def same_model(a: str | Path, b: str | Path) -> bool:
    """Whether two names mean one model: the same hub id, or paths of one directory."""
    return str(a) == str(b) or Path(a).resolve() == Path(b).resolve()


def on_base(path: str | Path, base: str | Path) -> bool:
    """Whether the directory is an adapter of this base."""
    other = base_of(path)
    return other is not None and same_model(other, base)


def merge_adapter(model: PreTrainedModel, path: str | Path) -> None:
    """Adds the adapter of a directory to the weights of its base `model` for good, and puts its head in place."""
    head = load_adapter(model, "merged", path)
    for name, module in list(model.named_modules()):
        if is_adapted(module):
            module.merge(adapter_names=["merged"])
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
    del model.peft_config
    unknown = set(head) - set(dict(model.named_parameters()))
    if unknown:
        raise EngineError(
            f"the adapter holds weights that its base has no place for: {', '.join(sorted(unknown))}",
            where=str(path),
            fix="adapters of linear layers and a score head are read; load others with peft and save them merged",
        )
    model.load_state_dict(head, strict=False)
    model.requires_grad_(True)


def add_adapter(model: PreTrainedModel, name: str, settings: LoRA, *, seed: int) -> None:
    """A new adapter that changes nothing yet. The base is frozen."""
    from peft import LoraConfig

    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=list(settings.modules) if settings.modules else linear_layers(model),
    )
    _inject(config, model, name, seed)


def load_adapter(model: PreTrainedModel, name: str, path: str | Path) -> dict[str, Tensor]:
    """The adapter of a directory under a name of its own on its base `model`, which is frozen; returns the weights
    stored beside it, such as a score head."""
    from peft import LoraConfig, set_peft_model_state_dict

    base_of(path)
    model.requires_grad_(False)
    config: Any = LoraConfig.from_pretrained(str(path))
    config.modules_to_save, config.inference_mode = None, False
    weights = {key.removeprefix(_PREFIX): value for key, value in load_file(Path(path) / WEIGHTS_FILE).items()}
    own = {key: value for key, value in weights.items() if "lora_" in key}
    _inject(config, model, name, seed=0)
    set_peft_model_state_dict(model, own, adapter_name=name)
    return {key: value for key, value in weights.items() if key not in own}


def save_adapter(
    model: PreTrainedModel, name: str, directory: Path, *, base: str, head: dict[str, Tensor] | None = None
) -> None:
    """The adapter as a directory that peft, transformers and vLLM load; `head` holds weights stored beside it."""
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config[name]
    config.base_model_name_or_path = base
    config.task_type = "SEQ_CLS" if head else "CAUSAL_LM"
    config.modules_to_save = sorted({key.split(".")[0] for key in head}) if head else None
    config.inference_mode = True
    state = get_peft_model_state_dict(model, adapter_name=name)
    tensors = {key: value for key, value in state.items() if "lora_" in key} | (head or {})
    directory.mkdir(parents=True, exist_ok=True)
    save_file({_PREFIX + k: v.detach().contiguous().clone() for k, v in tensors.items()}, directory / WEIGHTS_FILE)
    config.save_pretrained(str(directory))
    config.modules_to_save = None


@contextmanager
def using(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """The adapter `name` is active inside, and no other; None is the base alone.

    Only which adapter is applied changes. peft's own switches also set which weights take gradients, and a graph
    whose leaves lose that between forward and backward gets none, silently.
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
    """The weights of one adapter, which from now on take gradients."""
    found = {n: p for n, p in model.named_parameters() if "lora_" in n and f".{name}." in n}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as it is applied now: with its active adapter, if it has one."""
    layer: Any = linear
    if not is_adapted(linear):
        weight: Tensor = layer.weight.detach()
        return weight
    weight = layer.get_base_layer().weight.detach()
    if layer.disable_adapters:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name).detach()
    return weight


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names, without their place, of the linear layers of the blocks."""
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else None  # type: ignore[no-untyped-call]
    skipped = {id(head), id(getattr(model, "score", None))}
    kinds = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    names = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if (type(m).__name__ in kinds and id(m) not in skipped and "lora_" not in n) or is_adapted(m)
    }
    return sorted(names - {"base_layer"})


def _inject(config: Any, model: PreTrainedModel, name: str, seed: int) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # Several adapters are meant, and the layout of GPT-2's weights is found and set by peft itself.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`|fan_in_fan_out is set")
        inject_adapter_in_model(config, model, name)
    layers: list[Any] = [m for m in model.modules() if is_adapted(m)]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [], True
