"""Charts as SVG. They need no script, follow the light or dark colours of their page, and print as they look.

A chart is a list of marks in the units of its axes; `templates/chart.html` draws them. Every value shows its text when
the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from trimtab.reports.collect import RunRecord, Series
from trimtab.reports.markup import REPORTS
from trimtab.stats import Floats, Interval, moving_mean

BLUE, ROSE, TEAL, AMBER, VIOLET, LIME = "#4a8df6", "#f0527a", "#14a89a", "#e69a18", "#9a72f2", "#7fae25"
PALETTE = (BLUE, ROSE, TEAL, AMBER, VIOLET, LIME)
GREY = "#8b93a1"
Bar = tuple[str, Interval, str]
"""Name, value with bounds (nan if unknown), colour; for example ("chance", Interval(0.5, nan, nan, 0), GREY)."""
MAX_POINTS = 200
"""Maximum number of points drawn for a curve: of each stretch the lowest and the highest. Smoothing uses all points."""
MAX_NAME = 28
"""Letters of a name that a legend or an axis shows; beside a wide chart twice as many."""
_FAR = 1e300
"""No axis reaches further, nor shows differences smaller than one part of this."""
_LETTER = 6.2
"""Mean width of a letter of the charts' 11-pixel font, in pixels."""
_ROW = 22
"""Height of a row that has a name, in pixels."""


