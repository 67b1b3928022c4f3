from math import log

import pytest
import torch

from tests.preference_batches import log_ratios, make, mean_loss, random_pairs, sigmoid
from trimtab.math.losses.preference.sorted_pairs import matched


def test_values_are_matched_by_rank():
    assert matched(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([10.0, 30.0, 20.0])).tolist() == [30.0, 10.0, 20.0]


@pytest.mark.parametrize("paired", [True, False])
def test_aot_compares_what_has_the_same_rank(paired):
    batch, logprobs = random_pairs()
    pairs = log_ratios(batch, logprobs)
    if paired:
        high = sorted(sum(p.c) - sum(p.r) for p in pairs)
        low = sorted(sum(p.ref_c) - sum(p.ref_r) for p in pairs)
    else:
        high = sorted(sum(p.c) - sum(p.ref_c) for p in pairs)
        low = sorted(sum(p.r) - sum(p.ref_r) for p in pairs)
    expected = [-log(sigmoid(0.3 * (h - x))) for h, x in zip(high, low, strict=True)]
    value, _ = mean_loss(make("aot", beta=0.3, paired=paired), batch, logprobs)
    assert value.item() == pytest.approx(sum(expected) / 6, rel=1e-5)


@pytest.mark.parametrize("paired", [True, False])
def test_the_gradient_is_that_of_the_sorted_batch(paired):
    batch, start = random_pairs(seed=3)
    own, plain = (start.clone().requires_grad_() for _ in range(2))
    mean_loss(make("aot", paired=paired), batch, own)[0].backward()
    sums = torch.zeros(batch.num_sequences).index_add(0, batch.sequence_ids, plain)
    ref = torch.zeros(batch.num_sequences).index_add(0, batch.sequence_ids, batch.ref_logprobs)
    c, r = batch.chosen_ids, batch.rejected_ids
    high, low = (sums[c] - sums[r], ref[c] - ref[r]) if paired else ((sums - ref)[c], (sums - ref)[r])
    gap = high.sort().values - low.sort().values
    (-torch.nn.functional.logsigmoid(0.1 * gap)).mean().backward()
    torch.testing.assert_close(own.grad, plain.grad)


def test_soft_labels_have_no_place_in_an_order():
    assert not make("aot").uses_labels
    plain, logprobs = random_pairs()
    soft, _ = random_pairs(labels=[0.6] * 6)
    assert mean_loss(make("aot"), plain, logprobs)[0] == mean_loss(make("aot"), soft, logprobs)[0]
