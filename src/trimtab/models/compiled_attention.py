"""Attention over token trees in C (`tree_attention.c`), for float32 on a CPU.

Torch's flash kernel of the CPU is made for long rows. The stretches of a token tree are short, some dozens of tokens,
and beside them it spends its time on small products, padding and copies: there it takes two to three times as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.batches.trees import Stretch, Tree
from trimtab.core.compiled import NO_WINDOW, asked_for, cannot_be_had, library

SOURCE = Path(__file__).with_name("tree_attention.c")
WIDE = 16
"""Queries of a block, and what the size of a head must be a multiple of; see the C file."""


@dataclass(frozen=True)
class CompiledPart:
    """The whole row as one part of attention (`tree_attention.AttentionPart`)."""

    blocks: Tensor
    """[n, 5] for each block of queries the first and their number, where their branch begins, and the prompt."""
    bounds: Tensor
    """[P + 1] where the blocks of each tree begin, and n."""
    most_seen: int
    """The most tokens that a block sees."""
    window: int
    asking: None = None
    seen: None = None
    merges: bool = False

    @classmethod
    def build(cls, trees: Sequence[Tree], window: int | None) -> CompiledPart:
        """The part of these trees, in the order of their row. A token sees the last `window` tokens, itself included,
        of its prompt and branch; all of them if None."""
        blocks: list[tuple[int, int, int, int, int]] = []
        bounds, first = [0], 0
        for tree in trees:
            for start, length, prompt in _branches(tree, first):
                ends = range(start, start + length, WIDE)
                blocks += [(at, min(WIDE, start + length - at), start, *prompt) for at in ends]
            bounds.append(len(blocks))
            first += tree.num_tokens
        most_seen = max((at + count - start + length for at, count, start, _, length in blocks), default=0)
        window = NO_WINDOW if window is None else window
        return cls(torch.tensor(blocks).view(-1, 5), torch.tensor(bounds), most_seen, window)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """See `AttentionPart`."""
        size, states = query.shape[-1], [_padded(x) for x in (query, key, value)]
        n, heads, padded = states[0].shape
        output, lse = query.new_empty(n, heads, padded), query.new_empty(n, heads)
        room = self._room(padded)
        _loaded().attend_forward(
            _states(states), self.blocks.data_ptr(), len(self.blocks), heads, heads // key.shape[1], padded, scaling,
            self.window, output.data_ptr(), lse.data_ptr(), room.data_ptr(), room.shape[1], len(room),
        )  # fmt: skip
        return output[..., :size].contiguous(), lse

    def gradients(
        self, grad: Tensor, states: tuple[Tensor, Tensor, Tensor], output: Tensor, lse: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionPart`."""
        size, kv_heads = grad.shape[-1], states[1].shape[1]
        of_all = [_padded(x) for x in states]
        grad, output, lse = _padded(grad).contiguous(), _padded(output).contiguous(), lse.contiguous()
        heads, padded = grad.shape[1:]
        found = [torch.zeros_like(grad) for _ in range(3)]
        room = self._room(padded)
        _loaded().attend_backward(
            _states(of_all), grad.data_ptr(), output.data_ptr(), lse.data_ptr(), self.blocks.data_ptr(),
            self.bounds.data_ptr(), len(self.bounds) - 1, heads, heads // kv_heads, padded, scaling, self.window,
            (c_void_p * 3)(*(x.data_ptr() for x in found)), room.data_ptr(), room.shape[1], len(room),
        )  # fmt: skip
        if heads != kv_heads:  # sum over all query heads that read one key head
            found[1:] = [x.view(len(x), kv_heads, -1, padded).sum(2) for x in found[1:]]
        of_query, of_key, of_value = (x[..., :size] for x in found)
        return of_query, of_key, of_value

    def _room(self, size: int) -> Tensor:
        """Working memory, a row for each thread."""
        return torch.empty(torch.get_num_threads(), 2 * WIDE * (size + self.most_seen))


def takes_compiled(x: Tensor) -> bool:
    """Whether attention of states like `x`, or of a model with weights like it, is compiled: in float32 on a CPU with a
    compiler, unless the environment asks for torch. Raises EngineError if it asks for compiled kernels that cannot be
    had."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    asked = asked_for()
    found = asked != "torch" and _functions() is not None
    if asked == "compiled" and not found:
        raise cannot_be_had()
    return found


def _functions() -> ctypes.CDLL | None:
    return library(SOURCE, _declare)


def _declare(found: ctypes.CDLL) -> None:
    p, i, f = c_void_p, c_int64, c_float
    found.attend_forward.argtypes = [p, p, i, i, i, i, f, i, p, p, p, i, i]
    found.attend_backward.argtypes = [p, p, p, p, p, p, i, i, i, i, f, i, p, p, i, i]
    found.attend_forward.restype = found.attend_backward.restype = None


def _loaded() -> ctypes.CDLL:
    found = _functions()
    assert found is not None
    return found


class _StatesInC(ctypes.Structure):
    """`states` of the C file."""

    _fields_ = (("at", c_void_p), ("token", c_int64), ("head", c_int64))


def _states(states: Sequence[Tensor]) -> ctypes.Array[_StatesInC]:
    assert all(x.dtype == torch.float32 and x.stride(2) == 1 for x in states)
    return (_StatesInC * len(states))(*(_StatesInC(x.data_ptr(), x.stride(0), x.stride(1)) for x in states))


def _padded(x: Tensor) -> Tensor:
    """x [N, H, D] with dense heads whose size is a multiple of WIDE: zeros at the end change no score and no output."""
    x = pad(x, (0, -x.shape[-1] % WIDE)) if x.shape[-1] % WIDE else x
    return x if x.stride(2) == 1 else x.contiguous()


def _branches(tree: Tree, first: int) -> list[tuple[int, int, Stretch]]:
    """The stretches of a tree that begins at `first`: start, length, and the prompt that all their tokens see."""
    if len(tree.branches) == 1:
        return [(first, tree.num_tokens, (first, 0))]
    nodes = list(tree.nodes())
    prompt = (first, nodes[0][1])
    return [(first + at, length, prompt if number else (first, 0)) for number, (at, length) in enumerate(nodes)]
