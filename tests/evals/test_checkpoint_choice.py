from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from trimtab.evals.checkpoint_choice import (
    MeasuredCheckpoint,
    best_checkpoint,
    corrected_level,
    decision,
    fall_test,
    paired_gain,
    predicted_peak,
)

EXACT = {"kl": 1.0, "reward": 0.0}


def checkpoint(step, values, **changed):
    return MeasuredCheckpoint(step=step, values=tuple(map(float, values)), **EXACT | changed)


def simulated(means, *, seed, num_prompts=64):
    """Checkpoints whose prompts differ in difficulty and whose replies have noise of their own; scores in [0, 1]."""
    generator = np.random.default_rng(seed)
    prompts = generator.normal(0, 0.15, num_prompts)
    return [
        checkpoint(10 * k, np.clip(mean + prompts + generator.normal(0, 0.2, num_prompts), 0, 1))
        for k, mean in enumerate(means)
    ]


def first_alarm(series, *, alpha=0.05, num_checks=11):
    for k in range(1, len(series)):
        if fall_test(best_checkpoint(series[:k]), series[k], alpha=alpha, num_checks=num_checks).is_real:
            return k
    return None


def test_an_estimate_is_students_interval_over_prompts():
    # mean 2, deviation 1, error 1/sqrt(3); t with two degrees of freedom has its 97.5% quantile at 4.3027
    found = checkpoint(0, [1, 2, 3]).estimate
    assert (found.value, found.count) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)


def test_the_best_has_the_highest_lower_bound_and_not_the_highest_mean():
    steady, wild = checkpoint(10, [0.5, 0.6] * 8), checkpoint(20, [0.0, 1.2] * 8)
    assert wild.estimate.value > steady.estimate.value
    assert best_checkpoint([steady, wild]) is steady


def test_of_equal_bounds_the_earlier_is_best():
    assert best_checkpoint([checkpoint(20, [0, 1]), checkpoint(10, [1, 0]), checkpoint(30, [0, 1])]).step == 10


def test_a_checkpoint_with_unjudged_prompts_is_not_best():
    partly = checkpoint(20, [1] * 8 + [math.nan] * 2)
    assert best_checkpoint([checkpoint(10, [0, 1] * 5), partly]).step == 10
    with pytest.raises(ValueError, match="none of 1"):
        best_checkpoint([partly])


def test_checkpoints_are_compared_prompt_by_prompt():
    one, other = checkpoint(0, [0.1, 0.9, math.nan]), checkpoint(10, [0.2, 1.0, 0.3])
    assert paired_gain(other, one).value == pytest.approx(0.1)
    assert paired_gain(other, one).low == pytest.approx(0.1)  # every prompt says the same
    with pytest.raises(ValueError, match="2 and 3 prompts"):
        paired_gain(checkpoint(0, [1, 2]), one)


def test_a_fall_is_scipys_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.5, 0.2, 30), generator.normal(0.4, 0.2, 30)
    found = fall_test(checkpoint(0, a), checkpoint(10, b), alpha=0.05, num_checks=5)
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(a, b, alternative="greater").pvalue)
    assert found.level == 0.05 / 10
    moved = fall_test(checkpoint(0, a), checkpoint(10, b), alpha=0.05, num_checks=5, margin=0.05)
    assert moved.p_value == pytest.approx(scipy.stats.ttest_rel(a - 0.05, b, alternative="greater").pvalue)


def test_values_without_spread_are_no_division_by_zero():
    low, high = checkpoint(0, [0.2] * 4), checkpoint(10, [0.7] * 4)
    assert fall_test(high, low, alpha=0.05, num_checks=2).is_real
    assert fall_test(low, high, alpha=0.05, num_checks=2).p_value == 1
    assert fall_test(low, low, alpha=0.05, num_checks=2).p_value == 1
    assert fall_test(checkpoint(0, [1, math.nan]), high_of_two(), alpha=0.05, num_checks=2).p_value == 1


def high_of_two():
    return checkpoint(10, [0.0, 0.0])


def test_the_level_counts_pairs_of_checks():
    assert corrected_level(0.05, 1) == corrected_level(0.05, 2) == 0.05
    assert corrected_level(0.05, 11) == 0.05 / 55


def test_false_alarms_of_whole_runs_stay_below_alpha():
    # runs that stay where they are, and runs that rise and then stay: eleven checks each
    flat = [0.6] * 11
    rising = [0.3, 0.45, 0.55, *[0.6] * 8]
    alarms = [first_alarm(simulated(means, seed=seed)) is not None for means in (flat, rising) for seed in range(250)]
    assert sum(alarms) <= 0.05 * len(alarms)
    uncorrected = [first_alarm(simulated(flat, seed=seed), num_checks=2) is not None for seed in range(100)]
    assert sum(uncorrected) > 0.2 * len(uncorrected), "without the correction the test must cry wolf"


def test_a_run_that_falls_is_caught():
    falling = [0.3, 0.5, 0.6, 0.65, 0.62, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3]
    alarms = [first_alarm(simulated(falling, seed=seed)) for seed in range(200)]
    assert sum(alarm is not None and 4 <= alarm <= 8 for alarm in alarms) >= 0.97 * len(alarms)


def test_the_predicted_peak_is_that_of_the_curve():
    # R = d (1.2 - 0.6 log d) peaks at d = e, KL = e^2 = 7.39
    kls = [0.0, 0.5, 0.8, 1.1, 1.4, 4.0, 10.0]
    curve = [math.sqrt(kl) * (1.2 - 0.6 * math.log(math.sqrt(kl))) if kl else 0.0 for kl in kls]
    noise = np.random.default_rng(0).normal(0, 0.05, 40)
    series = [checkpoint(k, 1 + gain + noise, kl=kl) for k, (kl, gain) in enumerate(zip(kls, curve, strict=True))]
    found = predicted_peak(series)
    assert found.kl == pytest.approx(math.e**2, rel=1e-6)
    assert found.low <= found.kl * (1 + 1e-9)
    assert found.high >= found.kl * (1 - 1e-9)
    assert math.isnan(predicted_peak(series[:5]).kl), "the peak lies far beyond what was measured"
    assert predicted_peak(series[:4]) is None


def test_a_decision_names_the_step_its_rule_and_its_rivals():
    series = [
        checkpoint(0, [0, 0.2] * 4),
        checkpoint(10, [0.8, 1] * 4, reward=1.0),
        checkpoint(20, [0.4, 0.5] * 4, reward=3.0),
    ]
    found = decision(series, evidence={"num_prompts": 2})
    assert found["chosen_step"] == 10
    assert found["num_prompts"] == 2
    assert "lower bound" in found["rule"]
    assert found["chosen_against"]["best_reward"]["step"] == 20
    assert found["chosen_against"]["last"]["gain"] == pytest.approx(0.45)
    assert [row["step"] for row in found["checkpoints"]] == [0, 10, 20]
    assert found["checkpoints"][1]["measure"] == pytest.approx(0.9)
