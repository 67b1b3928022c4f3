"""Losses, and the shapes of what they read.

A loss is a frozen dataclass. `weight(batch)` is its denominator, known before any forward pass, and calling it gives
the SUM of the terms: the learner adds both over micro-batches and ranks, divides once and multiplies by `coef`, so
that neither split changes the gradient.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TokenOutputs(Protocol):
    """What a language model says of the trained tokens."""

    @property
    def logprobs(self) -> Tensor:
        """[M]"""
        ...

    @property
    def entropy(self) -> Tensor | None:
        """[M]; None where no loss in use needs it."""
        ...


class ValueOutputs(Protocol):
    """What a critic says of the trained tokens."""

    @property
    def values(self) -> Tensor:
        """[M]"""
        ...


class ScoreOutputs(Protocol):
    """What a reward model says of whole sequences."""

    @property
    def scores(self) -> Tensor:
        """[B]"""
        ...


class SequenceBatch(Protocol):
    """B sequences of trained tokens."""

    @property
    def num_sequences(self) -> int: ...

    @property
    def sequence_ids(self) -> Tensor:
        """[M]"""
        ...


class PolicyBatch(SequenceBatch, Protocol):
    """Rollouts with what a policy loss reads."""

    @property
    def old_logprobs(self) -> Tensor:
        """[M]"""
        ...

    @property
    def advantages(self) -> Tensor:
        """[M]"""
        ...

    @property
    def correction(self) -> Tensor:
        """[M] what each token's loss is multiplied by, where the sampler was not the policy; 1 where it was."""
        ...


class ReferenceBatch(SequenceBatch, Protocol):
    """Rollouts with the reference's opinion."""

    @property
    def ref_logprobs(self) -> Tensor:
        """[M]"""
        ...


class CriticBatch(SequenceBatch, Protocol):
    """Rollouts with what the critic learns from."""

    @property
    def old_values(self) -> Tensor:
        """[M]"""
        ...

    @property
    def returns(self) -> Tensor:
        """[M]"""
        ...


class PairBatch(Protocol):
    """P compared pairs among B sequences; a prompt with K replies may have up to K (K - 1) / 2 of them."""

    @property
    def chosen_ids(self) -> Tensor:
        """[P], which sequence is the preferred one."""
        ...

    @property
    def rejected_ids(self) -> Tensor:
        """[P], which sequence is the other one."""
        ...

    @property
    def margins(self) -> Tensor:
        """[P]; nan where there is none."""
        ...

    @property
    def labels(self) -> Tensor:
        """[P], the probability that `chosen` is preferred."""
        ...
