"""The operations of a decoding step with few rows: in torch, and in C (`kernels.c`), which is faster.

The C file is compiled by the machine's own compiler (`core/compiled.py`). torch computes the same if there is no
compiler with OpenMP, on a GPU, and in bfloat16 on processors that do not multiply it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm, silu

from trimtab.core.compiled import NO_WINDOW, asked_for, cannot_be_had, library


class ProductForm(NamedTuple):
    """What is applied to the rows of an input before a product.

    - plain: nothing.
    - normed: rows [n, k] are divided by their root mean square, with `eps` added to the mean square, and multiplied
      with `norm` [k].
    - gated: of rows [n, 2 k], silu of the first half times the second half.
    """

    kind: Literal["plain", "normed", "gated"]
    norm: Tensor | None = None
    eps: float = 0.0


PLAIN, GATED = ProductForm("plain"), ProductForm("gated")

PACK_FROM = 1 << 16
"""Matrices of at least this many entries are reordered for oneDNN, if torch has it: 1.4 to 2 times faster for the few
rows of a decoding step, slower for small matrices. The limit is fixed and not measured at run time, so that a resumed
run rounds as the interrupted one did."""
SOURCE = Path(__file__).with_name("kernels.c")
FORMS = ("plain", "normed", "gated")
"""The kinds of `ProductForm`, in the order of kernels.c."""
MOST_LANES = 32
"""Rows are padded to a multiple of this: the floats that two vectors of the widest processors hold."""
BLOCK = 16
"""Compiled kernels keep the keys of this many tokens side by side; see kernels.c."""


class Matrices:
    """Linear layers of the same input, side by side, without gradients, laid out for products with few rows."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], num_rows: int) -> None:
        """`weights` [out, k], `biases` [out] or None. `num_rows`, the rows of a usual product, is a hint for the
        layout."""
        dtype = product_dtype(weights[0])
        weight = torch.cat([w.to(dtype) for w in weights])
        present = [b.detach().to(dtype) for b in biases if b is not None]
        self._bias = torch.cat(present) if present else None
        self._weight, self._dtype = weight, dtype
        fits = weight.device.type == "cpu" and dtype == torch.float32  # others need processors of certain kinds
        packs = fits and weight.numel() >= PACK_FROM and has_onednn()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows) if packs else None
        if self._packed is not None:
            self._weight = weight.new_empty(0)  # a slice would keep the whole weight in memory

    def __call__(self, x: Tensor, form: ProductForm = PLAIN, *, add_to: Tensor | None = None) -> Tensor:
        """[n, sum of outs] form(x) @ weight.T + bias; with `add_to`, the result is added to it in place."""
        if form.kind == "normed":
            x = rms_norm(x, (x.shape[-1],), form.norm, form.eps)
        elif form.kind == "gated":
            gate, up = x.chunk(2, -1)
            x = silu(gate).mul_(up)
        x = x.to(self._dtype)
        if self._packed is None:
            result = linear(x, self._weight, self._bias)
        else:
            result = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return result if add_to is None else add_to.add_(result)


@dataclass(frozen=True)
class Block:
    """One block of a Llama-like model: attention and gated MLP, each after a norm."""

    norm: ProductForm
    query_key_value: Matrices
    query_key_norm: Tensor | None
    output: Matrices
    mlp_norm: ProductForm
    gate_up: Matrices
    down: Matrices
    scaling: float
    window: int | None


