"""What a noisy series did over a run, by medians of its beginning and end. A single step never decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trimtab.reports.collect import Series
from trimtab.stats import Floats

MIN_POINTS = 10
"""The fewest known values that are judged: with fewer, a window of three values would be a third of the series."""
WINDOW_FRACTION = 0.2
"""The share of the values that makes the beginning and the end."""
MIN_WINDOW = 3
"""The fewest values in a window: the median of three ignores one outlier."""
MIN_FITTED = 5
"""The fewest values of a window that a line is fitted to: two of its degrees of freedom are gone then."""
CHANCE = 4.0
"""Number of standard errors by which a series must move. Of 2,000 series of 30 steps of independent noise, none moves
so far; of noise whose neighbours correlate by 0.8, a fifth do, which is why every rule asks for a size too."""
SPIKE_DEVIATIONS = 10.0
"""Robust deviations from its neighbours that make a value a spike: losses of small batches have heavy tails."""
SPIKE_NEIGHBOURS = 10
"""Values on each side that a value is compared with."""

MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, for normal noise."""
_MAD_TO_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation, for normal noise."""


@dataclass(frozen=True)
class Trend:
    """The median of a series at its beginning and at its end."""

    start: float
    end: float
    error: float
    """Standard error of `end - start`, from the noise of neighbouring values and the spread around a line through each
    window: slow noise shows in the second only."""
    first_steps: tuple[int, int]
    """The first and the last step of the beginning."""
    last_steps: tuple[int, int]
    """The first and the last step of the end."""

    @property
    def change(self) -> float:
        """`end - start`."""
        return self.end - self.start

    @property
    def rose(self) -> bool:
        """Whether the end lies higher by more than chance explains."""
        return self.change > CHANCE * self.error

    @property
    def fell(self) -> bool:
        """Whether the end lies lower by more than chance explains."""
        return -self.change > CHANCE * self.error


def known(series: Series) -> Series:
    """The series without the values that are no finite numbers."""
    kept = np.isfinite(series.values)
    return Series(series.steps[kept], series.values[kept])


def trend(series: Series) -> Trend:
    """The trend of a series of at least one known value; see `MIN_POINTS` for how many make it worth reading."""
    clean = known(series)
    size = min(max(MIN_WINDOW, round(WINDOW_FRACTION * len(clean))), len(clean))
    first, last = clean.values[:size], clean.values[-size:]
    # The mean absolute difference of neighbours is 2 / sqrt(pi) deviations for independent normal noise.
    jumps = np.abs(np.diff(clean.values))
    noise = float(jumps.mean()) * math.sqrt(math.pi) / 2 if len(jumps) else 0.0
    errors = [MEDIAN_ERROR * max(noise, _around_a_line(window)) / math.sqrt(size) for window in (first, last)]
    return Trend(
        start=float(np.median(first)),
        end=float(np.median(last)),
        error=math.hypot(*errors),
        first_steps=(int(clean.steps[0]), int(clean.steps[size - 1])),
        last_steps=(int(clean.steps[-size]), int(clean.steps[-1])),
    )


def deviation(values: Floats) -> float:
    """The standard deviation, estimated by the median absolute deviation so that outliers do not count; 0 for none."""
    if not len(values):
        return 0.0
    return _MAD_TO_DEVIATION * float(np.median(np.abs(values - np.median(values))))


def _around_a_line(values: Floats) -> float:
    """The standard deviation around a fitted line; 0 for fewer values than show one."""
    if len(values) < MIN_FITTED:
        return 0.0
    places = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(places @ values) / float(places @ places)
    rest = values - values.mean() - slope * places
    return float(np.sqrt(rest @ rest / (len(values) - 2)))


def spikes(series: Series, *, least: float) -> Series:
    """The values that stand above the median of its neighbours by more than `SPIKE_DEVIATIONS` robust
    deviations of the whole series around such medians, and by more than the share `least` of that median."""
    clean = known(series)
    if len(clean) < MIN_POINTS:
        return Series(clean.steps[:0], clean.values[:0])
    values = clean.values
    width = SPIKE_NEIGHBOURS
    padded = np.pad(values, width, constant_values=np.nan)  # fewer neighbours at the ends
    middles = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 1), axis=1)
    above = values - middles
    high = (above > SPIKE_DEVIATIONS * deviation(above)) & (above > least * np.abs(middles))
    # A loss that falls steeply at the beginning stands above its later neighbours without being a spike.
    high[:width] = False
    return Series(clean.steps[high], clean.values[high])
