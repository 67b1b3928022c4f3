"""Keys and values of the sequences being decoded: a prompt once for its whole group, replies in rows that are refilled.

Rows 0 to n - 1 always hold the n replies still being written. A reply that ends gives its row to the last one, so no
product is spent on finished sequences, and a waiting prompt starts as soon as there is room for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trimtab.data.trees import Strips
from trimtab.models.attention import UNSEEN, Attend, attention_with_lse, merge_attention


class SlotCache:
    """Room for `num_rows` replies of `reply_width` tokens to `num_prompts` prompts of `prompt_width` tokens."""

    def __init__(
        self, *, num_rows: int, num_prompts: int, group_size: int, prompt_width: int, reply_width: int
    ) -> None:
        self.num_rows = num_rows
        self.num_prompts = num_prompts
        self.group_size = group_size
        self._prompt_width = prompt_width
        self._reply_width = reply_width
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.sequences = torch.empty(0, dtype=torch.int64)
        """[n] which sequence each row holds: prompt number * group_size + number in its group."""
        self.lengths = torch.empty(0, dtype=torch.int64)
        """[n] tokens of each reply whose keys are stored."""
        self._prompt_of = torch.empty(0, dtype=torch.int64)
        self._prompt_lengths = torch.empty(0, dtype=torch.int64)

    @property
    def room(self) -> int:
        """How many more prompts can start now, with all their replies."""
        rows = (self.num_rows - len(self.sequences)) // self.group_size
        return max(0, min(rows, self.num_prompts - len(self._prompt_lengths)))

    @property
    def positions(self) -> Tensor:
        """[n] the position of each reply's next token in its own sequence."""
        return self._prompt_lengths[self._prompt_of] + self.lengths

    def add(self, numbers: Sequence[int], prompts: Sequence[Sequence[int]]) -> Attend:
        """Starts every reply of these prompts, known by their numbers; returns the attention of the row that holds
        the prompts one after the other, which stores their keys and values."""
        first = len(self._prompt_lengths)
        assert len(prompts) <= self.room
        lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        group = torch.arange(self.group_size)
        self._prompt_lengths = torch.cat([self._prompt_lengths, lengths])
        new = (torch.tensor(numbers, dtype=torch.int64)[:, None] * self.group_size + group).flatten()
        self.sequences = torch.cat([self.sequences, new])
        self.lengths = torch.cat([self.lengths, torch.zeros_like(new)])
        owners = torch.arange(first, first + len(prompts))
        self._prompt_of = torch.cat([self._prompt_of, owners.repeat_interleave(self.group_size)])

        starts = (lengths.cumsum(0) - lengths).tolist()
        strips = Strips.build(list(zip(starts, lengths.tolist(), strict=True)))
        longest = strips.rows.shape[1]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
            queries, keys, values = (strips.cut(x) for x in (query, key, value))
            prompt_keys, prompt_values, _, _ = self._buffers(layer, key)
            prompt_keys[first : first + len(prompts), :, :longest] = keys
            prompt_values[first : first + len(prompts), :, :longest] = values
            near = None
            if window is not None and window < longest:
                slot = torch.arange(longest)
                near = (slot <= slot[:, None]) & (slot > slot[:, None] - window)
            output = scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=near,
                is_causal=near is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            return strips.back(output)

        return attend

    def extend(self) -> Attend:
        """Attention for one more token of every reply: it sees its prompt, its reply so far and itself."""
        places, lengths = self.lengths, self.lengths + 1
        num_rows, num_prompts = len(lengths), len(self._prompt_lengths)
        positions = self.positions
        width, prompt_width = int(lengths.max()), int(self._prompt_lengths.max())
        rows = torch.arange(num_rows)
        cell = self._prompt_of * self.group_size + self.sequences % self.group_size
        own_bias = _bias(torch.arange(width) <= places[:, None])[:, None, None]
        prompt_bias = _bias(torch.arange(prompt_width) < self._prompt_lengths[:, None])[:, None, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
            prompt_keys, prompt_values, keys, values = self._buffers(layer, key)
            keys[rows, :, places] = key
            values[rows, :, places] = value
            kv_heads, size = key.shape[1:]
            repeats = query.shape[1] // kv_heads
            # Query heads that share a key head stand side by side as if they were several tokens, and so do the
            # replies of one prompt: their keys are read once for all of them.
            queries = query.view(num_rows, kv_heads, repeats, size)
            grid = queries.new_zeros(num_prompts * self.group_size, kv_heads, repeats, size)
            grid[cell] = queries
            shape = (num_prompts, self.group_size, kv_heads, repeats, size)
            by_prompt = grid.view(shape).transpose(1, 2).reshape(num_prompts, kv_heads, -1, size)
            seen_own, seen_prompt = own_bias, prompt_bias
            if window is not None:
                seen_own, seen_prompt = self._windowed(window, positions, cell, repeats, own_bias, prompt_bias)
            own, own_lse = attention_with_lse(
                queries, keys[:num_rows, :, :width], values[:num_rows, :, :width], seen_own, scaling
            )
            shared, shared_lse = attention_with_lse(
                by_prompt,
                prompt_keys[:num_prompts, :, :prompt_width],
                prompt_values[:num_prompts, :, :prompt_width],
                seen_prompt,
                scaling,
            )
            back = (num_prompts, kv_heads, self.group_size, repeats)
            shared = shared.view(*back, size).transpose(1, 2).flatten(0, 1)[cell]
            shared_lse = shared_lse.reshape(back).transpose(1, 2).flatten(0, 1)[cell]
            merged, _ = merge_attention(own, own_lse, shared, shared_lse)
            return merged.reshape(num_rows, -1, size)

        self.lengths = lengths
        return attend

    def keep(self, alive: Tensor) -> Tensor:
        """Frees the rows of replies that are not `alive` [n]; returns [n'] the old row of each one that stays."""
        order = self._close_gaps(alive, (2, 3))
        self.sequences, self.lengths = self.sequences[order], self.lengths[order]
        self._prompt_of = self._prompt_of[order]
        in_use = torch.zeros(len(self._prompt_lengths), dtype=torch.bool)
        in_use[self._prompt_of] = True
        if not in_use.all():
            prompts = self._close_gaps(in_use, (0, 1))
            renamed = torch.empty(len(in_use), dtype=torch.int64)
            renamed[prompts] = torch.arange(len(prompts))
            self._prompt_of = renamed[self._prompt_of]
            self._prompt_lengths = self._prompt_lengths[prompts]
        return order

    def _close_gaps(self, alive: Tensor, buffers: tuple[int, int]) -> Tensor:
        count = int(alive.sum())
        gaps = torch.nonzero(~alive[:count]).squeeze(1)
        movers = torch.nonzero(alive[count:]).squeeze(1) + count
        if len(gaps):
            for layer in self._layers.values():
                for index in buffers:
                    layer[index][gaps] = layer[index][movers]
        order = torch.arange(count)
        order[gaps] = movers
        return order

    def _buffers(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if layer not in self._layers:
            heads, size = key.shape[1:]
            prompts = (self.num_prompts, heads, self._prompt_width, size)
            replies = (self.num_rows, heads, self._reply_width, size)
            # Zeros, since what is masked is still multiplied, by zero: garbage could be infinite.
            self._layers[layer] = tuple(key.new_zeros(s) for s in (prompts, prompts, replies, replies))  # type: ignore[assignment]
        return self._layers[layer]

    def _windowed(
        self, window: int, positions: Tensor, cell: Tensor, repeats: int, own_bias: Tensor, prompt_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two biases without the keys that lie `window` or more tokens back."""
        num_prompts, width = prompt_bias.shape[0], prompt_bias.shape[-1]
        starts = self._prompt_lengths[self._prompt_of]
        own = (
            own_bias
            + _bias(starts[:, None] + torch.arange(own_bias.shape[-1]) > (positions - window)[:, None])[:, None, None]
        )
        grid = torch.zeros(num_prompts * self.group_size, dtype=torch.int64)
        grid[cell] = positions - window
        oldest = grid.view(num_prompts, 1, self.group_size, 1)
        near = _bias(torch.arange(width) > oldest).repeat_interleave(repeats, 2)
        return own.clamp(min=UNSEEN), (prompt_bias + near).clamp(min=UNSEEN)


def _bias(visible: Tensor) -> Tensor:
    """0 where a key is seen; elsewhere a number whose exponential is 0 but which, unlike -inf, never makes a NaN of
    a row that sees nothing."""
    return torch.zeros(visible.shape).masked_fill_(~visible, UNSEEN)
