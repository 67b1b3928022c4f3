"""One score of several members': worked by hand, and in the limits of the coefficient."""

import math

import pytest
import torch

from trimtab.math.ensembles import aggregate

SCORES = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
ALL = ["mean", "min", "variance", "lower_bound", "soft_min"]


@pytest.mark.parametrize(
    ("how", "coef", "expected"),
    [
        ("mean", None, 3.0),
        ("min", None, 1.0),
        ("variance", None, 3 - 0.5 * 2.0),  # the population's variance of 1 to 5 is 2; the sample's is 2.5
        ("variance", 0.1, 2.8),
        ("lower_bound", None, 3 - math.sqrt(2)),
        ("soft_min", 2.0, -2 * math.log(sum(math.exp(-k / 2) for k in range(1, 6)) / 5)),
    ],
)
def test_scores_of_five_members_worked_by_hand(how, coef, expected):
    found = aggregate(SCORES, how, coef)
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_limits_of_the_soft_minimum_are_mean_and_minimum(dtype, shift):
    scores = torch.randn(5, 40, dtype=dtype) + shift
    for coef in (1e4, 1e7):
        found = aggregate(scores, "soft_min", coef)
        assert found.dtype == dtype
        torch.testing.assert_close(found, scores.mean(0), rtol=3e-7, atol=3e-4 if coef == 1e4 else 1e-6)
    torch.testing.assert_close(aggregate(scores, "soft_min", 1e-6), scores.amin(0), rtol=3e-7, atol=1e-5)
    far = torch.tensor([[-1e4], [1e4]])
    assert aggregate(far, "soft_min", 1.0).item() == pytest.approx(-1e4, abs=1)


def test_to_the_second_order_the_soft_minimum_is_the_variance_penalty():
    """UWO's lambda is 1 / (2 beta); what is left falls with the square of beta."""
    scores = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = [
        float((aggregate(scores, "soft_min", beta) - aggregate(scores, "variance", 1 / (2 * beta))).abs().max())
        for beta in (20.0, 40.0)
    ]
    assert left[0] < 2e-3
    assert left[0] / left[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("how", ALL)
def test_order_and_shift_of_the_members_do_not_matter(how):
    scores = torch.randn(4, 20, dtype=torch.float64)
    torch.testing.assert_close(aggregate(scores[[2, 0, 3, 1]], how), aggregate(scores, how))
    torch.testing.assert_close(aggregate(scores + 7, how), aggregate(scores, how) + 7)
    torch.testing.assert_close(aggregate(scores[:1].expand(4, -1), how), scores[0], rtol=0, atol=1e-9)
