"""Curves fitted to runs, against curves that the points were made from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.evals.overoptimisation import best_of_n_kl
from trimtab.reports.collect import RunRecord, Series
from trimtab.reports.fits import FEWEST, fits_of


def record(kl, reward=None, gold=None, **other) -> RunRecord:
    """An online run that logged these at each step."""
    steps = np.arange(1.0, len(kl) + 1)
    columns = {"policy/kl": kl, "reward/mean": reward, "gold/mean": gold}
    metrics = {name: Series(steps, np.asarray(values, float)) for name, values in columns.items() if values is not None}
    return RunRecord(name="ppo", stage="online", metrics=metrics, **other)


def walk(num: int, seed: int, *, alpha: float, beta: float, noise: float):
    """A run that moves away evenly, with gold by Gao's form and noise, and a reward that rises in a line."""
    generator = np.random.default_rng(seed)
    distance = np.linspace(0, 6, num)
    gold = 0.4 + distance * (alpha - beta * np.log(np.maximum(distance, 1e-9)))
    reward = 0.1 + 0.3 * distance + noise * generator.standard_normal(num)
    return distance**2, reward, gold + noise * generator.standard_normal(num)


def test_the_form_that_gold_followed_is_found_with_its_peak():
    found = {one.of: one for one in fits_of(record(*walk(200, 0, alpha=0.4, beta=0.25, noise=0.02)))}
    gold, reward = found["gold"], found["reward"]
    assert (gold.fit.form, reward.fit.form) == ("rl", "linear")
    assert gold.alpha.value == pytest.approx(0.4, abs=0.03)
    assert gold.beta.value == pytest.approx(0.25, abs=0.03)
    assert gold.peak_kl.value == pytest.approx(math.exp(0.4 / 0.25 - 1) ** 2, rel=0.1)
    assert gold.peak_kl.low <= gold.peak_kl.value <= gold.peak_kl.high
    assert reward.peak_kl is None
    assert reward.alpha.value == pytest.approx(0.3, abs=0.02)
    assert gold.at(np.array([0.0]))[0] == gold.start == pytest.approx(0.4, abs=0.05)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    held = [
        one.alpha.low <= 0.4 <= one.alpha.high
        for seed in range(40)
        for one in fits_of(record(*walk(120, seed, alpha=0.4, beta=0.25, noise=0.1)))
        if one.of == "gold" and one.fit.form == "rl"
    ]
    assert len(held) > 35
    assert np.mean(held) > 0.8  # the start is estimated too, so that they are a little narrow or wide


def test_too_few_points_far_from_the_reference_are_not_fitted():
    near = np.linspace(0, 0.05, 50)
    assert fits_of(record(near, near, near)) == []
    assert fits_of(record(np.arange(FEWEST), np.arange(FEWEST))) == []  # one of them is at the reference
    assert [one.of for one in fits_of(record(np.arange(FEWEST + 1.0), np.arange(FEWEST + 1.0)))] == ["reward"]
    assert fits_of(RunRecord(name="sft", stage="sft")) == []


def test_the_best_of_n_is_fitted_by_its_own_form():
    def point(n: int) -> dict:
        kl = best_of_n_kl(n)
        gold = 0.5 + math.sqrt(kl) * (0.3 - 0.1 * math.sqrt(kl))
        return {"n": n, "kl": kl, "gold": gold, "gold_low": gold - 0.01, "gold_high": gold + 0.01, "reward": gold}

    summary = {"best_of": {"num_prompts": 40, "curve": [point(2**k) for k in range(7)]}}
    (one,) = fits_of(RunRecord(name="select", stage="select", summary=summary))  # the reward has no interval
    assert (one.of, one.fit.form, one.start) == ("gold", "best_of_n", 0.5)
    assert one.alpha.value == pytest.approx(0.3)
    assert one.alpha.low < 0.3 < one.alpha.high
    assert one.peak_kl.value == pytest.approx(1.5**2)
    assert fits_of(RunRecord(name="select", stage="select", summary={"best_of": {"curve": "none"}})) == []


def test_the_measure_of_a_guard_is_moved_by_its_own_errors():
    rows = [
        {
            "step": step,
            "kl": kl,
            "reward": kl,
            "measure": level,
            "measure_low": level - 0.1,
            "measure_high": level + 0.1,
        }
        for step, kl, level in ((0, 0.0, 0.5), (10, 1.0, 0.7), (20, 4.0, 0.8), (30, 9.0, 0.75), (40, 16.0, 0.6))
    ]
    (one,) = fits_of(RunRecord(name="ppo", stage="online", decision={"checkpoints": rows}))
    assert one.of == "the guard's measure"
    assert one.alpha.low < one.alpha.value < one.alpha.high
    assert one.as_json["num_points"] == 4
