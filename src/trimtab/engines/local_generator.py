"""The local generator: samples replies with the weights being trained, and needs nothing but torch and transformers.

Every reply has a row of a cache that was allocated once; a reply that ends gives its row to one that waits, a prompt
is computed once for its group, and nothing is padded to the longest (`models/slots.py`). Llama-like models decode with
a fused forward pass (`models/fused.py`), others with their own forward, and those whose attention cannot be
replaced in padded rows (`padded_decoding.py`): the same replies, more slowly. Steps over the slots are computed in C
where the machine can compile it (`models/kernels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trimtab import seeds
from trimtab.data.chat import Chat
from trimtab.engines.padded_decoding import decode_padded
from trimtab.errors import DataError
from trimtab.math.logprobs import draw
from trimtab.models.adapters import using
from trimtab.models.attention import Attend, backbone, row_states
from trimtab.models.fused import FusedForward, supports_fusing
from trimtab.models.kernels import Kernels, find
from trimtab.models.roles import Policy
from trimtab.models.slots import SlotCache
from trimtab.types import Prompt, Rollout

PREFILL_TOKENS = 256
"""Prompts are started in rows of about this many tokens: enough for fast products, little memory."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn."""

    max_new_tokens: int = 64
    """Longest reply, its end token included."""
    temperature: float = 1.0
    """Logits are divided by it; the policy's log-probabilities use the same."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability; 1 keeps all."""
    top_k: int = 0
    """Only the most probable tokens; 0 keeps all."""
    max_prompt_tokens: int = 1024
    """A longer prompt is refused."""
    stop: tuple[str, ...] = ()
    """A reply also ends once it holds one of these texts; its tokens stay as drawn, its text ends before it."""
    batch_size: int = 256
    """Replies decoded together. Speed and memory only."""
    cache_gb: float = 4.0
    """Room for keys and values; fewer replies are decoded together where it would not suffice for batch_size."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}; it must be above 0 (top_k = 1 is greedy decoding)")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"top_p = {self.top_p}, top_k = {self.top_k}; top_p is in (0, 1], top_k is 0 or more")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens and batch_size must be at least 1")
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb = {self.cache_gb}; it must be above 0")
        if "" in self.stop:
            raise ValueError('stop holds an empty text, which every reply contains; take "" out')

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn, so that sampling and policy distributions differ."""
        return self.top_p < 1 or self.top_k > 0


Drawn = tuple[list[int], list[float], bool]
"""Ids and log-probabilities of a reply, and whether it stopped of itself."""


@dataclass(frozen=True)
class Forward:
    """The two halves of a decoding step."""

    hidden: Callable[[Tensor, Tensor, Attend], Tensor]
    """[n, D] from token ids [n], positions [n] and their attention."""
    logits: Callable[[Tensor], Tensor]
    """[n, V] from [n, D]."""


