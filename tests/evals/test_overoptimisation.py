from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.evals.overoptimisation import best_of_n, best_of_n_curve, best_of_n_kl, fit_curve, hacking_summary


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (4, 0.636), (16, 1.835), (64, 3.175), (1000, 5.909)])
def test_best_of_n_kl_matches_the_published_numbers(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=5e-4)


def test_best_of_n_kl_is_the_kl_of_the_winner_of_many_distinct_samples():
    # with N equally likely samples the winner of n draws is sample i with probability (i/N)^n - ((i-1)/N)^n
    num, n = 20_000, 5
    i = np.arange(1, num + 1)
    p = (i / num) ** n - ((i - 1) / num) ** n
    p = p[p > 0]
    assert float(np.sum(p * np.log(p * num))) == pytest.approx(best_of_n_kl(n), abs=1e-3)


@given(
    st.integers(1, 6).flatmap(
        lambda num: st.tuples(
            st.lists(st.integers(0, 3), min_size=num, max_size=num),
            st.lists(st.floats(-5, 5), min_size=num, max_size=num),
            st.integers(1, num),
        )
    )
)
def test_best_of_n_equals_trying_every_subset(case):
    proxy, gold, n = case
    expected = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        tied = [gold[i] for i in subset if proxy[i] == best]
        expected.append(sum(tied) / len(tied))
    assert best_of_n([gold], [proxy], n)[0] == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_best_of_n_stays_exact_for_thousands_of_samples():
    values = np.arange(5000.0)[None]
    assert best_of_n(values, values, 5000)[0] == pytest.approx(4999)
    # the expected maximum of n draws without replacement from 0..N-1 is n (N + 1) / (n + 1) - 1
    assert best_of_n(values, values, 9)[0] == pytest.approx(9 * 5001 / 10 - 1)


def test_best_of_n_names_an_impossible_n():
    with pytest.raises(ValueError, match="best of 3 needs n between 1 and the 2 samples"):
        best_of_n([[1.0, 2.0]], [[1.0, 2.0]], 3)
    with pytest.raises(ValueError, match="one shape"):
        best_of_n([[1.0, 2.0]], [[1.0]], 1)


def test_a_best_of_n_curve_starts_at_the_mean_and_ends_at_the_best():
    generator = np.random.default_rng(0)
    gold = generator.normal(size=(30, 8))
    proxy = gold + generator.normal(size=(30, 8))
    by_proxy, by_gold = best_of_n_curve(gold, proxy, [1, 2, 8]), best_of_n_curve(gold, gold, [1, 2, 8])
    assert [point.n for point in by_proxy] == [1, 2, 8]
    assert by_proxy[0].value.value == pytest.approx(gold.mean())
    assert by_gold[2].value.value == pytest.approx(gold.max(axis=1).mean())
    assert by_proxy[2].value.value == pytest.approx(gold[np.arange(30), proxy.argmax(axis=1)].mean())
    assert by_gold[1].value.low < by_gold[1].value.value < by_gold[1].value.high
    with pytest.raises(ValueError, match="best of 16"):
        best_of_n_curve(gold, gold, [16])


@pytest.mark.parametrize(
    ("form", "curve", "peak"),
    [
        # worked by hand: alpha / 2 beta = 3 and alpha^2 / 4 beta = 1.8; exp(alpha / beta - 1) = e^2 and beta e^2
        ("best_of_n", lambda d: d * (1.2 - 0.2 * d), (3.0, 1.8)),
        ("rl", lambda d: d * (1.2 - 0.4 * math.log(d)), (math.e**2, 0.4 * math.e**2)),
    ],
)
def test_a_fit_recovers_the_curve_and_its_peak(form, curve, peak):
    distance = np.linspace(0.4, 8, 40)
    noise = np.random.default_rng(0).normal(scale=0.01, size=40)
    fit = fit_curve(distance**2, 0.5 + np.array([curve(d) for d in distance]) + noise, form, start=0.5)
    assert fit.peak == pytest.approx(peak, rel=0.02)
    assert fit(2.0) == pytest.approx(curve(2.0), rel=0.01)


