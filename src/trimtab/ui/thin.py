"""Long series as means of neighbouring values, with the lowest and the highest of them.

So thousands of steps take little memory and are drawn at once, and no spike is lost.
"""

from __future__ import annotations

import numpy as np

from trimtab.reports.collect import Series, Thinned
from trimtab.stats import Floats

MOST_POINTS = 800
"""A series has at most so many points. One that becomes longer is thinned to half as many."""


class ThinnedSeries:
    """One metric of a run, to which values are added as they are logged.

    Each point is the mean of `num_each` values that were logged one after the other, a power of two that grows with the
    series. The points do not depend on the portions in which the values came.
    """

    def __init__(self) -> None:
        self.num_each = 1
        self.num_logged = 0
        self._sums: Floats = np.zeros((4, 0))
        """For each point the sum of its steps, their number, the sum of its known values, their number."""
        self._ends: Floats = np.zeros((2, 0))
        """The lowest known value of each point, and the highest with its sign turned; inf if none is known."""
        self._last_step = 0.0

    def add(self, new: Series) -> None:
        """Adds the values of further steps."""
        known = ~np.isnan(new.values)
        point = (self.num_logged + np.arange(len(new))) // self.num_each
        self.num_logged += len(new)
        num_points = -(-self.num_logged // self.num_each)
        sums = np.zeros((4, num_points))
        sums[:, : self._sums.shape[1]] = self._sums
        for row, values in zip(
            sums, (new.steps, 1.0 + 0 * new.steps, np.where(known, new.values, 0), known), strict=True
        ):
            row += np.bincount(point, values, num_points)
        ends = np.full((2, num_points), np.inf)
        ends[:, : self._ends.shape[1]] = self._ends
        for row, values in zip(ends, (new.values, -new.values), strict=True):
            np.minimum.at(row, point[known], values[known])
        while sums.shape[1] > MOST_POINTS:
            self.num_each *= 2
            odd = ((0, 0), (0, sums.shape[1] % 2))
            sums = np.pad(sums, odd).reshape(4, -1, 2).sum(axis=2)
            ends = np.pad(ends, odd, constant_values=np.inf).reshape(2, -1, 2).min(axis=2)
        self._sums, self._ends = sums, ends
        if len(new):
            self._last_step = float(new.steps[-1])

    @property
    def series(self) -> Series:
        """The points, nan if none of the values of a point is known."""
        steps, num, values, known = self._sums
        means = np.divide(values, known, out=np.full(len(known), np.nan), where=known > 0)
        low, high = np.where(known > 0, self._ends, np.nan)
        num_unknown = self.num_logged - int(known.sum())
        return Series(steps / num, means, Thinned(known, low, -high, num_unknown, self._last_step))
