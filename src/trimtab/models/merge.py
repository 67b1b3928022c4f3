"""Merges adapters permanently into their base, with every part that they contain."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.data.tokenizers import first_line, is_embedding
from trimtab.models.adapters import does_not_fit, read_adapter, refuse_misfit


def merge_adapter(model: PreTrainedModel, path: str | Path) -> None:
    """Merges the adapter of a directory permanently into the weights of its base `model`, with every part it contains:
    changes of any kind that peft can merge, layers saved whole, biases, single rows of embeddings, a score head.

    The merged logits are compared with those that peft computes without merging. Raises EngineError, with the names, if
    the adapter holds weights that the base has no place for, or lacks weights that its configuration names.
    """
    from peft import PeftModel, set_peft_model_state_dict

    config, weights = read_adapter(model, path)
    tied = _is_tied(model)
    _make_rows_for(model, weights, path)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's warnings are about training; what matters here is checked below
            adapted: Any = PeftModel(model, config, adapter_name="merged")
            loaded: Any = set_peft_model_state_dict(adapted, weights, adapter_name="merged")
    except Exception as error:  # foreign files fail in many ways, and none of them is a bug of ours
        raise does_not_fit(
            path, f"peft cannot put it onto its base: {type(error).__name__}, {first_line(error)}"
        ) from error
    unexpected = [name for name in loaded.unexpected_keys if not _is_repeated(name, weights)]
    refuse_misfit(path, unexpected, lacking=_lacking(adapted, loaded.missing_keys))
    adapted.eval()
    _untie(model)
    before = _logits(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.merge_and_unload()
    except Exception as error:
        raise does_not_fit(path, f"peft cannot merge it: {first_line(error)}") from error
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
    if tied:
        _tie_again(model)
    after = _logits(model)
    difference = float((after - before).abs().max())
    if not difference <= 1e-3 * max(1.0, float(before.abs().max())):
        raise does_not_fit(
            path, f"merged, it gives logits that differ by {difference:.3g} from those it gives unmerged"
        )
    model.requires_grad_(True)


def _lacking(adapted: nn.Module, missing: list[str]) -> list[str]:
    """The weights of the adapter that its file lacks. A weight tied to one that was loaded is not lacking, nor are the
    ranks of AdaLoRA, which peft never writes."""
    parameters: dict[str, Tensor] = dict(adapted.named_parameters(remove_duplicate=False))
    parameters |= dict(adapted.named_buffers(remove_duplicate=False))
    there = {id(p) for name, p in parameters.items() if name not in missing}
    own = [n for n in missing if (".merged." in n or n.endswith(".merged")) and ".ranknum." not in n]
    return [name for name in own if id(parameters.get(name)) not in there]


def _is_repeated(name: str, weights: dict[str, Tensor]) -> bool:
    """Whether a weight is the change of single tokens that the file holds for the other one of two tied embeddings."""
    others = [w for n, w in weights.items() if n != name and n.endswith(_OF_TOKENS)]
    return name.endswith(_OF_TOKENS) and any(torch.equal(weights[name], other) for other in others)


_OF_TOKENS = ".trainable_tokens_delta"


def _make_rows_for(model: PreTrainedModel, weights: dict[str, Tensor], path: str | Path) -> None:
    """Resizes the embedding of the base to the rows that the adapter was trained with, if tokens were added for it.
    Raises EngineError if the file lacks those of one of two embeddings, which would be random."""
    embedding: Any = model.get_input_embeddings()
    rows = [len(weight) for name, weight in weights.items() if is_embedding(name)]
    if not rows or max(rows) == embedding.num_embeddings:
        return
    if len(rows) == 1 and model.get_output_embeddings() is not None and not _is_tied(model):  # type: ignore[no-untyped-call]
        raise does_not_fit(
            path,
            f"it was trained with {max(rows)} rows of embeddings, its base has {embedding.num_embeddings}, and the "
            "file holds the new rows of only one of input and output embedding",
        )
    model.resize_token_embeddings(max(rows), mean_resizing=False)


def _untie(model: PreTrainedModel) -> None:
    """Gives every layer weights of its own, so that changing one layer does not change another."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) in seen:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone())
                seen.add(id(parameter))


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether input and output embedding share one weight."""
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
    return output is not None and output.weight is embedding.weight


def _tie_again(model: PreTrainedModel) -> None:
    """Ties input and output embedding again if they are still equal, and writes into the configuration whether they are
    tied: it has changed to untied while they were separate."""
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
    equal = torch.equal(output.weight, embedding.weight)
    if equal:
        output.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 11)[None] % model.config.get_text_config().vocab_size
    logits: Tensor = model(input_ids=ids).logits
    return logits.float()
