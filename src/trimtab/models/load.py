"""Loads models from ordinary Hugging Face directories: safetensors only, and code in them is never run.

Every model is checked: it must be of the right kind, with complete weights and a trained head. A directory with a
mistake is refused with a one-sentence message, before anything is computed with it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from trimtab.batches.device import CPU
from trimtab.core.errors import EngineError
from trimtab.core.hub import base_of, find_model, reward_facts
from trimtab.data.tokenizers import first_line, load_config
from trimtab.data.tokenizers import load_tokenizer as load_tokenizer
from trimtab.models.adapters import adapter_weights, is_head, is_reward_adapter, reward_model_as_policy
from trimtab.models.forms import proved
from trimtab.models.logits import logit_shape
from trimtab.models.merge import merge_adapter
from trimtab.models.quantized import is_quantized
from trimtab.models.weights import check_weights, refuse_damage, refuse_unused, stored_dtype

transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
# peft imports bitsandbytes if it is installed, which then logs the optional kernels that it did not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_CLASSIFIER = "ForSequenceClassification"


def load_causal(path: str | Path, *, device: torch.device = CPU) -> PreTrainedModel:
    """A causal language model in float32 on a device, with dropout off.

    It is checked that this package computes the same hidden states (`models/forms.py`) and logits (`models/logits.py`)
    as transformers. An adapter directory gives its base with the adapter merged. Raises EngineError for a reward model.
    """
    if (base := base_of(path)) is not None:
        if is_reward_adapter(path):
            raise reward_model_as_policy(path, "the adapter of a reward model")
        model = load_causal(base, device=device)
        merge_adapter(model, path)
        return model
    kinds = load_config(path).architectures or []
    if any(kind.endswith(_CLASSIFIER) for kind in kinds):
        raise reward_model_as_policy(path, f"a reward model or classifier ({', '.join(kinds)})")
    model, info = _load(AutoModelForCausalLM, path)
    if missing := _missing(model, info):
        raise EngineError(
            f"the directory lacks weights of a {type(model).__name__}, such as {missing[0]}: "
            f"{len(missing)} of them would be random{_other_names(info)}",
            where=str(path),
            fix="name a causal language model saved with its output head, such as one that `trimtab sft` wrote",
        )
    _note_own_head(model)
    _without_dropout(model, device)
    proved(model)
    logit_shape(model)
    return model


def load_scalar(
    path: str | Path, *, head_seed: int | None = None, zero_head: bool = False, device: torch.device = CPU
) -> PreTrainedModel:
    """A model with one score per sequence or token (`num_labels = 1`), in float32 on a device, with dropout off.

    A directory saved by the reward stage keeps its head. For any other model a new head is drawn from `head_seed`
    with standard deviation 1 / sqrt(D + 1) (Stiennon et al., arXiv:2009.01325, appendix B), or set to zero, as suits
    a critic. Raises EngineError if a head is missing and `head_seed` is None. An adapter directory gives its base with
    adapter and head merged. A model with a trained head gets the attribute `trained_pad_id`: the padding token of its
    configuration, before which transformers reads its scores.
    """
    if (base := base_of(path)) is not None:
        brings_head = is_reward_adapter(path) and any(map(is_head, adapter_weights(path)))
        if not brings_head and head_seed is None and not is_classifier(base):
            raise _no_head(path, "the adapter brings none, and its base has none")
        head_seed = 0 if head_seed is None else head_seed
        model = load_scalar(base, head_seed=head_seed, zero_head=zero_head, device=device)
        merge_adapter(model, path)
        model.config.update(reward_facts(path))
        if brings_head:
            model.trained_pad_id = model.config.get_text_config().pad_token_id
        return _without_dropout(model, device)
    refuse_several_labels(path, where=str(path))
    if load_config(path).is_encoder_decoder:
        raise EngineError(
            "this model has an encoder and a decoder, and such models read a score in ways of their own",
            where=str(path),
            fix="use a decoder or an encoder as reward model",
        )
    model, info = _load(AutoModelForSequenceClassification, path, num_labels=1)
    new = _missing(model, info)
    of_backbone = [name for name in new if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name]
    if of_backbone:
        raise EngineError(
            f"the directory lacks weights of a {type(model).__name__}, such as {of_backbone[0]}{_other_names(info)}",
            where=str(path),
            fix="copy or download it again, or name another model",
        )
    if new and head_seed is None:
        raise _no_head(path, f"missing: {', '.join(new)}")
    _fill_head(model, new, head_seed or 0, zero_head)
    if not new:
        model.trained_pad_id = model.config.get_text_config().pad_token_id
    return _without_dropout(model, device)


def refuse_several_labels(path: str | Path, *, where: str) -> None:
    """Raises EngineError for a classifier that gives more than one score, or none."""
    if is_classifier(path) and (num := load_config(path).num_labels) != 1:
        raise EngineError(
            f"a classifier with {num} labels; a reward model gives one score, so one label is needed",
            where=where,
            fix="name a sequence classifier with num_labels = 1, or train one from a language model: `trimtab reward`",
        )


def is_classifier(path: str | Path) -> bool:
    """Whether the directory or hub id is a sequence classifier, as every reward model is, or an adapter with such a
    head."""
    if (base := base_of(path)) is not None:
        return is_reward_adapter(path) or is_classifier(base)
    return any(kind.endswith(_CLASSIFIER) for kind in load_config(path).architectures or [])


def _load(auto_class: Any, path: str | Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model in float32, with its loading info. A model whose attention cannot be changed after it is made gets the
    eager kind, which is the definition: the kinds of Falcon with ALiBi differ by 0.1 nats."""
    name = find_model(path)
    check_weights(name)
    _refuse_quantised(path)
    options |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    if (config := load_config(path))._attn_implementation not in (None, "eager", "sdpa"):
        options["attn_implementation"] = "eager"  # its file asks for a library, and the kind is chosen here
    try:
        model, info = auto_class.from_pretrained(name, trust_remote_code=False, **options)
        if model.config._attn_implementation != "eager" and not model._can_set_attn_implementation():
            options["attn_implementation"] = "eager"
            model, info = auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # foreign files fail in many ways, and none of them is a bug of ours
        raise EngineError(
            f"the model cannot be loaded: {_why_not_loaded(auto_class, name, options, error)}",
            where=str(path),
            fix="a model needs config.json, model.safetensors and a tokenizer that belong together; "
            "copy or download it again, or name another one",
        ) from error
    if is_quantized(model):
        raise _quantised(path, "integers")
    refuse_unused(model, info["unexpected_keys"], str(path))
    new = set(info["missing_keys"])  # random for now
    refuse_damage(((n, p) for n, p in model.named_parameters() if n not in new), str(path))
    # What a forward pass gives beside its result is for inspection, and not every kind of attention can give it.
    model.config.output_attentions, model.config.output_hidden_states = False, False
    model.written_dtype = stored_dtype(name) or config.dtype or torch.float32
    return model, info


