"""What can be had of two objectives at once: the Pareto front of policies, and how much it dominates.

Both objectives are better the higher they are, so a harm is given as one minus its share. A sweep over weights or
limits is a run for each of them; what is compared here are the scores of the policies that came out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from trimtab.stats import Floats, Interval, bootstrap_tail


def pareto_front(points: ArrayLike) -> list[int]:
    """The numbers of the points [K, 2] that no other point dominates, by rising first objective.

    A point dominates another one if it is at least as good in both objectives and better in one of them. Of equal
    points the first one stands for all. Raises ValueError for another shape, and for values that are not finite.
    """
    table = _finite(points, num_dimensions=2)
    found: list[int] = []
    highest = -math.inf
    # From the best in the first objective on: what follows is on the front only if it is better in the second.
    for i in np.lexsort((-table[:, 1], -table[:, 0])).tolist():
        if table[i, 1] > highest:
            found.append(i)
            highest = float(table[i, 1])
    return found[::-1]


def hypervolume(points: ArrayLike, reference: tuple[float, float]) -> float:
    """The area between a reference point and the front of the points [K, 2] (Zitzler and Thiele, 1999).

    It is the area of all pairs of values above the reference that some point reaches in both objectives, so a point
    that is not above the reference in both adds nothing. Areas are comparable only for one reference: state it beside
    the area. Raises ValueError as `pareto_front` does.
    """
    above = np.maximum(_finite(points, num_dimensions=2) - np.asarray(reference, dtype=np.float64), 0.0)
    area, before = 0.0, 0.0
    for i in pareto_front(above):
        area += float((above[i, 0] - before) * above[i, 1])
        before = float(above[i, 0])
    return area


def hypervolume_interval(
    values: ArrayLike,
    reference: tuple[float, float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The hypervolume of the mean scores of K policies on the same N prompts, with a percentile bootstrap interval.

    `values` is [K, N, 2]. Prompts are drawn with replacement, the same ones for every policy. The area of noisy means
    is a little too large, because among policies of about one worth the luckiest counts. With fewer than two prompts
    the bounds are nan. Raises ValueError as `pareto_front` does.
    """
    table = _finite(values, num_dimensions=3)
    num_prompts = table.shape[1]
    area = hypervolume(table.mean(1), reference)
    if num_prompts < 2:
        return Interval(area, math.nan, math.nan, num_prompts)
    generator = np.random.default_rng(seed)
    areas = [
        hypervolume(table[:, generator.integers(num_prompts, size=num_prompts)].mean(1), reference)
        for _ in range(num_resamples)
    ]
    tail = bootstrap_tail(num_prompts, confidence)
    low, high = np.quantile(areas, [tail, 1 - tail])
    return Interval(area, float(low), float(high), num_prompts)


def _finite(values: ArrayLike, *, num_dimensions: int) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != num_dimensions or table.shape[-1] != 2 or not table.size:
        shape = "[K, 2]" if num_dimensions == 2 else "[K, N, 2]"
        raise ValueError(f"expected scores {shape} in two objectives, got the shape {table.shape}")
    if broken := int((~np.isfinite(table)).sum()):
        raise ValueError(f"{broken} of {table.size} scores are not finite, and such a policy has no place on a front")
    return table
