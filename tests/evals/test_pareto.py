from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.evals.pareto import hypervolume, hypervolume_interval, pareto_front
from trimtab.stats import bootstrap_mean

POINTS = st.lists(st.tuples(st.integers(-2, 6), st.integers(-2, 6)), min_size=1, max_size=8)


def dominates(one, other):
    return one[0] >= other[0] and one[1] >= other[1] and one != other


@given(POINTS)
def test_the_front_is_what_no_other_point_dominates(points):
    front = pareto_front(points)
    assert {points[i] for i in front} == {p for p in points if not any(dominates(q, p) for q in points)}
    assert [points[i][0] for i in front] == sorted({points[i][0] for i in front})


@given(POINTS, st.tuples(st.integers(-2, 2), st.integers(-2, 2)))
def test_the_hypervolume_is_the_number_of_unit_squares_below_some_point(points, reference):
    squares = itertools.product(range(reference[0], 7), range(reference[1], 7))
    reached = sum(any(x + 1 <= p and y + 1 <= q for p, q in points) for x, y in squares)
    assert hypervolume(points, reference) == reached


def test_a_hypervolume_worked_by_hand():
    # three steps of a staircase, and a point below it: 0.2 * 0.9 + 0.3 * 0.6 + 0.3 * 0.1
    points = [(0.8, 0.1), (0.2, 0.9), (0.4, 0.5), (0.5, 0.6)]
    assert pareto_front(points) == [1, 3, 0]
    assert hypervolume(points, (0.0, 0.0)) == pytest.approx(0.18 + 0.18 + 0.03)
    # from (0.3, 0.1) on: the first point is left of it, the last one no higher
    assert hypervolume(points, (0.3, 0.1)) == pytest.approx(0.2 * 0.5)


def test_of_equal_points_the_first_is_named():
    assert pareto_front([(1, 1), (0, 0), (1, 1)]) == [0]


def test_the_interval_of_one_policy_is_that_of_its_mean():
    scores = np.random.default_rng(3).random(40)
    values = np.stack([scores, np.ones(40)], axis=1)[None]
    found, mean = hypervolume_interval(values, (0.0, 0.0)), bootstrap_mean(scores)
    assert (found.value, found.low, found.high) == pytest.approx((mean.value, mean.low, mean.high))
    assert found.count == 40


def test_all_policies_are_measured_on_the_prompts_that_were_drawn():
    # One policy is good where the other is bad. On the same prompts their means mirror each other, (m, 1 - m) and
    # (1 - m, m), whose area 2 m (1 - m) - min(m, 1 - m)^2 is never below the 0.25 of m = 0.5; on unlike prompts it may.
    easy = np.arange(100) % 2 == 0
    one = np.stack([easy, ~easy], axis=1).astype(float)
    found = hypervolume_interval(np.stack([one, 1 - one]), (0.0, 0.0))
    assert found.value == pytest.approx(0.25)
    assert found.low == pytest.approx(0.25)
    assert found.high < 0.37


def test_one_prompt_has_no_interval():
    found = hypervolume_interval([[[0.5, 0.4]]], (0.0, 0.0))
    assert found.value == pytest.approx(0.2)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize("points", [[], [1.0, 2.0], [[1.0, 2.0, 3.0]]])
def test_points_of_another_shape_are_refused(points):
    with pytest.raises(ValueError, match=r"expected scores \[K, 2\] in two objectives"):
        pareto_front(points)
    with pytest.raises(ValueError, match=r"expected scores \[K, N, 2\]"):
        hypervolume_interval(points, (0.0, 0.0))


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        hypervolume([[0.1, 0.2], [math.nan, 0.3]], (0.0, 0.0))
