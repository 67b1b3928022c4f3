"""The local generator: samples replies with the weights being trained, and needs nothing but torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trimtab import seeds
from trimtab.data.chat import Chat
from trimtab.errors import DataError
from trimtab.math.logprobs import sample, truncated_logprobs
from trimtab.models.roles import Policy
from trimtab.types import Prompt, Rollout


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
    batch_size: int = 256
    """Replies decoded together. Speed and memory only."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}; it must be above 0 (top_k = 1 is greedy decoding)")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"top_p = {self.top_p}, top_k = {self.top_k}; top_p is in (0, 1], top_k is 0 or more")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens and batch_size must be at least 1")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn, so that sampling and policy distributions differ."""
        return self.top_p < 1 or self.top_k > 0


class LocalGenerator:
    """Decodes with a key-value cache in which a prompt shared by a group is computed once."""

    def __init__(self, policy: Policy, chat: Chat, sampling: Sampling) -> None:
        self.policy = policy
        self.chat = chat
        self.sampling = sampling

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, seed: int) -> list[Rollout]:
        """`group_size` rollouts of each prompt. Every reply has random numbers of its own, made from the seed, its
        prompt's id and its number in the group, so batch size and order of prompts do not change what is drawn."""
        encoded = [self._encode(p) for p in prompts]
        seen: dict[str, int] = {}
        uniforms = np.empty((len(prompts), group_size, self.sampling.max_new_tokens))
        for i, prompt in enumerate(prompts):
            repeat = seen[prompt.id] = seen.get(prompt.id, -1) + 1
            for g in range(group_size):
                draw = seeds.generator(seed, prompt.id, repeat, g)
                uniforms[i, g] = draw.random(self.sampling.max_new_tokens)
        rollouts: list[Rollout] = []
        per_batch = max(1, self.sampling.batch_size // group_size)
        for start in range(0, len(prompts), per_batch):
            part = slice(start, start + per_batch)
            ids, logprobs = self._decode(encoded[part], group_size, torch.from_numpy(uniforms[part]).flatten(0, 1))
            for j, (response_ids, response_logprobs) in enumerate(zip(ids, logprobs, strict=True)):
                prompt = prompts[start + j // group_size]
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        response=self.chat.decode_response(response_ids),
                        prompt_ids=tuple(encoded[start + j // group_size]),
                        response_ids=tuple(response_ids),
                        logprobs=tuple(response_logprobs),
                        finish_reason="stop" if response_ids[-1] in self.chat.stop_ids else "length",
                    )
                )
        return rollouts

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = self.chat.encode_prompt(prompt.messages)
        if len(ids) > self.sampling.max_prompt_tokens:
            raise DataError(
                f"a prompt of {len(ids)} tokens; the longest allowed is {self.sampling.max_prompt_tokens}",
                where=f"prompt {prompt.id}: {prompt.text[:60]!r}",
                fix="raise sampling.max_prompt_tokens, or drop long prompts with max_prompt_tokens of the data",
            )
        return ids

    @torch.no_grad()
    def _decode(
        self, encoded: Sequence[Sequence[int]], group_size: int, uniforms: Tensor
    ) -> tuple[list[list[int]], list[list[float]]]:
        width = max(len(p) for p in encoded)
        input_ids = torch.tensor([[self.chat.pad_id] * (width - len(p)) + list(p) for p in encoded])
        mask = torch.arange(width)[None, :] >= torch.tensor([[width - len(p)] for p in encoded])
        cache = roomy_cache(self.policy.model)
        hidden = self._step(input_ids, mask, cache, (mask.cumsum(1) - 1).clamp(min=0))
        if group_size > 1:
            cache.batch_repeat_interleave(group_size)
            hidden = hidden.repeat_interleave(group_size, 0)
            mask = mask.repeat_interleave(group_size, 0)
        lengths = mask.sum(1)
        num_rows = len(mask)
        active = torch.arange(num_rows)
        stop_ids = torch.tensor(sorted(self.chat.stop_ids))
        drawn = torch.zeros(num_rows, self.sampling.max_new_tokens, dtype=torch.int64)
        logprobs = torch.zeros(num_rows, self.sampling.max_new_tokens)
        num_drawn = torch.full((num_rows,), self.sampling.max_new_tokens)
        alive = torch.ones(num_rows, dtype=torch.bool)
        for t in range(self.sampling.max_new_tokens):
            logits = self.policy.head(hidden).float()
            distribution = truncated_logprobs(
                logits,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                top_k=self.sampling.top_k,
            )
            tokens = sample(distribution, uniforms[active, t])
            drawn[active, t] = tokens
            logprobs[active, t] = distribution.gather(1, tokens[:, None]).squeeze(1)
            stopped = alive[active] & torch.isin(tokens, stop_ids)
            num_drawn[active[stopped]] = t + 1
            alive[active[stopped]] = False
            if not alive.any() or t + 1 == self.sampling.max_new_tokens:
                break
            if int(alive.sum()) <= 0.75 * len(active):  # finished rows are dropped from the cache once they add up
                keep = torch.nonzero(alive[active]).squeeze(1)
                cache.batch_select_indices(keep)
                active, mask, tokens = active[keep], mask[keep], tokens[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = self._step(tokens[:, None], mask, cache, (lengths[active] + t)[:, None])
        counts = num_drawn.tolist()
        return (
            [row[:n] for row, n in zip(drawn.tolist(), counts, strict=True)],
            [row[:n] for row, n in zip(logprobs.tolist(), counts, strict=True)],
        )

    def _step(self, input_ids: Tensor, mask: Tensor, cache: DynamicCache, position_ids: Tensor) -> Tensor:
        outputs = self.policy.model.base_model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        hidden: Tensor = outputs.last_hidden_state[:, -1]
        return hidden


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer with room to grow, so that a new token is written beside the old ones instead of copying them all.

    `keys` and `values` are views of the filled part of two buffers; an operation that replaces them (repeating or
    selecting rows) gives up the buffers, and the next token makes new ones.
    """

    ROOM = 32

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the states of new tokens [B, H, T, D]; returns all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._extended("_key_buffer", self.keys, key_states)
        self.values = self._extended("_value_buffer", self.values, value_states)
        return self.keys, self.values

    def _extended(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        length = old.shape[2] + new.shape[2]
        buffer: Tensor | None = getattr(self, name, None)
        if buffer is None or buffer.data_ptr() != old.data_ptr() or buffer.shape[2] < length:
            batch, heads, _, size = new.shape
            buffer = new.new_empty(batch, heads, length + self.ROOM, size)
            buffer[:, :, : old.shape[2]] = old
            setattr(self, name, buffer)
        buffer[:, :, old.shape[2] : length] = new
        return buffer[:, :, :length]


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache, its plain layers replaced by ones that do not copy themselves every token."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
        for layer in cache.layers
    ]
    return cache
