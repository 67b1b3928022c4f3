from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from trimtab.core.errors import ConfigError
from trimtab.feedback.campaign import (
    Campaign,
    fit_learning_curve,
    items_for_agreement,
    items_for_win_rate,
    label_accuracy,
    overlaps_for_the_money,
    parse_pilot,
    vote_accuracy,
)


def test_the_bill_worked_by_hand():
    # 1000 items × 2 votes, a tenth more for checks: 2200 judgements of 90 s at 24 an hour and a fee of a quarter
    plan = Campaign(
        items=1000, overlap=2, gold=0.05, repeats=0.03, adjudication=0.02, minutes=1.5, wage=24, fee=0.25,
        annotators=5, hours_per_day=5.5,
    )  # fmt: skip
    assert plan.judgements == 2200
    assert plan.price_per_judgement == pytest.approx(0.75)
    assert plan.cost == pytest.approx(1650)
    assert plan.hours == pytest.approx(55)
    assert plan.days == pytest.approx(2)
    assert Campaign(items=10, gold=0, repeats=0, price=2.0, fee=0).cost == 20


@pytest.mark.parametrize(("half_width", "num"), [(0.05, 385), (0.03, 1068), (0.02, 2401)])
def test_judgements_for_a_win_rate(half_width, num):
    assert items_for_win_rate(half_width) == num


def test_items_for_an_agreement_give_the_interval_that_was_asked_for():
    generator = np.random.default_rng(0)
    p = vote_accuracy(0.7)
    num = items_for_agreement(0.05, agreement=0.7, votes_per_item=3)
    means = []
    for _ in range(2000):
        right = generator.binomial(3, p, size=num)
        means.append(np.mean((right * (right - 1) + (3 - right) * (2 - right)) / 6))
    assert 1.96 * np.std(means) == pytest.approx(0.05, rel=0.06)
    with pytest.raises(ConfigError, match="1 vote for an item"):
        items_for_agreement(0.05, agreement=0.7, votes_per_item=1)


def test_the_accuracy_of_a_majority_is_a_sum_over_all_outcomes():
    for n in (1, 2, 3, 4, 5):
        slow = 0.0
        for votes in itertools.product((0, 1), repeat=n):
            chance = math.prod(0.8 if vote else 0.2 for vote in votes)
            slow += chance * (1.0 if 2 * sum(votes) > n else 0.5 if 2 * sum(votes) == n else 0.0)
        assert label_accuracy(0.8, n) == pytest.approx(slow)
    assert label_accuracy(0.8, 1.5) == pytest.approx((label_accuracy(0.8, 1) + label_accuracy(0.8, 2)) / 2)


def test_vote_accuracy_is_what_gives_that_agreement():
    for a in (0.5, 0.63, 0.9, 1.0):
        p = vote_accuracy(a)
        assert p**2 + (1 - p) ** 2 == pytest.approx(a)


def test_flipped_labels_cost_what_the_formula_says():
    # the mean of a sign s in {-1, 1} estimated from n flips with chance 1 - q: its error is that of n (2q - 1)² signs
    generator = np.random.default_rng(0)
    q, n = 0.8, 4000
    signs = np.where(generator.random((1000, n)) < 0.5, 1, -1)
    seen = np.where(generator.random((1000, n)) < q, signs, -signs)
    error = np.std(seen.mean(axis=1) / (2 * q - 1))
    assert 1 / error**2 == pytest.approx(n * (2 * q - 1) ** 2, rel=0.1)
    assert Campaign(items=1000, agreement=0.68).effective_items == pytest.approx(1000 * 0.36)


def test_one_vote_for_each_item_is_the_best_use_of_money_without_other_costs():
    rows = overlaps_for_the_money(Campaign(items=3000))
    assert [row["items"] for row in rows] == pytest.approx([3000, 1500, 1000, 600, 3000 / 7])
    assert max(rows, key=lambda row: row["effective_items"])["overlap"] == 1


def test_a_learning_curve_is_recovered():
    points = [(n, 0.8 - 2 * n**-0.4) for n in (200, 500, 1000, 4000)]
    curve = fit_learning_curve(points, highest=0.95)
    assert (curve.limit, curve.scale, curve.exponent) == pytest.approx((0.8, 2, 0.4), abs=0.02)
    assert curve.accuracy(1000) == pytest.approx(points[2][1])
    two = fit_learning_curve([(n, 0.8 - 2 * n**-0.4) for n in (200, 2000)], highest=0.8)
    assert (two.limit, two.exponent) == pytest.approx((0.8, 0.4), abs=0.01)


def test_a_straight_line_of_points_is_not_carried_beyond_what_votes_allow():
    curve = fit_learning_curve(parse_pilot("500:0.58,1000:0.61,2000:0.64"), highest=0.8)
    assert curve.limit == 0.8
    assert curve.accuracy(2000) == pytest.approx(0.64, abs=0.01)
    assert curve.accuracy(1e9) < 0.8


@pytest.mark.parametrize("pilot", ["500:0.6", "500:0.6,500:0.7", "500:0.6,1000:1.2", "500:0.6,1000:0.85", ""])
def test_a_pilot_that_says_nothing_is_refused(pilot):
    with pytest.raises(ConfigError, match="the pilot"):
        fit_learning_curve(parse_pilot(pilot), highest=0.8)


def test_accuracy_that_falls_is_no_learning_curve():
    with pytest.raises(ConfigError, match="does not rise"):
        fit_learning_curve([(100, 0.7), (200, 0.65), (400, 0.6)], highest=0.8)
    with pytest.raises(ConfigError, match="hello"):
        parse_pilot("hello")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"items": 0}, "items is 0"),
        ({"overlap": 0.5}, "overlap is 0.5"),
        ({"agreement": 0.5}, "agreement is 0.5"),
        ({"wage": -1.0}, "wage is -1"),
        ({"gold": -0.1}, "gold is -0.1"),
        ({"hours_per_day": 30.0}, "hours_per_day is 30"),
    ],
)
def test_plans_that_cannot_be_are_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        Campaign(**settings)
