import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.math.rewards import RunningMoments, clip, missing_eos_penalty, moments_of


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=5))
def test_moments_by_batch_are_those_of_all_values_at_once(batches):
    moments = RunningMoments()
    for batch in batches:
        moments = moments.update(torch.tensor(batch, dtype=torch.float64))
    values = np.array([x for batch in batches for x in batch])
    assert moments.count == len(values)
    if len(values):
        assert moments.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9)
        assert moments.variance == pytest.approx(values.var(), rel=1e-9, abs=1e-9)


def test_a_large_offset_does_not_swallow_the_variance():
    # the sum of squares minus the square of the sum gives 0 or less here
    values = 1e9 + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    moments = RunningMoments().update(values[:1]).update(values[1:])
    assert moments.variance == pytest.approx(1.25)


def test_moments_resume_from_their_state_through_json():
    moments = RunningMoments().update(torch.randn(7)).update(torch.randn(5))
    again = RunningMoments(**json.loads(json.dumps(moments.state())))
    assert again == moments
    batch = torch.randn(4)
    assert again.update(batch) == moments.update(batch)


def test_an_empty_batch_changes_nothing():
    assert RunningMoments().update(torch.zeros(0)) == RunningMoments()
    assert moments_of(torch.ones(3)).update(torch.zeros(0)) == moments_of(torch.ones(3))
    assert math.isnan(RunningMoments().std)


def test_normalised_rewards_by_hand():
    moments = RunningMoments().update(torch.tensor([1.0, 3.0]))  # mean 2, std 1
    assert moments.normalise(torch.tensor([0.0, 2.0, 5.0])).tolist() == [-2.0, 0.0, 3.0]
    assert moments.normalise(torch.tensor([5.0]), shift_mean=False).tolist() == [5.0]


def test_rewards_that_never_differed_are_not_scaled_to_infinity():
    moments = RunningMoments().update(torch.full((5,), 0.7))
    assert moments.normalise(torch.full((2,), 0.7)).abs().max() < 1e-6
    assert RunningMoments().normalise(torch.tensor([2.0])).tolist() == [2.0]


def test_clipped_rewards_are_counted():
    clipped, moved = clip(torch.tensor([-20.0, -5.0, 0.0, 10.0, 11.0]), low=-10, high=10)
    assert clipped.tolist() == [-10.0, -5.0, 0.0, 10.0, 10.0]
    assert moved.tolist() == [True, False, False, False, True]


def test_only_unfinished_replies_pay_the_penalty():
    scores = missing_eos_penalty(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, False, False]), 3.0)
    assert scores.tolist() == [1.0, -2.0, -3.0]
