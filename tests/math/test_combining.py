"""Rewards as one: the weighted sum, and Llama 2's gate against its formula in probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.math.combining import SafetyGate, WeightedSum
from trimtab.math.rewards import moments_of


def logit(p):
    return math.log(p / (1 - p))


# Probabilities of helpfulness and safety, whether the prompt is flagged, and which of both counts: eq. (4) by hand.
HAND_MADE = [
    (0.90, 0.80, False, 0.90),
    (0.90, 0.14, False, 0.14),
    (0.90, 0.16, False, 0.90),
    (0.20, 0.99, False, 0.20),
    (0.20, 0.99, True, 0.99),
    (0.70, 0.05, True, 0.05),
    (0.05, 0.10, False, 0.10),
]


def gated(threshold=0.15):
    helpful, safe, flags, _ = zip(*HAND_MADE, strict=True)
    scores = {"model": torch.tensor([*map(logit, helpful)]), "model_2": torch.tensor([*map(logit, safe)])}
    gate = SafetyGate(safety="model_2", threshold=threshold)
    return gate.total(scores, {"model": 1.0, "model_2": 1.0}, torch.tensor(flags))


def test_the_gate_is_that_of_llama_2_on_hand_made_scores():
    total, metrics = gated()
    torch.testing.assert_close(total, torch.tensor([logit(p) for *_, p in HAND_MADE]))
    assert metrics["reward/gated"].value == 4
    assert metrics["reward/gated_fraction"].value == pytest.approx(4 / 7)
    assert metrics["reward/flagged_fraction"].value == pytest.approx(2 / 7)


def test_a_safety_score_at_the_threshold_is_safe():
    at = torch.tensor([math.log(0.15 / 0.85), math.log(0.15 / 0.85) - 1e-3], dtype=torch.float64)
    helpful = torch.tensor([5.0, 5.0], dtype=torch.float64)
    gate = SafetyGate(safety="b")
    total, _ = gate.total({"a": helpful, "b": at}, {"a": 1.0, "b": 1.0}, torch.tensor([False, False]))
    assert total[0] == 5
    assert total[1] == at[1]


def test_a_saturated_score_has_a_finite_reward():
    assert torch.tensor(40.0).sigmoid() == 1  # whose logit would be infinite
    scores = {"a": torch.tensor([40.0]), "b": torch.tensor([60.0])}
    total, _ = SafetyGate(safety="b").total(scores, {"a": 1.0, "b": 1.0}, torch.tensor([True]))
    assert total.tolist() == [60.0]


def test_a_score_that_is_missing_leaves_no_reward_even_where_the_other_counts():
    scores = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([torch.nan, -9.0])}
    total, metrics = SafetyGate(safety="b").total(scores, {"a": 1.0, "b": 1.0}, torch.tensor([False, False]))
    assert total.isnan().all()
    assert metrics["reward/gated"].value == 1


def test_the_gate_weighs_scores_before_it_compares_them():
    scores = {"a": torch.tensor([3.0]), "b": torch.tensor([2.0])}
    total, _ = SafetyGate(safety="b").total(scores, {"a": 2.0, "b": -1.0}, torch.tensor([False]))
    assert total.tolist() == [-2.0]  # a score of harm, turned around


@pytest.mark.parametrize(
    ("combine", "names", "problem"),
    [
        (SafetyGate(safety="b"), ["a"], "between two rewards, and there are 1: a"),
        (SafetyGate(safety="b"), ["a", "b", "c"], "there are 3"),
        (SafetyGate(safety="x"), ["a", "b"], "combine.safety = 'x', and the rewards are a and b"),
        (WeightedSum(normalize="running"), ["a"], "shaping.normalize = true"),
    ],
)
def test_rewards_that_can_not_be_combined_are_refused(combine, names, problem):
    assert problem in combine.refusal(names)


def test_a_threshold_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="threshold = 1"):
        SafetyGate(safety="b", threshold=1.0)


def test_the_sum_of_normalised_rewards_does_not_know_their_units():
    one, other = torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.arange(64.0)

    def total(scale):
        scores = {"a": one, "b": scale * other + 3 * scale}
        normal = {name: moments_of(x).normalise(x) for name, x in scores.items()}
        return WeightedSum().total(normal, {"a": 1.0, "b": 0.5}, torch.zeros(64, dtype=torch.bool))[0]

    torch.testing.assert_close(total(1.0), total(1000.0), rtol=1e-4, atol=1e-4)
