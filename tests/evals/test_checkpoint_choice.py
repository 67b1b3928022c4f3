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
        if fall_test(best_checkpoint(series[:k]), series[k], level=corrected_level(alpha, num_checks)).is_real:
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
    with pytest.raises(ValueError, match="2 and 3 prompts"):
        paired_gain(checkpoint(0, [1, 2]), one)


def test_a_fall_is_scipys_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.5, 0.2, 30), generator.normal(0.4, 0.2, 30)
    found = fall_test(checkpoint(0, a), checkpoint(10, b), level=0.005)
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(a, b, alternative="greater").pvalue)
    assert found.level == 0.005
    moved = fall_test(checkpoint(0, a), checkpoint(10, b), level=0.005, margin=0.05)
    assert moved.p_value == pytest.approx(scipy.stats.ttest_rel(a - 0.05, b, alternative="greater").pvalue)


def test_prompts_that_all_fall_alike_are_as_sure_as_the_sign_test():
    low, high = checkpoint(0, [0.2] * 4), checkpoint(10, [0.7] * 4)
    assert fall_test(high, low, level=0.05).p_value == 0.5**4
    assert not fall_test(high, low, level=0.05).is_real
    nearly = checkpoint(0, [0.1 + 0.2, 0.3, 0.3, 0.3])  # 0.1 + 0.2 is 0.30000000000000004
    assert fall_test(high, nearly, level=0.05).p_value == 0.5**4
    assert fall_test(high, low, level=0.05, margin=0.6).p_value == 1
    assert fall_test(low, high, level=0.05).p_value == 1
    assert fall_test(low, low, level=0.05).p_value == 1
    assert fall_test(checkpoint(0, [1, math.nan]), high_of_two(), level=0.05).p_value == 1


def test_a_group_without_spread_is_not_certain():
    none, three = checkpoint(0, [0] * 64), checkpoint(10, [1] * 3 + [0] * 61)
    # Wilson: 0 of 64 has the upper bound z^2 / (64 + z^2)
    z = scipy.stats.norm.ppf(0.975)
    assert (none.estimate.low, none.estimate.high) == pytest.approx((0, z**2 / (64 + z**2)))
    by_scipy = scipy.stats.binomtest(3, 64).proportion_ci(method="wilson")
    assert (three.estimate.low, three.estimate.high) == pytest.approx((by_scipy.low, by_scipy.high))
    assert best_checkpoint([none, three]) is three
    # all 0.25: an unseen share of 0.0566 may be anything from 0 to 1
    alike = checkpoint(0, [0.25] * 64).estimate
    share = z**2 / (64 + z**2)
    assert (alike.low, alike.high) == pytest.approx((0.25 * (1 - share), 0.25 + 0.75 * share))
    assert checkpoint(0, [-3.0] * 8).estimate.low == -math.inf  # a scale that nobody knows
    gain = paired_gain(checkpoint(0, [0.75] * 64), checkpoint(10, [0.25] * 64))
    assert (gain.low, gain.high) == pytest.approx((0.5 - 1.5 * share, 0.5 + 0.5 * share))


def test_few_prompts_of_right_and_wrong_give_no_false_alarms():
    for num_prompts in (2, 4, 8, 16):
        generator = np.random.default_rng(num_prompts)
        runs = [[checkpoint(k, generator.random(num_prompts) < 0.9) for k in range(11)] for _ in range(150)]
        assert sum(first_alarm(series) is not None for series in runs) <= 0.05 * len(runs)


def test_what_is_said_of_the_chosen_one_counts_that_it_was_chosen():
    num_covered = num_better = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        series = [checkpoint(k, generator.normal(0.5, 0.1, 64), kl=0.0) for k in range(11)]
        found = decision(series, evidence={})
        num_covered += found["chosen"]["measure_low"] <= 0.5 <= found["chosen"]["measure_high"]
        num_better += found["chosen_against"]["last"]["gain_low"] > 0
    assert num_covered >= 0.95 * 400
    assert num_better <= 0.05 * 400
    assert found["confidence"] == pytest.approx(
        {"each_checkpoint": 0.95, "chosen": 1 - 0.05 / 11, "chosen_against": 1 - 0.05 / 55}
    )


def high_of_two():
    return checkpoint(10, [0.0, 0.0])


def test_the_level_counts_pairs_of_checks():
    assert corrected_level(0.05, 1) == corrected_level(0.05, 2) == 0.05
    assert corrected_level(0.05, 11) == 0.05 / 55
    assert corrected_level(0.05, 2, num_before=3) == 0.05 / (3 + 4)


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
