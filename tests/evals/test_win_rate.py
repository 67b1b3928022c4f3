from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import by_matchup, differences, likely_deviation, prompts_for, win_rate_of
from trimtab.stats import holm


def verdict(prompt, value, *, model="mine", baseline="base", shown_first=None, judge=""):
    return PairVerdict(
        prompt=str(prompt), model=model, baseline=baseline, verdict=value, shown_first=shown_first, judge=judge
    )


def test_a_tie_is_half_a_win_and_each_prompt_counts_once():
    # prompt a: mean of 1, 1, 0.5 = 5/6; b: 0; c: 0.9, which is a win if rounded
    rows = [verdict("a", 1.0, judge="1"), verdict("a", 1.0, judge="2"), verdict("a", 0.5, judge="3")]
    found = win_rate_of([*rows, verdict("b", 0.0), verdict("c", 0.9)])
    assert found.rate.value == pytest.approx((5 / 6 + 0 + 0.9) / 3)
    assert found.discrete.value == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert (found.num_wins, found.num_losses, found.num_ties) == (3, 1, 1)
    assert (found.rate.count, found.num_verdicts) == (3, 5)
    assert found.first_shown is None
    assert math.isnan(found.flip_fraction)


def test_position_bias_is_read_from_the_prompts_with_both_orders():
    # a: the reply shown first wins twice; b: the model wins twice; c: one order only
    rows = [
        verdict("a", 1.0, shown_first="model"),
        verdict("a", 0.0, shown_first="baseline"),
        verdict("b", 1.0, shown_first="model"),
        verdict("b", 1.0, shown_first="baseline"),
        verdict("c", 1.0, shown_first="model"),
    ]
    found = win_rate_of(rows)
    assert found.first_shown.value == pytest.approx((1.0 + 0.5) / 2)
    assert found.first_shown.count == 2
    assert found.flip_fraction == 0.5
    assert found.num_one_order == 1
    assert found.rate.value == pytest.approx((0.5 + 1 + 1) / 3)


def test_a_judge_that_always_takes_the_first_gives_even_models():
    rows = [verdict(i, float(side == "model"), shown_first=side) for i in range(20) for side in ("model", "baseline")]
    found = win_rate_of(rows)
    assert found.rate.value == 0.5
    assert found.first_shown.value == 1.0
    assert found.flip_fraction == 1.0
    assert found.first_shown.low < 1  # twenty prompts are not certainty


def test_orders_weigh_the_same_however_often_each_was_judged():
    # The judge takes what is shown first, and most prompts are judged thrice with the model first.
    rows = [verdict(i, 1.0, shown_first="model", judge=str(j)) for i in range(9) for j in range(3)]
    rows += [verdict(i, 0.0, shown_first="baseline", judge="0") for i in range(9)]
    even = [verdict("even", float(side == "model"), shown_first=side) for side in ("model", "baseline")]
    found = win_rate_of([*rows, *even])
    assert found.rate.value == 0.5
    assert found.discrete.value == 0.5
    assert found.num_unbalanced == 9
    assert found.num_one_order == 0


def test_verdicts_in_no_known_order_keep_their_share():
    # By hand: three of the four verdicts count (1 + 0) / 2 together, and the fourth 1.
    orders = [("model", 1.0, "1"), ("model", 1.0, "2"), ("baseline", 0.0, "1"), (None, 1.0, "3")]
    rows = [verdict("a", value, shown_first=side, judge=judge) for side, value, judge in orders]
    assert win_rate_of(rows).rate.value == pytest.approx((3 * 0.5 + 1) / 4)


