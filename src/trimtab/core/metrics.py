"""Numbers that know how to add up, so that a mean over micro-batches or ranks is the mean over the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self


class Metric(Protocol):
    """One quantity seen on a part of the data; `a.merge(b)` is the quantity on both parts."""

    def merge(self, other: Self) -> Self: ...

    @property
    def value(self) -> float: ...


@dataclass(frozen=True)
class Mean:
    """A mean kept as sum and weight: parts merge exactly, whatever their sizes."""

    total: float
    weight: float

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class Total:
    """A count or an amount, such as seconds or dropped rows."""

    total: float

    def merge(self, other: Total) -> Total:
        return Total(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


@dataclass(frozen=True)
class Peak:
    """The largest value seen."""

    peak: float

    def merge(self, other: Peak) -> Peak:
        return Peak(max(self.peak, other.peak))

    @property
    def value(self) -> float:
        return self.peak


Metrics = dict[str, Metric]
"""Named `owner/quantity`: `policy/kl`, `reward/mean`, `time/generate_seconds`."""


def mean_of(values: Iterable[float]) -> Mean:
    """The mean of `values` as a metric."""
    listed = [float(v) for v in values]
    return Mean(math.fsum(listed), len(listed))


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """All parts as one; a name missing from a part is simply not counted there."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def to_values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain numbers, for a log line."""
    return {name: metric.value for name, metric in metrics.items()}
