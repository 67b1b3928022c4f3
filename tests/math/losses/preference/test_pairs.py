"""The losses over pairs with a reference, against their equations written out for one pair at a time."""

import math
from math import exp, log

import pytest
import torch

from tests.preference_batches import log_ratios, make, mean_loss, random_pairs, sigmoid
from trimtab.math.losses.preference.pairs import discopop, divergence_score, exo

BETA = 0.3
MARGINS = [0.5, 0.0, 1.0, 0.2, 0.0, 2.0]
LABELS = [1.0, 0.8, 0.5, 1.0, 0.9, 0.6]


def by_hand(gap, num=6, **settings):
    """The mean over pairs of a function of the two rewards, each the beta of the settings times a log-ratio."""
    batch, logprobs = random_pairs(num)
    beta = settings.get("beta", BETA)
    values = []
    for p in log_ratios(batch, logprobs):
        c, r = sum(p.c) - sum(p.ref_c), sum(p.r) - sum(p.ref_r)
        values.append(gap(beta * c, beta * r))
    return sum(values) / num


EQUATIONS = {
    "dpo": lambda c, r: -log(sigmoid(c - r)),
    "robust_dpo": lambda c, r: (-0.9 * log(sigmoid(c - r)) + 0.1 * log(sigmoid(r - c))) / 0.8,
    "ipo": lambda c, r: ((c - r) / BETA - 1 / (2 * BETA)) ** 2,
    "hinge": lambda c, r: max(0.0, 1 - (c - r)),
    "exo": lambda c, r: (
        sigmoid(c - r) * (log(sigmoid(c - r)) - log(0.999)) + sigmoid(r - c) * (log(sigmoid(r - c)) - log(0.001))
    ),
    "nca": lambda c, r: -log(sigmoid(c)) - 0.5 * log(sigmoid(-c)) - 0.5 * log(sigmoid(-r)),
    "sppo": lambda c, r: (c / BETA - 0.5 / BETA) ** 2 + (r / BETA + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r: 1 - sigmoid(c) + sigmoid(r),
    "apo_down": lambda c, r: sigmoid(c) + 1 - sigmoid(c - r),
    "discopop": lambda c, r: (
        (1 - sigmoid((c - r) / 0.05)) * -log(sigmoid(c - r)) + sigmoid((c - r) / 0.05) * exp(r - c)
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_loss_is_the_mean_of_its_equation_over_pairs(name):
    batch, logprobs = random_pairs()
    value, metrics = mean_loss(make(name, beta=BETA), batch, logprobs)
    assert value.item() == pytest.approx(by_hand(EQUATIONS[name]), rel=1e-5)
    assert metrics["loss/train"].value == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(EQUATIONS) - {"sppo", "exo"}))
def test_a_soft_label_is_the_mean_loss_of_the_votes_behind_it(name):
    soft, logprobs = random_pairs(labels=LABELS)
    equation = EQUATIONS[name]
    expected = []
    for p, q in zip(log_ratios(soft, logprobs), LABELS, strict=True):
        c, r = BETA * (sum(p.c) - sum(p.ref_c)), BETA * (sum(p.r) - sum(p.ref_r))
        expected.append(q * equation(c, r) + (1 - q) * equation(r, c))
    value, _ = mean_loss(make(name, beta=BETA), soft, logprobs)
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_sppo_and_exo_take_a_soft_label_as_their_target():
    batch, logprobs = random_pairs(labels=LABELS)
    sppo, exo_ = [], []
    for p, q in zip(log_ratios(batch, logprobs), LABELS, strict=True):
        c, r = sum(p.c) - sum(p.ref_c), sum(p.r) - sum(p.ref_r)
        sppo.append((c - (q - 0.5) / BETA) ** 2 + (r - (0.5 - q) / BETA) ** 2)
        p_c, t = sigmoid(BETA * (c - r)), 0.99 * q + 0.01 * (1 - q)
        exo_.append(p_c * log(p_c / t) + (1 - p_c) * log((1 - p_c) / (1 - t)))
    assert mean_loss(make("sppo", beta=BETA), batch, logprobs)[0].item() == pytest.approx(sum(sppo) / 6, rel=1e-5)
    found = mean_loss(make("exo", beta=BETA, label_smoothing=0.01), batch, logprobs)[0].item()
    assert found == pytest.approx(sum(exo_) / 6, rel=1e-4)


def test_label_smoothing_is_a_soft_label_for_all():
    batch, logprobs = random_pairs()
    smoothed, _ = mean_loss(make("dpo", label_smoothing=0.2), batch, logprobs)
    soft, _ = mean_loss(make("dpo"), random_pairs(labels=[0.8] * 6)[0], logprobs)
    torch.testing.assert_close(smoothed, soft)


def test_a_margin_is_asked_for_on_top_where_the_setting_says_so():
    batch, logprobs = random_pairs(margins=MARGINS)
    plain, _ = mean_loss(make("dpo", beta=BETA), batch, logprobs)
    assert plain.item() == pytest.approx(by_hand(EQUATIONS["dpo"]), rel=1e-5)
    expected = []
    for p, m in zip(log_ratios(batch, logprobs), MARGINS, strict=True):
        c, r = BETA * (sum(p.c) - sum(p.ref_c)), BETA * (sum(p.r) - sum(p.ref_r))
        expected.append(-log(sigmoid(c - r - 0.7 * m)))
    loss = make("dpo", beta=BETA, margin_coef=0.7)
    assert mean_loss(loss, batch, logprobs)[0].item() == pytest.approx(sum(expected) / 6, rel=1e-5)
    assert loss.uses_margins
    assert not make("dpo").uses_margins


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_length_normalised_scores_are_those_of_an_average_token(name):
    batch, logprobs = random_pairs()
    expected = []
    for p in log_ratios(batch, logprobs):
        c, r = (sum(p.c) - sum(p.ref_c)) / len(p.c), (sum(p.r) - sum(p.ref_r)) / len(p.r)
        expected.append(EQUATIONS[name](BETA * c, BETA * r))
    value, _ = mean_loss(make(name, beta=BETA, length_normalised=True), batch, logprobs)
    assert value.item() == pytest.approx(sum(expected) / 6, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_tokens_past_the_shorter_reply_count_alpha(alpha):
    batch, logprobs = random_pairs()
    expected = []
    for p in log_ratios(batch, logprobs):
        shared = min(len(p.c), len(p.r))
        gap = 0.0
        for sign, new, ref in ((1, p.c, p.ref_c), (-1, p.r, p.ref_r)):
            for t, (a, b) in enumerate(zip(new, ref, strict=True)):
                gap += sign * (a - b) * (1.0 if t < shared else alpha)
        expected.append(-log(sigmoid(BETA * gap)))
    value, _ = mean_loss(make("dpo", beta=BETA, ld_alpha=alpha), batch, logprobs)
    assert value.item() == pytest.approx(sum(expected) / 6, rel=1e-5)


def test_the_divergences_score_by_the_slope_of_their_generator():
    """f' by finite differences of f from the paper's table."""
    generators = {
        "reverse_kl": lambda u: u * log(u),
        "forward_kl": lambda u: -log(u),
        "js": lambda u: u * log(u) - (u + 1) * log((u + 1) / 2),
        "alpha": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * (0.3 - 1)),
    }
    log_ratio = torch.tensor([-2.0, -0.3, 0.0, 1.0, 3.0], dtype=torch.float64)
    for name, f in generators.items():
        h = 1e-6
        slopes = torch.tensor([(f(exp(x) * (1 + h)) - f(exp(x) * (1 - h))) / (2 * h * exp(x)) for x in log_ratio])
        found = divergence_score(log_ratio, name, 0.3)
        # one constant for all arguments is free: only differences of scores enter a loss
        torch.testing.assert_close((found - found[0]).float(), (slopes - slopes[0]).float(), rtol=1e-4, atol=1e-6)


def test_the_alpha_divergence_goes_from_reverse_to_forward_kl():
    log_ratio = torch.linspace(-2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(divergence_score(log_ratio, "alpha", 1e-6), log_ratio, rtol=1e-5, atol=1e-5)
    near = divergence_score(log_ratio, "alpha", 1 - 1e-9)
    torch.testing.assert_close(near, 1 + divergence_score(log_ratio, "forward_kl"))


@pytest.mark.parametrize(
    "name", ["dpo", "ipo", "hinge", "exo", "robust_dpo", "discopop", "nca", "apo_zero", "apo_down"]
)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "alpha"])
def test_far_from_the_reference_losses_and_gradients_stay_finite(name, divergence):
    batch, _ = random_pairs()
    settings = {"divergence": divergence} if hasattr(make(name), "divergence") else {}
    for shift in (-60.0, 60.0):
        logprobs = (batch.ref_logprobs + shift).requires_grad_()
        value, _ = mean_loss(make(name, beta=0.05, **settings), batch, logprobs)
        value.backward()
        assert value.isfinite()
        assert logprobs.grad.isfinite().all()


