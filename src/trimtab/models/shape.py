"""The sizes of a model, read from its config.json alone: how many weights it has, and how much a token of it keeps.

Nothing is loaded and nothing is downloaded, so that a model can be planned for before it is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import ConfigError
from trimtab.core.hub import read_json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type` of models whose blocks are x + attention(norm(x)), then x + gated MLP(norm(x)), all dense."""
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense Llama-like model. For example Llama 3 8B: 32 blocks, 4,096 wide, 32 heads of 128 with 8 key heads, an MLP
    of 14,336 and 128,256 tokens."""

    num_layers: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    """Whether the output head is the embedding."""
    head_norms: bool = False
    """Whether queries and keys are normalised, as in Qwen3."""
    projection_biases: int = 0
    """Biases of a block's linear layers."""
    scalar: bool = False
    """Whether the head gives one number and not one for each token, as that of a reward model or a critic."""

    @property
    def query_size(self) -> int:
        """Numbers of the queries of a token, all heads together."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Numbers of the keys of a token; there are as many of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a block."""
        d, f, q, k = self.hidden_size, self.mlp_size, self.query_size, self.key_size
        return dict(zip(_LINEAR, ((d, q), (d, k), (d, k), (q, d), (d, f), (d, f), (f, d)), strict=True))

    @property
    def linear_weights(self) -> int:
        """Weights of the matrices of a block."""
        return sum(i * o for i, o in self.linear_sizes.values())

    @property
    def block_weights(self) -> int:
        """All weights of a block: matrices, biases and norms."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.head_norms else 0)
        return self.linear_weights + self.projection_biases + norms

    @property
    def head_weights(self) -> int:
        """Weights of the output head as it is multiplied, whether it is the embedding or not."""
        return self.hidden_size if self.scalar else self.vocab_size * self.hidden_size

    @property
    def outer_weights(self) -> int:
        """Weights outside the blocks: embedding, last norm, and a head of its own."""
        own_head = 0 if self.tied and not self.scalar else self.head_weights
        return self.vocab_size * self.hidden_size + self.hidden_size + own_head

    @property
    def num_weights(self) -> int:
        """All weights."""
        return self.num_layers * self.block_weights + self.outer_weights

    def adapter_weights(self, rank: int, modules: Sequence[str] = (), *, blocks: int | None = None) -> int:
        """Weights of a low-rank adapter (arXiv:2106.09685) on these linear layers, or on all of them, of so many
        blocks, or of all."""
        sizes = [size for name, size in self.linear_sizes.items() if not modules or name in modules]
        num_blocks = self.num_layers if blocks is None else min(blocks, self.num_layers)
        return num_blocks * rank * sum(i + o for i, o in sizes)

    def kept_bytes(self, *, bfloat16: bool, fused: bool) -> int:
        """Bytes that one block keeps of each token for its backward pass, if activations are not computed again.

        In float32 that are, for widths D (hidden), F (MLP), Q (queries) and K (keys): the input of each norm, what it
        normalises and what it gives (3 D, twice); queries, keys, values and the output of attention (2 Q + 2 K); the
        gate, its SiLU, the other half and their product (4 F); in Qwen3 what the norms of the heads read and normalise
        (2 Q + 2 K). In bfloat16 (autocast) each product keeps its input in 16 bits once more. Fused layers keep what
        they read, and each product its input: 4 D + 2 Q + 2 K + 3 F in float32 and in Qwen3 Q + K; in bfloat16 2 D of
        them in float32 and the rest in 16 bits. Sums of exponentials and deviations of norms are counted too.
        """
        d, f, q, k = self.hidden_size, self.mlp_size, self.query_size, self.key_size
        few = 4 * (self.num_heads + 2 + (self.num_heads + self.num_kv_heads if self.head_norms else 0))
        norms = q + k if self.head_norms else 0
        if not bfloat16:
            kept = 4 * d + 3 * f + norms if fused else 6 * d + 4 * f + 2 * norms
            return 4 * (kept + 2 * q + 2 * k) + few
        if fused:
            return 8 * d + 2 * (2 * d + 2 * q + 2 * k + 3 * f + norms) + few
        return 16 * d + 2 * (5 * d + 2 * q + 2 * k + 4 * f) + 6 * norms + few

    def attention_flops(self, pairs: float) -> float:
        """Operations of a forward pass of attention in all blocks, for this many pairs of a token and one it sees: two
        products of two operations for each number of a query."""
        return 4.0 * self.num_layers * self.query_size * pairs


def read_shape(path: str | Path, *, scalar: bool = False) -> ModelShape:
    """The shape of the model in a directory, or of a config.json. Raises ConfigError if there is none on this machine,
    or if it is of a kind whose sizes are not known here, and EngineError if the file is damaged."""
    place = Path(path).expanduser()
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise ConfigError(
            f"there is no {file.name} for {str(path)!r} on this machine, and a paper plan downloads nothing",
            where=str(file),
            fix="name a model directory or a config.json: model=path/to/config.json",
        )
    return shape_of(read_json(file), where=str(file), scalar=scalar)


def shape_of(values: Mapping[str, Any], *, where: str, scalar: bool = False) -> ModelShape:
    """The shape that the values of a config.json describe. Raises ConfigError for a size that is missing or is none."""

    def size(name: str, otherwise: int | None = None) -> int:
        value = values.get(name)
        if value is None and otherwise is not None:
            value = otherwise
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problem = f"{name} = {value!r}; it is a whole number above 0" if name in values else f"{name} is missing"
            raise ConfigError(problem, where=where, fix="give the model's own config.json")
        return value

    family = values.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type = {family!r}; the sizes of {', '.join(FAMILIES)} are known on paper",
            where=where,
            fix="rehearse it where it is to run: trimtab plan without --on",
        )
    d, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", d // heads)
    mlp = size("intermediate_size")
    q, k = heads * head_dim, kv_heads * head_dim
    biases = q + 2 * k if family == "qwen2" else 0
    if values.get("attention_bias"):
        biases = q + 2 * k + d
    if values.get("mlp_bias"):
        biases += 2 * mlp + d
    return ModelShape(
        num_layers=size("num_hidden_layers"),
        hidden_size=d,
        mlp_size=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=size("vocab_size"),
        tied=bool(values.get("tie_word_embeddings", False)),
        head_norms=family == "qwen3",
        projection_biases=biases,
        scalar=scalar,
    )