_READ_AS_NUMBERS = ("fp8", "fbgemm_fp8", "mxfp4")
"""The ways of rounding whose weights transformers turns back into ordinary numbers when it loads them."""


def _refuse_quantised(path: str | Path) -> None:
    """Raises EngineError for a model whose configuration says that its weights are rounded, before the library that
    reads them is asked for."""
    settings: Any = getattr(load_config(path), "quantization_config", None)
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if str(getattr(method, "value", method)) not in _READ_AS_NUMBERS:
        raise _quantised(path, f"{getattr(method, 'value', method)} says its quantization_config")


def _quantised(path: str | Path, how: str) -> EngineError:
    return EngineError(
        f"its weights are rounded (a quantised model: {how}), and cannot be trained or scored exactly",
        where=str(path),
        fix="name the model it was made from; adapter.base_bits = 4 or 8 rounds a base when it is loaded",
    )


def _why_not_loaded(auto_class: Any, name: str, options: dict[str, Any], error: Exception) -> str:
    """What is wrong with the files, in a sentence: transformers only says that some sizes do not match."""
    if isinstance(error, KeyError):
        return f"its configuration names {first_line(error)}, which transformers does not know"
    if "ignore_mismatched_sizes" not in str(error):
        return first_line(error)
    _, info = auto_class.from_pretrained(name, trust_remote_code=False, ignore_mismatched_sizes=True, **options)
    mismatched = sorted(info["mismatched_keys"])
    weight, stored, wanted = mismatched[0]
    return (
        f"{len(mismatched)} weights have other sizes than config.json says, such as {weight}: a mismatch of "
        f"{tuple(stored)} in the file and {tuple(wanted)}"
    )


def _note_own_head(model: PreTrainedModel) -> None:
    """Writes into the configuration that the output embedding has weights of its own, if it has. A file with two
    different weights is loaded so whatever its configuration says, and other libraries go by the configuration."""
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
    if output is not None and output.weight is not embedding.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _missing(model: PreTrainedModel, info: dict[str, Any]) -> list[str]:
    """The trained weights that the files lack. Tied weights and buffers do not count: transformers makes them."""
    return sorted(set(info["missing_keys"]) & set(dict(model.named_parameters())))


def _other_names(info: dict[str, Any]) -> str:
    """Adds to the error for missing weights how the file calls its own, as a wrapper that was saved with it does."""
    unused = sorted(info["unexpected_keys"])
    return f"; the file calls its weights otherwise, such as {unused[0]}" if unused else ""


@torch.no_grad()
def _fill_head(model: PreTrainedModel, names: list[str], seed: int, zero: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name in names:
        weight = parameters[name].data
        if zero or weight.ndim < 2:
            weight.zero_()
        else:
            weight.normal_(0.0, (weight.shape[1] + 1) ** -0.5, generator=draw)


def drawn_head(model: PreTrainedModel, seed: int) -> torch.nn.Linear:
    """A new score head for the hidden states of a model that has one: drawn as `load_scalar` draws it."""
    score: Any = model.score
    head = torch.nn.Linear(score.in_features, 1, bias=score.bias is not None, device=model.device)
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.empty(1, score.in_features).normal_(0.0, (score.in_features + 1) ** -0.5, generator=draw)
    with torch.no_grad():
        head.weight.copy_(drawn)
        if head.bias is not None:
            head.bias.zero_()
    return head


def _no_head(path: str | Path, why: str) -> EngineError:
    return EngineError(
        f"the model has no trained score head ({why})",
        where=str(path),
        fix="train one with `trimtab reward`, or name a directory that the reward stage wrote",
    )


def _without_dropout(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train(False)
    return model
