"""The capability tax: clustered errors against a slow loop, published sample sizes, verdicts, Holm and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy

from trimtab.evals.suites.tax import ALPHA, PairedGap, num_more, tax_verdicts


def gap(mean, deviation, num):
    return PairedGap(mean=mean, num_items=num, num_clusters=num, deviation=deviation, equal_fraction=0.0)


def test_the_clustered_error_is_that_of_a_slow_loop():
    generator = np.random.default_rng(0)
    values = generator.normal(size=30)
    clusters = [str(i) for i in generator.integers(8, size=30)]
    mean = sum(values) / 30
    total = 0.0
    for cluster in set(clusters):
        inside = [value - mean for value, name in zip(values, clusters, strict=True) if name == cluster]
        for a in inside:
            for b in inside:
                total += a * b  # Miller (2024), section 3.2: cross terms within a cluster
    num = len(set(clusters))
    error = math.sqrt(total / 30**2 * num / (num - 1))
    found = PairedGap.of(values, clusters)
    assert found.mean == pytest.approx(mean)
    assert found.deviation / math.sqrt(num) == pytest.approx(error)


def test_equal_items_of_a_cluster_count_once():
    one = PairedGap.of([1.0, 0.0, -1.0], ["a", "b", "c"])
    thrice = PairedGap.of([1.0, 0.0, -1.0] * 3, ["a", "b", "c"] * 3)
    assert thrice.interval().low == pytest.approx(one.interval().low)


@pytest.mark.parametrize(
    ("margin", "differ", "published"), [(0.03, 0.15, 1299), (0.02, 0.10, 1953), (0.01, 0.08, 6265)]
)
def test_the_number_of_items_is_that_of_published_tables(margin, differ, published):
    # McNemar's test at 80% power and two-sided 5%, a share of pairs that differ
    needed = 10 + num_more(gap(0.0, math.sqrt(differ), 10), margin)
    assert needed == pytest.approx(published, rel=0.01)


def test_a_clear_loss_fails_and_a_clear_tie_passes():
    generator = np.random.default_rng(0)
    names = [str(i) for i in range(2000)]
    worse = PairedGap.of(generator.choice([-1.0, 0.0], size=2000, p=[0.1, 0.9]), names)
    same = PairedGap.of(generator.choice([-1.0, 0.0, 1.0], size=2000, p=[0.03, 0.94, 0.03]), names)
    few = PairedGap.of([-1.0, 0.0, 1.0] * 10, names[:30])
    found = tax_verdicts({("a", "x"): worse, ("b", "x"): same, ("c", "x"): few}, margin=0.03)
    assert [one.verdict for one in found] == ["fail", "pass", "inconclusive"]
    assert found[2].num_more > 1000
    assert found[2].text == f"inconclusive, about {found[2].num_more} more items needed"


def test_a_significant_loss_within_the_margin_is_no_failure():
    (found,) = tax_verdicts({("a", "x"): gap(-0.01, 0.1, 10_000)}, margin=0.03)
    assert found.p_fail < ALPHA
    assert found.verdict == "pass"


def test_holm_takes_a_pass_that_is_only_one_of_many():
    borderline = gap(0.0, 1.0, 5300)  # z = 0.03 / (1 / sqrt(5300)) = 2.18
    assert tax_verdicts({("a", "x"): borderline}, margin=0.03)[0].verdict == "pass"
    noise = {(str(i), "x"): gap(-0.03, 1.0, 5300) for i in range(4)}
    found = tax_verdicts({("a", "x"): borderline, **noise}, margin=0.03)[0]
    assert found.p_pass == pytest.approx(5 * borderline.p_above(-0.03))
    assert found.verdict == "inconclusive"


def test_holm_takes_a_failure_that_is_only_one_of_many():
    borderline = gap(-0.04, 1.0, 3000)  # z = 0.04 * sqrt(3000) = 2.19
    assert tax_verdicts({("a", "x"): borderline}, margin=0.03)[0].verdict == "fail"
    found = tax_verdicts(
        {("a", "x"): borderline, **{(str(i), "x"): gap(0.0, 1.0, 3000) for i in range(4)}}, margin=0.03
    )
    assert found[0].p_fail == pytest.approx(5 * borderline.p_below(0.0))
    assert found[0].verdict == "inconclusive"


def test_identical_answers_are_no_proof_if_they_are_few():
    def all_equal(num):
        return PairedGap.of([0.0] * num, [str(i) for i in range(num)])

    few, many = all_equal(20), all_equal(500)
    assert few.interval().low == pytest.approx(-(1 - ALPHA ** (1 / 20)), abs=0.015)
    assert few.interval().high == -few.interval().low
    assert tax_verdicts({("a", "x"): few}, margin=0.03)[0].verdict == "inconclusive"
    assert tax_verdicts({("a", "x"): many}, margin=0.03)[0].verdict == "pass"
    # by hand: if 3% of 100 items were lost, all 100 would be equal with a chance of 0.97^100 = 0.048
    assert all_equal(100).p_above(-0.03) == pytest.approx(0.97**100, abs=0.01)


@pytest.mark.parametrize("odd", [-0.25, 0.01, 0.5, 1.0])
def test_one_item_that_differs_by_a_part_proves_no_more_than_equal_answers(odd):
    found = PairedGap.of([0.0] * 19 + [odd], [str(i) for i in range(20)])
    assert tax_verdicts({("a", "x"): found}, margin=0.03)[0].verdict == "inconclusive"
    assert found.interval().low < -0.05


def test_differences_that_all_vary_keep_their_own_variance():
    generator = np.random.default_rng(0)
    values = generator.normal(0, 0.02, size=40)
    found = PairedGap.of(values, [str(i) for i in range(40)])
    assert found.equal_fraction == 0
    half = scipy.stats.t.isf(0.025, 39) * values.std(ddof=1) / math.sqrt(40)
    assert found.interval().low == pytest.approx(values.mean() - half)
    assert tax_verdicts({("a", "x"): found}, margin=0.03)[0].verdict == "pass"


def test_bounds_are_where_the_p_value_is_that_of_one_side():
    generator = np.random.default_rng(0)
    for num in generator.integers(8, 60, size=50).tolist():
        values = generator.choice([-1.0, -0.5, 0.0, 0.3], size=num, p=[0.05, 0.1, 0.8, 0.05])
        found = PairedGap.of(values, [str(i) for i in range(num)])
        low = found.interval().low
        if -1 < low < 0:
            assert found.p_above(low) == pytest.approx(ALPHA)
            assert max(found.p_above(bound) for bound in np.linspace(-1, low, 20)) <= ALPHA + 1e-9
        mirrored = PairedGap.of(-values, [str(i) for i in range(num)])
        assert mirrored.interval().high == pytest.approx(-low)


def test_the_difference_of_two_pooled_means_has_the_error_of_the_bootstrap():
    generator = np.random.default_rng(0)
    names = [str(i // 2) for i in range(120)]
    ours, theirs = ([generator.random(generator.integers(1, 4)).tolist() for _ in names] for _ in range(2))
    ours[5] = []
    found = PairedGap.of_values(ours, theirs, names)
    pooled = [[value for row in rows for value in row] for rows in (ours, theirs)]
    assert found.mean == pytest.approx(np.mean(pooled[0]) - np.mean(pooled[1]))
    drawn = []
    for _ in range(2000):
        items = [2 * cluster + i for cluster in generator.integers(60, size=60) for i in (0, 1)]
        a, b = ([value for i in items for value in rows[i]] for rows in (ours, theirs))
        drawn.append(np.mean(a) - np.mean(b))
    assert found.deviation / math.sqrt(60) == pytest.approx(np.std(drawn), rel=0.06)


def test_a_single_cluster_says_nothing():
    one = PairedGap.of([1.0, 0.0], ["a", "a"])
    assert math.isnan(one.interval().low)
    assert (one.p_above(-0.03), one.p_below(0.0), num_more(one, 0.03)) == (1.0, 1.0, None)
    assert "would not settle it" in tax_verdicts({("a", "x"): one}, margin=0.03)[0].text


def test_the_same_loss_everywhere_is_significant_by_the_sign_test():
    lost = PairedGap.of([-0.5] * 10, [str(i) for i in range(10)])
    assert lost.p_below(0.0) == 0.5**10


@pytest.mark.parametrize("last", [-0.1, -0.1001])
def test_fewer_than_six_clusters_conclude_nothing(last):
    for num, verdict in ((3, "inconclusive"), (5, "inconclusive"), (6, "fail")):
        lost = PairedGap.of([-0.1] * (num - 1) + [last], [str(i) for i in range(num)])
        (found,) = tax_verdicts({("a", "x"): lost}, margin=0.03)
        assert (found.verdict, found.p_fail) == (verdict, 0.5**num)
    three = PairedGap.of([-0.1] * 3, "abc")
    assert num_more(three, 0.03) == 3


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.1])
def test_a_margin_outside_its_range_is_refused(margin):
    with pytest.raises(ValueError, match="margin"):
        tax_verdicts({}, margin=margin)


def test_intervals_of_equal_models_hold_nothing_at_their_rate():
    generator = np.random.default_rng(1)
    held = held_alone = passed = 0
    for _ in range(400):
        clusters = [str(i // 2) for i in range(120)]
        # the second item of a cluster mostly has the difference of the first
        gaps = np.repeat(generator.choice([-1.0, 0.0, 1.0], size=60, p=[0.15, 0.7, 0.15]), 2)
        own = generator.random(120) < 0.2
        gaps[own] = generator.choice([-1.0, 0.0, 1.0], size=own.sum(), p=[0.15, 0.7, 0.15])
        interval = PairedGap.of(gaps, clusters).interval()
        held += interval.low <= 0 <= interval.high
        alone = PairedGap.of(gaps, list(map(str, range(120)))).interval()
        held_alone += alone.low <= 0 <= alone.high
        # a model that loses exactly the margin passes at most as often as the error allows
        at_margin = PairedGap.of(generator.choice([-1.0, 0.0], size=120, p=[0.03, 0.97]), list(map(str, range(120))))
        passed += at_margin.p_above(-0.03) < ALPHA
    assert 0.925 * 400 <= held <= 0.975 * 400
    assert held_alone < 0.9 * 400  # without clusters the intervals are too narrow
    assert passed <= 0.045 * 400
