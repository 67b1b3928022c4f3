"""Keys and values of the sequences being decoded: a prompt once for its whole group, replies in rows that are refilled.
With a group size of 1, prompt and reply are stored one after the other in one row, and one product covers both.

Rows 0 to n - 1 always hold the n replies still being decoded. When a reply ends, the last row is moved into its place,
so no product is spent on finished sequences, and a waiting prompt can start as soon as there is room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trimtab.batches.device import CPU, to_device
from trimtab.batches.trees import Strips
from trimtab.core.errors import EngineError
from trimtab.engines.local.kernels import CompiledKernels, Kernels
from trimtab.models.attention import UNSEEN, Attend, Window

AttendWithin = Callable[[int, Tensor, Tensor, Tensor, float, int | None], Tensor]
"""An `Attend` that supports only int windows, and no attention sinks."""

Buffers = Callable[[int, Tensor | None], tuple[Tensor, ...]]
"""The keys and values of a layer, as `SlotCache` keeps them. They are made for the first key [N, KV heads, D]."""


class SlotCache:
    """Room for `num_rows` replies of `reply_width` tokens to `num_prompts` prompts of `prompt_width` tokens."""

    def __init__(
        self,
        *,
        num_rows: int,
        num_prompts: int,
        group_size: int,
        prompt_width: int,
        reply_width: int,
        kernels: Kernels,
        device: torch.device = CPU,
    ) -> None:
        """`device` holds the keys and values; what says whose they are stays on the CPU, and each step sends the
        indices that it needs once."""
        self.num_rows = num_rows
        self.num_prompts = num_prompts
        self.group_size = group_size
        self._prompt_width = prompt_width
        self._reply_width = reply_width
        self._kernels = kernels
        self._device = device
        self._layers: dict[int, tuple[Tensor, ...]] = {}
        self.sequences = torch.empty(0, dtype=torch.int64)
        """[n] the sequence that each row holds: prompt number * group_size + number in its group."""
        self.lengths = torch.empty(0, dtype=torch.int64)
        """[n] the number of tokens of each reply whose keys are stored."""
        self._prompt_of = torch.empty(0, dtype=torch.int64)
        self._prompt_lengths = torch.empty(0, dtype=torch.int64)

    @property
    def room(self) -> int:
        """The number of prompts that can start now, with all their replies."""
        rows = (self.num_rows - len(self.sequences)) // self.group_size
        return max(0, min(rows, self.num_prompts - len(self._prompt_lengths)))

    @property
    def positions(self) -> Tensor:
        """[n] the position of each reply's next token in its own sequence."""
        return self._prompt_lengths[self._prompt_of] + self.lengths

    def add(self, numbers: Sequence[int], prompts: Sequence[Sequence[int]]) -> Attend:
        """Starts every reply to these prompts, whose indices are `numbers`. Returns the attention for one flat row that
        holds the prompts one after the other; it also stores their keys and values."""
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
        strips = Strips.build(list(zip(starts, lengths.tolist(), strict=True))).to(self._device)
        longest = strips.rows.shape[1]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
            queries, keys, values = (strips.cut(x) for x in (query, key, value))
            self._kernels.store(self._buffers(layer, key)[:2], first, keys, values)
            near = None
            if window is not None and window < longest:
                slot = torch.arange(longest, device=self._device)
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

        return _of_windows(attend)

    def extend(self) -> Attend:
        """Attention for one more token of every reply: it sees its prompt, its reply so far and itself."""
        attend: Attend
        if isinstance(self._kernels, CompiledKernels):
            whole = self.group_size == 1
            shared = {} if whole else {"prompt_of": self._prompt_of, "prompt_lengths": self._prompt_lengths}
            places = self.positions if whole else self.lengths
            attend = StepAttend(self._kernels, self._buffers, {"places": places, **shared})
        else:
            attend = _of_windows(self._extend_whole() if self.group_size == 1 else self._extend_shared())
        self.lengths = self.lengths + 1
        return attend

    def _extend_whole(self) -> AttendWithin:
        width = int(self.positions.max()) + 1
        positions, rows, slots = map(
            self._sent, (self.positions, torch.arange(len(self.positions)), torch.arange(width))
        )
        own = positions[:, None]
        biases: dict[int | None, Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
            keys, values = self._buffers(layer, key)
            keys[rows, :, positions] = key
            values[rows, :, positions] = value
            if window not in biases:
                biases[window] = _unseen((slots <= own) & (slots > own - (window or width)))
            # Query heads that share a key head are treated as several tokens of that head. Plain products are twice as
            # fast here as the flash kernel, which is made for many queries.
            queries = query.view(len(rows), key.shape[1], -1, key.shape[2]) * scaling
            scores = queries @ keys[: len(rows), :, :width].transpose(-1, -2)
            weights = scores.float().add_(biases[window]).softmax(-1).to(value.dtype)
            return (weights @ values[: len(rows), :, :width]).view(query.shape)

        return attend

    def _extend_shared(self) -> AttendWithin:
        places, positions = self.lengths, self.positions
        num_rows, num_prompts = len(places), len(self._prompt_lengths)
        width, prompt_width = int(places.max()) + 1, int(self._prompt_lengths.max())
        cell = self._sent(self._prompt_of * self.group_size + self.sequences % self.group_size)
        stored_at, rows = self._sent(places), self._sent(torch.arange(num_rows))
        biases: dict[int | None, Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
            prompt_keys, prompt_values, keys, values = self._buffers(layer, key)
            keys[rows, :, stored_at] = key
            values[rows, :, stored_at] = value
            if window not in biases:
                biases[window] = self._bias(places, positions, prompt_width, width, window)
            kv_heads, size = key.shape[1:]
            # As in `_extend_whole`, and the replies of a prompt are side by side too: its keys are read once for all.
            queries = query.view(num_rows, kv_heads, -1, size) * scaling
            by_prompt = _to_prompts(queries, cell, num_prompts, self.group_size)
            shared = by_prompt @ prompt_keys[:num_prompts, :, :prompt_width].transpose(-1, -2)
            own = queries @ keys[:num_rows, :, :width].transpose(-1, -2)
            scores = torch.cat([_to_rows(shared, cell, self.group_size), own], -1)
            weights = scores.float().add_(biases[window]).softmax(-1).to(value.dtype)
            by_prompt = _to_prompts(weights[..., :prompt_width], cell, num_prompts, self.group_size)
            output = _to_rows(by_prompt @ prompt_values[:num_prompts, :, :prompt_width], cell, self.group_size)
            output += weights[..., prompt_width:] @ values[:num_rows, :, :width]
            return output.reshape(num_rows, -1, size)

        return attend

    def _bias(self, places: Tensor, positions: Tensor, prompt_width: int, width: int, window: int | None) -> Tensor:
        """[n, 1, 1, prompt_width + width] added to scores: 0 where a reply's next token sees a place of its prompt or
        of the reply, else `UNSEEN`."""
        starts = self._prompt_lengths[self._prompt_of]
        prompt_slots, slots = torch.arange(prompt_width), torch.arange(width)
        of_prompt, own = prompt_slots < starts[:, None], slots <= places[:, None]
        if window is not None:
            oldest = (positions - window)[:, None]
            of_prompt &= prompt_slots > oldest
            own &= starts[:, None] + slots > oldest
        return self._sent(_unseen(torch.cat([of_prompt, own], -1)))

    def keep(self, alive: Tensor) -> Tensor:
        """Frees the rows of replies that are not `alive` [n]. Returns [n'] the old row of each reply that is kept."""
        whole = self.group_size == 1
        order = self._close_gaps(alive, (0, 1) if whole else (2, 3))
        self.sequences, self.lengths = self.sequences[order], self.lengths[order]
        if whole:
            self._prompt_lengths, self._prompt_of = self._prompt_lengths[order], torch.arange(len(order))
            return order
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
            to, from_ = self._sent(gaps), self._sent(movers)
            for layer in self._layers.values():
                for index in buffers:
                    layer[index][to] = layer[index][from_]
        order = torch.arange(count)
        order[gaps] = movers
        return order

    def _sent(self, x: Tensor) -> Tensor:
        return to_device(x, self._device)

    def _buffers(self, layer: int, key: Tensor | None) -> tuple[Tensor, ...]:
        """The keys and values of a layer. With a group size of 1, two tensors hold prompts and replies; otherwise two
        hold the prompts and two more the replies. They are made for the first `key`."""
        if key is not None and layer not in self._layers:
            rooms = [(self.num_prompts, self._prompt_width), (self.num_rows, self._reply_width)]
            if self.group_size == 1:
                rooms = [(self.num_rows, self._prompt_width + self._reply_width)]
            self._layers[layer] = tuple(kept for room in rooms for kept in self._kernels.cache(key, *room))
        return self._layers[layer]


class StepAttend:
    """Attention for one more token of every reply by compiled kernels: of one block, or of all in `CompiledBlocks`."""

    def __init__(self, kernels: CompiledKernels, buffers: Buffers, seen: dict[str, Tensor]) -> None:
        """`seen` are `places`, `prompt_of` and `prompt_lengths` as in `CompiledKernels.attend`."""
        self._kernels = kernels
        self._buffers = buffers
        self.seen = seen

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: Window,
        sinks: Tensor | None = None,
    ) -> Tensor:
        *prompts, keys, values = self._buffers(layer, key)
        return self._kernels.attend(
            query,
            key,
            value,
            scaling=scaling,
            window=_checked(layer, window, sinks),
            rows=(keys, values),
            prompts=(prompts[0], prompts[1]) if prompts else None,
            **self.seen,
        )

    def caches(self, num_layers: int) -> list[tuple[Tensor, ...]]:
        """The keys and values of each block, in which those of the prompts stand."""
        return [self._buffers(layer, None) for layer in range(num_layers)]


def _of_windows(attend: AttendWithin) -> Attend:
    """`attend` as an `Attend` for every model. It raises EngineError for attention that slots do not compute."""

    def checked(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: Window,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return attend(layer, query, key, value, scaling, _checked(layer, window, sinks))

    return checked


def _checked(layer: int, window: Window, sinks: Tensor | None) -> int | None:
    """The window of a layer. Raises EngineError for attention that slots do not compute."""
    if sinks is not None or callable(window):
        what = "attention sinks" if sinks is not None else "a mask that is no window"
        raise EngineError(
            f"this model has {what}, which sampling over slots does not compute",
            where=f"layer {layer}",
            fix="sample with another engine; please report this",
        )
    return window


def _unseen(seen: Tensor) -> Tensor:
    """[n, 1, 1, T] added to scores: 0 where a place is seen [n, T], else `UNSEEN`."""
    seen = seen[:, None, None]
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, UNSEEN)


def _to_prompts(x: Tensor, cell: Tensor, num_prompts: int, group_size: int) -> Tensor:
    """[P, H, G * R, X] the rows [n, H, R, X] side by side for each prompt, with zeros for replies that have ended. Row
    i goes to place `cell[i]` of the P * G replies."""
    heads, repeats, size = x.shape[1:]
    grid = x.new_zeros(num_prompts * group_size, heads, repeats, size)
    grid[cell] = x
    by_prompt = grid.view(num_prompts, group_size, heads, repeats, size).transpose(1, 2)
    return by_prompt.reshape(num_prompts, heads, -1, size)


def _to_rows(x: Tensor, cell: Tensor, group_size: int) -> Tensor:
    """[n, H, R, X] from [P, H, G * R, X]: the inverse of `_to_prompts`."""
    num_prompts, heads, _, size = x.shape
    return x.view(num_prompts, heads, group_size, -1, size).transpose(1, 2).flatten(0, 1)[cell]
