from math import exp, log

import pytest
import torch

from tests.preference_batches import log_ratios, make, mean_loss, random_pairs, random_replies, sigmoid, split_pairs
from trimtab.core.metrics import Mean
from trimtab.math.losses.preference.replies import Gap
from trimtab.math.masking import sum_per_sequence


def ratios_of(batch, logprobs):
    return sum_per_sequence(logprobs - batch.ref_logprobs, batch.sequence_ids, batch.num_sequences).tolist()


def baseline_of(batch, mismatched_logprobs):
    differences = mismatched_logprobs - batch.mismatched_ref_logprobs
    ratios = sum_per_sequence(differences, batch.mismatched.sequence_ids, batch.mismatched.num_sequences)
    return max(0.0, float(ratios.mean()))


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_kto_measures_replies_from_the_mean_log_ratio_of_mismatched_ones_if_it_is_positive(shift):
    batch, logprobs, mismatched = random_replies()
    mismatched = mismatched + shift
    z = baseline_of(batch, mismatched)
    assert (z > 0) == (shift > 0)
    loss = make("kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    expected = [
        1.5 * (1 - sigmoid(0.2 * (x - z))) if good else 0.5 * (1 - sigmoid(0.2 * (z - x)))
        for x, good in zip(ratios_of(batch, logprobs), batch.desirable.tolist(), strict=True)
    ]
    value, metrics = mean_loss(loss, batch, logprobs, logprobs_of=lambda trees: mismatched)
    assert value.item() == pytest.approx(sum(expected) / 6, rel=1e-5)
    assert metrics["policy/baseline"].value == pytest.approx(z, rel=1e-5)


def test_kto_without_a_baseline_needs_no_mismatched_replies():
    batch, logprobs, _ = random_replies()
    loss = make("kto", baseline="none")
    assert not loss.needs_mismatched
    expected = [
        1 - sigmoid(0.1 * x) if good else sigmoid(0.1 * x)
        for x, good in zip(ratios_of(batch, logprobs), batch.desirable.tolist(), strict=True)
    ]
    assert mean_loss(loss, batch, logprobs)[0].item() == pytest.approx(sum(expected) / 6, rel=1e-5)


@pytest.mark.parametrize("shift", ["update", "none"])
def test_bco_is_cross_entropy_measured_from_half_way_between_good_and_bad(shift):
    batch, logprobs, _ = random_replies()
    found = list(zip(ratios_of(batch, logprobs), batch.desirable.tolist(), strict=True))
    good, bad = [x for x, is_good in found if is_good], [x for x, is_good in found if not is_good]
    delta = (sum(good) / len(good) + sum(bad) / len(bad)) / 2 if shift == "update" else 0.0
    expected = [-log(sigmoid(0.1 * (x - delta))) for x in good] + [-log(sigmoid(-0.1 * (x - delta))) for x in bad]
    value, _ = mean_loss(make("bco", shift=shift), batch, logprobs)
    assert value.item() == pytest.approx(sum(expected) / 6, rel=1e-5)


def test_a_baseline_moves_no_gradient():
    batch, logprobs, mismatched = random_replies()
    for name in ("kto", "bco"):
        logprobs.grad = None
        own = logprobs.clone().requires_grad_()
        loss = make(name)
        value, _ = mean_loss(loss, batch, own, logprobs_of=lambda t: mismatched if t is batch.mismatched else logprobs)
        value.backward()
        numeric = own.detach().clone()
        fixed = loss.complete(batch, lambda t: mismatched if t is batch.mismatched else logprobs)
        for i in (0, 3):
            step = torch.zeros_like(numeric)
            step[i] = 1e-2
            up, down = (
                loss(type("Outputs", (), {"logprobs": numeric + s * step})(), fixed)[0] / loss.weight(fixed)
                for s in (1, -1)
            )
            assert own.grad[i].item() == pytest.approx((up - down).item() / 2e-2, rel=2e-2, abs=1e-5)


def test_pairs_split_in_two_are_a_good_and_a_bad_reply_each():
    pairs, logprobs = random_pairs()
    value, metrics = mean_loss(make("kto", baseline="none", beta=0.3), split_pairs(pairs), logprobs)
    expected = []
    for p in log_ratios(pairs, logprobs):
        c, r = sum(p.c) - sum(p.ref_c), sum(p.r) - sum(p.ref_r)
        expected += [1 - sigmoid(0.3 * c), sigmoid(0.3 * r)]
    assert value.item() == pytest.approx(sum(expected) / 12, rel=1e-5)
    of_pairs = mean_loss(make("apo_zero", beta=0.3), pairs, logprobs)
    assert value.item() == pytest.approx(of_pairs[0].item() / 2, rel=1e-5)  # the same terms over twice as many
    for name in ("policy/chosen_reward", "policy/rejected_reward", "policy/margin", "policy/chosen_logprobs"):
        assert metrics[name].value == pytest.approx(of_pairs[1][name].value, rel=1e-5), name


def test_soft_labels_share_a_reply_between_good_and_bad():
    pairs, logprobs = random_pairs(labels=[0.75] * 6)
    loss = make("bco", shift="none")
    value, _ = mean_loss(loss, split_pairs(pairs), logprobs)
    expected = []
    for p in log_ratios(pairs, logprobs):
        for x, q in ((sum(p.c) - sum(p.ref_c), 0.75), (sum(p.r) - sum(p.ref_r), 0.25)):
            expected.append(q * log(1 + exp(-0.1 * x)) + (1 - q) * log(1 + exp(0.1 * x)))
    assert value.item() == pytest.approx(sum(expected) / 12, rel=1e-5)


def test_imitation_is_of_good_replies_only():
    batch, logprobs, _ = random_replies()
    plain, _ = mean_loss(make("bco"), batch, logprobs)
    both, metrics = mean_loss(make("bco", nll_coef=2.0), batch, logprobs)
    sums = sum_per_sequence(logprobs, batch.sequence_ids, 6)
    lengths = torch.bincount(batch.sequence_ids)
    nll = float((-sums / lengths * batch.desirable).sum())
    assert (both - plain).item() == pytest.approx(2.0 * nll / 6, rel=1e-5)
    assert metrics["loss/nll"].value == pytest.approx(nll / float(batch.desirable.sum()), rel=1e-5)


def test_a_gap_merges_exactly():
    whole = Gap(Mean(6.0, 3.0), Mean(1.0, 2.0))
    parts = Gap(Mean(2.0, 1.0), Mean(0.0, 0.0)).merge(Gap(Mean(4.0, 2.0), Mean(1.0, 2.0)))
    assert parts == whole
    assert whole.value == 1.5
