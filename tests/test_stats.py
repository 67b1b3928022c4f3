from __future__ import annotations

import math

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from trimtab.stats import (
    Interval,
    auc,
    bootstrap_mean,
    bootstrap_tail,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    moving_mean,
    paired_difference,
    reliability_bins,
    spearman,
    t_interval,
    wilson,
    win_rate,
)


def test_an_interval_reads_as_a_person_would_write_it():
    assert str(Interval(0.81, 0.78, 0.84, 800)) == "0.81 [0.78, 0.84] (n=800)"
    assert str(Interval(0.81, math.nan, math.nan, 0)) == "0.81"


def test_wilson_bounds_are_where_the_score_test_just_rejects():
    # the definition: |share - p| = z sqrt(p (1 - p) / n) at both bounds, p the bound
    interval = wilson(37, 50)
    for bound in (interval.low, interval.high):
        assert abs(37 / 50 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 50), rel=1e-6)


def test_wilson_of_a_textbook_case():
    # 15 of 148 (Newcombe 1998, table I): 0.0624 to 0.1605
    interval = wilson(15, 148)
    assert (interval.low, interval.high) == pytest.approx((0.0624, 0.1605), abs=5e-5)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_stays_in_the_unit_interval_and_holds_the_share(n, share):
    interval = wilson(share * n, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_wilson_without_trials_knows_nothing():
    interval = wilson(0, 0)
    assert math.isnan(interval.value)
    assert (interval.low, interval.high, interval.count) == (0, 1, 0)
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)


def test_the_bootstrap_agrees_with_every_possible_resample():
    # the sum of a draw of four ones and six zeros is binomial
    interval = bootstrap_mean([1.0] * 4 + [0.0] * 6, num_resamples=20_000)
    tail = scipy.stats.norm.sf(scipy.stats.t.ppf(0.975, 9) * math.sqrt(10 / 9))
    sums = scipy.stats.binom.ppf([tail, 1 - tail], 10, 0.4)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.4, *sums / 10))


def test_clustering_widens_the_interval_by_the_design_effect():
    # ten identical answers for each prompt: as much is known as from one answer each
    prompts = np.random.default_rng(1).normal(size=200)
    one_each = bootstrap_mean(prompts)
    ten_each = bootstrap_mean(np.repeat(prompts, 10), groups=np.repeat(np.arange(200), 10).tolist())
    naive = bootstrap_mean(np.repeat(prompts, 10))
    assert ten_each.count == 2000
    assert (ten_each.low, ten_each.high) == pytest.approx((one_each.low, one_each.high))
    assert (ten_each.high - ten_each.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(10), rel=0.15)


def test_groups_of_unequal_size_keep_the_mean_over_values():
    interval = bootstrap_mean([1.0, 1.0, 1.0, 5.0], groups=["a", "a", "a", "b"])
    assert interval.value == 2.0
    # the groups' parts in the mean are (3 - 3 * 2) / 2 and (5 - 2) / 2, so its error is 1.5, of one degree of freedom
    assert (interval.low, interval.high) == pytest.approx((2 - 12.7062 * 1.5, 2 + 12.7062 * 1.5), abs=1e-3)


def test_a_bootstrap_of_one_group_claims_no_interval():
    interval = bootstrap_mean([1.0, 2.0], groups=["a", "a"])
    assert interval.value == 1.5
    assert math.isnan(interval.low)
    assert math.isnan(bootstrap_mean([]).value)
    with pytest.raises(ValueError, match="1 groups for 2 values"):
        bootstrap_mean([1.0, 2.0], groups=["a"])


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = bootstrap_mean(generator.exponential(size=60), num_resamples=200, seed=seed)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


@pytest.mark.parametrize("num", [2, 3, 5, 7, 8, 15])
def test_intervals_of_few_values_cover_the_truth_too(num):
    generator = np.random.default_rng(num)
    drawn = generator.beta(2, 2, size=(400, num))
    found = [bootstrap_mean(row, shares=True, num_resamples=200) for row in drawn]
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in found)
    assert sum(one.low <= 0.5 <= one.high for one in found) / 400 >= 0.91


def test_of_many_values_the_percentiles_are_the_plain_ones():
    assert bootstrap_tail(10_000, 0.95) == pytest.approx(0.025, abs=1e-4)
    assert bootstrap_tail(10, 0.95) == pytest.approx(0.0086, abs=1e-4)


