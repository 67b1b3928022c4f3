"""Gao's forms fitted to what a run measured: how the reward, and the measure that training does not see, move with the
distance from the reference (Gao et al., arXiv:2210.10760; `evals.overoptimisation`).

Of the form for RL (for a choice among n replies, that for best-of-n) and a straight line the one with the lower AICc is
shown. Its interval resamples the points, which says nothing of how far the form itself is from the truth. Points of one
run depend on each other, so they are drawn in blocks of neighbouring steps; points with a standard error of their own,
as a guard measures them, are moved by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from trimtab.evals.overoptimisation import MIN_RL_DISTANCE, CurveForm, Fit, fit_curve
from trimtab.reports.collect import RunRecord
from trimtab.reports.headline import interval, number, section
from trimtab.reports.quality import NORMAL_97_5, measured_quality
from trimtab.stats import Floats, Interval

FEWEST = 8
"""Points that are far enough from the reference; with fewer nothing is fitted."""
FEWEST_MEASURED = 4
"""The same for points with errors of their own, each of which is the mean over many prompts."""
NUM_RESAMPLES = 200
EQUATIONS = {
    "rl": "R(d) = d (alpha - beta log d)",
    "best_of_n": "R(d) = d (alpha - beta d)",
    "linear": "R(d) = alpha d",
}
"""The forms, of d = sqrt(KL) with the KL in nats; R is the gain over `start`."""


@dataclass(frozen=True, kw_only=True)
class MeasuredFit:
    """A form fitted to the points of one run."""

    of: str
    """What was measured: "reward", "gold" or "the guard's measure"."""
    fit: Fit
    start: float
    """What the policy had at its reference."""
    alpha: Interval
    beta: Interval
    peak_kl: Interval | None
    """The KL in nats at which the fitted curve is highest, with infinite bounds where a resample has no peak in reach;
    None if the curve has no peak up to one and a half times the distance that was measured."""
    aicc: dict[CurveForm, float]
    """Akaike's criterion of each form; the lower one was taken."""

    def at(self, distances: Floats) -> Floats:
        """The fitted values at distances that were measured."""
        return self.start + np.array([self.fit(distance) for distance in distances.tolist()])

    @property
    def as_json(self) -> dict[str, Any]:
        """The fit as JSON values."""
        peak = self.peak_kl
        return {
            "of": self.of,
            "form": self.fit.form,
            "equation": EQUATIONS[self.fit.form],
            "start": self.start,
            "alpha": _bounded(self.alpha),
            "beta": _bounded(self.beta),
            "peak_kl": None if peak is None else _bounded(peak),
            "aicc": dict(self.aicc),
            "num_points": self.fit.num_points,
            "max_kl": self.fit.max_distance**2,
        }


