"""Writes models so that they behave in transformers, vLLM and TRL as they do here.

- A reply ends at the same tokens: the end token of the template is in `eos_token_id` of config.json and
  generation_config.json, beside the ones that were there.
- Greedy decoding gives the reply that the model itself finds likeliest: penalties, beams, forced or forbidden tokens
  of a base are not written. Settings of sampling, such as its temperature, stay.
- There is one pad token, the same in tokenizer and configuration, and no reply ends with it: transformers reads the
  score of a padded text at the last token that is not the pad token.
- Weights have the dtype in which the model was stored, rounded from the float32 in which they are trained, so training
  does not make a bfloat16 model twice as large. `trimtab export --dtype` writes another dtype.
- The tokenizer holds the chat template that was trained with, and an adapter the absolute path of its base. That of a
  reward model ends a conversation at the token at which its score is read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.core.hub import GENERATION_FILE, MODEL_FILE, REWARD_FILE, read_json
from trimtab.core.terminal import note
from trimtab.data.chat import Chat
from trimtab.data.templates import ending_with
from trimtab.models.adapters import save_adapter
from trimtab.models.roles import Policy, ScalarModel
from trimtab.models.weights import refuse_to_write

_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation settings that mean something only if replies are sampled."""
_OTHER_POLICY = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "min_length", "min_new_tokens", "guidance_scale"),
    *("watermarking_config", "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
    *("penalty_alpha", "dola_layers", "num_return_sequences", "constraints", "force_words_ids", "stop_strings"),
)
"""Generation settings that make of a model another policy: its likeliest reply is no longer the model's own."""
PAD_TOKEN = "<|pad|>"
"""The pad token that is added to a tokenizer without an unused token."""


def save_role(role: Policy | ScalarModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, base: str) -> None:
    """Writes the role's model as a directory. A role that is an adapter is written as an adapter of `base`, with its
    head beside it."""
    if role.adapter is None:
        save_model(role.model, tokenizer, directory)
        return
    head = None
    if isinstance(role, ScalarModel):
        head = {f"score.{n}": p.detach() for n, p in role.head.named_parameters()}
        write_reward_facts(role.model, directory)
    save_adapter(role.model, role.adapter, directory, base=base, head=head)
    chat, pad_id = _chat_to_write(tokenizer)
    _end_where_read(role.model, chat)
    chat.tokenizer.save_pretrained(directory)
    if not isinstance(role, ScalarModel):  # for other libraries that generate with base and adapter
        settings: Any = GenerationConfig
        settings(eos_token_id=_stop_ids(chat), pad_token_id=pad_id).save_pretrained(directory)


def write_reward_facts(model: PreTrainedModel, directory: Path) -> None:
    """Writes what is known of the scores of a reward model, from its configuration, beside its adapter."""
    facts = {k: v for k, v in model.config.to_dict().items() if k.startswith("reward_")}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / REWARD_FILE).write_text(json.dumps(facts), encoding="utf-8")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the model and its tokenizer as a Hugging Face directory, in `dtype` or by default in the dtype in which
    the model was stored."""
    chat, pad_id = _chat_to_write(tokenizer)
    if (trained := _trained_pad(model, chat.tokenizer)) is not None:
        pad_id = trained
    elif pad_id is None and not model.can_generate():
        pad_id = _add_pad(model, chat.tokenizer)
    apart = _set_ids(model, _stop_ids(chat), chat.tokenizer.eos_token_id if pad_id is None else pad_id)
    if pad_id is None:
        chat.tokenizer.pad_token = chat.tokenizer.eos_token
    dtype = dtype or written_dtype(model)
    weights = None if dtype == torch.float32 else cast_weights(model, dtype)
    refuse_to_write(model.named_parameters() if weights is None else weights.items(), directory, dtype)
    model.save_pretrained(directory, state_dict=weights)
    if apart:
        file = directory / GENERATION_FILE
        file.write_text(json.dumps(read_json(file) | apart, indent=2) + "\n", encoding="utf-8")
    if dtype != torch.float32:
        file = directory / MODEL_FILE
        file.write_text(json.dumps(_with_dtype(read_json(file), dtype), indent=2) + "\n", encoding="utf-8")
    _end_where_read(model, chat)
    chat.tokenizer.save_pretrained(directory)


def written_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype in which the model was stored; float32 for a model that was made here."""
    found = getattr(model, "written_dtype", torch.float32)
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


@torch.no_grad()
def round_as_written(model: PreTrainedModel) -> None:
    """Rounds the weights as they will be rounded when written, so that later measurements hold for the written
    model."""
    dtype = written_dtype(model)
    for _, tensor in _rounded(model, dtype):
        tensor.copy_(tensor.to(dtype))


