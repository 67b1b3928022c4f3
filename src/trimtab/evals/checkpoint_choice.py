"""Which checkpoint of a run to take, by a measure that training did not see; and whether a fall of it is real.

Every checkpoint answers the same prompts. A prompt has one value for each checkpoint, the mean over its replies, so
that prompts are the clusters of every interval, and two checkpoints are compared prompt by prompt. Nothing here knows
what a run is: a series may come from a run that goes on, from the checkpoints of one that ended, or from a simulation.

**The rule.** The checkpoint with the highest lower bound of its 95% interval is chosen, of equal ones the earlier: a
high mean that few prompts carry is not enough.

**What is said of the chosen one.** The highest of many is high by luck too, and its bound as well as its mean. So its
interval is made at 5% divided by the number K of checkpoints, and the intervals of its gains over others at 5% divided
by the K (K - 1) / 2 pairs: whichever is chosen, each of the two kinds holds with at least 95% (the union bound).

**When a fall is real.** A check compares its values with those of the best checkpoint so far by a one-sided paired t
test. The best so far was chosen for being high, and a run is looked at many times, so a test at 5% would give many
false alarms. With K checks there are K (K - 1) / 2 pairs of an earlier and a later check, and each test is of one of
them; it is made at alpha divided by their number. If no check is below an earlier one, the probability of any alarm in
the whole run is then at most alpha, however the checks depend on each other and whichever of them is best (the union
bound).

**Values without spread** would be certain by Student's formula, and are not. If all n prompts have one value, the share
of prompts with another is at most Wilson's bound for 0 of n, and these may have any value that there is: from 0 to 1
if all values are, and without bounds otherwise. A measure of zeros and ones has Wilson's interval throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy

from trimtab.evals.overoptimisation import MIN_RL_DISTANCE, fit_curve
from trimtab.stats import Floats, Interval, t_interval, wilson

RULE = "highest lower bound of the 95% interval of the measure's mean over prompts; of equal ones the earlier"
MIN_JUDGED_FRACTION = 0.9
"""A checkpoint of which the measure could judge fewer prompts than this share is not chosen: what it could not judge
may be what is wrong with it."""
CONFIDENCE = 0.95
"""Of the interval of a single checkpoint, and of all that is said of the chosen one together."""
_EQUAL = 1e-9
"""Values that lie closer together than this, in units of the largest, differ by rounding."""
NUM_RESAMPLES = 200
"""Resamples of prompts for the interval of a predicted peak."""


@dataclass(frozen=True, kw_only=True)
class MeasuredCheckpoint:
    """A checkpoint as it was measured, for example
    `MeasuredCheckpoint(step=20, values=(0.5, 1.0), kl=3.1, reward=0.8)`."""

    step: int
    values: tuple[float, ...]
    """[P] the independent measure of each prompt, a mean over its replies; nan if it could not be judged."""
    kl: float
    """Mean KL of a reply to the reference, in nats; nan if unknown."""
    reward: float
    """Mean of the reward that was trained on, over the same replies; nan if unknown."""

    @cached_property
    def estimate(self) -> Interval:
        """The mean over the prompts that were judged, with its 95% interval."""
        return self.interval()

    @cached_property
    def is_share(self) -> bool:
        """Whether all values that are known lie from 0 to 1, which is then taken as the scale of the measure."""
        return all(0 <= value <= 1 for value in self.values if math.isfinite(value))

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """The mean over the prompts that were judged: Wilson's interval if all values are 0 or 1, else Student's."""
        known = np.array([value for value in self.values if math.isfinite(value)])
        if known.size and np.isin(known, (0.0, 1.0)).all():
            return wilson(float(known.sum()), known.size, confidence=confidence)
        return _interval(known, (0.0, 1.0) if self.is_share else None, confidence)

    @property
    def may_be_chosen(self) -> bool:
        """Whether enough prompts were judged for a lower bound that means something."""
        return self.estimate.count >= max(2, MIN_JUDGED_FRACTION * len(self.values))


def best_checkpoint(series: Sequence[MeasuredCheckpoint]) -> MeasuredCheckpoint:
    """The checkpoint that `RULE` chooses. Raises ValueError if none has enough judged prompts."""
    able = [one for one in series if one.may_be_chosen]
    if not able:
        raise ValueError(f"none of {len(series)} checkpoints has enough judged prompts")
    return max(able, key=lambda one: (one.estimate.low, -one.step))


def paired_gain(one: MeasuredCheckpoint, other: MeasuredCheckpoint, *, confidence: float = CONFIDENCE) -> Interval:
    """The mean of `one` - `other` over the prompts judged for both, with Student's interval over prompts."""
    apart = _differences(one, other)
    if one is other:
        return Interval(0.0, 0.0, 0.0, apart.size)
    return _interval(apart, (-1.0, 1.0) if one.is_share and other.is_share else None, confidence)