class LocalGenerator:
    """Decodes with a key-value cache in which a prompt shared by a group is computed once."""

    def __init__(self, policy: Policy, chat: Chat, sampling: Sampling) -> None:
        self.policy = policy
        self.chat = chat
        self.sampling = sampling

    @property
    def method(self) -> Literal["fused", "rows", "padded"]:
        """How this model decodes: a fused forward pass, its own forward over rows of slots, or padded rows."""
        if not self.policy.tree_form:
            return "padded"
        return "fused" if supports_fusing(self.policy.model) else "rows"

    @property
    def sampler(self) -> str:
        """The method, and whether its steps are compiled."""
        return f"{self.method}, compiled" if self.method != "padded" and self.kernels.compiled else self.method

    @property
    def kernels(self) -> Kernels:
        """What computes the steps: torch, or C where this machine and these weights allow it."""
        return find(next(self.policy.model.parameters()))

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, seed: int) -> list[Rollout]:
        """`group_size` rollouts of each prompt. Every reply has random numbers of its own, made from the seed, its
        prompt's id and its number in the group, so batch size and order of prompts do not change what is drawn."""
        encoded = [self.encode(p) for p in prompts]
        uniforms = self.uniforms(prompts, group_size=group_size, seed=seed)
        return [
            Rollout(
                prompt=prompts[i // group_size],
                response=self.text(ids),
                prompt_ids=tuple(encoded[i // group_size]),
                response_ids=tuple(ids),
                logprobs=tuple(logprobs),
                finish_reason="stop" if stopped else "length",
            )
            for i, (ids, logprobs, stopped) in enumerate(
                self.continue_ids(encoded, group_size=group_size, uniforms=uniforms)
            )
        ]

    def uniforms(self, prompts: Sequence[Prompt], *, group_size: int, seed: int) -> Tensor:
        """[prompts * group_size, max_new_tokens] the random numbers of each reply, one a token."""
        names = reply_names(prompts, group_size)
        uniforms = np.empty((len(names), self.sampling.max_new_tokens))
        for i, name in enumerate(names):
            uniforms[i] = seeds.generator(seed, *name).random(self.sampling.max_new_tokens)
        return torch.from_numpy(uniforms)

    def continue_ids(
        self,
        prefixes: Sequence[Sequence[int]],
        *,
        group_size: int,
        uniforms: Tensor,
        limits: Tensor | None = None,
    ) -> list[Drawn]:
        """`group_size` continuations of each prefix, in order; token ids go in and come out, and no text is made.

        `uniforms` [B, T] are the random numbers, `limits` [B] how many tokens each may have if not all T.
        """
        if not prefixes:
            return []
        replies = Replies(uniforms, self.sampling, self.chat, limits)
        with torch.no_grad(), using(self.policy.model, self.policy.adapter):
            if self.method == "padded":
                self._decode_padded(prefixes, group_size, replies)
            else:
                self._decode(prefixes, group_size, replies)
        return replies.finished()

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt. Raises DataError for one that is too long."""
        ids = self.chat.encode_prompt(prompt.messages)
        if len(ids) > self.sampling.max_prompt_tokens:
            raise DataError(
                f"a prompt of {len(ids)} tokens; the longest allowed is {self.sampling.max_prompt_tokens}",
                where=f"prompt {prompt.id}: {prompt.text[:60]!r}",
                fix="raise sampling.max_prompt_tokens, or drop long prompts with max_prompt_tokens of the data",
            )
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of a reply, up to the first stop text."""
        text = self.chat.decode_response(ids)
        return text[: min((at for s in self.sampling.stop if (at := text.find(s)) >= 0), default=len(text))]

    def _decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: Replies) -> None:
        kernels = self.kernels
        forward = self._forward(kernels)
        num_groups = self._num_groups(prompts, group_size, replies.width)
        slots = SlotCache(
            num_rows=num_groups * group_size,
            # A prompt stays until the last reply of its group has ended, while rows of the others are free again.
            num_prompts=min(len(prompts), num_groups if group_size == 1 else 2 * num_groups),
            group_size=group_size,
            prompt_width=max(len(p) for p in prompts),
            reply_width=replies.width,
            kernels=kernels,
        )
        # Taken from the end, the longest first, so that prompts of like lengths are decoded together.
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        hidden: Tensor | None = None
        while waiting or len(slots.sequences):
            # Prompts start several at a time: a forward pass over few tokens is slow.
            if waiting and slots.room >= min(len(waiting), max(1, num_groups // 8)):
                started = start_prompts(forward, slots, prompts, waiting)
                hidden = started if hidden is None else torch.cat([hidden, started])
            assert hidden is not None
            tokens, ended = replies.draw(forward.logits(hidden), slots.sequences, slots.lengths)
            if ended.any():
                tokens = tokens[slots.keep(~ended)]
            hidden = forward.hidden(tokens, slots.positions, slots.extend()) if len(tokens) else None

    def _num_groups(self, prompts: Sequence[Sequence[int]], group_size: int, reply_width: int) -> int:
        """Prompts decoded together with all their replies."""
        config = self.policy.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bytes_per_token = 2 * 4 * config.num_hidden_layers * heads * size
        prompt_copies = 1 if group_size == 1 else 2
        tokens = prompt_copies * max(len(p) for p in prompts) + group_size * reply_width
        room = int(self.sampling.cache_gb * 2**30 / (bytes_per_token * tokens))
        return max(1, min(len(prompts), self.sampling.batch_size // group_size, room))

    def _decode_padded(self, prompts: Sequence[Sequence[int]], group_size: int, replies: Replies) -> None:
        per_batch = max(1, self.sampling.batch_size // group_size)
        for start in range(0, len(prompts), per_batch):

            def draw_next(hidden: Tensor, sequences: Tensor, place: int, first: int = start) -> tuple[Tensor, Tensor]:
                places = torch.full_like(sequences, place)
                return replies.draw(self.policy.head(hidden), sequences + first * group_size, places)

            decode_padded(
                self.policy.model, prompts[start : start + per_batch], group_size, draw_next, pad_id=self.chat.pad_id
            )

    def _forward(self, kernels: Kernels) -> Forward:
        """The fastest forward pass for this model, with its weights as they are now."""
        model = self.policy.model
        if self.method == "rows":
            return Forward(lambda *row: row_states(backbone(model), *row), self.policy.head)
        # Made anew for every call, since weights change between calls in ways no version counter shows.
        fused = FusedForward(model, self.sampling.batch_size, kernels)
        fused.prove_fresh(model)
        return Forward(fused, fused.head)


def reply_names(prompts: Sequence[Prompt], group_size: int) -> list[tuple[str, int, int]]:
    """What each reply's random numbers are made from, besides a seed: its prompt's id, how often that prompt has come
    before, and the reply's number in its group."""
    seen: dict[str, int] = {}
    names = []
    for prompt in prompts:
        repeat = seen[prompt.id] = seen.get(prompt.id, -1) + 1
        names += [(prompt.id, repeat, g) for g in range(group_size)]
    return names


def start_prompts(forward: Forward, slots: SlotCache, prompts: Sequence[Sequence[int]], waiting: list[int]) -> Tensor:
    """[n, D] the hidden states from which the first tokens of newly started replies are drawn. As many prompts as
    there is room for are taken off the end of `waiting`."""
    states = []
    while waiting and slots.room:
        numbers: list[int] = []
        num_tokens = 0
        while waiting and len(numbers) < slots.room and num_tokens < PREFILL_TOKENS:
            numbers.append(waiting.pop())
            num_tokens += len(prompts[numbers[-1]])
        rows = [prompts[i] for i in numbers]
        ids = torch.tensor([token for row in rows for token in row])
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        hidden = forward.hidden(ids, positions, slots.add(numbers, rows))
        states.append(hidden[last].repeat_interleave(slots.group_size, 0))
    return torch.cat(states)


class Replies:
    """The tokens of B replies as they are drawn, their log-probabilities, and when each ends."""

    def __init__(self, uniforms: Tensor, sampling: Sampling, chat: Chat, limits: Tensor | None = None) -> None:
        """`uniforms` [B, T] are the random numbers, one a token; `limits` [B] end a reply before T tokens."""
        self.uniforms = uniforms
        self.width = uniforms.shape[1] if limits is None else int(limits.max())
        self.limits = torch.full((len(uniforms),), self.width) if limits is None else limits
        self.sampling = sampling
        self.chat = chat
        self.tokens = torch.zeros(uniforms.shape, dtype=torch.int64)
        self.logprobs = torch.zeros(uniforms.shape)
        self.lengths = torch.zeros(len(uniforms), dtype=torch.int64)
        self.stopped = torch.zeros(len(uniforms), dtype=torch.bool)
        self._stop_ids = torch.tensor(sorted(chat.stop_ids))
        # A character is at most four tokens, where tokens are bytes.
        self._tail = 4 * max((len(s) for s in sampling.stop), default=0)

    def draw(self, logits: Tensor, sequences: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens [n] of these sequences [n] at these places [n], from logits [n, V]; and whether a sequence
        has ended with it [n]."""
        tokens, logprobs = draw(
            logits.float(),
            self.uniforms[sequences, places],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
        )
        self.tokens[sequences, places] = tokens
        self.logprobs[sequences, places] = logprobs
        self.lengths[sequences] = places + 1
        stopped = torch.isin(tokens, self._stop_ids)
        if self.sampling.stop:
            stopped |= torch.tensor([self._holds_stop(*row) for row in zip(sequences, places, strict=True)])
        self.stopped[sequences] = stopped
        return tokens, stopped | (places + 1 == self.limits[sequences])

    def finished(self) -> list[Drawn]:
        """Every reply."""
        columns = (self.tokens.tolist(), self.logprobs.tolist(), self.lengths.tolist(), self.stopped.tolist())
        return [(ids[:n], logprobs[:n], stopped) for ids, logprobs, n, stopped in zip(*columns, strict=True)]

    def _holds_stop(self, sequence: Tensor, place: Tensor) -> bool:
        end = int(place) + 1
        text = self.chat.decode_response(self.tokens[sequence, max(0, end - self._tail) : end].tolist())
        return any(s in text for s in self.sampling.stop)
