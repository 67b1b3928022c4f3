"""Models in and out: ordinary Hugging Face directories, safetensors only, no code from them ever run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from trimtab.errors import EngineError
from trimtab.models.adapters import base_of, merge_adapter, save_adapter
from trimtab.models.forms import proved
from trimtab.models.logits import logit_shape
from trimtab.models.roles import Policy, ScalarModel

transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id; an adapter without one has its base's."""
    if (base := base_of(path)) is not None and not (Path(path) / "tokenizer_config.json").exists():
        return load_tokenizer(base)
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, path)
    return tokenizer


def load_causal(path: str | Path) -> PreTrainedModel:
    """A causal language model in float32 with dropout off, compared with its own plain logits: what is computed here of
    its hidden states (`models/forms.py`) and of its head (`models/logits.py`) is what transformers computes.

    An adapter directory gives its base with the adapter merged.
    """
    if (base := base_of(path)) is not None:
        model = load_causal(base)
        merge_adapter(model, path)
        return model
    model = _prepared(_load_plain(AutoModelForCausalLM, path))
    proved(model)
    logit_shape(model)
    return model


def load_scalar(path: str | Path, *, head_seed: int | None = None, zero_head: bool = False) -> PreTrainedModel:
    """A model with one score per sequence or token (`num_labels = 1`), in float32 with dropout off.

    A directory saved by the reward stage keeps its head. For any other model a new head is drawn from `head_seed`
    with standard deviation 1 / sqrt(D + 1) (Stiennon et al., arXiv:2009.01325, appendix B), or set to zero, as suits
    a critic. Raises EngineError where a head is missing and none may be made. An adapter directory gives its base with
    adapter and head merged.
    """
    if (base := base_of(path)) is not None:
        model = load_scalar(base, head_seed=0)
        merge_adapter(model, path)
        model.config.update(reward_facts(path))
        return _prepared(model)
    model, missing = _load_plain(AutoModelForSequenceClassification, path, num_labels=1, output_loading_info=True)
    new = [name for name in missing["missing_keys"] if not name.endswith("position_ids")]
    if new:
        if head_seed is None:
            raise EngineError(
                f"the model has no trained score head (missing: {', '.join(sorted(new))})",
                where=str(path),
                fix="train one with `trimtab reward`, or name a directory that the reward stage wrote",
            )
        draw = torch.Generator().manual_seed(head_seed)
        parameters = dict(model.named_parameters())
        for name in sorted(new):
            weight = parameters[name].data
            if zero_head or weight.ndim < 2:
                weight.zero_()
            else:
                weight.normal_(0.0, (weight.shape[1] + 1) ** -0.5, generator=draw)
    return _prepared(model)


def reward_facts(path: str | Path) -> dict[str, float]:
    """What the reward stage wrote about a reward adapter: its shift and temperature."""
    file = Path(path) / "reward.json"
    facts: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return facts


def save_role(role: Policy | ScalarModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, base: str) -> None:
    """The role's model as a directory; a role that is an adapter as an adapter of `base`, its head beside it."""
    if role.adapter is None:
        save_model(role.model, tokenizer, directory)
        return
    head = None
    if isinstance(role, ScalarModel):
        head = {f"score.{n}": p.detach() for n, p in role.head.named_parameters()}
        facts = {k: v for k, v in role.model.config.to_dict().items() if k.startswith("reward_")}
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "reward.json").write_text(json.dumps(facts), encoding="utf-8")
    save_adapter(role.model, role.adapter, directory, base=base, head=head)
    tokenizer.save_pretrained(directory)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The model and its tokenizer as a Hugging Face directory; the pad token is written into the configuration."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _load(auto_class: Any, path: str | Path, **options: Any) -> Any:
    name = str(path)
    if "/" not in name.strip("/") and not Path(name).exists():
        raise EngineError(
            f"no model directory {name!r}", where="the model setting", fix="name a directory, or a hub id as org/name"
        )
    if auto_class is not AutoTokenizer:
        options |= {"use_safetensors": True}
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        fix = "check the path; a model needs config.json, model.safetensors and a tokenizer"
        if os.environ.get("HF_HUB_OFFLINE"):
            fix += " (HF_HUB_OFFLINE is set, so hub ids are not fetched)"
        raise EngineError(f"cannot load {name!r}: {str(error).splitlines()[0]}", where=name, fix=fix) from error


def _load_plain(auto_class: Any, path: str | Path, **options: Any) -> Any:
    """A model in float32. One that chooses its attention for good when it is made gets the eager kind, which is the
    definition: those of Falcon with ALiBi differ by 0.1 nats."""
    loaded = _load(auto_class, path, dtype=torch.float32, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if model.config._attn_implementation != "eager" and not model._can_set_attn_implementation():
        return _load(auto_class, path, dtype=torch.float32, attn_implementation="eager", **options)
    return loaded


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train(False)
    return model
