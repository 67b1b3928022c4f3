"""The multiplier of a limit: Safe RLHF's step by hand, and its state."""

from __future__ import annotations

import json
import math

import pytest
import torch

from trimtab.math.constraints import Multiplier, lagrangian

HOW = {"limit": 0.0, "learning_rate": 0.1, "least": 0.01, "most": 5.0}


def test_the_step_of_lambda_is_that_of_safe_rlhf():
    # lambda = 1, J - d = 0.5, a rate of 0.1: the gradient of -(J - d) exp(log lambda) is -0.5, so log lambda + 0.05
    moved = Multiplier.starting_at(1.0).see([0.25, 0.75], window=128).update(**HOW)
    assert moved.value == pytest.approx(1.05127, abs=1e-5)


def test_the_step_is_that_of_sgd_on_the_dual():
    log_lambda = torch.tensor(math.log(0.7), dtype=torch.float64, requires_grad=True)
    multiplier, optimizer = Multiplier.starting_at(0.7), torch.optim.SGD([log_lambda], lr=0.1)
    for costs in ([0.9, 0.8], [0.1, 0.0], [0.6, 0.4]):
        multiplier = multiplier.see(costs, window=3).update(limit=0.3, learning_rate=0.1, least=0.01, most=5.0)
        latest = list(multiplier.costs)
        optimizer.zero_grad()
        (-(sum(latest) / len(latest) - 0.3) * log_lambda.exp()).backward()
        optimizer.step()
        assert multiplier.value == pytest.approx(float(log_lambda.detach().exp()))


def test_the_mean_is_that_of_the_latest_costs():
    multiplier = Multiplier.starting_at(1.0).see([9.0, 1.0], window=3).see([2.0, 3.0], window=3)
    assert list(multiplier.costs) == [1.0, 2.0, 3.0]
    assert multiplier.mean_cost == 2
    assert math.isnan(Multiplier.starting_at(1.0).mean_cost)


def test_lambda_stays_between_its_least_and_its_most():
    high = Multiplier.starting_at(4.0).see([100.0], window=1)
    assert high.update(**HOW).value == pytest.approx(5.0)
    low = Multiplier.starting_at(1.0).see([-100.0], window=1)
    assert low.update(**HOW).value == pytest.approx(0.01)
    assert low.update(**HOW | {"least": 1e-5}).value == pytest.approx(math.exp(-10))


def test_from_its_least_lambda_comes_back_in_about_the_steps_that_are_said():
    multiplier, num = Multiplier.starting_at(0.01).see([0.5], window=1), 0
    while multiplier.value < 1:
        multiplier, num = multiplier.update(**HOW), num + 1
    assert num == pytest.approx(1 / (0.1 * 0.01 * 0.5), rel=0.02)


def test_damping_answers_at_once_and_leaves_the_multiplier_alone():
    multiplier = Multiplier.starting_at(2.0).see([0.5, 0.1], window=2)  # J = 0.3
    how = {"limit": 0.1, "most": 5.0}
    assert multiplier.damped(damping=0.0, **how) == pytest.approx(2.0)
    assert multiplier.damped(damping=3.0, **how) == pytest.approx(2 * math.exp(0.6))
    assert multiplier.damped(damping=100.0, **how) == pytest.approx(5.0)
    assert multiplier.value == pytest.approx(2.0)
    assert multiplier.see([1e300], window=1).damped(damping=3.0, **how) == pytest.approx(5.0)


def largest_swing(damping: float) -> float:
    """Of the last 100 of 400 steps of a policy whose log odds of harm rise by 0.2 a step and fall by 0.4 lambda."""
    multiplier, log_odds, harm = Multiplier.starting_at(0.5), -1.0, []
    for _ in range(400):
        harm.append(1 / (1 + math.exp(-log_odds)))
        multiplier = multiplier.see([harm[-1]], window=2).update(limit=0.2, learning_rate=1.0, least=1e-9, most=5.0)
        log_odds += 0.2 - 0.4 * multiplier.damped(limit=0.2, damping=damping, most=5.0)
    return max(abs(cost - 0.2) for cost in harm[-100:])


def test_damping_ends_the_swings_of_a_policy_that_follows():
    assert largest_swing(0.0) > 0.05
    assert largest_swing(5.0) < 0.001


def test_the_state_comes_back_from_json_with_the_same_bits():
    multiplier = Multiplier.starting_at(1 / 3).see([0.1, 1 / 7], window=9)
    kept = Multiplier(**json.loads(json.dumps(multiplier.state())))
    assert kept == multiplier
    assert kept.update(**HOW).log_lambda == multiplier.update(**HOW).log_lambda


def test_both_advantages_are_joined_by_lambda():
    joined = lagrangian(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 1.0, 2.0]), 3.0)
    torch.testing.assert_close(joined, torch.tensor([0.25, -1.25, -1.5]))


def test_a_kl_paid_by_both_keeps_its_coefficient_for_every_lambda():
    reward, cost, kl = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.5])
    for lam in (0.0, 1.0, 4.0):
        paid = lagrangian(reward - 0.1 * kl, cost + 0.1 * kl, lam)
        torch.testing.assert_close(paid, lagrangian(reward, cost, lam) - 0.1 * kl)
