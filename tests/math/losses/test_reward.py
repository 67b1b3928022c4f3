import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.special import expit

from tests.preference_batches import random_ids
from tests.tiny import scalar
from trimtab.batches.pairs import Compared, PairBatch
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.metrics import merge, to_values
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.math.losses.preference.pairs import robust_dpo
from trimtab.math.losses.reward import (
    BradleyTerry,
    PlackettLuce,
    bradley_terry,
    centering,
    plackett_luce,
    unbiased_label,
)
from trimtab.models.roles import ScalarModel


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
    loss, metrics = BradleyTerry(centering_coef=0.5)(SimpleNamespace(scores=scores), batch)
    first = math.log1p(math.exp(-2)) + 0.5 * 4
    second = math.log1p(math.exp(1)) + 0.5 * 4  # no difference, short of the margin by 1
    assert loss.item() == pytest.approx(first + second, rel=1e-6)
    assert BradleyTerry().weight(batch).item() == 2
    assert metrics["loss/train"].value == pytest.approx((first + second) / 2, rel=1e-6)
    assert metrics["reward/margin"].value == 1.0


def test_missing_margins_leave_no_nan_in_the_gradient():
    scores = torch.randn(4, requires_grad=True)
    BradleyTerry()(SimpleNamespace(scores=scores), batch_of([math.nan, math.nan], [1.0, 0.5]))[0].backward()
    assert scores.grad.isfinite().all()


def test_a_tied_score_is_half_right_and_a_tied_label_has_no_right_side():
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 9.0, 0.0])
    _, metrics = BradleyTerry()(SimpleNamespace(scores=scores), batch_of([math.nan] * 4, [1.0, 0.8, 1.0, 0.5]))
    assert metrics["reward/accuracy"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["reward/accuracy"].weight == 3


def test_splitting_the_pairs_changes_nothing():
    loss_class = BradleyTerry(label_smoothing=0.1)
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


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"centering_coef": -1.0}, {"unbiased": True}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BradleyTerry(**wrong)


def test_the_unbiased_loss_over_noisy_labels_is_the_loss_over_correct_ones():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    noise = 0.2
    label = unbiased_label(torch.ones(5, dtype=torch.float64), noise)
    right = bradley_terry(chosen, rejected, label=label)
    wrong = bradley_terry(rejected, chosen, label=label)  # the label was flipped
    torch.testing.assert_close((1 - noise) * right + noise * wrong, bradley_terry(chosen, rejected))
    # Written out as Chowdhury et al. do, and as our robust DPO computes it.
    torch.testing.assert_close(right, robust_dpo(chosen - rejected, noise))


def test_smoothing_has_a_finite_best_margin_and_the_unbiased_loss_has_none():
    """Smoothing learns that labels are wrong now and then; the unbiased form learns the clean preference."""
    batch = batch_of([math.nan], [1.0])
    gradients = {}
    for unbiased in (False, True):
        scores = torch.tensor([6.0, -6.0], requires_grad=True)
        loss = BradleyTerry(label_smoothing=0.1, unbiased=unbiased, centering_coef=0.0)
        loss(SimpleNamespace(scores=scores), batch)[0].backward()
        gradients[unbiased] = float(scores.grad[0])
    assert gradients[False] > 0  # 12 nats apart is too far for one label in ten wrong
    assert gradients[True] < 0


def test_strength_grades_become_margins():
    """Grades 3, 2, 1 and 0, as thirds (Llama 2's small margins): a gap as large as the margin is undecided."""
    scores = torch.tensor([1.0, 0.0, 2 / 3, 0.0, 1 / 3, 0.0, 0.0, 0.0])
    loss = BradleyTerry(margin_coef=1 / 3, centering_coef=0.0)
    total, _ = loss(SimpleNamespace(scores=scores), batch_of([3.0, 2.0, 1.0, 0.0], [1.0] * 4))
    assert total.item() == pytest.approx(4 * math.log(2))
    ignored, _ = BradleyTerry(margin_coef=0.0)(SimpleNamespace(scores=scores), batch_of([3.0] * 4, [1.0] * 4))
    assert ignored == BradleyTerry()(SimpleNamespace(scores=scores), batch_of([math.nan] * 4, [1.0] * 4))[0]


# --- rankings ---


def ranked_batch(orders):
    """Trees of random replies with these ranks, as a batch of all their pairs."""
    draw = torch.Generator().manual_seed(0)
    trees = [response_tree(random_ids(draw, 3, 9), [random_ids(draw, 1, 7) for _ in ranks]) for ranks in orders]
    compared = tuple(
        tuple(Compared(i, j, 0.0, 1.0) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j])
        for ranks in orders
    )
    return PairBatch(trees=TokenTrees.build(trees), compared=compared)


ORDERS = [[2, 0, 1, 3], [1, 0], [0, 2, 1]]
TIED = [[1, 0, 1, 2], [0, 0, 1], [0, 1, 1]]


