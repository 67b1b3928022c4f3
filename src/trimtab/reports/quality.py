"""An independent measure of quality over a run, and whether it fell while the reward that is trained on rose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from trimtab.evals.overoptimisation import HackingSummary, hacking_summary
from trimtab.reports.collect import RunRecord, finite

FALL = 0.05
"""Quality counts as fallen if it ends at least this share below its peak, and noise alone does not explain the fall."""
CHANCE = 4
"""Number of standard errors by which quality must fall. It is large because the peak is the highest of many points: of
2,000 runs of 30 steps in which gold only fluctuates, two fall further."""
MOST_AVERAGED = 15
"""Largest number of steps averaged to tell whether gold has fallen; a short run averages a fifth of its steps."""
ROSE = 2
"""Number of standard errors by which the last of two measures that were chosen beforehand is above the first."""
NORMAL_97_5 = 1.96
"""Half the width of a 95% interval in standard errors."""


@dataclass(frozen=True, kw_only=True)
class MeasuredQuality:
    """A measure that training does not see, over a run: gold of the sampled replies at every step, or what the guard
    (or `trimtab choose`) measured at a few checkpoints, each with its own error."""

    name: str
    """As a sentence names it: "gold" or "the guard's measure"."""
    steps: tuple[float, ...]
    points: tuple[tuple[float, float, float], ...]
    """(KL, reward, quality) at each step; at least one."""
    errors: tuple[float, ...] | None
    """The standard error of each quality; None if they are estimated from the differences of neighbouring points."""

    @cached_property
    def summary(self) -> HackingSummary:
        """Quality against reward, averaged over neighbouring steps if the points have no errors of their own."""
        if self.errors is None:
            return hacking_summary(self.points, window=min(MOST_AVERAGED, len(self.points) // 5 | 1))
        found = hacking_summary(self.points)
        return replace(found, fall_error=math.hypot(self.errors[found.peak_index], self.errors[-1]))

    @property
    def fell(self) -> bool:
        """Whether quality ended below its peak by more than chance explains."""
        found = self.summary
        return found.fall_fraction >= FALL and found.peak_gold - found.final_gold > CHANCE * found.fall_error

    @property
    def was_gamed(self) -> bool:
        """Whether quality fell while the reward rose."""
        return self.fell and self.summary.proxy_kept_rising

    @property
    def rose(self) -> bool:
        """Whether the last point is above the first by more than chance explains. Needs points with errors."""
        assert self.errors is not None, "the trend of a series says whether it rose"
        return self.points[-1][2] - self.points[0][2] > ROSE * math.hypot(self.errors[0], self.errors[-1])


def measured_quality(run: RunRecord) -> MeasuredQuality | None:
    """The independent measure of a run: gold, else what decision.json holds, else the guard's metrics; None if nothing
    was measured together with a KL and a reward."""
    gold = _logged(run, "gold/mean")
    if gold:
        return MeasuredQuality(name="gold", steps=tuple(gold), points=tuple(gold.values()), errors=None)
    measured = _decided(run) or _checked(run)
    if not measured:
        return None
    points, errors = zip(*measured.values(), strict=True)
    return MeasuredQuality(name="the guard's measure", steps=tuple(measured), points=points, errors=errors)


Measured = dict[float, tuple[tuple[float, float, float], float]]
"""By step: (KL, reward, quality), and the standard error of the quality."""


def _logged(run: RunRecord, quality: str) -> dict[float, tuple[float, float, float]]:
    """(KL, reward, quality) at each step at which all three are known."""
    columns = [run.metrics.get(name) for name in ("policy/kl", "reward/mean", quality)]
    by_step = [dict(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for c in columns if c is not None]
    if len(by_step) < len(columns):
        return {}
    kl, reward, level = by_step
    points = {step: (kl[step], reward[step], level[step]) for step in sorted(kl.keys() & reward.keys() & level.keys())}
    return {step: point for step, point in points.items() if not any(map(math.isnan, point))}


def _checked(run: RunRecord) -> Measured:
    """What the guard logged as metrics."""
    ends = [_logged(run, f"guard/measure_{side}") for side in ("low", "high")]
    return {
        step: (point, (ends[1][step][2] - ends[0][step][2]) / (2 * NORMAL_97_5))
        for step, point in _logged(run, "guard/measure").items()
        if all(step in bounds for bounds in ends)
    }


def _decided(run: RunRecord) -> Measured:
    """What decision.json says of the checkpoints, the model that training began with among them."""
    rows, found = run.decision.get("checkpoints"), {}
    names = ("step", "kl", "reward", "measure", "measure_low", "measure_high")
    for row in rows if isinstance(rows, list) else []:
        step, kl, reward, level, low, high = (
            finite(row.get(n)) if isinstance(row, Mapping) else math.nan for n in names
        )
        if math.isfinite(step + kl + reward + level + low + high):
            found[step] = (kl, reward, level), (high - low) / (2 * NORMAL_97_5)
    return dict(sorted(found.items()))
