"""Long series as means of neighbouring values, so that thousands of steps take little memory and are drawn at once."""

from __future__ import annotations

import numpy as np

from trimtab.reports.collect import Series
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
        while sums.shape[1] > MOST_POINTS:
            self.num_each *= 2
            sums = np.pad(sums, ((0, 0), (0, sums.shape[1] % 2))).reshape(4, -1, 2).sum(axis=2)
        self._sums = sums

    @property
    def series(self) -> Series:
        """The points, nan if none of the values of a point is known."""
        steps, num, values, known = self._sums
        means = np.divide(values, known, out=np.full(len(known), np.nan), where=known > 0)
        return Series(steps / num, means, known, self.num_logged - int(known.sum()))
