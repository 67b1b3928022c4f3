"""The three ways to average a per-token loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from trimtab.batches.trees import TreeBatch
from trimtab.core.metrics import Mean, Metrics
from trimtab.math.masking import mean_per_sequence

Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
"""Every token counts the same ("token_mean"), every sequence counts the same ("sequence_mean"), or the sum over tokens
is divided by sequences times a constant length ("constant_length"), so that the lengths of the other replies do not
matter (Dr. GRPO: Liu et al., arXiv:2503.20783)."""


def terms(token_losses: Tensor, batch: TreeBatch, aggregation: Aggregation) -> Tensor:
    """The terms that are averaged: the token losses [M], or their mean over each sequence [B]."""
    if aggregation != "sequence_mean":
        return token_losses
    return mean_per_sequence(token_losses, batch.sequence_ids, batch.num_sequences)


def num_terms(batch: TreeBatch, aggregation: Aggregation, length: int = 1) -> Tensor:
    """The divisor of the sum of `terms`, as a float64 scalar; `length` is the constant of "constant_length"."""
    counts = {
        "token_mean": batch.sequence_ids.numel(),
        "sequence_mean": batch.num_sequences,
        "constant_length": batch.num_sequences * length,
    }
    return torch.tensor(counts[aggregation], dtype=torch.float64)


def means(values: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> Metrics:
    """Each tensor's mean as a metric: its sum divided by its number of entries, or by the number under its name in
    `weights`. All sums come from the device in one transfer."""
    totals = torch.stack([v.detach().double().sum() for v in values.values()]).tolist()
    numbers = {name: float(v.numel()) for name, v in values.items()}
    numbers |= {name: float(weight) for name, weight in (weights or {}).items()}
    return {name: Mean(total, numbers[name]) for name, total in zip(values, totals, strict=True)}
