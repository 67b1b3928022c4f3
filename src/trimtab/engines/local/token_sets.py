"""The tokens that end a reply, and those that are never drawn. Both depend on the model and on its tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.data.chat import Chat
from trimtab.models.roles import Policy


def stop_ids(policy: Policy, chat: Chat) -> frozenset[int]:
    """The chat's stop tokens, and those that the model's generation settings add: transformers and vLLM stop at them
    too.

    An id that is also in the model's configuration may be only the default of its class, such as Llama's 2, which
    nobody set for this vocabulary. Such an id counts only if it is a special token.
    """
    model = policy.model
    named = _ids(getattr(model, "generation_config", None)) - _ids(model.config) - _ids(model.config.get_text_config())
    configured = _ids(getattr(model, "generation_config", None)) & _special_ids(chat)
    return frozenset(chat.stop_ids) | named | configured


def unnamed_tokens(policy: Policy, chat: Chat) -> Tensor | None:
    """[V] true for rows of the embedding that are no token of the tokenizer (vocabularies are often padded to a round
    number); None if every row is a token."""
    tokenizer = getattr(chat, "tokenizer", None)
    if tokenizer is None:
        return None
    size = policy.model.config.get_text_config().vocab_size
    unnamed = torch.ones(size, dtype=torch.bool)
    unnamed[[id_ for id_ in tokenizer.get_vocab().values() if id_ < size]] = False
    return unnamed if unnamed.any() else None


def _ids(settings: Any) -> set[int]:
    found = getattr(settings, "eos_token_id", None)
    return set() if found is None else {found} if isinstance(found, int) else {int(i) for i in found}


def _special_ids(chat: Chat) -> set[int]:
    tokenizer = getattr(chat, "tokenizer", None)
    return set() if tokenizer is None else {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