class Kernels:
    """The operations in torch, which are the definition."""

    compiled = False

    def matrices(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], num_rows: int) -> Matrices:
        """Linear layers of the same input, side by side."""
        return Matrices(weights, biases, num_rows)

    def rotate(self, x: Tensor, heads: int, norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> None:
        """Normalises and rotates, in place, the first `heads` heads of every row of `x` [n, heads and others, size].
        `norm` is [heads, size], or None for no norm; `cos` and `sin` are [n, size]."""
        size = x.shape[-1]
        rotated = x[:, :heads]
        made = rotated if norm is None else rms_norm(rotated, (size,), None, eps) * norm
        sin = torch.cat([-sin[:, : size // 2], sin[:, size // 2 :]], -1)
        rotated.copy_(torch.addcmul(made * cos[:, None], made.roll(size // 2, -1), sin[:, None]))

    def cache(self, key: Tensor, num_rows: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Room for keys and values [num_rows, KV, num_tokens, size] like `key` [n, KV, size], in the layout of these
        kernels; the first dimension is that of the rows in each."""
        # Zeros, because masked places are still multiplied by zero, and uninitialised memory could be infinite.
        shape = (num_rows, key.shape[1], num_tokens, key.shape[2])
        return key.new_zeros(shape), key.new_zeros(shape)

    def store(self, cache: Sequence[Tensor], first: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [n, KV, T, size] as the first T tokens of the rows of a cache from `first` on."""
        for kept, new in zip(cache, (keys, values), strict=True):
            kept[first : first + len(new), :, : new.shape[2]] = new

    def cache_dtype(self, key: Tensor) -> torch.dtype:
        """The dtype in which keys like this, and their values, are kept."""
        return key.dtype

    def cache_tokens(self, num_tokens: int) -> int:
        """The number of tokens for which a row of a cache has room, if it is made for `num_tokens`."""
        return num_tokens


class CompiledKernels(Kernels):
    """The operations in C, with the working memory that they need."""

    compiled = True

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is that of the operands of products, and of the keys and values that are kept; all else is
        float32."""
        self.library = library
        self.dtype = dtype
        self._scratch = torch.empty(0)

    def matrices(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], num_rows: int) -> Matrices:
        """The layers in the model's own memory: nothing is copied, so a change of the weights is seen here. Weights in
        bfloat16 are a copy."""
        return _CompiledMatrices(self, weights, biases)

    def rotate(self, x: Tensor, heads: int, norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> None:
        """Computes the same as `Kernels.rotate`."""
        n, all_heads, size = x.shape
        cos, sin = cos.contiguous(), sin.contiguous()
        assert x.is_contiguous()
        assert cos.shape == sin.shape == (n, size)
        self.library.rotate(
            _address(x), n, all_heads * size, heads, size, _address(norm), eps, _address(cos), _address(sin),
            torch.get_num_threads(),
        )  # fmt: skip

    def cache(self, key: Tensor, num_rows: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys [num_rows, KV, blocks of tokens, size or half of it, tokens of a block, 1 or 2 entries] and values
        [num_rows, KV, tokens, size]; in float32, or in bfloat16 where products are."""
        dtype, (_, heads, size) = self.cache_dtype(key), key.shape
        together, room = 2 if dtype == torch.bfloat16 else 1, self.cache_tokens(num_tokens)
        keys = torch.zeros(num_rows, heads, room // BLOCK, size // together, BLOCK, together, dtype=dtype)
        return keys, torch.zeros(num_rows, heads, room, size, dtype=dtype)

    def store(self, cache: Sequence[Tensor], first: int, keys: Tensor, values: Tensor) -> None:
        """Computes the same as `Kernels.store`."""
        kept_keys, kept_values = cache
        n, heads, num_tokens, size = keys.shape
        room, together = self.cache_tokens(num_tokens), kept_keys.shape[-1]
        blocks = pad(keys, (0, 0, 0, room - num_tokens)).reshape(n, heads, -1, BLOCK, size // together, together)
        kept_keys[first : first + n, :, : room // BLOCK] = blocks.transpose(3, 4)
        kept_values[first : first + n, :, :num_tokens] = values

    def cache_dtype(self, key: Tensor) -> torch.dtype:
        """bfloat16 where products are, of pairs of entries, else float32."""
        return self.dtype if key.shape[-1] % 2 == 0 else torch.float32

    def cache_tokens(self, num_tokens: int) -> int:
        """Whole blocks."""
        return -(-num_tokens // BLOCK) * BLOCK

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        rows: tuple[Tensor, Tensor],
        places: Tensor,
        prompts: tuple[Tensor, Tensor] | None = None,
        prompt_of: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """[n, H, D] the attention output of the next token of n replies. The token sees its prompt, its row up to its
        place, and itself.

        `query` is [n, H, D], `key` and `value` [n, KV, D]. The last two are stored at `places` [n] of `rows`, which are
        a `cache`, and so are `prompts`; row i sees their first `prompt_lengths[prompt_of[i]]` places. With a window,
        only the last `window` of all these tokens are seen.
        """
        query, key, value = map(_with_dense_rows, (query, key, value))
        if key.stride(0) != value.stride(0):
            key, value = key.contiguous(), value.contiguous()
        assert query.dtype == key.dtype == value.dtype == torch.float32
        n, heads, size = query.shape
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        prompt_room, row_room = 0 if prompts is None else prompts[1].shape[2], rows[1].shape[2]
        threads = torch.get_num_threads()
        output = query.new_empty(query.shape)
        self.library.attend(
            _address(query), query.stride(0), _address(key), _address(value), key.stride(0), n, kv_heads, repeats, size,
            scaling, window or NO_WINDOW, *map(_address, prompts or (None, None)), prompt_room, _address(prompt_of),
            _address(prompt_lengths), *map(_address, rows), row_room, _address(places), _address(output),
            self.room(threads * (repeats * (prompt_room + row_room) + size)), rows[0].dtype == torch.bfloat16, threads,
        )  # fmt: skip
        return output

    def room(self, num_floats: int) -> int:
        """The address of working memory for this many floats, valid until the next call."""
        return self.rooms(num_floats)[0]

    def rooms(self, *num_floats: int) -> list[int]:
        """The addresses of several such places, each as aligned as the first."""
        ends = list(itertools.accumulate(-(-num // MOST_LANES) * MOST_LANES for num in num_floats))
        if self._scratch.shape[0] < ends[-1]:
            self._scratch = torch.empty(ends[-1])
        first = self._scratch.data_ptr()
        return [first + 4 * start for start in (0, *ends[:-1])]


class CompiledBlocks:
    """The blocks of a model for the next token of every reply, in one call: the second thread does not wait for Python
    between the operations of a step. The numbers are those of the operations one by one, to the bit."""

    def __init__(self, kernels: CompiledKernels, blocks: Sequence[Block], num_heads: int, num_kv_heads: int) -> None:
        self._kernels = kernels
        self._blocks = blocks  # holds the memory to which the next line points
        self._array = (_BlockInC * len(blocks))(*map(_block, blocks))
        self._heads = num_heads, num_kv_heads
        inputs = [m for b in blocks for m in (b.query_key_value, b.output, b.gate_up, b.down)]
        self._most_ins = max(_compiled_form(m).num_ins for m in inputs)
        self._gates = max(_compiled_form(b.gate_up).num_outs for b in blocks)

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        caches: Sequence[Sequence[Tensor]],
        places: Tensor,
        prompt_of: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> None:
        """Turns embeddings `x` [n, D] into the states behind the last block, in place.

        `cos` and `sin` are [n, size]. `caches` has for each block the keys and values of the prompts, if replies share
        them, and those of the rows; they and the rest are as in `CompiledKernels.attend`.
        """
        (n, size), (heads, kv_heads), threads = cos.shape, self._heads, torch.get_num_threads()
        cos, sin = cos.contiguous(), sin.contiguous()
        assert x.is_contiguous()
        assert x.dtype == cos.dtype == sin.dtype == torch.float32
        prompt_room, row_room = 0 if prompt_of is None else caches[0][1].shape[2], caches[0][-1].shape[2]
        addresses = [0] * 4 * len(caches)
        for number, kept in enumerate(caches):
            addresses[4 * number + 4 - len(kept) : 4 * number + 4] = [tensor.data_ptr() for tensor in kept]
        room, states, mixed, gates, scores = self._kernels.rooms(
            -(-n // MOST_LANES) * MOST_LANES * (self._most_ins + 1),
            n * (heads + 2 * kv_heads) * size,
            n * heads * size,
            n * self._gates,
            threads * (heads // kv_heads * (prompt_room + row_room) + size),
        )
        self._kernels.library.decode(
            self._array, (c_int64 * len(addresses))(*addresses), len(caches), _address(x), n, x.shape[1],
            self._blocks[0].norm.eps, heads, kv_heads, size, _address(cos), _address(sin), prompt_room,
            _address(prompt_of), _address(prompt_lengths), row_room, _address(places), states, mixed, gates, room,
            scores, caches[0][0].dtype == torch.bfloat16, threads,
        )  # fmt: skip


class _CompiledMatrices(Matrices):
    def __init__(self, kernels: CompiledKernels, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        many = len(weights)
        self._kernels = kernels
        # Pairs of entries are multiplied in bfloat16, so an odd number of them is not.
        self.pairs = kernels.dtype == torch.bfloat16 and weights[0].shape[1] % 2 == 0
        dtype = torch.bfloat16 if self.pairs else torch.float32
        self._kept: list[Tensor | None] = [x.detach().to(dtype).contiguous() for x in weights]
        self._kept += [None if x is None else x.detach().contiguous() for x in biases]
        self.num_ins, self.num_outs = weights[0].shape[1], sum(map(len, weights))
        self.arguments = (
            many,
            (c_void_p * many)(*map(_address, self._kept[:many])),
            (c_void_p * many)(*map(_address, self._kept[many:])),
            (c_int64 * many)(*map(len, weights)),
        )

    def __call__(self, x: Tensor, form: ProductForm = PLAIN, *, add_to: Tensor | None = None) -> Tensor:
        x, n, k = x.contiguous(), x.shape[0], self.num_ins
        assert x.dtype == torch.float32
        assert x.shape[1] == (2 * k if form.kind == "gated" else k)
        result = x.new_empty(n, self.num_outs) if add_to is None else add_to
        padded = -(-n // MOST_LANES) * MOST_LANES
        self._kernels.library.product(
            _address(x), n, k, FORMS.index(form.kind), _address(form.norm), form.eps, *self.arguments,
            _address(result), add_to is not None, self._kernels.room(padded * (k + 1)), self.pairs,
            torch.get_num_threads(),
        )  # fmt: skip
        return result


class _LinearsInC(ctypes.Structure):
    """`linears` of kernels.c."""

    _fields_ = (
        *(("matrices", c_int64), ("weights", c_void_p), ("biases", c_void_p), ("outs", c_void_p)),
        *(("width", c_int64), ("pairs", c_int64)),
    )


class _BlockInC(ctypes.Structure):
    """`block` of kernels.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("norm", "query_key_norm", "mlp_norm")),
        *((name, _LinearsInC) for name in ("query_key_value", "output", "gate_up", "down")),
        *(("scaling", c_float), ("window", c_int64)),
    )


def _compiled_form(matrices: Matrices) -> _CompiledMatrices:
    assert isinstance(matrices, _CompiledMatrices)
    return matrices


def _linears(matrices: Matrices) -> _LinearsInC:
    made = _compiled_form(matrices)
    many, weights, biases, outs = made.arguments
    addresses = [ctypes.addressof(array) for array in (weights, biases, outs)]
    return _LinearsInC(many, *addresses, made.num_outs, made.pairs)


def _block(block: Block) -> _BlockInC:
    norms = map(_address, (block.norm.norm, block.query_key_norm, block.mlp_norm.norm))
    layers = map(_linears, (block.query_key_value, block.output, block.gate_up, block.down))
    return _BlockInC(*norms, *layers, block.scaling, block.window or NO_WINDOW)


def find(weight: Tensor) -> Kernels:
    """The fastest kernels for a model with weights like this, or those that the environment variable asks for. Raises
    EngineError if they are not available."""
    asked, dtype = asked_for(), product_dtype(weight)
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16)
    found = _library() if fits and asked != "torch" else None
    if found is not None and (dtype == torch.float32 or found.multiplies_pairs()):
        return CompiledKernels(found, dtype)
    if asked == "compiled":
        if found is not None:
            raise cannot_be_had(
                "this processor does not multiply bfloat16, in which replies are to be sampled",
                "leave the variable out",
            )
        if not fits:
            raise cannot_be_had("only float32 weights on a CPU have compiled kernels", "leave the variable out")
        raise cannot_be_had()
    return Kernels()


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which products with this weight are computed here, which autocast may change."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _library() -> ctypes.CDLL | None:
    return library(SOURCE, _declare)


def _declare(found: ctypes.CDLL) -> None:
    p, i, f = c_void_p, c_int64, c_float
    found.product.argtypes = [p, i, i, i, p, f, i, p, p, p, p, i, p, i, i]
    found.rotate.argtypes = [p, i, i, i, i, p, f, p, p, i]
    found.attend.argtypes = [p, i, p, p, i, i, i, i, i, f, i, p, p, i, p, p, p, p, i, p, p, p, i, i]
    found.decode.argtypes = [p, p, i, p, i, i, f, i, i, i, p, p, i, p, p, i, p, p, p, p, p, p, i, i]
    for function in (found.product, found.rotate, found.attend, found.decode):
        function.restype = None
    found.multiplies_pairs.restype = i


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _with_dense_rows(x: Tensor) -> Tensor:
    """x [n, H, D], copied if the entries of a row are not contiguous."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
