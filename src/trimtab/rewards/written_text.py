"""How a reward model of another program reads a conversation: as `tokenizer.apply_chat_template` writes it as a whole.

Models of the reward stage read a prompt with its generation prompt and then a reply. Some templates write the same
conversation otherwise when the reply is part of it: Qwen 3.5 and DeepSeek R1 open a thought in the generation prompt
only, and Mistral writes a system turn only before the last user turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.core.errors import DataError
from trimtab.core.types import Message, Prompt
from trimtab.data.chat import Chat

Ids = tuple[tuple[int, ...], tuple[int, ...]]
"""The token ids of a prompt and of a reply to it."""


@dataclass(frozen=True)
class WrittenText:
    """Conversations as a template writes them, up to the token at which transformers reads a score."""

    chat: Chat
    pad_id: int | None
    """The pad token of the model's configuration. It is often the eos token, and then a score is read before that."""
    ending: tuple[int, ...]
    """The ids behind the text of a reply."""

    @classmethod
    def of(cls, chat: Chat, pad_id: int | None) -> WrittenText:
        """The reading of a model with this chat and pad token."""
        without = cls(chat, pad_id, ())
        one, other = (without.encode([[Message("user", "a"), Message("assistant", text)]])[0] for text in "bc")
        if one is None or other is None:
            return cls(chat, pad_id, (chat.end_id,))
        same = 0
        while same < len(one) - 1 and one[-1 - same] == other[-1 - same]:
            same += 1
        return cls(chat, pad_id, one[len(one) - same :])

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[int, ...] | None]:
        """For each conversation its ids, without padding tokens at their end; None if a turn holds a special token,
        which would not be read as text. Raises DataError if the template refuses a conversation."""
        texts, safe = [], []
        for messages, text in zip(conversations, self.chat.render_many(conversations, False), strict=True):
            if isinstance(text, DataError):
                raise text
            safe.append(not any(self.chat.holds_special_token(m.content) for m in messages))
            texts += [text] if safe[-1] else []
        ids = iter(self.chat.words.encode(texts))
        return [self._without_padding(next(ids)) if is_safe else None for is_safe in safe]

    def _without_padding(self, ids: list[int]) -> tuple[int, ...]:
        while len(ids) > 1 and ids[-1] == self.pad_id:
            ids = ids[:-1]
        return tuple(ids)

    def read(self, pairs: Sequence[tuple[Prompt, str]], usual: Sequence[Ids]) -> list[Ids]:
        """The ids of prompts and finished replies. `usual` are those of each prompt with its generation prompt and of
        each reply: they say where a conversation is split, and stand for one with a special token in a turn."""
        whole = self.encode([(*prompt.messages, Message("assistant", reply)) for prompt, reply in pairs])
        return [own if ids is None else _split(ids, own[0]) for ids, own in zip(whole, usual, strict=True)]


def _split(ids: tuple[int, ...], prompt: tuple[int, ...]) -> Ids:
    """The ids that begin as those of a prompt, and the others, which are at least one."""
    at = 0
    while at < min(len(ids) - 1, len(prompt)) and ids[at] == prompt[at]:
        at += 1
    return ids[:at], ids[at:]
