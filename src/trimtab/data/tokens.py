"""Records as columns of numbers: token ids, lengths, and hashes that say which prompts and replies are the same.

What a stage needs to know of its data before the first step (which examples are held out, which share a prompt, which
fit) is computed from these columns, and a column may lie on disk. The texts stay in their source; a tree is built when
it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, LabelledResponse, PreferencePair, Prompt, prompt_id
from trimtab.data.chat import Chat

Array = NDArray[Any]
Columns = dict[str, Array]
T = TypeVar("T")

DTYPES: dict[str, str] = {
    "row": "<u4",  # the row of the source that a record is made from
    "id_hash": "<u8",
    "messages_hash": "<u8",  # of the prompt's messages; as a fraction of 2^64 it decides whether the prompt is held out
    "num_prompt": "<u4",
    "num_mask": "<u4",  # the number of tokens of the prompt, or 0 without a mask
    "margin": "<f8",  # nan if there is none
    "label": "<f8",
    "reply_hash": "<u8",  # this column and the next have an entry for each reply
    "num_reply": "<u4",
    "ids": "<u4",  # token after token, record after record: the prompt, then its replies; "<u2" if that is enough
    "mask": "|b1",  # which tokens are learnt from, for prompts with earlier replies that are learnt from
}
REPLIES: dict[type, int] = {Demonstration: 1, LabelledResponse: 1, PreferencePair: 2}


def tokenise(chat: Chat, records: Sequence[Any], rows: Sequence[int]) -> tuple[Columns, dict[int, DataError]]:
    """The columns of records, and the errors of records that the chat template refuses, by the place of the record.
    `rows` holds the row of each record in its source; if one record of a row is refused, the row gives none."""
    prompts = [record.prompt for record in records]
    encoded = chat.encode_prompts([prompt.messages for prompt in prompts])
    refused = {i: found for i, found in enumerate(encoded) if isinstance(found, DataError)}
    without = {rows[i] for i in refused}
    kept = [i for i in range(len(records)) if rows[i] not in without]
    texts = [_replies(records[i]) for i in kept]
    replies = iter(chat.encode_responses([text for of_record in texts for text in of_record]))
    ids: list[int] = []
    mask: list[bool] = []
    columns: dict[str, list[Any]] = {name: [] for name in DTYPES}
    for i, own_texts in zip(kept, texts, strict=True):
        found = encoded[i]
        assert not isinstance(found, DataError)
        prompt_ids, prompt_mask = found
        record, prompt = records[i], prompts[i]
        encoded_replies = [next(replies) for _ in own_texts]
        columns["row"].append(rows[i])
        columns["id_hash"].append(hash_of(prompt.id))
        columns["messages_hash"].append(hash_of(prompt_id(prompt.messages)))
        columns["num_prompt"].append(len(prompt_ids))
        columns["margin"].append(_margin(record))
        columns["label"].append(float(getattr(record, "label", 1.0)))
        columns["reply_hash"] += map(hash_of, own_texts)
        columns["num_reply"] += map(len, encoded_replies)
        ids += prompt_ids
        for reply in encoded_replies:
            ids += reply
        learnt = without_turns(prompt_mask, getattr(record, "untrained_turns", ()))
        learnt = learnt if any(learnt) else []
        columns["num_mask"].append(len(learnt))
        mask += learnt
    columns["ids"], columns["mask"] = ids, mask
    dtypes = DTYPES | {"ids": "<u2"} if chat.highest_id < 2**16 else DTYPES
    return {name: np.array(values, dtypes[name]) for name, values in columns.items()}, refused


def hash_of(text: str) -> int:
    """Eight bytes of a text's SHA-256, the same on every machine. One file in 40 with a billion texts has two texts
    with the same hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _replies(record: Any) -> tuple[str, ...]:
    return (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record.response,)


def _margin(record: Any) -> float:
    margin = getattr(record, "margin", None)
    return float("nan") if margin is None else margin


