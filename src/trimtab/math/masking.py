"""Operations on per-token tensors [M] of B sequences. `sequence_ids` [M] (int64, sorted, 0 to B - 1) says which
sequence a token belongs to.

Everything here computes in float32 at least: half precision is converted to float32, float64 is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sequence_lengths(sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """The number of tokens of each sequence, int64 [B]."""
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
    """The mean over each sequence's tokens, [B]; a sequence without tokens gives nan."""
    return sum_per_sequence(x, sequence_ids, num_sequences) / sequence_lengths(sequence_ids, num_sequences)


def last_index_per_sequence(sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """The index in [M] of each sequence's last token, int64 [B]. Every sequence must have a token."""
    lengths = sequence_lengths(sequence_ids, num_sequences)
    assert bool((lengths > 0).all()), "a sequence without tokens has no last one"
    return lengths.cumsum(0) - 1


def pad_per_sequence(x: Tensor, sequence_ids: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """One row for each sequence, [B, T] padded with zeros on the right, and the mask that is true at its tokens.

    T is the length of the longest sequence. The values keep their dtype.
    """
    lengths = sequence_lengths(sequence_ids, num_sequences)
    longest = int(lengths.max()) if num_sequences else 0
    mask = torch.arange(longest, device=x.device) < lengths[:, None]
    return x.new_zeros(mask.shape).masked_scatter(mask, x), mask


def unpad_per_sequence(padded: Tensor, mask: Tensor) -> Tensor:
    """The values [M] under the mask, row by row: the inverse of `pad_per_sequence`, for padding on any side."""
    return padded[mask]


def whiten(x: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(variance + eps)` over all entries. If `shift_mean` is false, the mean is added back.

    The variance is the biased one (divided by the count), as in Ziegler et al. (arXiv:1909.08593), so one entry
    gives 0 and not nan. Mean and variance are computed in float64: equal entries then give exactly equal results near
    0, while the float32 rounding error of a large mean would be scaled up to order one. Whiten the whole batch of an
    update at once; whitening its parts gives other numbers.
    """
    exact = x.double()
    mean = exact.mean()
    centred = exact - mean
    whitened = centred * (centred.square().mean() + eps).rsqrt()
    return (whitened if shift_mean else whitened + mean).to(at_least_float32(x).dtype)