def rows_of(scores, orders):
    values = iter(scores.tolist())
    return [[(next(values), rank) for rank in ranks] for ranks in orders]


def slow_plackett_luce(row):
    """One choice after the other from the replies that are left; each of several tied replies among all not better."""
    total = 0.0
    for score, rank in row:
        left = [math.exp(other) for other, other_rank in row if other_rank >= rank]
        total -= math.log(math.exp(score) / sum(left))
    return total


def slow_centering(row):
    squares = [(a + b) ** 2 for (a, r), (b, q) in itertools.combinations(row, 2) if r != q]
    return sum(squares) / len(squares)


@pytest.mark.parametrize(("orders", "ties"), [(ORDERS, "refuse"), (TIED, "breslow")])
def test_plackett_luce_is_one_choice_after_the_other(orders, ties):
    batch = ranked_batch(orders)
    scores = torch.randn(batch.num_sequences, generator=torch.Generator().manual_seed(1))
    loss = PlackettLuce(centering_coef=0.3, ties=ties)
    total, metrics = loss(SimpleNamespace(scores=scores), batch)
    slow = [slow_plackett_luce(row) + 0.3 * slow_centering(row) for row in rows_of(scores, orders)]
    assert total.item() == pytest.approx(sum(slow), rel=1e-5)
    assert loss.weight(batch).item() == len(orders)
    assert metrics["loss/train"].value == pytest.approx(sum(slow) / len(slow), rel=1e-5)


def test_the_best_of_three_worked_by_hand():
    # scores log 3, log 2, log 1 in this order: 3/6 to choose the first, then 2/3 to choose the second
    loss = plackett_luce(
        torch.tensor([3.0, 2.0, 1.0]).log(), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64)
    )
    assert loss.sum().item() == pytest.approx(-math.log(3 / 6 * 2 / 3))


def test_of_two_replies_plackett_luce_is_bradley_terry():
    batch = ranked_batch([[0, 1], [1, 0]])
    scores = torch.randn(4)
    mine, _ = PlackettLuce()(SimpleNamespace(scores=scores), batch)
    torch.testing.assert_close(mine, BradleyTerry()(SimpleNamespace(scores=scores), batch)[0])


def test_scores_far_apart_have_finite_losses_and_gradients():
    scores = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    plackett_luce(scores, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert scores.grad.tolist() == [-1.0, -1.0, 2.0]


def test_the_mean_over_prompts_weighs_each_pair_by_its_share():
    """Ouyang et al., eq. 1: the mean over prompts of the mean over the C(K, 2) pairs of each."""
    batch = ranked_batch(ORDERS)
    scores = torch.randn(batch.num_sequences, generator=torch.Generator().manual_seed(2))
    means = []
    for row in rows_of(scores, ORDERS):
        pairs = [(a, b) for (a, r), (b, q) in itertools.permutations(row, 2) if r < q]
        assert len(pairs) == math.comb(len(row), 2)
        means.append(sum(math.log1p(math.exp(b - a)) for a, b in pairs) / math.comb(len(row), 2))
    loss = BradleyTerry(centering_coef=0.0, mean_over="prompts")
    total, metrics = loss(SimpleNamespace(scores=scores), batch)
    assert total.item() / loss.weight(batch).item() == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert metrics["loss/train"].value == pytest.approx(sum(means) / len(means), rel=1e-5)


RANKED_LOSSES = [
    (BradleyTerry(), ORDERS),
    (BradleyTerry(mean_over="prompts", label_smoothing=0.1, unbiased=True), ORDERS),
    (PlackettLuce(), ORDERS),
    (PlackettLuce(ties="breslow", centering_coef=0.2), TIED),
]


def gradient_of(loss, batch, *, token_budget=10_000, tree_form=True):
    """The gradient and metrics of one update of a tiny model."""
    role = ScalarModel(scalar("llama"), pad_id=0, gives="scores")
    role.tree_form = tree_form
    learner = LocalLearner(role, AdamW(), name="reward", token_budget=token_budget, num_updates=1)
    metrics = learner.update([(batch, [loss])])
    return {name: p.grad.clone() for name, p in learner.parameters.items()}, to_values(metrics)


@pytest.mark.parametrize(("loss", "orders"), RANKED_LOSSES)
@pytest.mark.parametrize("change", ["split", "order", "form"])
def test_split_order_and_form_change_no_gradient(loss, orders, change):
    batch = ranked_batch(orders)
    expected, logged = gradient_of(loss, batch)
    changed = {
        "split": lambda: gradient_of(loss, batch, token_budget=1),
        "order": lambda: gradient_of(loss, batch.select([2, 0, 1])),
        "form": lambda: gradient_of(loss, batch, tree_form=False),
    }[change]()
    for name, gradient in expected.items():
        torch.testing.assert_close(changed[0][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert changed[1] == pytest.approx(logged, rel=1e-4)