def _chat_to_write(tokenizer: PreTrainedTokenizerBase) -> tuple[Chat, int | None]:
    """The chat of a copy of the tokenizer that has the pad token of the conversations, and the id of that token; None
    if the pad token could also occur in a text."""
    chat = Chat(copy.deepcopy(tokenizer))
    if not chat.pad_is_spare:
        return chat, None
    if chat.tokenizer.pad_token_id != chat.pad_id:
        chat.tokenizer.pad_token = chat.tokenizer.convert_ids_to_tokens(chat.pad_id)
    return chat, chat.pad_id


def _end_where_read(model: PreTrainedModel, chat: Chat) -> None:
    """Makes the chat template of a reward model of the reward stage end a conversation at the token at which the model
    is read: other programs read what their template wrote last."""
    of_replies = getattr(model.config, "reward_shift", None) is not None
    if of_replies and getattr(model.config, "reward_kind", None) != "process" and len(set(chat.closings)) > 1:
        chat.tokenizer.chat_template = ending_with(chat.tokenizer, *chat.closings)


def _trained_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The pad token of a reward model of another program, which becomes that of the tokenizer; None for any other
    model. It stays although a reply may end with it, because the model learned to give its scores before it."""
    pad_id: int | None = getattr(model, "trained_pad_id", None)
    if getattr(model.config, "reward_shift", None) is not None or pad_id is None or not 0 <= pad_id < len(tokenizer):
        return None
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return pad_id


def _add_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds a pad token to the tokenizer, and a row to the embedding if it has no unused one. Returns the token's id."""
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    embedding: Any = model.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return int(tokenizer.pad_token_id)


def _stop_ids(chat: Chat) -> int | list[int]:
    """Every id that ends a reply, the end token of the template first."""
    ids = [chat.end_id, *sorted(chat.stop_ids - {chat.end_id})]
    return ids[0] if len(ids) == 1 else ids


def _set_ids(model: PreTrainedModel, stop_ids: int | list[int], pad_id: int) -> dict[str, Any]:
    """Sets the ids that end a reply and pad it, wherever they stand. Returns the generation settings that transformers
    reads but refuses to write, which are taken out: published ones often have a temperature without do_sample, which
    vLLM samples at, while transformers decodes greedily."""
    configs: dict[int, Any] = {id(c): c for c in (model.config, model.config.get_text_config())}
    for config in configs.values():
        config.eos_token_id, config.pad_token_id = stop_ids, pad_id
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return {}
    generation.eos_token_id, generation.pad_token_id = stop_ids, pad_id
    generation._from_model_config = False
    _drop_other_policy(generation)
    try:
        generation.validate(strict=True)
    except ValueError:
        apart = {name: value for name in _OF_SAMPLING if (value := getattr(generation, name, None)) is not None}
        for name in apart:
            setattr(generation, name, None)
        return apart
    return {}


def _drop_other_policy(generation: GenerationConfig) -> None:
    """Removes the settings that would make of the model another policy than the one that was trained and measured, and
    says on stderr which."""
    usual = GenerationConfig()  # type: ignore[no-untyped-call]
    found = {name: getattr(generation, name, None) for name in _OTHER_POLICY}
    changed = {name: value for name, value in found.items() if value != getattr(usual, name, None)}
    for name in changed:
        setattr(generation, name, getattr(usual, name, None))
    if shown := {name: value for name, value in changed.items() if value not in _WITHOUT_EFFECT.get(name, ())}:
        listed = ", ".join(f"{name} = {value}" for name, value in shown.items())
        note(f"{GENERATION_FILE} is written without {listed}, with which it would reply otherwise")


_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale"), (1, 1.0)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    "diversity_penalty": (0, 0.0),
    "early_stopping": (False,),
}
"""Values that change nothing, which older releases wrote into every file."""


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that are rounded when the model is written in `dtype`: all except those that the model's class
    always keeps in float32, such as the weights and biases by which a router chooses experts."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and dtype != torch.float32 and not any(part in name for part in kept):
            yield name, tensor


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another dtype. Weights that share memory still share it."""
    done: dict[int, Tensor] = {}
    cast: dict[str, Tensor] = model.state_dict()
    for name, tensor in _rounded(model, dtype):
        cast[name] = done.setdefault(tensor.data_ptr(), tensor.to(dtype))
    return cast


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration with this dtype, also in the configurations inside it."""
    name = str(dtype).removeprefix("torch.")
    return {
        key: name if key == "dtype" else _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in config.items()
    }
