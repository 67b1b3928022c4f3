"""The two ways to average a per-token loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from trimtab.math.losses import SequenceBatch
from trimtab.math.masking import mean_per_sequence
from trimtab.metrics import Mean, Metrics

Aggregation = Literal["token_mean", "sequence_mean"]
"""Every token counts the same, or every sequence does."""


def terms(token_losses: Tensor, batch: SequenceBatch, aggregation: Aggregation) -> Tensor:
    """What is averaged: the token losses [M], or their mean over each sequence [B]."""
    if aggregation == "token_mean":
        return token_losses
    return mean_per_sequence(token_losses, batch.sequence_ids, batch.num_sequences)


def num_terms(batch: SequenceBatch, aggregation: Aggregation) -> Tensor:
    """How many `terms` there will be, as a float64 scalar."""
    count = batch.sequence_ids.numel() if aggregation == "token_mean" else batch.num_sequences
    return torch.tensor(count, dtype=torch.float64)


def means(values: Mapping[str, Tensor]) -> Metrics:
    """Each tensor's mean as a metric, weighted by its number of entries; one transfer from the device for all."""
    totals = torch.stack([v.detach().double().sum() for v in values.values()]).tolist()
    return {name: Mean(total, v.numel()) for (name, v), total in zip(values.items(), totals, strict=True)}
