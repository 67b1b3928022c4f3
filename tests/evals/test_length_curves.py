"""Curves of reward against length: by hand, against slow loops, and what a correction does to rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.evals.length_curves import (
    METHODS,
    LengthCurve,
    fit_curve,
    length_figures,
    length_premium,
    length_refusal,
    lowess,
)


def replies(num=200, seed=0):
    """Rewards and lengths of replies, many of them of one length, with a taste for length that levels off."""
    draw = np.random.default_rng(seed)
    lengths = np.round(draw.gamma(4.0, 6.0, num)) + 1
    return 3 * np.log(lengths) + draw.normal(size=num), lengths


def slow_lowess(x, y, place, bandwidth):
    """From the definition: the q nearest points, their tricube weights, and the normal equations of a line."""
    q = max(2, math.ceil(bandwidth * len(x)))
    width = sorted(abs(a - place) for a in x)[q - 1]
    weights = []
    for a in x:
        part = abs(a - place) / width if width else float(a != place)
        weights.append((1 - part**3) ** 3 if part < 1 else 0.0)
    design = np.array([[1.0, a] for a in x])
    weighted = design.T @ (design * np.array(weights)[:, None])
    if np.linalg.matrix_rank(weighted) < 2:
        return float(np.average(y, weights=weights))
    intercept, slope = np.linalg.solve(weighted, design.T @ (np.array(weights) * y))
    return float(intercept + slope * place)


@pytest.mark.parametrize("bandwidth", [0.05, 0.3, 0.5, 1.0])
def test_lowess_is_the_weighted_line_of_its_definition(bandwidth):
    y, x = replies()
    places = np.unique(x)
    expected = [slow_lowess(x.tolist(), y, place, bandwidth) for place in places.tolist()]
    assert lowess(x, y, places, bandwidth=bandwidth) == pytest.approx(expected, abs=1e-8)


def test_lowess_of_four_points_worked_by_hand():
    # At 1 with q = 4: h = 2, so 0, 1 and 2 weigh (7/8)^3, 1 and (7/8)^3, and 3 nothing. Around 1 they are even, so the
    # line's value there is the weighted mean.
    w = (7 / 8) ** 3
    found = lowess(np.arange(4.0), np.array([1.0, 2.0, 6.0, 100.0]), np.array([1.0]), bandwidth=1.0)
    assert found == pytest.approx([(w * 1 + 2 + w * 6) / (1 + 2 * w)], abs=1e-12)


def test_lowess_follows_a_line_exactly_and_a_regression_is_that_of_polyfit():
    y, x = replies()
    places = np.unique(x)
    assert lowess(x, 2 - 0.3 * x, places, bandwidth=0.4) == pytest.approx(2 - 0.3 * places, abs=1e-9)
    slope, intercept = np.polyfit(x, y, 1)
    curve = fit_curve(y, x, "regression")
    asked = np.array([0.0, 10.0, 500.0])  # below, within and above the lengths
    assert curve.at(asked) == pytest.approx(intercept + slope * asked - y.mean(), abs=1e-9)


def test_where_all_near_replies_have_one_length_lowess_is_their_mean():
    x, y = np.array([5.0] * 9 + [50.0]), np.array([*range(9), 1000.0])
    assert lowess(x, y, np.array([5.0]), bandwidth=0.5) == pytest.approx([4.0])
    assert lowess(x, y, np.array([50.0]), bandwidth=1.0) == pytest.approx([1000.0])  # the others are all at distance h


@pytest.mark.parametrize("method", METHODS)
def test_a_correction_keeps_the_mean_and_takes_the_length(method):
    rewards, lengths = replies()
    corrected = rewards - fit_curve(rewards, lengths, method).at(lengths)
    assert corrected.mean() == pytest.approx(rewards.mean(), abs=1e-9)
    assert np.corrcoef(rewards, lengths)[0, 1] > 0.7
    assert abs(np.corrcoef(corrected, lengths)[0, 1]) < (1e-9 if method == "regression" else 0.05)


def test_what_bends_is_taken_by_lowess_and_not_by_a_line():
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 101, 1000).astype(float)
    bent = np.abs(lengths - 50) / 10
    rewards = bent + 0.1 * draw.normal(size=1000)
    left = {m: float(np.corrcoef(bent, rewards - fit_curve(rewards, lengths, m).at(lengths))[0, 1]) for m in METHODS}
    assert left["regression"] > 0.99
    narrow = rewards - fit_curve(rewards, lengths, "lowess", bandwidth=0.1).at(lengths)
    assert abs(float(np.corrcoef(bent, narrow)[0, 1])) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_curves_are_linear_in_the_rewards_and_know_no_order(method):
    rewards, lengths = replies()
    other = np.random.default_rng(2).normal(size=rewards.size)
    places = np.unique(lengths)
    one, two = (fit_curve(y, lengths, method).at(places) for y in (rewards, other))
    both = fit_curve(3 * rewards - 2 * other + 7, lengths, method).at(places)
    assert both == pytest.approx(3 * one - 2 * two, abs=1e-9)
    order = np.random.default_rng(3).permutation(rewards.size)
    assert fit_curve(rewards[order], lengths[order], method).at(places) == pytest.approx(one, abs=1e-9)


def test_beyond_the_replies_of_the_fit_lowess_is_level_and_between_them_it_is_linear():
    rewards, lengths = replies()
    curve = fit_curve(rewards, lengths, "lowess")
    ends = curve.at([lengths.min(), lengths.max()])
    assert curve.at([lengths.min() - 1, lengths.max() + 1000]) == pytest.approx(ends)
    line = LengthCurve((10.0, 30.0), (-1.0, 1.0), slope=0.1)
    assert line.at([[10, 20], [30, 40]]) == pytest.approx(np.array([[-1, 0], [1, 2]]))


def test_too_few_replies_and_replies_of_one_length_are_said():
    assert "19 replies, and at least 20 are needed" in length_refusal(range(19))
    assert "each of 30 replies has 8 tokens" in length_refusal([8] * 30)
    assert length_refusal([8] * 29 + [9]) == ""


def test_the_premium_is_the_slope_times_the_deviation_with_the_interval_of_a_bootstrap_over_prompts():
    rewards, lengths = replies()
    prompts = [str(i // 4) for i in range(200)]
    found = length_premium(rewards, lengths, prompts)
    assert found.value == pytest.approx(np.polyfit(lengths, rewards, 1)[0] * lengths.std())
    draw = np.random.default_rng(5)
    drawn = []
    for _ in range(1000):
        rows = np.concatenate([np.arange(4 * g, 4 * g + 4) for g in draw.integers(50, size=50)])
        drawn.append(np.polyfit(lengths[rows], rewards[rows], 1)[0] * lengths.std())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert np.isnan(length_premium(rewards, np.full(200, 3.0), prompts).value)
    alone = length_premium(rewards, lengths, ["a"] * 200)
    assert alone.value == pytest.approx(found.value)
    assert np.isnan(alone.low)


def test_the_figures_of_a_card_are_those_of_each_set_of_rewards():
    pairs = [
        PreferencePair(prompt=Prompt(messages=(Message("user", str(i)),)), chosen="a b", rejected="a", label=label)
        for i, label in enumerate((1.0, 1.0, 1.0, 0.5))
    ]
    lengths = np.array([[4.0, 6.0, 8.0, 2.0], [2.0, 3.0, 9.0, 1.0]])
    rewards = {"none": lengths, "lowess": np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])}
    found = length_figures(pairs, rewards=rewards, lengths=lengths)
    assert found["mean_tokens"] == pytest.approx(35 / 8)
    assert found["none"]["premium"]["value"] == pytest.approx(lengths.std())  # the reward is the length
    assert found["none"]["spearman"] == pytest.approx(1)
    assert found["none"]["accuracy"]["accuracy"] == pytest.approx(2 / 3)
    assert found["lowess"]["accuracy"] | {"low": 0, "high": 0} == {
        "accuracy": pytest.approx(2 / 3), "low": 0, "high": 0, "count": 3,
    }  # fmt: skip
