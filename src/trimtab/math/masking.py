"""Per-token tensors [M] of B sequences, told apart by `sequence_ids` [M]: int64, sorted, each of 0..B-1 in one run.

Everything here computes in float32 at least: half precision is raised, float64 is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sequence_lengths(sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Tokens of each sequence, int64 [B]."""
    numbers = torch.arange(num_sequences, device=sequence_ids.device)
    ends = torch.searchsorted(sequence_ids, numbers, right=True)
    return ends.diff(prepend=ends.new_zeros(1))


def sum_per_sequence(x: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """The sum of each sequence's tokens, [B]; a sequence without tokens gives 0.

    Each sequence is added up on its own and in order, so the result has the same bits whatever else is in the batch
    and however often it is computed (scattered addition has neither property on a GPU).
    """
    lengths = sequence_lengths(sequence_ids, num_sequences)
    total: Tensor = torch.segment_reduce(at_least_float32(x), "sum", lengths=lengths, unsafe=True, initial=0)
    return total


def mean_per_sequence(x: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """The mean over each sequence's tokens, [B]; a sequence without tokens has none and gives nan."""
    return sum_per_sequence(x, sequence_ids, num_sequences) / sequence_lengths(sequence_ids, num_sequences)


def last_index_per_sequence(sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """The place in [M] of each sequence's last token, int64 [B]. Every sequence must have a token."""
    lengths = sequence_lengths(sequence_ids, num_sequences)
    assert bool((lengths > 0).all()), "a sequence without tokens has no last one"
    return lengths.cumsum(0) - 1


def pad_per_sequence(x: Tensor, sequence_ids: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """One row for each sequence, [B, T] with zeros at the right, and the mask that is true at its tokens.

    T is the longest sequence; the values keep their dtype.
    """
    lengths = sequence_lengths(sequence_ids, num_sequences)
    longest = int(lengths.max()) if num_sequences else 0
    mask = torch.arange(longest, device=x.device) < lengths[:, None]
    return x.new_zeros(mask.shape).masked_scatter(mask, x), mask


def unpad_per_sequence(padded: Tensor, mask: Tensor) -> Tensor:
    """The values [M] under the mask, row by row: the inverse of `pad_per_sequence`, for padding on any side."""
    return padded[mask]


def whiten(x: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(variance + eps)` over all entries, which keeps the mean where `shift_mean` is false.

    The variance is the biased one (divided by the count), as in Ziegler et al. (arXiv:1909.08593), so one entry
    gives 0 and not nan. Mean and variance are taken in float64: equal entries then give exactly equal results near
    0, where float32 rounding of a large mean would be blown up to order one. Whiten the whole batch of an update at
    once; whitening its parts gives other numbers.
    """
    exact = x.double()
    mean = exact.mean()
    centred = exact - mean
    whitened = centred * (centred.square().mean() + eps).rsqrt()
    return (whitened if shift_mean else whitened + mean).to(at_least_float32(x).dtype)
