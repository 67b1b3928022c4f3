import math
from math import exp, log
from types import SimpleNamespace

import pytest
import torch

from tests.preference_batches import log_ratios, make, mean_loss, random_pairs, sigmoid
from trimtab.math.losses.preference.reference_free import log_odds


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def odds(logprobs):
    p = exp(mean(logprobs))
    return p / (1 - p)


EQUATIONS = {
    "orpo": lambda p: -mean(p.c) - 0.1 * log(sigmoid(log(odds(p.c) / odds(p.r)))),
    "simpo": lambda p: -log(sigmoid(2.0 * mean(p.c) - 2.0 * mean(p.r) - 1.0)),
    "cpo": lambda p: -mean(p.c) - log(sigmoid(0.1 * (sum(p.c) - sum(p.r)))),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_loss_is_the_mean_of_its_equation_and_reads_no_reference(name):
    batch, logprobs = random_pairs()
    expected = mean(EQUATIONS[name](p) for p in log_ratios(batch, logprobs))
    bare = SimpleNamespace(**{k: getattr(batch, k) for k in ("sequence_ids", "num_sequences", "chosen_ids")})
    bare.rejected_ids, bare.labels = batch.rejected_ids, batch.labels
    loss = make(name)
    assert not loss.needs_reference
    assert mean_loss(loss, bare, logprobs)[0].item() == pytest.approx(expected, rel=1e-5)


def test_cpo_simpo_is_simpo_with_imitation():
    batch, logprobs = random_pairs()
    pairs = log_ratios(batch, logprobs)
    expected = mean(EQUATIONS["simpo"](p) - mean(p.c) for p in pairs)
    assert mean_loss(make("simpo", nll_coef=1.0), batch, logprobs)[0].item() == pytest.approx(expected, rel=1e-5)


def test_soft_labels_share_the_preference_term_and_leave_imitation_to_the_chosen_reply():
    labels = [1.0, 0.8, 0.5, 1.0, 0.9, 0.6]
    batch, logprobs = random_pairs(labels=labels)
    expected = []
    for p, q in zip(log_ratios(batch, logprobs), labels, strict=True):
        x = 0.1 * (sum(p.c) - sum(p.r))
        expected.append(-mean(p.c) - q * log(sigmoid(x)) - (1 - q) * log(sigmoid(-x)))
    assert mean_loss(make("cpo"), batch, logprobs)[0].item() == pytest.approx(mean(expected), rel=1e-5)


def test_each_vote_behind_a_soft_label_asks_simpo_for_its_margin():
    labels = [1.0, 0.8, 0.5, 1.0, 0.9, 0.6]
    batch, logprobs = random_pairs(labels=labels)
    expected = []
    for p, q in zip(log_ratios(batch, logprobs), labels, strict=True):
        ahead = 2.0 * (mean(p.c) - mean(p.r))
        expected.append(-q * log(sigmoid(ahead - 1.0)) - (1 - q) * log(sigmoid(-ahead - 1.0)))
    assert mean_loss(make("simpo"), batch, logprobs)[0].item() == pytest.approx(mean(expected), rel=1e-5)


def test_log_odds_keep_their_digits_at_both_ends():
    found = log_odds(torch.tensor([-20.0, -1e-4, math.log(0.5)], dtype=torch.float64))
    expected = [-20.0 - math.log1p(-exp(-20)), -1e-4 - math.log(-math.expm1(-1e-4)), 0.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_certain_reply_has_finite_odds_and_gradient():
    logprobs = torch.zeros(3, requires_grad=True)
    log_odds(logprobs).sum().backward()
    assert logprobs.grad.isfinite().all()