def _bounded(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def fits_of(run: RunRecord) -> list[MeasuredFit]:
    """The fits of the reward and of the independent measure over the KL; empty if too little was measured."""
    if run.stage == "select":
        return [one for of in ("reward", "gold") if (one := _best_of_n(run, of)) is not None]
    quality, found = measured_quality(run), []
    rewarded = np.array(list(_rewards(run)), dtype=float).reshape(-1, 2)
    found.append(_fitted("reward", rewarded[:, 0], rewarded[:, 1], None))
    if quality is not None:
        points = np.array(quality.points, dtype=float)
        errors = None if quality.errors is None else np.array(quality.errors)
        found.append(_fitted(quality.name, points[:, 0], points[:, 2], errors))
    return [one for one in found if one is not None]


def _best_of_n(run: RunRecord, of: str) -> MeasuredFit | None:
    """The fit to the best of n replies for every n, each of which is a mean over the same prompts."""
    curve = section(run.summary, "best_of").get("curve")
    points = [
        (kl, found.value, (found.high - found.low) / (2 * NORMAL_97_5))
        for row in (curve if isinstance(curve, list) else [])
        if isinstance(row, Mapping)
        and (kl := number(row, "kl")) is not None
        and (found := interval(row, of)) is not None
    ]
    table = np.array(points, dtype=float).reshape(-1, 3)
    known = bool(np.isfinite(table).all())
    return _fitted(of, table[:, 0], table[:, 1], table[:, 2], form="best_of_n") if known else None


def _rewards(run: RunRecord) -> Iterator[tuple[float, float]]:
    """(KL, reward) of each step at which both are known."""
    kl, reward = run.metrics.get("policy/kl"), run.metrics.get("reward/mean")
    if kl is None or reward is None:
        return
    known = dict(zip(kl.steps.tolist(), kl.values.tolist(), strict=True))
    for step, value in zip(reward.steps.tolist(), reward.values.tolist(), strict=True):
        if math.isfinite(value + known.get(step, math.nan)):
            yield known[step], value


def _fitted(
    of: str, kl: Floats, values: Floats, errors: Floats | None, *, form: CurveForm = "rl"
) -> MeasuredFit | None:
    far = np.sqrt(np.maximum(kl, 0.0)) > (MIN_RL_DISTANCE if form == "rl" else 0.0)
    if far.sum() < (FEWEST if errors is None else FEWEST_MEASURED):
        return None
    forms: tuple[CurveForm, ...] = ("linear", form)
    fits = {one: fit_curve(kl, values, one, start=_start(kl, values, one, errors)) for one in forms}
    chosen = min(fits.values(), key=lambda one: one.aicc)  # the straight line if both are as good
    alphas, betas, peaks = [], [], []
    for drawn_kl, drawn in _resampled(kl, values, errors, far):
        one = fit_curve(drawn_kl, drawn, chosen.form, start=_start(drawn_kl, drawn, chosen.form, errors))
        alphas.append(one.alpha)
        betas.append(one.beta)
        peaks.append(math.inf if one.peak is None else one.peak[0] ** 2)
    num = chosen.num_points
    return MeasuredFit(
        of=of,
        fit=chosen,
        start=_start(kl, values, chosen.form, errors),
        alpha=_interval(chosen.alpha, alphas, num),
        beta=_interval(chosen.beta, betas, num),
        peak_kl=None if chosen.peak is None else _interval(chosen.peak[0] ** 2, peaks, num),
        aicc={name: one.aicc for name, one in fits.items()},
    )


def _start(kl: Floats, values: Floats, form: CurveForm, errors: Floats | None) -> float:
    """The value at the reference. Points with errors of their own begin with one that was measured there; of single
    noisy steps none is exact, and those beside it are already higher, so that it is the intercept of the least-squares
    fit of the form."""
    distance = np.sqrt(np.maximum(kl, 0.0))
    if errors is not None:
        return float(values[distance.argmin()])
    bent = [] if form == "linear" else [scipy.special.xlogy(distance, distance)]
    found = np.linalg.lstsq(np.stack([np.ones_like(distance), distance, *bent], axis=1), values, rcond=None)[0]
    return float(found[0])


def _resampled(kl: Floats, values: Floats, errors: Floats | None, far: np.ndarray) -> Iterator[tuple[Floats, Floats]]:
    """The points drawn again, each time with enough of them far from the reference."""
    generator, num = np.random.default_rng(0), len(kl)
    if errors is not None:
        for _ in range(NUM_RESAMPLES):
            yield kl, values + errors * generator.standard_normal(num)
        return
    size = max(1, round(math.sqrt(num)))
    for _ in range(NUM_RESAMPLES):
        begins = generator.integers(num - size + 1, size=-(-num // size))
        places = (begins[:, None] + np.arange(size)).ravel()[:num]
        if far[places].sum() >= FEWEST // 2:
            yield kl[places], values[places]


def _interval(value: float, drawn: Sequence[float], count: int) -> Interval:
    if not drawn:
        return Interval(value, math.nan, math.nan, count)
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")  # others would compute with infinities
    return Interval(value, float(low), float(high), count)