def interval_of_chosen(chosen: MeasuredCheckpoint, num_checkpoints: int) -> Interval:
    """The measure of the checkpoint that was chosen of so many, with an interval that holds although it was chosen."""
    return chosen.interval(1 - (1 - CONFIDENCE) / num_checkpoints)


@dataclass(frozen=True, kw_only=True)
class FallTest:
    """Whether a checkpoint is below an earlier one by more than a margin."""

    difference: Interval
    """Mean of earlier - later over prompts, paired, with its 95% interval."""
    p_value: float
    """One-sided, of the hypothesis that the fall is at most the margin."""
    level: float
    """The p-value below which the fall counts as real, corrected for the number of pairs of checks."""

    @property
    def is_real(self) -> bool:
        """Whether the fall is larger than the margin at the corrected level."""
        return self.p_value < self.level


def corrected_level(alpha: float, num_checks: int, *, num_before: int = 0) -> float:
    """alpha divided by the number of pairs of an earlier and a later check: K (K - 1) / 2 of K checks. With
    `num_before`, K checks are to come after so many, and the pairs are those whose later check is to come."""
    return alpha / max(1, num_checks * num_before + num_checks * (num_checks - 1) // 2)


def fall_test(best: MeasuredCheckpoint, now: MeasuredCheckpoint, *, level: float, margin: float = 0.0) -> FallTest:
    """Tests whether `now` is below `best` by more than `margin` (in the measure's unit), at a `corrected_level`.

    With fewer than two prompts judged for both, the p-value is 1. If all n prompts fall alike, it is that of the sign
    test, 0.5^n.
    """
    lost = _differences(best, now)
    p_value = 1.0
    if lost.size > 1:
        above = float(lost.mean()) - margin
        if _without_spread(lost):
            p_value = 0.5**lost.size if above > 0 else 1.0
        else:
            error = float(lost.std(ddof=1)) / math.sqrt(lost.size)
            p_value = float(scipy.special.stdtr(lost.size - 1, -above / error))
    return FallTest(difference=paired_gain(best, now), p_value=p_value, level=level)


@dataclass(frozen=True, kw_only=True)
class PredictedPeak:
    """Where Gao's form for RL, R(d) = d (alpha - beta log d) with d = sqrt(KL), has its highest value."""

    kl: float
    """KL at the peak in nats; nan if the fit has none that was nearly reached (`MAX_EXTRAPOLATION`)."""
    low: float
    high: float
    """The 95% interval of the KL over resampled prompts; infinite where a fit has no peak in reach."""
    alpha: float
    beta: float


def predicted_peak(series: Sequence[MeasuredCheckpoint], *, seed: int = 0) -> PredictedPeak | None:
    """The peak that the series so far predicts, with an interval; None for fewer than four checkpoints that are far
    enough from the reference. The gain is over the first checkpoint. Prompts are resampled, not checkpoints, so the
    interval does not know how far the form itself is from the truth."""
    known = [one for one in series if math.isfinite(one.kl)]
    if sum(math.sqrt(max(one.kl, 0.0)) > MIN_RL_DISTANCE for one in known) < 4:
        return None
    table = np.array([one.values for one in known])
    table = table[:, np.isfinite(table).all(0)]
    if table.shape[1] < 2:
        return None
    kl = [one.kl for one in known]
    whole = fit_curve(kl, table.mean(1), "rl", start=float(table[0].mean()))
    generator = np.random.default_rng(seed)
    peaks = []
    for _ in range(NUM_RESAMPLES):
        means = table[:, generator.integers(table.shape[1], size=table.shape[1])].mean(1)
        peak = fit_curve(kl, means, "rl", start=float(means[0])).peak
        peaks.append(math.inf if peak is None else peak[0] ** 2)
    low, high = np.quantile(peaks, [0.025, 0.975], method="nearest")  # others would compute with infinities
    at = whole.peak
    return PredictedPeak(
        kl=math.nan if at is None else at[0] ** 2,
        low=float(low),
        high=float(high),
        alpha=whole.alpha,
        beta=whole.beta,
    )


def decision(series: Sequence[MeasuredCheckpoint], *, evidence: dict[str, Any]) -> dict[str, Any]:
    """What decision.json holds: the chosen step with an interval that counts the choice, the rule, `evidence` (prompts,
    the measure and its hash), every checkpoint with its own interval, and how the chosen one compares, paired by
    prompt, with the first, the last and the one of the highest reward. `confidence` has the level of each interval.
    Raises ValueError as `best_checkpoint` does."""
    chosen, num = best_checkpoint(series), len(series)
    of_gains = 1 - corrected_level(1 - CONFIDENCE, num)
    rewarded = [one for one in series if math.isfinite(one.reward)]
    rivals = {"first": series[0], "last": series[-1]}
    if rewarded:
        rivals["best_reward"] = max(rewarded, key=lambda one: (one.reward, -one.step))
    return {
        "chosen_step": chosen.step,
        "chosen": interval_of_chosen(chosen, num).named("measure"),
        "rule": RULE,
        **evidence,
        "checkpoints": [
            {"step": one.step, "kl": one.kl, "reward": one.reward, "num_judged": one.estimate.count}
            | one.estimate.named("measure")
            for one in series
        ],
        "chosen_against": {
            name: {"step": other.step, **paired_gain(chosen, other, confidence=of_gains).named("gain")}
            for name, other in rivals.items()
        },
        "confidence": {
            "each_checkpoint": CONFIDENCE,
            "chosen": 1 - (1 - CONFIDENCE) / num,
            "chosen_against": of_gains,
        },
        "predicted_peak": predicted_peak(series),
    }


def _differences(one: MeasuredCheckpoint, other: MeasuredCheckpoint) -> Floats:
    """one - other for the prompts judged for both."""
    if len(one.values) != len(other.values):
        raise ValueError(f"checkpoints measured on {len(one.values)} and {len(other.values)} prompts are not paired")
    apart = np.array(one.values, dtype=np.float64) - np.array(other.values, dtype=np.float64)
    return np.asarray(apart[np.isfinite(apart)])


def _without_spread(values: Floats) -> bool:
    return bool(np.ptp(values) <= _EQUAL * np.abs(values).max())


def _interval(values: Floats, scale: tuple[float, float] | None, confidence: float) -> Interval:
    """Student's interval; for values without spread, what an unseen share of others on the scale may change."""
    if values.size < 2 or not _without_spread(values):
        return t_interval(values, confidence=confidence)
    value, unseen = float(values.mean()), wilson(0, values.size, confidence=confidence).high
    low, high = scale or (-math.inf, math.inf)
    return Interval(value, value - unseen * (value - low), value + unseen * (high - value), values.size)