@dataclass(frozen=True)
class Axis:
    """What an axis measures, and the range that it shows."""

    title: str = ""
    low: float | None = None
    """None for the lowest value drawn, with a margin; the same for `high`."""
    high: float | None = None
    names: tuple[str, ...] = ()
    """Names instead of numbers: the i-th stands at i, the first one leftmost or on top."""
    ticks: tuple[tuple[float, str], ...] = ()
    """Where to write what; empty for round numbers."""

    def range_of(self, values: Floats) -> tuple[float, float]:
        """The two ends of the axis for these values, some of which may be nan."""
        if self.names:
            return -0.5, len(self.names) - 0.5
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        low, high = (low if self.low is None else self.low), (high if self.high is None else self.high)
        low = min(max(low, -_FAR), _FAR)
        high = min(max(high, low), _FAR)
        # values that differ in their last digits only are one value, and have no round numbers between them
        apart = high - low > max(1e-9 * max(abs(low), abs(high)), 1 / _FAR)
        margin = 0.04 * (high - low) if apart else abs(low) / 2 or 0.5
        return low - (margin if self.low is None else 0), high + (margin if self.high is None or not apart else 0)

    def ticks_in(self, low: float, high: float, letters: int = MAX_NAME) -> list[tuple[float, str]]:
        """Places and texts of at most seven ticks; of all names, of which it shows so many letters."""
        if self.names:
            return [(i, _short(name, letters)) for i, name in enumerate(self.names)]
        if self.ticks:
            return [(at, text) for at, text in self.ticks if low <= at <= high]
        power = 10.0 ** math.floor(math.log10((high - low) / 6))
        step = next(power * size for size in (1, 2, 5, 10) if (high - low) / (power * size) <= 6)
        return [(i * step, f"{i * step:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Mark:
    """One thing that is drawn: a line or an area through points [num_points], or dots, texts or boxes at points.

    The points of boxes are pairs of corners that face each other, [2, num_boxes].
    """

    shape: Literal["line", "area", "dots", "texts", "boxes"]
    x: Floats
    y: Floats
    colours: Sequence[str]
    """One for all, or one for each point."""
    texts: Sequence[str] = ()
    """What each point says."""
    size: float = 2.0
    """Width of a line, radius of a dot or height of a text, in pixels."""
    opacity: float = 1.0
    dashed: bool = False


@dataclass
class Chart:
    """Marks between two axes. A template draws it by writing it."""

    x: Axis
    y: Axis
    height: int = 200
    """Height in pixels; charts whose rows have names are as high as the rows need."""
    wide: bool = False
    marks: list[Mark] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Names and colours, shown if there are several."""

    def line(self, x: ArrayLike, y: ArrayLike, colour: str, *, size: float = 2.0, dashed: bool = False) -> None:
        """A line through the points that are known."""
        across, up = np.asarray(x, float), np.asarray(y, float)
        known = np.isfinite(across) & np.isfinite(up)
        self.marks.append(Mark("line", across[known], up[known], [colour], size=size, dashed=dashed))

    def dots(
        self,
        x: ArrayLike,
        y: ArrayLike,
        colours: Sequence[str],
        texts: Sequence[str],
        *,
        size: float = 3.5,
        opacity: float = 1.0,
    ) -> None:
        """A dot at each point that is known, with what it says."""
        self.marks.append(Mark("dots", np.asarray(x, float), np.asarray(y, float), colours, texts, size, opacity))

    def texts(self, x: ArrayLike, y: ArrayLike, colour: str, texts: Sequence[str]) -> None:
        """Texts centred at points."""
        self.marks.append(Mark("texts", np.asarray(x, float), np.asarray(y, float), [colour], texts, 11))

    def boxes(self, x: ArrayLike, y: ArrayLike, colours: Sequence[str], texts: Sequence[str]) -> None:
        """Filled boxes between corners [2, num_boxes], with what each says."""
        across, up = np.asarray(x, float).reshape(2, -1), np.asarray(y, float).reshape(2, -1)
        self.marks.append(Mark("boxes", across, up, colours, texts, opacity=0.85))

    def area(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str, *, opacity: float = 0.75) -> None:
        """The area between two curves over the same places."""
        at, below, above = np.asarray(x, float), np.asarray(low, float), np.asarray(high, float)
        self.marks.append(
            Mark("area", np.append(at, at[::-1]), np.append(below, above[::-1]), [colour], opacity=opacity)
        )

    def whiskers(self, x: Sequence[tuple[float, float]], y: Sequence[tuple[float, float]], colour: str) -> None:
        """Thin lines between pairs of values, such as the bounds of intervals; unknown ones are left out."""
        for ends_x, ends_y in zip(x, y, strict=True):
            if np.isfinite([*ends_x, *ends_y]).all():
                self.line(ends_x, ends_y, colour, size=1.5)

    def __html__(self) -> Markup:
        xs, ys = (np.concatenate([getattr(mark, axis).ravel() for mark in self.marks] or [[]]) for axis in "xy")
        if not xs.size:
            return Markup('<p class="soft">Nothing to show yet.</p>')
        (x_low, x_high), (y_low, y_high) = self.x.range_of(xs), self.y.range_of(ys)
        x_ticks, y_ticks = self.x.ticks_in(x_low, x_high), self.y.ticks_in(y_low, y_high, MAX_NAME * (1 + self.wide))
        letters_x, letters_y = (max((len(text) for _, text in ticks), default=0) for ticks in (x_ticks, y_ticks))
        width = 1040 if self.wide else 360
        left, right, top = 12 + letters_y * _LETTER + (16 if self.y.title else 0), width - 12, 8
        turned = bool(self.x.names) and letters_x * _LETTER * len(x_ticks) > right - left
        below = (letters_x * 4.5 if turned else 0) + (36 if self.x.title else 20)
        bottom = top + len(self.y.names) * _ROW if self.y.names else self.height - below

        def across(values: Floats) -> list[float]:
            share = (np.clip(values, x_low, x_high) - x_low) / (x_high - x_low)
            return (left + share * (right - left)).round(1).tolist()  # type: ignore[no-any-return]

        def down(values: Floats) -> list[float]:
            share = (np.clip(values, y_low, y_high) - y_low) / (y_high - y_low)
            return (top + (share if self.y.names else 1 - share) * (bottom - top)).round(1).tolist()  # type: ignore[no-any-return]

        text = REPORTS.get_template("chart.html").render(
            chart=self,
            x_ticks=list(zip(across(np.array([at for at, _ in x_ticks])), [name for _, name in x_ticks], strict=True)),
            y_ticks=list(zip(down(np.array([at for at, _ in y_ticks])), [name for _, name in y_ticks], strict=True)),
            marks=[(mark, across(mark.x), down(mark.y)) for mark in self.marks],
            turned=turned,
            size=(width, round(bottom + below)),
            frame=(round(left, 1), right, top, round(bottom, 1)),
        )
        return Markup(text)


def smoothing_window(num_points: int) -> int:
    """Neighbours averaged into the drawn line: a twenty-fifth of the curve; odd, so that the line is not shifted."""
    return max(1, num_points // 25) | 1


def curves(series: Mapping[str, Series], unit: str, *, max_points: int = MAX_POINTS) -> Chart:
    """One or more metrics over the steps: values as faint points, their moving mean as a line.

    Of each curve at most `max_points` are drawn, the lowest and the highest of each stretch among them. Of a thinned
    series the points are means, and a band reaches from the lowest value to the highest of each.
    """
    chart = Chart(Axis("step"), Axis(unit, low=0.0 if unit == "seconds" else None), height=200 + 50 * (len(series) > 2))
    for (name, one), colour in zip(series.items(), cycle(PALETTE), strict=False):
        chart.legend.append((_short(name), colour))
        window, shown = smoothing_window(len(one)), _with_extremes(one, max_points)
        texts = [f"step {step:g}: {value:.4g}" for step, value in zip(one.steps[shown], one.values[shown], strict=True)]
        if one.thinned is not None and (one.thinned.known > 1).any():
            known = shown[~np.isnan(one.values[shown])]
            chart.area(one.steps[known], one.low[known], one.high[known], colour, opacity=0.2)
            ends = zip(one.low[shown], one.high[shown], strict=True)
            texts = [f"{text}, from {low:.4g} to {high:.4g}" for text, (low, high) in zip(texts, ends, strict=True)]
        chart.line(one.steps[shown], moving_mean(one.values, window)[shown], colour)
        size, opacity = (1.5, 0.4) if window > 1 else (2.5, 1.0)
        chart.dots(one.steps[shown], one.values[shown], [colour], texts, size=size, opacity=opacity)
    return chart


def stacked(series: Mapping[str, Series], unit: str) -> Chart:
    """Quantities that add up to a total, as smoothed areas stacked on each other. All have the steps of the first."""
    chart = Chart(Axis("step"), Axis(unit, low=0.0), height=250)
    steps = next(iter(series.values())).steps
    shown, below = slice(None, None, math.ceil(len(steps) / MAX_POINTS) or 1), np.zeros(len(steps))
    for (name, one), colour in zip(series.items(), cycle(PALETTE), strict=False):
        chart.legend.append((_short(name), colour))
        values = np.interp(steps, one.steps, np.nan_to_num(moving_mean(one.values, smoothing_window(len(one)))))
        chart.area(steps[shown], below[shown], (below + values)[shown], colour)
        below = below + values
    return chart


def over_kl(runs: Sequence[RunRecord], metric: str, unit: str, *, wide: bool = False, peak: bool = False) -> Chart:
    """A metric against sqrt(KL), with one colour for each run; the axis is the same for every metric of these runs.

    With `peak`, a large dot marks the highest smoothed value.
    """
    furthest = max((float(np.nanmax(_root(run.metrics["policy/kl"].values), initial=0.0)) for run in runs), default=0)
    chart = Chart(Axis("√KL from the reference (√nats)", 0.0, furthest * 1.02 or 1.0), Axis(unit), 280, wide)
    for run, colour in zip(runs, cycle(PALETTE), strict=False):
        chart.legend.append((_short(run.name), colour))
        if metric not in run.metrics:
            continue
        steps, distance, values = _joined(run.metrics["policy/kl"], run.metrics[metric])
        if not steps.size:
            continue
        # the few steps of a short run are noisy, and a line through each would run back and forth
        window, shown = (
            max(smoothing_window(len(steps)), min(7, len(steps) // 5) | 1),
            _with_extremes(Series(steps, values)),
        )
        far, smooth = moving_mean(distance, window), moving_mean(values, window)
        rows = zip(steps[shown], values[shown], distance[shown], strict=True)
        texts = [f"{run.name}, step {step:g}: {value:.3g} at √KL {at:.2f}" for step, value, at in rows]
        chart.dots(distance[shown], values[shown], [colour], texts, size=2, opacity=0.4)
        chart.line(far[shown], smooth[shown], colour, size=2.5)
        if peak:
            best = int(np.nanargmax(smooth))
            highest = f"{run.name}, highest: {smooth[best]:.3g} at step {steps[best]:.0f}"
            chart.dots(far[[best]], smooth[[best]], [colour], [highest], size=6)
    return chart


def reliability(bins: Sequence[Mapping[str, float]]) -> Chart:
    """Observed share of wins against predicted chance, with intervals; the diagonal is perfect calibration."""
    chart = Chart(Axis("predicted chance of winning", 0, 1), Axis("share that won", 0, 1))
    chart.line([0, 1], [0, 1], GREY, size=1, dashed=True)
    texts = [
        f"predicted {b['mean_probability']:.2f}, happened {b['accuracy']:.2f}: {b['count']:.0f} pairs" for b in bins
    ]
    _with_bounds(chart, [b["mean_probability"] for b in bins], bins, "accuracy", BLUE, texts)
    return chart


def by_margin(bins: Sequence[Mapping[str, float]]) -> Chart:
    """Accuracy in bins of the reward margin, with intervals, and a line at chance."""
    middles = [(b["low"] + b["high"]) / 2 for b in bins]
    chart = Chart(Axis("difference of the two rewards", low=0.0), Axis("accuracy (share)"))
    texts = [f"margin {b['low']:.2f} to {b['high']:.2f}: {b['accuracy']:.2f} of {b['count']:.0f} pairs" for b in bins]
    _with_bounds(chart, middles, bins, "accuracy", TEAL, texts)
    chart.line([0, max(middles)], [0.5, 0.5], GREY, size=1, dashed=True)
    return chart


def by_length(bins: Sequence[Mapping[str, float]]) -> Chart:
    """Mean reward in bins of reply length."""
    chart = Chart(Axis("reply length (words)"), Axis("mean reward"))
    texts = [f"{b['mean_length']:.0f} words: {b['mean_reward']:.3g}, {b['count']:.0f} replies" for b in bins]
    _with_bounds(chart, [b["mean_length"] for b in bins], bins, "mean_reward", AMBER, texts)
    return chart


def best_of_n(points: Sequence[Mapping[str, float]], lines: Mapping[str, str], unit: str) -> Chart:
    """Curves of the best of n replies over n, with intervals; n is on a logarithmic axis.

    `lines` maps a key of the points to the name of its line.
    """
    x = [math.log2(p["n"]) for p in points]
    ticks = tuple((at, f"{p['n']:.0f}") for at, p in zip(x, points, strict=True))
    chart = Chart(Axis("n replies to choose from", ticks=ticks), Axis(unit))
    for (key, name), colour in zip(lines.items(), PALETTE, strict=False):
        chart.legend.append((name, colour))
        _with_bounds(chart, x, points, key, colour, [f"best of {p['n']:.0f}: {p[key]:.3f}" for p in points])
    return chart


def shares(rows: Sequence[Bar]) -> Chart:
    """Horizontal bars of shares, the first on top, with intervals if they are known, and a line at chance."""
    chart = Chart(Axis("accuracy (share)", 0, 1), Axis(names=tuple(name for name, *_ in rows)))
    places, values = np.arange(len(rows)), np.array([share.value for _, share, _ in rows])
    texts = [f"{name}: {share}" for name, share, _ in rows]
    chart.boxes([0 * values, values], [places - 0.33, places + 0.33], [colour for *_, colour in rows], texts)
    chart.whiskers([(share.low, share.high) for _, share, _ in rows], [(i, i) for i in range(len(rows))], GREY)
    chart.line([0.5, 0.5], [-0.5, len(rows) - 0.5], GREY, size=1, dashed=True)
    chart.texts(0 * values + 0.06, places, "#ffffff", [f"{value:.2f}" for value in values])
    return chart


def dots(
    rows: Sequence[Bar], unit: str, *, line: float | None = None, low: float | None = None, high: float | None = None
) -> Chart:
    """A dot with its interval for each row, the first on top; rows of unknown value are left out.

    `line` is a value to compare with, drawn as a dashed line. Rows of the same name share one line of the chart.
    """
    rows = [row for row in rows if not math.isnan(row[1].value)]
    names = list(dict.fromkeys(name for name, *_ in rows))
    places = [names.index(name) for name, *_ in rows]
    chart = Chart(Axis(unit, low, high), Axis(names=tuple(names)), wide=len(names) > 10)
    chart.whiskers([(found.low, found.high) for _, found, _ in rows], [(i, i) for i in places], GREY)
    texts = [f"{name}: {found}" for name, found, _ in rows]
    chart.dots([found.value for _, found, _ in rows], places, [colour for *_, colour in rows], texts, size=4.5)
    if line is not None and rows:
        chart.line([line, line], [-0.5, len(names) - 0.5], GREY, size=1, dashed=True)
    return chart


def columns(
    x: Sequence[float], heights: Sequence[float], x_title: str, y_title: str, *, labels: Sequence[str] = ()
) -> Chart:
    """Counts as vertical bars side by side. With `labels`, the axis shows the first and the last of them."""
    at, known = np.asarray(x, float), [*labels] or [f"{value:.3g}" for value in x]
    half = 0.45 * (float(np.diff(np.unique(at)).min()) if len(set(x)) > 1 else 1.0)
    ticks = tuple((float(at[i]), labels[i]) for i in sorted({0, len(labels) - 1})) if labels else ()
    chart = Chart(Axis(x_title, ticks=ticks), Axis(y_title, low=0.0))
    texts = [f"{name}: {height:g}" for name, height in zip(known, heights, strict=True)]
    chart.boxes([at - half, at + half], [np.zeros(len(at)), np.asarray(heights)], [BLUE], texts)
    return chart


def matrix(names: Sequence[str], values: Sequence[Sequence[float]]) -> Chart:
    """A square table of values in [0, 1] as colours; nan is left blank."""
    chart = Chart(Axis(names=tuple(names)), Axis(names=tuple(names)), wide=True)
    table = np.array(values, float)
    down, across = np.nonzero(~np.isnan(table))
    known = table[down, across]
    texts = [f"{names[i]} and {names[j]}: {table[i, j]:.2f}" for i, j in np.argwhere(~np.isnan(table)).tolist()]
    boxes = [across - 0.48, across + 0.48], [down - 0.46, down + 0.46]
    chart.boxes(*boxes, [_between(value) for value in known.tolist()], texts)
    if len(names) <= 20:
        chart.texts(across, down, "#1c2330", [f"{value:.2f}" for value in known])
    return chart


def _with_bounds(
    chart: Chart, x: Sequence[float], rows: Sequence[Mapping[str, float]], key: str, colour: str, texts: Sequence[str]
) -> None:
    """A line with a dot for each row, and whiskers from `key_low` to `key_high` where a row has them."""
    chart.whiskers(
        [(at, at) for at in x],
        [(row.get(f"{key}_low", math.nan), row.get(f"{key}_high", math.nan)) for row in rows],
        colour,
    )
    chart.line(x, [row[key] for row in rows], colour, size=1.5)
    chart.dots(x, [row[key] for row in rows], [colour], texts)


def _joined(kl: Series, other: Series) -> tuple[Floats, Floats, Floats]:
    """The steps at which both are known, sqrt(KL) there, and the other values."""
    steps, left, right = np.intersect1d(kl.steps, other.steps, return_indices=True)
    known = ~(np.isnan(kl.values[left]) | np.isnan(other.values[right]))
    return steps[known], _root(kl.values[left][known]), other.values[right][known]


def _root(kl: Floats) -> Floats:
    """sqrt(KL); an estimate below 0 counts as 0."""
    return np.sqrt(np.maximum(kl, 0.0))


def _between(share: float) -> str:
    """A colour from rose (0) over grey (0.5) to teal (1)."""
    low, high, part = ("#f0527a", "#c9ced6", 2 * share) if share < 0.5 else ("#c9ced6", "#14a89a", 2 * share - 1)
    ends = [(int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in ends)


def _short(name: str, letters: int = MAX_NAME) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _with_extremes(series: Series, most: int = MAX_POINTS) -> NDArray[np.intp]:
    """The places of at most so many points of a series: the lowest and the highest of each stretch, in their order."""
    num = len(series)
    if num <= most:
        return np.arange(num)
    stretches = np.array_split(np.arange(num), max(1, most // 2))
    low, high = (
        np.where(np.isnan(series.low), np.inf, series.low),
        np.where(np.isnan(series.high), -np.inf, series.high),
    )
    return np.unique([end for at in stretches for end in (at[np.argmin(low[at])], at[np.argmax(high[at])])])
