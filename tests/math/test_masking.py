import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.math.masking import (
    last_index_per_sequence,
    mean_per_sequence,
    pad_per_sequence,
    sequence_lengths,
    sum_per_sequence,
    unpad_per_sequence,
    whiten,
)

IDS = torch.tensor([0, 0, 1, 2, 2, 2])
X = torch.tensor([1.0, 2.0, 10.0, 3.0, 4.0, 8.0])


def test_tokens_are_added_and_averaged_within_their_sequence():
    assert sequence_lengths(IDS, 3).tolist() == [2, 1, 3]
    assert sum_per_sequence(X, IDS, 3).tolist() == [3.0, 10.0, 15.0]
    assert mean_per_sequence(X, IDS, 3).tolist() == [1.5, 10.0, 5.0]
    assert last_index_per_sequence(IDS, 3).tolist() == [1, 2, 5]


def test_rows_are_padded_at_the_right_and_come_back():
    padded, mask = pad_per_sequence(X, IDS, 3)
    assert padded.tolist() == [[1, 2, 0], [10, 0, 0], [3, 4, 8]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert torch.equal(unpad_per_sequence(padded, mask), X)
    assert torch.equal(unpad_per_sequence(padded.flip(1), mask.flip(1)), X.new_tensor([2, 1, 10, 8, 4, 3]))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 1000))
def test_flat_and_padded_forms_agree(lengths, seed):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    x = torch.randn(len(ids), generator=torch.Generator().manual_seed(seed))
    padded, mask = pad_per_sequence(x, ids, len(lengths))
    assert torch.equal(unpad_per_sequence(padded, mask), x)
    expected = torch.stack([part.double().sum() for part in x.split(lengths)])
    torch.testing.assert_close(sum_per_sequence(x, ids, len(lengths)).double(), expected, rtol=1e-5, atol=1e-6)
    assert x[last_index_per_sequence(ids, len(lengths))].tolist() == [part[-1].item() for part in x.split(lengths)]


def test_a_sequence_has_the_same_sum_to_the_bit_whoever_else_is_in_the_batch():
    x = torch.randn(700)
    ids = torch.arange(7).repeat_interleave(100)
    whole = sum_per_sequence(x, ids, 7)
    alone = torch.cat([sum_per_sequence(part, torch.zeros(100, dtype=torch.long), 1) for part in x.split(100)])
    assert torch.equal(whole, alone)


def test_sums_of_half_precision_are_made_in_float32():
    # 256 ones and then ones that bfloat16 cannot add: 256 + 1 rounds to 256 there
    total = sum_per_sequence(torch.ones(1000, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long), 1)
    assert total.dtype == torch.float32
    assert total.tolist() == [1000.0]


def test_gradients_of_sums_and_means_are_those_of_the_definition():
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sum_per_sequence(x, IDS, 3), (x,))
    assert torch.autograd.gradcheck(lambda x: mean_per_sequence(x, IDS, 3), (x,))
    assert torch.autograd.gradcheck(lambda x: pad_per_sequence(x, IDS, 3)[0], (x,))


def test_no_tokens_give_sums_of_zero_and_no_rows():
    none, no_ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert sum_per_sequence(none, no_ids, 2).tolist() == [0.0, 0.0]
    assert mean_per_sequence(none, no_ids, 2).isnan().all()
    assert sum_per_sequence(none, no_ids, 0).shape == (0,)
    padded, mask = pad_per_sequence(none, no_ids, 0)
    assert padded.shape == mask.shape == (0, 0)
    assert whiten(none).shape == (0,)


def test_a_sequence_without_tokens_has_no_last_one():
    with pytest.raises(AssertionError, match="without tokens"):
        last_index_per_sequence(torch.tensor([0, 2]), 3)


def test_whitening_by_hand():
    # mean 2, biased variance 2/3
    x = torch.tensor([1.0, 2.0, 3.0])
    scale = (2 / 3) ** -0.5
    torch.testing.assert_close(whiten(x), torch.tensor([-scale, 0.0, scale]))
    torch.testing.assert_close(whiten(x, shift_mean=False), torch.tensor([2 - scale, 2.0, 2 + scale]))


def test_whitening_one_entry_gives_zero_and_not_nan():
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.tensor([3.0]), shift_mean=False).tolist() == [3.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -1e6])
def test_whitening_equal_advantages_does_not_blow_up_rounding(value):
    assert whiten(torch.full((999,), value)).tolist() == [0.0] * 999


def test_whitening_the_parts_is_not_whitening_the_whole():
    # the per-rank normalisation of other trainers: callers must whiten the batch of the update at once
    x = torch.tensor([0.0, 1.0, 10.0, 11.0])
    assert not torch.allclose(whiten(x), torch.cat([whiten(x[:2]), whiten(x[2:])]))