def test_discopop_and_exo_are_finite_where_written_out_they_overflow():
    gap = torch.tensor([-200.0, -60.0, 0.0, 200.0], requires_grad=True)
    discopop(gap, 0.05).sum().backward()
    assert gap.grad.isfinite().all()
    assert exo(torch.tensor([-300.0, 300.0]), torch.tensor([0.999, 0.999])).isfinite().all()


def test_robust_dpo_sees_through_flipped_labels_on_average():
    batch, logprobs = random_pairs()
    clean, _ = mean_loss(make("dpo"), batch, logprobs)
    noisy, _ = mean_loss(make("robust_dpo", label_smoothing=0.3), random_pairs(labels=[0.7] * 6)[0], logprobs)
    torch.testing.assert_close(noisy, clean)


def test_from_its_reference_every_loss_starts_at_a_known_value():
    batch, _ = random_pairs()
    at_zero = {
        "dpo": log(2),
        "robust_dpo": log(2),
        "ipo": 1 / (4 * 0.1**2),
        "hinge": 1.0,
        "nca": 2 * log(2),
        "sppo": 2 * (0.5 / 0.1) ** 2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": (log(2) + 1) / 2,
        "aot": log(2),
    }
    for name, expected in at_zero.items():
        value, metrics = mean_loss(make(name, beta=0.1), batch, batch.ref_logprobs.clone())
        assert value.item() == pytest.approx(expected, rel=1e-6), name
        assert metrics["policy/accuracy"].value == 0.5