def test_the_form_that_made_the_points_has_the_lower_aicc():
    distance = np.linspace(0.5, 6, 30)
    noise = np.random.default_rng(0).normal(scale=0.02, size=30)
    reward = distance * (1.2 - 0.4 * np.log(distance)) + noise
    aicc = {form: fit_curve(distance**2, reward, form, start=0.0).aicc for form in ("rl", "best_of_n", "linear")}
    assert min(aicc, key=aicc.__getitem__) == "rl"


def test_aicc_of_a_line_worked_by_hand():
    # y = x + residuals (0.1, -0.2, 0.1) whose sum with x = 1, 2, 3 is 0: RSS 0.06 over n = 3 has no correction left
    assert fit_curve([1, 4, 9], [1.1, 1.8, 3.1], "linear", start=0.0).aicc == math.inf
    # n = 4, residuals (1, -1, 1, -0.5) orthogonal to x = 1..4 : 1 - 2 + 3 - 2 = 0; RSS 3.25; k = 2
    fit = fit_curve([1, 4, 9, 16], [2, 1, 4, 3.5], "linear", start=0.0)
    assert fit.alpha == pytest.approx(1)
    assert fit.aicc == pytest.approx(4 * math.log(3.25 / 4) + 4 + 12)


def test_a_peak_far_beyond_the_data_is_not_predicted():
    distance = np.linspace(0.1, 1.0, 20)
    fit = fit_curve(distance**2, distance * (1.2 - 0.2 * distance), "best_of_n", start=0.0)
    assert fit.alpha == pytest.approx(1.2)
    assert fit.peak is None
    with pytest.raises(ValueError, match="measured up to d = 1"):
        fit(3.0)


def test_a_curve_that_bends_upwards_is_fitted_by_a_line():
    distance = np.linspace(0.1, 2, 20)
    fit = fit_curve(distance**2, distance * (1 + distance), "best_of_n", start=0.0)
    assert fit.beta == 0
    assert fit.peak is None


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="2 usable points cannot fit the 2 parameters of 'rl'"):
        fit_curve([0.01, 1.0, 4.0], [0.0, 1.0, 1.5], "rl")


def test_a_hacked_run_is_summarised():
    points = [(0.0, 0.0, 0.50), (1.0, 1.0, 0.80), (4.0, 2.0, 0.60), (9.0, 3.0, 0.40)]
    summary = hacking_summary(points)
    assert (summary.peak_gold, summary.peak_index, summary.peak_kl, summary.final_gold) == (0.8, 1, 1.0, 0.4)
    assert summary.fall_fraction == pytest.approx(0.5)
    assert summary.proxy_kept_rising


def test_a_run_that_ends_at_its_best_has_not_fallen():
    summary = hacking_summary([(0.0, 0.0, 0.5), (1.0, 1.0, 0.8)])
    assert summary.fall_fraction == 0
    assert not summary.proxy_kept_rising


def test_averaging_keeps_one_lucky_step_from_being_the_peak():
    gold = [0.5, 0.5, 0.9, 0.5, 0.5, 0.6, 0.7, 0.7, 0.7]
    points = [(float(i), float(i), g) for i, g in enumerate(gold)]
    assert hacking_summary(points).peak_index == 2
    summary = hacking_summary(points, window=3)
    assert summary.peak_index == 7
    assert summary.final_gold == pytest.approx(0.7)
    # differences 0, 0.4, -0.4, 0, 0.1, 0.1, 0, 0: their mean square over two is that of the noise, 0.021
    assert summary.fall_error == pytest.approx(math.sqrt((0.16 + 0.16 + 0.01 + 0.01) / 8 / 2 * 2 / 3))
