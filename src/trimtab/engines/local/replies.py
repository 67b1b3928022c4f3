"""Sampling settings, and the buffer of the replies being drawn, which every form of decoding fills."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trimtab.batches.device import to_cpu, to_device
from trimtab.core.bounds import refuse_out_of_range
from trimtab.data.chat import Chat
from trimtab.math.logprobs import draw, logprobs_of
from trimtab.models.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn."""

    max_new_tokens: int = 64
    """Largest number of tokens of a reply, its end token included."""
    temperature: float = 1.0
    """Logits are divided by it; the policy's log-probabilities use the same temperature."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this total probability; 1 keeps all."""
    top_k: int = 0
    """Sample from this many most probable tokens; 0 keeps all."""
    max_prompt_tokens: int = 1024
    """A longer prompt is refused."""
    stop: tuple[str, ...] = ()
    """A reply also ends when it contains one of these texts. Its tokens are kept as drawn, and its text ends before the
    stop text."""
    batch_size: int = 256
    """Replies decoded together. Speed and memory only."""
    precision: Precision = "float32"
    """Precision of the matrix products while replies are drawn; the output head and log-probabilities stay float32."""
    cache_gb: float = 4.0
    """Memory for keys and values, in GiB; if it is too small for batch_size, fewer replies are decoded together."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}; it must be above 0 (top_k = 1 is greedy decoding)")
        refuse_out_of_range(self, "top_p", "top_k", "max_new_tokens", "batch_size", "cache_gb")
        if "" in self.stop:
            raise ValueError('stop holds an empty text, which every reply contains; take "" out')

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn, so that sampling and policy distributions differ."""
        return self.top_p < 1 or self.top_k > 0


SampledReply = tuple[list[int], list[float], bool]
"""Ids and log-probabilities of a reply, and whether it ended by a stop token or text, such as `([5, 2], [-0.1, -0.7],
True)`."""


class DecodingForm(Protocol):
    """A way of decoding. Every form gives the same replies up to rounding. Forms differ in speed and in the models
    whose distribution they get right (`form_choice.py`)."""

    @property
    def name(self) -> str:
        """The name in the run's records: "fused", "rows", "padded", "lockstep" or "uncached"."""

    def decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """Draws `group_size` replies to each prompt into `replies`. Its sequence i answers prompt i // group_size."""


class ReplyBuffer:
    """The tokens of B replies as they are drawn, their log-probabilities, and whether each has ended."""

    def __init__(
        self,
        uniforms: Tensor,
        sampling: Sampling,
        chat: Chat,
        limits: Tensor | None = None,
        *,
        stop_ids: Collection[int] | None = None,
        unnamed: Tensor | None = None,
    ) -> None:
        """`uniforms` [B, T] are the random numbers, one for each token; `limits` [B] end a reply before T tokens.

        `stop_ids` are the chat's unless given. Tokens that are true in `unnamed` [V] are never drawn. Without
        truncation the log-probabilities are still those of the policy, whose softmax runs over its whole embedding.
        """
        self.uniforms = uniforms
        self.width = uniforms.shape[1] if limits is None else int(limits.max())
        self.limits = torch.full((len(uniforms),), self.width) if limits is None else limits
        self.sampling = sampling
        self.chat = chat
        self.tokens = torch.zeros(uniforms.shape, dtype=torch.int64)
        self.logprobs = torch.zeros(uniforms.shape)
        self.policy_logprobs = torch.zeros(uniforms.shape) if sampling.truncates else self.logprobs
        """`logprobs` under the whole softmax, as the policy is scored. A tensor of its own only if sampling
        truncates."""
        self.lengths = torch.zeros(len(uniforms), dtype=torch.int64)
        self.stopped = torch.zeros(len(uniforms), dtype=torch.bool)
        self.stop_ids = frozenset(chat.stop_ids if stop_ids is None else stop_ids)
        """Tokens that end a reply."""
        self._stop_ids = torch.tensor(sorted(self.stop_ids), dtype=torch.int64)
        self.unnamed = unnamed
        """[V] true for tokens that are never drawn; None if all may be."""
        # A character has at most four tokens: that many if tokens are bytes.
        self._tail = 4 * max((len(s) for s in sampling.stop), default=0)

    def draw(self, logits: Tensor, sequences: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the next tokens [n] of these sequences [n] at these places [n] from logits [n, V]. Returns them, and
        whether each sequence ends with its token [n]."""
        logits = logits.float()
        if self.unnamed is not None:
            self.unnamed = to_device(self.unnamed, logits.device)
        drawn, logprobs = draw(
            logits if self.unnamed is None else logits.masked_fill(self.unnamed, -torch.inf),
            to_device(self.uniforms[sequences, places], logits.device),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
        )
        of_policy: Tensor | None = None
        if self.sampling.truncates or self.unnamed is not None:
            of_policy = logprobs_of(logits, drawn, self.sampling.temperature)
        tokens, *found = to_cpu(drawn, logprobs, of_policy)
        self.tokens[sequences, places] = tokens
        for column, values in zip((self.logprobs, self.policy_logprobs), found, strict=True):
            if values is not None:
                column[sequences, places] = values
        self.lengths[sequences] = places + 1
        stopped = torch.isin(tokens, self._stop_ids)
        if self.sampling.stop:
            stopped |= torch.tensor([self._holds_stop(*row) for row in zip(sequences, places, strict=True)])
        self.stopped[sequences] = stopped
        return tokens, stopped | (places + 1 == self.limits[sequences])

    def columns(self) -> dict[str, Tensor]:
        """What was drawn, as tensors; `fill` takes them."""
        names = ("tokens", "logprobs", "policy_logprobs", "lengths", "stopped")
        return {name: getattr(self, name) for name in names}

    def fill(self, rows: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Takes over the replies [n] that another buffer of this width drew, as sequences `rows` [n]."""
        for name, column in columns.items():
            getattr(self, name)[rows] = column

    def finished(self) -> list[SampledReply]:
        """All replies, each cut to its length."""
        ends = enumerate(zip(self.lengths.tolist(), self.stopped.tolist(), strict=True))
        return [(self.tokens[i, :n].tolist(), self.logprobs[i, :n].tolist(), stopped) for i, (n, stopped) in ends]

    def _holds_stop(self, sequence: Tensor, place: Tensor) -> bool:
        end = int(place) + 1
        text = self.chat.decode_response(self.tokens[sequence, max(0, end - self._tail) : end].tolist())
        return any(s in text for s in self.sampling.stop)