def test_metrics_are_means_over_pairs():
    batch, logprobs = random_pairs(labels=[1.0, 0.8, 0.5, 1.0, 0.9, 0.6])
    _, metrics = mean_loss(make("dpo", beta=BETA), batch, logprobs)
    rewards = [
        (BETA * (sum(p.c) - sum(p.ref_c)), BETA * (sum(p.r) - sum(p.ref_r))) for p in log_ratios(batch, logprobs)
    ]
    right = [c > r for i, (c, r) in enumerate(rewards) if i != 2]  # the third pair is a tie to the annotators
    assert metrics["policy/accuracy"].value == pytest.approx(sum(right) / 5)
    assert metrics["policy/chosen_reward"].value == pytest.approx(sum(c for c, _ in rewards) / 6, rel=1e-5)
    assert metrics["policy/margin"].value == pytest.approx(sum(c - r for c, r in rewards) / 6, rel=1e-5)
    sums = [sum(p.c) for p in log_ratios(batch, logprobs)]
    assert metrics["policy/chosen_logprobs"].value == pytest.approx(sum(sums) / 6, rel=1e-5)


def test_the_imitation_term_changes_neither_the_rewards_nor_the_other_term():
    """trl#5079: the sft term overwrote the rewards."""
    batch, logprobs = random_pairs()
    plain, plain_metrics = mean_loss(make("dpo"), batch, logprobs)
    both, metrics = mean_loss(make("dpo", nll_coef=0.5), batch, logprobs)
    nll = sum(-sum(p.c) / len(p.c) for p in log_ratios(batch, logprobs)) / 6
    assert (both - plain).item() == pytest.approx(0.5 * nll, rel=1e-5)
    assert metrics["loss/nll"].value == pytest.approx(nll, rel=1e-5)
    for name, metric in plain_metrics.items():
        if name.startswith("policy/"):
            assert metrics[name] == metric


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"label_smoothing": 0.5}),
        ("dpo", {"nll_coef": -1.0}),
        ("dpo", {"ld_alpha": 1.5}),
        ("ipo", {"divergence_alpha": 1.0}),
        ("exo", {"label_smoothing": 0.0}),
        ("discopop", {"tau": 0.0}),
        ("simpo", {"gamma": -1.0}),
        ("orpo", {"odds_coef": 0.0}),
        ("kto", {"desirable_weight": 0.0}),
    ],
)
def test_impossible_settings_are_refused(name, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(name, **wrong)


def test_gradients_check():
    from trimtab.math.losses.preference import pairs

    chosen, rejected = (t.requires_grad_() for t in torch.randn(2, 4, dtype=torch.float64))
    target = torch.tensor([0.999, 0.9, 0.7, 0.5], dtype=torch.float64)
    for function in (pairs.nca, pairs.apo_zero, pairs.apo_down):
        assert torch.autograd.gradcheck(function, (chosen, rejected))
    for function in (
        pairs.dpo,
        lambda gap: pairs.robust_dpo(gap, 0.1),
        lambda gap: pairs.ipo(gap, 0.1),
        lambda gap: pairs.exo(gap, target),
        lambda gap: pairs.discopop(gap, 0.5),
    ):
        assert torch.autograd.gradcheck(function, (chosen,))
    assert math.isclose(pairs.hinge(torch.tensor(0.4)).item(), 0.6, rel_tol=1e-6)