def test_two_models_are_paired_by_prompt_as_in_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.random(30), generator.random(30) * 0.9
    rows = [verdict(i, x, model="a") for i, x in enumerate(a)] + [verdict(i, x, model="b") for i, x in enumerate(b)]
    rows += [verdict("only a", 1.0, model="a"), verdict(0, 1.0, model="c", baseline="other")]
    (found,) = differences(by_matchup(rows))
    expected = scipy.stats.ttest_rel(a, b)
    assert found.p_value == pytest.approx(expected.pvalue)
    bounds = expected.confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high))
    assert found.difference.count == 30
    assert found.p_holm == found.p_value


def test_without_spread_the_difference_has_the_p_value_of_the_sign_test():
    rows = [verdict(i, x, model=m) for i in range(6) for m, x in (("a", 1.0), ("b", 0.0), ("c", 0.0))]
    found = {(row.model, row.other): row for row in differences(by_matchup(rows))}
    assert found["a", "b"].p_value == scipy.stats.binomtest(6, 6).pvalue
    assert math.isnan(found["a", "b"].difference.low)
    assert found["b", "c"].p_value == 1.0


def test_holm_as_worked_by_hand():
    # sorted .01 .03 .04: times 3, 2, 1 gives .03 .06 .04, and what follows is never smaller
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(("half_width", "num"), [(0.05, 385), (0.03, 1068), (0.02, 2401)])
def test_prompts_for_a_wanted_width_are_the_textbooks(half_width, num):
    assert prompts_for(half_width) == num


def test_a_width_of_0_is_refused():
    with pytest.raises(ValueError, match="half-width"):
        prompts_for(0.0)


@pytest.mark.parametrize(("num", "value", "wanted"), [(10, 1.0, 857), (10, 0.0, 857), (2, 1.0, 1068), (1, 1.0, 1068)])
def test_verdicts_that_agree_do_not_settle_the_number_of_prompts(num, value, wanted):
    # Of 10 prompts the upper bound of 0 is z^2 / (10 + z^2) = 0.2775: a variance of 0.2775 * 0.7225 = 0.2005.
    found = win_rate_of([verdict(i, value) for i in range(num)], half_width=0.03)
    assert found.prompts_for_width == pytest.approx(wanted, abs=1)


def test_the_deviation_of_many_prompts_is_their_own():
    means = np.random.default_rng(0).random(50_000)
    assert likely_deviation(means) == pytest.approx(means.std(), rel=1e-3)
    assert likely_deviation(np.array([0.0, 1.0])) == 0.5  # no values in [0, 1] vary more


def test_the_interval_at_the_wanted_size_has_the_wanted_width():
    generator = np.random.default_rng(0)
    num = win_rate_of([verdict(i, x) for i, x in enumerate(generator.random(200))], half_width=0.02).prompts_for_width
    found = win_rate_of([verdict(i, x) for i, x in enumerate(generator.random(num))])
    assert (found.rate.high - found.rate.low) / 2 == pytest.approx(0.02, rel=0.1)


def test_identical_models_give_half_and_their_intervals_cover_at_their_rate():
    # Two verdicts a prompt, one in each order, which share a leaning of the prompt and a bias to the first reply.
    generator = np.random.default_rng(1)
    covered, paired, rejected = [], [], []
    for seed in range(200):
        rows = []
        for i in range(100):
            leaning = generator.normal()
            for model in ("a", "b"):
                for side, bias in (("model", 0.5), ("baseline", -0.5)):
                    wins = float(generator.random() < 1 / (1 + math.exp(-(leaning + bias))))
                    rows.append(verdict(i, wins, model=model, shown_first=side))
        matchups = by_matchup(rows)
        rate = win_rate_of(matchups["a", "base"], seed=seed).rate
        covered.append(rate.low <= 0.5 <= rate.high)
        (gap,) = differences(matchups)
        paired.append(gap.difference.low <= 0 <= gap.difference.high)
        rejected.append(gap.p_value < 0.05)
    assert all(0.91 <= np.mean(row) <= 0.985 for row in (covered, paired))  # 0.95 within 2.6 standard errors
    assert np.mean(rejected) == pytest.approx(1 - np.mean(paired))
