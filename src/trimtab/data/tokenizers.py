"""Loads the tokenizers of model directories, with the facts in the files beside them that conversations depend on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from trimtab.core.errors import DataError, EngineError
from trimtab.core.hub import ADAPTER_WEIGHTS, base_of, find_model, read_json

PROCESSOR_TEMPLATE = "chat_template.json"
"""The file in which processors of images and text kept the chat template; a tokenizer does not read it."""


@dataclass(frozen=True)
class ModelFacts:
    """The facts in a model directory about the ids of its tokenizer."""

    stop_ids: frozenset[int]
    """The ids on which its generation settings end a reply, besides the tokenizer's eos token."""
    num_rows: int
    """The rows of its embedding: it cannot read an id of this number or above."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id, with its `ModelFacts`. An adapter without a tokenizer gets that of
    its base."""
    base, name = base_of(path), find_model(path)
    own = base is None or any((Path(name) / file).exists() for file in ("tokenizer_config.json", "tokenizer.json"))
    directory = name if own else find_model(str(base))
    fix = (
        "a model directory needs tokenizer.json (or the files of its kind) and tokenizer_config.json beside its "
        "weights; save the tokenizer there with save_pretrained"
    )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # foreign files fail in many ways, and none of them is a bug of ours
        raise EngineError(f"no tokenizer can be loaded: {first_line(error)}", where=str(path), fix=fix) from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        # transformers makes an empty tokenizer of the named class if the files with the vocabulary are not there
        raise EngineError(
            f"the tokenizer has {len(tokenizer)} special tokens and no other: its vocabulary is not there",
            where=str(path),
            fix=fix,
        )
    if tokenizer.chat_template is None and (file := Path(directory) / PROCESSOR_TEMPLATE).exists():
        tokenizer.chat_template = read_json(file).get("chat_template")
    tokenizer.model_facts = facts_of(tokenizer, name, base)
    return tokenizer


def facts_of(tokenizer: PreTrainedTokenizerBase, name: str, base: str | None) -> ModelFacts:
    """The facts of a model, or of an adapter of the model `base`."""
    whole = name if base is None else base
    while (next_base := base_of(whole)) is not None:
        whole = next_base
    config = load_config(whole)
    rows = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    if base is not None:
        rows = max(rows, _rows_in(Path(name) / ADAPTER_WEIGHTS))
    return ModelFacts(_stop_ids(tokenizer, find_model(whole), config), rows)


def load_config(path: str | Path) -> Any:
    """The transformers configuration of a model directory or hub id. Raises EngineError for one that cannot be read."""
    name = find_model(path)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise EngineError(
            f"its config.json cannot be used: {first_line(error)}",
            where=str(path),
            fix="copy or download the model again; one that needs code of its own, or a newer transformers, is refused",
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error that is not empty; the type of the error if it has no such line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") and len(lines) > 1 else lines[0].removesuffix(":")


def refuse_missing_rows(tokenizer: PreTrainedTokenizerBase, num_rows: int, written: set[int]) -> None:
    """Raises EngineError if conversations can hold tokens that have no row in the model. `written` are the ids of a
    conversation; special tokens that it does not hold may lack a row, as the image token of a text model does."""
    if len(tokenizer) <= num_rows:
        return
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    missing = {
        text: id_
        for text, id_ in tokenizer.get_vocab().items()
        if id_ >= num_rows and (id_ in written or id_ not in special)
    }
    if missing:
        first = min(missing, key=lambda text: missing[text])
        raise EngineError(
            f"the tokenizer has {len(missing)} tokens that the model has no row for, such as {first!r} with id "
            f"{missing[first]}; the model has {num_rows} rows (vocab_size)",
            where=tokenizer.name_or_path or "the tokenizer",
            fix="resize the model once, model.resize_token_embeddings(len(tokenizer)), and save both; or take the "
            "tokens out of the tokenizer",
        )


def choose_pad(
    tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], written: set[int], num_ids: int
) -> tuple[int, bool]:
    """The id to pad with, and whether it is spare, that is, not a word that a text could hold. A token that is
    `written` into conversations is not spare: if no attention mask is given, `generate` of transformers masks every
    pad token."""
    added = tokenizer.added_tokens_decoder.items()
    spare: list[int | None] = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    spare += [id_ for id_, t in added if re.search("pad|unused|reserved", t.content.lower())]
    special = [id_ for id_, t in added if t.special]
    spare += sorted(special, key=lambda id_: (id_ == tokenizer.bos_token_id, id_))
    unused = (id_ for id_ in spare if id_ is not None and id_ < num_ids and id_ not in stop_ids | written)
    if (found := next(unused, None)) is not None:
        return found, True
    for id_ in range(num_ids):
        if id_ not in stop_ids:
            return id_, False
    raise DataError(
        f"every one of the {num_ids} ids that the model can read ends a reply, so none can pad",
        where=tokenizer.name_or_path or "the tokenizer",
        fix="correct eos_token_id in generation_config.json, or use another model",
    )


def _stop_ids(tokenizer: PreTrainedTokenizerBase, name: str, config: Any) -> frozenset[int]:
    """The ids on which transformers ends a reply. If no generation settings were written, the ids come from the model's
    configuration. There they are often only the default of its class, so they count only if they are special tokens."""
    try:
        generation = GenerationConfig.from_pretrained(name)
    except (OSError, ValueError):
        generation = config
    found = generation.eos_token_id
    ids = [] if found is None else [found] if isinstance(found, int) else found
    if not isinstance(ids, list) or not all(isinstance(id_, int) for id_ in ids):
        raise EngineError(
            f"eos_token_id = {found!r:.40} is neither a number nor a list of numbers",
            where=f"generation_config.json or config.json of {name}",
            fix="write the ids of the tokens at which a reply ends",
        )
    if generation is config or getattr(generation, "_from_model_config", False):
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = [id_ for id_ in ids if id_ in special]
    return frozenset(ids)


def _rows_in(weights: Path) -> int:
    """The rows of the largest embedding or head that an adapter brings; 0 if it brings none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "numpy") as file:
            shapes = [file.get_slice(n).get_shape() for n in file.keys() if is_embedding(n)]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise EngineError(
            f"the weights of the adapter cannot be read: {first_line(error)}",
            where=str(weights),
            fix="copy or download the adapter again",
        ) from error
    return max((shape[0] for shape in shapes), default=0)


def is_embedding(name: str) -> bool:
    """Whether a name in the file of an adapter is that of a whole input or output embedding. peft writes one that the
    adapter changes under the names of its wrappers."""
    parts = [part for part in name.split(".") if part not in ("base_layer", "token_adapter")]
    return parts[-1] == "weight" and parts[-2] in _EMBEDDINGS


_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""The names that models give to their input and output embeddings."""
