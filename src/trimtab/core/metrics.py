"""Metrics that merge exactly, so that the mean over micro-batches or ranks is the mean over the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self


class Metric(Protocol):
    """One quantity measured on a part of the data. `a.merge(b)` is the quantity on both parts, for example
    `Mean(6.0, 2).merge(Mean(3.0, 1)) == Mean(9.0, 3)`."""

    def merge(self, other: Self) -> Self: ...

    @property
    def value(self) -> float: ...


@dataclass(frozen=True)
class Mean:
    """A mean stored as sum and weight, so that parts of any sizes merge exactly."""

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
    """The metrics of all parts together. A name that a part lacks is merged from the other parts only."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def to_values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The value of each metric as a plain number, for a log line."""
    return {name: metric.value for name, metric in metrics.items()}