def without_turns(mask: Sequence[bool], turns: Sequence[int]) -> list[bool]:
    """The mask without the assistant turns of these numbers: each run of trained tokens is one turn.

    If the template rewrites earlier turns, only the last turn is trained, and there is nothing to take out.
    """
    starts = [i for i, trained in enumerate(mask) if trained and not (i and mask[i - 1])]
    found = list(mask)
    for turn in turns if len(starts) > max(turns, default=0) else ():
        end = next((i for i in range(starts[turn], len(mask)) if not mask[i]), len(mask))
        found[starts[turn] : end] = [False] * (end - starts[turn])
    return found


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, size: int, make: Callable[[int], T]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._make(i) for i in range(self._size)[place]]
        return self._make(range(self._size)[place])


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The columns of the records of one source. A part of a table shares its columns and has another `chosen`."""

    columns: Columns
    num_replies: int
    """The number of replies of each record: two for a pair."""
    num_used: int
    """How many of these count: only the first if a pair is used as a demonstration."""
    read: Callable[[Array], list[Any]]
    """Takes the numbers of records and gives these records, as texts."""
    chosen: Array
    """The numbers of the records that count, in order."""

    def __len__(self) -> int:
        return len(self.chosen)

    def of(self, name: str) -> Array:
        """A column of the records that count, one entry each."""
        return np.asarray(self.columns[name][self.chosen])

    def part(self, chosen: Array) -> TokenTable:
        """A table with only the records of these numbers."""
        return replace(self, chosen=chosen)

    def best_replies(self) -> TokenTable:
        """A table with only the chosen replies of pairs, each once, without those that are rejected in another pair."""
        replies = self.columns["reply_hash"].reshape(-1, self.num_replies)[self.chosen]
        # The factor is odd, so that different prompts stay different; sums of hashes are as good as hashes.
        prompts = self.of("messages_hash") * np.uint64(0x9E3779B97F4A7C15)
        chosen, rejected = prompts + replies[:, 0], prompts + replies[:, 1]
        _, first = np.unique(chosen, return_index=True)
        first = np.sort(first[~np.isin(chosen[first], rejected)])
        return replace(self, chosen=self.chosen[first], num_used=1)

    def records(self) -> list[Any]:
        """The records that count, as texts; they are read again from their source if they are not in memory."""
        return self.read(self.chosen)

    @cached_property
    def _starts(self) -> Array:
        """Where the tokens of each record begin."""
        sizes = self.columns["num_prompt"].astype(np.int64) + self._reply_sizes.sum(1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(sizes)])

    @cached_property
    def _mask_starts(self) -> Array:
        return np.concatenate([[0], np.cumsum(self.columns["num_mask"], dtype=np.int64)])

    @property
    def _reply_sizes(self) -> Array:
        return self.columns["num_reply"].reshape(-1, self.num_replies)

    def longest(self) -> Array:
        """The number of tokens of the longest reply, for each record that counts."""
        return np.asarray(self._reply_sizes[self.chosen, : self.num_used].max(1, initial=0)).astype(np.int64)

    def prompt(self, record: int) -> list[int]:
        """The token ids of a record's prompt."""
        start = int(self._starts[record])
        found: list[int] = self.columns["ids"][start : start + int(self.columns["num_prompt"][record])].tolist()
        return found

    def prompt_mask(self, record: int) -> list[bool]:
        """Which tokens of a prompt belong to earlier replies that are learnt from."""
        found: list[bool] = self.columns["mask"][self._mask_starts[record] : self._mask_starts[record + 1]].tolist()
        return found or [False] * int(self.columns["num_prompt"][record])

    def replies(self, record: int) -> list[tuple[int, list[int]]]:
        """The hash of the text and the token ids of each reply of a record."""
        at = int(self._starts[record]) + int(self.columns["num_prompt"][record])
        found = []
        for place in range(record * self.num_replies, record * self.num_replies + self.num_used):
            size = int(self.columns["num_reply"][place])
            found.append((int(self.columns["reply_hash"][place]), self.columns["ids"][at : at + size].tolist()))
            at += size
        return found

    def first_ids(self) -> Array:
        """The first token of each prompt."""
        return np.asarray(self.columns["ids"][self._starts[self.chosen]])

    # ---- which side, which group ------------------------------------------------------------------------------------

    def split(self, held_out: float) -> tuple[TokenTable, TokenTable]:
        """The tables to train on and to hold out, split as `split.split_by_prompt` does."""
        rest = self.of("messages_hash").astype(np.float64) / 2**64 < held_out
        return self.part(self.chosen[~rest]), self.part(self.chosen[rest])

    def by_prompt(self) -> tuple[Array, Array]:
        """The numbers of the records, those of one prompt together, and where the records of each prompt begin (with
        the end of the last). Prompts are in the order of their first records; the records of a prompt keep theirs."""
        order, starts = _grouped(self.of("id_hash"))
        return self.chosen[order], starts

    def with_an_id_of_another_prompt(self) -> list[tuple[int, int]]:
        """Records whose prompt has the id of an earlier, other prompt: (the record, that earlier one)."""
        order, starts = _grouped(self.of("id_hash"))
        messages = self.of("messages_hash")[order]
        firsts = np.repeat(starts[:-1], np.diff(starts))
        wrong: list[int] = np.flatnonzero(messages != messages[firsts]).tolist() if len(order) else []
        found = [(int(self.chosen[order[i]]), int(self.chosen[order[firsts[i]]])) for i in wrong]
        return sorted(found)


def _grouped(keys: Array) -> tuple[Array, Array]:
    """The places of the keys, equal keys together and groups in the order of their first key, and where each group
    begins (with the end of the last)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    group = rank[inverse]
    order = np.argsort(group, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(first)))])


def table_of(chat: Chat, kind: type, records: Iterable[Any]) -> TokenTable:
    """The table of records in memory. Raises DataError for a conversation that the chat template refuses, and for an
    id that two prompts share."""
    records = list(records)
    columns, refused = tokenise(chat, records, range(len(records)))
    for error in refused.values():
        raise error
    table = TokenTable(
        columns, REPLIES[kind], REPLIES[kind], lambda chosen: [records[i] for i in chosen], np.arange(len(records))
    )
    for record, other in table.with_an_id_of_another_prompt():
        raise id_of_two(records[record].prompt, records[other].prompt, where=f"record {record + 1}", other=other + 1)
    return table


def id_of_two(prompt: Prompt, other_prompt: Prompt, *, where: str, other: str | int) -> DataError:
    """The error for two prompts that share one id."""
    return DataError(
        f"the id {prompt.id!r} is that of another prompt: here {prompt.text[:60]!r}, "
        f"in {f'record {other}' if isinstance(other, int) else other} {other_prompt.text[:60]!r}",
        where=where,
        fix="give each prompt an id of its own, or none: prompts are then told apart by their messages",
    )