def test_pairing_removes_what_both_sides_share():
    difficulty = np.random.default_rng(0).normal(scale=10, size=100)
    interval = paired_difference(difficulty + 1.0, difficulty)
    assert (interval.low, interval.high) == pytest.approx((1.0, 1.0))
    with pytest.raises(ValueError, match="values_a 2, values_b 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_the_t_interval_of_three_seeds_worked_by_hand():
    # mean 2, sd 1, t(2 df, 0.975) = 4.303
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.low == pytest.approx(2 - 4.302653 / math.sqrt(3))
    assert interval.high == pytest.approx(2 + 4.302653 / math.sqrt(3))
    assert math.isnan(t_interval([1.0]).low)


def test_ties_are_half_a_win():
    assert win_rate([3, 2, 1, 1], [1, 2, 3, 0]).value == (1 + 0.5 + 0 + 1) / 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=30))
def test_a_win_rate_and_its_mirror_image_add_up_to_one(rows):
    a, b, prompts = zip(*rows, strict=True)
    for groups in (None, prompts):
        here, there = win_rate(a, b, groups=groups, num_resamples=50), win_rate(b, a, groups=groups, num_resamples=50)
        assert here.value + there.value == pytest.approx(1)
        if groups is None or len(set(prompts)) > 1:
            assert here.low + there.high == pytest.approx(1)


def test_a_unanimous_win_rate_is_not_certain():
    interval = win_rate([1.0] * 20, [0.0] * 20, groups=[i // 2 for i in range(20)])
    assert (interval.value, interval.count) == (1.0, 20)
    assert interval.low == pytest.approx(wilson(10, 10).low)


def test_reliability_bins_hold_equal_numbers_and_the_right_means():
    p = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3]
    y = [1, 0, 1, 0, 0, 1]
    low, middle, high = reliability_bins(p, y, num_bins=3)
    assert (low.mean_probability, low.accuracy, low.count) == (pytest.approx(0.15), 0.0, 2)
    assert (middle.mean_probability, middle.accuracy) == (pytest.approx(0.5), 0.5)
    assert (high.low, high.high, high.accuracy) == (0.8, 0.9, 1.0)
    assert expected_calibration_error(p, y, num_bins=3) == pytest.approx((0.15 + 0.0 + 0.15) / 3)


def test_fewer_predictions_than_bins_leave_no_bin_empty():
    assert [b.count for b in reliability_bins([0.2, 0.4], [0, 1])] == [1, 1]
    assert math.isnan(expected_calibration_error([], []))


def test_a_perfect_forecaster_is_nearly_calibrated_and_an_overconfident_one_is_not():
    generator = np.random.default_rng(0)
    p = generator.uniform(size=20_000)
    y = generator.uniform(size=20_000) < p
    assert expected_calibration_error(p, y) < 0.4 / math.sqrt(20_000 / 15) * 1.5
    assert expected_calibration_error((p > 0.5).astype(float), y) == pytest.approx(0.25, abs=0.02)


def test_the_brier_score_is_the_mean_squared_error():
    assert brier_score([0.0, 0.5, 0.9], [0, 1, 1]) == pytest.approx((0 + 0.25 + 0.01) / 3)
    assert brier_score([0.5, 0.5], [0, 1]) == 0.25
    assert math.isnan(brier_score([], []))


def test_auc_counts_every_pair():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 6, size=40), generator.integers(0, 2, size=40)
    wins = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1].tolist() for b in scores[labels == 0].tolist()]
    assert auc(scores, labels) == pytest.approx(sum(wins) / len(wins))
    assert math.isnan(auc([1.0, 2.0], [1, 1]))


def test_spearman_of_a_case_with_ties_worked_by_hand():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_the_temperature_undoes_a_scaling_of_the_logits(scale):
    logits = np.random.default_rng(0).normal(size=500)
    chances = 1 / (1 + np.exp(-logits))  # soft outcomes: no sampling noise
    assert fit_temperature(logits * scale, chances) == pytest.approx(scale, rel=1e-4)


def test_logits_that_point_the_wrong_way_are_flattened():
    assert fit_temperature([2.0, -1.0], [0, 1]) == pytest.approx(1000, rel=1e-3)


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(math.nan)), min_size=1, max_size=12), st.integers(1, 5))
def test_the_moving_mean_is_the_mean_of_what_its_window_covers(values, window):
    smooth = moving_mean(values, window)
    assert len(smooth) == len(values)
    for i in range(len(values)):
        covered = [v for v in values[max(0, i - (window - 1) // 2) : i + window // 2 + 1] if not math.isnan(v)]
        expected = sum(covered) / len(covered) if covered else math.nan
        assert smooth[i] == pytest.approx(expected, abs=1e-9, nan_ok=True)
