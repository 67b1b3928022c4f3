import math
from types import SimpleNamespace

import pytest
import torch
from scipy.special import expit

from trimtab.core.metrics import merge
from trimtab.math.losses.reward import RewardLoss, bradley_terry, centering


def batch_of(margins, labels):
    return SimpleNamespace(
        chosen_ids=torch.arange(0, 2 * len(labels), 2),
        rejected_ids=torch.arange(1, 2 * len(labels), 2),
        margins=torch.tensor(margins),
        labels=torch.tensor(labels, dtype=torch.float32),
    )


def test_bradley_terry_is_the_negative_log_of_the_modelled_probability():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64)
    expected = -torch.tensor(expit((chosen - rejected).numpy())).log()
    torch.testing.assert_close(bradley_terry(chosen, rejected), expected)
    assert bradley_terry(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_soft_and_smoothed_labels_are_torchs_binary_cross_entropy():
    chosen, rejected = torch.randn(2, 6)
    label = torch.tensor([1.0, 0.5, 0.7, 0.9, 0.6, 1.0])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    logits = chosen - rejected
    torch.testing.assert_close(bradley_terry(chosen, rejected, label=label), bce(logits, label, reduction="none"))
    smoothed = bradley_terry(chosen, rejected, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, bce(logits, torch.full((6,), 0.9), reduction="none"))
    both = bradley_terry(chosen, rejected, label=label, label_smoothing=0.1)
    torch.testing.assert_close(both, bce(logits, 0.9 * label + 0.1 * (1 - label), reduction="none"))


def test_the_margin_is_asked_for_on_top():
    # scores 3 apart with a margin of 3: as undecided as equal scores
    loss = bradley_terry(torch.tensor([3.0]), torch.tensor([0.0]), margin=torch.tensor([3.0]))
    assert loss.item() == pytest.approx(math.log(2))


def test_large_gaps_give_finite_losses_and_gradients():
    # log(1 + exp(x)) written out overflows at x = 89
    chosen = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    loss = bradley_terry(chosen, rejected)
    assert loss.tolist() == [0.0, 2e4, pytest.approx(math.log(2))]
    loss.sum().backward()
    assert chosen.grad.tolist() == [0.0, -1.0, -0.5]
    assert rejected.grad.tolist() == [0.0, 1.0, 0.5]


def test_gradients_check():
    chosen, rejected = (t.requires_grad_() for t in torch.randn(2, 4, dtype=torch.float64))
    label = torch.tensor([1.0, 0.5, 0.8, 0.6], dtype=torch.float64)
    margin = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry(c, r, label=label, margin=margin, label_smoothing=0.1), (chosen, rejected)
    )
    assert torch.autograd.gradcheck(centering, (chosen, rejected))


def test_only_differences_count_until_scores_are_centred():
    chosen, rejected = torch.randn(2, 5)
    torch.testing.assert_close(bradley_terry(chosen + 7, rejected + 7), bradley_terry(chosen, rejected))
    assert centering(torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 3.0])).tolist() == [0.0, 16.0]


def test_scores_are_read_chosen_first_with_margins_and_centring():
    scores = torch.tensor([2.0, 0.0, 1.0, 1.0])
    batch = batch_of([math.nan, 1.0], [1.0, 1.0])
    loss, metrics = RewardLoss(centering_coef=0.5)(SimpleNamespace(scores=scores), batch)
    first = math.log1p(math.exp(-2)) + 0.5 * 4
    second = math.log1p(math.exp(1)) + 0.5 * 4  # no difference, short of the margin by 1
    assert loss.item() == pytest.approx(first + second, rel=1e-6)
    assert RewardLoss().weight(batch).item() == 2
    assert metrics["loss/train"].value == pytest.approx((first + second) / 2, rel=1e-6)
    assert metrics["reward/margin"].value == 1.0


def test_missing_margins_leave_no_nan_in_the_gradient():
    scores = torch.randn(4, requires_grad=True)
    RewardLoss()(SimpleNamespace(scores=scores), batch_of([math.nan, math.nan], [1.0, 0.5]))[0].backward()
    assert scores.grad.isfinite().all()


def test_a_tied_score_is_half_right_and_a_tied_label_has_no_right_side():
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 9.0, 0.0])
    _, metrics = RewardLoss()(SimpleNamespace(scores=scores), batch_of([math.nan] * 4, [1.0, 0.8, 1.0, 0.5]))
    assert metrics["reward/accuracy"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["reward/accuracy"].weight == 3


def test_splitting_the_pairs_changes_nothing():
    loss_class = RewardLoss(label_smoothing=0.1)
    scores = torch.randn(6, dtype=torch.float64)
    margins, labels = [0.5, math.nan, 1.0], [1.0, 0.5, 0.9]
    whole, metrics = loss_class(SimpleNamespace(scores=scores), batch_of(margins, labels))
    parts = [
        loss_class(SimpleNamespace(scores=scores[2 * i : 2 * i + 2]), batch_of(margins[i : i + 1], labels[i : i + 1]))
        for i in range(3)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    merged = merge(m for _, m in parts)
    assert {k: m.value for k, m in merged.items()} == pytest.approx({k: m.value for k, m in metrics.items()})


@pytest.mark.parametrize("wrong", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"centering_coef": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardLoss(**wrong)
