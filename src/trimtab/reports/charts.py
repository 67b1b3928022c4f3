"""Figures as plain plotly JSON: {"data": [...], "layout": {...}}.

They are transparent with mid-grey text, so that one figure suits a light and a dark page. Plotly interprets some HTML
in its texts, so every text that comes from a file goes through `label`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.reports.collect import RunRecord, Series
from trimtab.reports.markup import visible
from trimtab.stats import Floats, Interval, moving_mean

Figure = dict[str, Any]

BLUE, ROSE, TEAL, AMBER, VIOLET, LIME = "#4a8df6", "#f0527a", "#14a89a", "#e69a18", "#9a72f2", "#7fae25"
PALETTE = (BLUE, ROSE, TEAL, AMBER, VIOLET, LIME)
GREY = "#8b93a1"
_GRID = "rgba(139,147,161,0.20)"
Bar = tuple[str, Interval, str]
"""Name, value with bounds (nan if unknown), colour; for example ("chance", Interval(0.5, nan, nan, 0), GREY)."""
MAX_POINTS = 400
"""Maximum number of points drawn for a curve. They are evenly spaced; smoothing uses all points."""


def label(text: object) -> str:
    """A text from a file as plotly may show it: no markup, not too long."""
    shown = visible(str(text))
    return html.escape(shown if len(shown) <= 60 else shown[:59] + "…", quote=False)


def smoothing_window(num_points: int) -> int:
    """Neighbours averaged into the drawn line: a twenty-fifth of the curve; odd, so that the line is not shifted."""
    return max(1, num_points // 25) | 1


def curves(series: Mapping[str, Series], unit: str) -> Figure:
    """One or more metrics over the steps: every value as a faint point, its moving mean as a line."""
    data: list[Figure] = []
    for i, (name, one) in enumerate(series.items()):
        colour = PALETTE[i % len(PALETTE)]
        data += _points_and_line(one.steps, one.values, name, colour, legend=len(series) > 1)
    figure = _figure(data, "step", unit, legend=len(series) > 1)
    if unit == "seconds":
        figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return figure


def stacked(series: Mapping[str, Series], unit: str) -> Figure:
    """Quantities that add up to a total, as smoothed areas stacked on each other."""
    data = []
    for i, (name, one) in enumerate(series.items()):
        shown = _thin(len(one))
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(name),
                "x": one.steps[shown].tolist(),
                "y": moving_mean(one.values, smoothing_window(len(one)))[shown].tolist(),
                "stackgroup": "all",
                "line": {"width": 0.5, "color": PALETTE[i % len(PALETTE)]},
                "hovertemplate": "%{y:.4g}",
            }
        )
    return _figure(data, "step", unit, legend=True)


def proxy_against_gold(runs: Sequence[RunRecord]) -> Figure:
    """Reward above and gold below, both against sqrt(KL), with one colour for each run.

    A star marks the peak of smoothed gold. The trace of a part of gold has the part's name in `meta.part` and starts
    hidden; that of the total has "".
    """
    data: list[Figure] = []
    with_gold = any("gold/mean" in run.metrics for run in runs)
    for i, run in enumerate(runs):
        colour = PALETTE[i % len(PALETTE)]
        kl = run.metrics["policy/kl"]
        names = ["reward/mean", *sorted(name for name in run.metrics if name.startswith("gold/"))]
        for name in names:
            if name not in run.metrics:
                continue
            steps, distance, values = _joined(kl, run.metrics[name])
            if not steps.size:
                continue
            lower = name.startswith("gold/")
            part = "" if name in ("reward/mean", "gold/mean") else name.removeprefix("gold/")
            traces = _path(steps, distance, values, run.name, colour, peak=lower)
            for trace in traces:
                trace |= {"xaxis": "x", "yaxis": "y2" if lower else "y", "legendgroup": label(run.name)}
                trace["showlegend"] = trace["mode"] == "lines" and not lower
                if lower:
                    trace |= {"meta": {"part": part}, "visible": not part}
            data += traces
    figure = _figure(data, "√KL from the reference (√nats)", "reward", legend=len(runs) > 1)
    layout = figure["layout"]
    layout["xaxis"]["rangemode"] = "tozero"
    if with_gold:
        layout["yaxis"]["domain"] = [0.54, 1.0]
        layout["yaxis2"] = _axis("gold score (0–1)") | {"domain": [0.0, 0.46]}
        layout["xaxis"]["anchor"] = "y2"
    return figure


def reliability(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Observed share of wins against predicted chance, with intervals; the diagonal is perfect calibration."""
    x = [b["mean_probability"] for b in bins]
    y = [b["accuracy"] for b in bins]
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": GREY, "width": 1, "dash": "dash"},
        "hoverinfo": "skip",
    }
    points = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": x,
        "y": y,
        "error_y": _error_bars(bins, "accuracy", BLUE),
        "marker": {"color": BLUE, "size": 7},
        "line": {"color": BLUE, "width": 1.5},
        "customdata": [b["count"] for b in bins],
        "hovertemplate": "predicted %{x:.2f}, happened %{y:.2f}<br>%{customdata} pairs<extra></extra>",
    }
    figure = _figure([diagonal, points], "predicted chance of winning", "share that won")
    figure["layout"]["xaxis"] |= {"range": [0, 1]}
    figure["layout"]["yaxis"] |= {"range": [0, 1]}
    return figure


def by_margin(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy in bins of the reward margin, with intervals, and a line at chance."""
    points = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [(b["low"] + b["high"]) / 2 for b in bins],
        "y": [b["accuracy"] for b in bins],
        "error_y": _error_bars(bins, "accuracy", TEAL),
        "marker": {"color": TEAL, "size": 7},
        "line": {"color": TEAL, "width": 1.5},
        "customdata": [[b["low"], b["high"], b["count"]] for b in bins],
        "hovertemplate": "margin %{customdata[0]:.2f} to %{customdata[1]:.2f}: %{y:.2f}"
        "<br>%{customdata[2]} pairs<extra></extra>",
    }
    figure = _figure([points], "difference of the two rewards", "accuracy (share)")
    figure["layout"]["shapes"] = [_horizontal(0.5)]
    figure["layout"]["xaxis"] |= {"rangemode": "tozero"}
    return figure


def by_length(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Mean reward in bins of reply length."""
    points = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [b["mean_length"] for b in bins],
        "y": [b["mean_reward"] for b in bins],
        "marker": {"color": AMBER, "size": 7},
        "line": {"color": AMBER, "width": 1.5},
        "customdata": [b["count"] for b in bins],
        "hovertemplate": "%{x:.0f} words: %{y:.3g}<br>%{customdata} replies<extra></extra>",
    }
    return _figure([points], "reply length (words)", "mean reward")


def shares(rows: Sequence[Bar]) -> Figure:
    """Horizontal bars, the first on top, with intervals if they are known."""
    rows = rows[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [label(name) for name, *_ in rows],
        "x": [share.value for _, share, _ in rows],
        "marker": {"color": [colour for *_, colour in rows], "opacity": 0.85},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [share.high - share.value for _, share, _ in rows],
            "arrayminus": [share.value - share.low for _, share, _ in rows],
            "color": GREY,
            "thickness": 1.5,
        },
        "text": [f"{share.value:.2f}" for _, share, _ in rows],
        "textposition": "inside",
        "insidetextanchor": "start",
        "insidetextfont": {"color": "#ffffff"},
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
    }
    figure = _figure([bars], "accuracy (share)", "")
    layout = figure["layout"]
    layout["xaxis"] |= {"range": [0, 1]}
    layout["yaxis"] |= {"automargin": True, "showgrid": False}
    layout["shapes"] = [_vertical(0.5)]
    layout["bargap"] = 0.35
    return figure


def dots(rows: Sequence[Bar], unit: str, *, line: float | None = None) -> Figure:
    """A dot with its interval for each row, the first on top.

    `line` is a value to compare with, drawn as a dashed line. Rows of the same name share one line of the chart.
    """
    rows = rows[::-1]
    points = {
        "type": "scatter",
        "mode": "markers",
        "y": [label(name) for name, *_ in rows],
        "x": [estimate.value for _, estimate, _ in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_known(estimate.high - estimate.value) for _, estimate, _ in rows],
            "arrayminus": [_known(estimate.value - estimate.low) for _, estimate, _ in rows],
            "color": GREY,
            "thickness": 1.5,
            "width": 3,
        },
        "marker": {"color": [colour for *_, colour in rows], "size": 9},
        "customdata": [estimate.count for _, estimate, _ in rows],
        "hovertemplate": "%{y}: %{x:.3f} (n=%{customdata})<extra></extra>",
    }
    figure = _figure([points], unit, "")
    figure["layout"]["yaxis"] |= {"automargin": True, "type": "category", "dtick": 1}
    if line is not None:
        figure["layout"]["shapes"] = [_vertical(line)]
    return figure


def columns(x: Sequence[float], heights: Sequence[float], x_title: str, y_title: str) -> Figure:
    """Counts as vertical bars side by side."""
    bars = {
        "type": "bar",
        "x": list(x),
        "y": list(heights),
        "marker": {"color": BLUE, "opacity": 0.85},
        "hovertemplate": "%{x:.3g}: %{y}<extra></extra>",
    }
    figure = _figure([bars], x_title, y_title)
    figure["layout"]["bargap"] = 0.1
    return figure


def matrix(names: Sequence[str], values: Sequence[Sequence[float]], unit: str) -> Figure:
    """A square table of values in [0, 1] as colours; nan is left blank."""
    cells = {
        "type": "heatmap",
        "x": [label(name) for name in names],
        "y": [label(name) for name in names],
        "z": [list(row) for row in values],
        "colorscale": [[0, ROSE], [0.5, "#c9ced6"], [1, TEAL]],
        "zmin": 0,
        "zmax": 1,
        "colorbar": {"thickness": 10, "title": {"text": unit, "font": {"size": 10}}, "tickfont": {"size": 10}},
        "hoverongaps": False,
        "hovertemplate": "%{y} and %{x}: %{z:.2f}<extra></extra>",
    }
    figure = _figure([cells], "", "")
    for axis in ("xaxis", "yaxis"):
        figure["layout"][axis] |= {"type": "category", "showgrid": False, "dtick": 1}
    figure["layout"]["yaxis"]["autorange"] = "reversed"
    return figure


def best_of_n(points: Sequence[Mapping[str, float]], lines: Mapping[str, str], unit: str) -> Figure:
    """Curves of the best of n replies over n, with intervals; n is on a logarithmic axis.

    `lines` maps a key of the points to the name of its line.
    """
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [p["n"] for p in points],
            "y": [p[key] for p in points],
            "error_y": _error_bars(points, key, colour),
            "line": {"color": colour, "width": 1.5},
            "marker": {"color": colour, "size": 7},
            "hovertemplate": "best of %{x}: %{y:.3f}<extra></extra>",
        }
        for (key, name), colour in zip(lines.items(), PALETTE, strict=False)
    ]
    figure = _figure(data, "n replies to choose from", unit, legend=len(lines) > 1)
    figure["layout"]["xaxis"] |= {"type": "log", "tickvals": [p["n"] for p in points]}
    return figure


def _points_and_line(steps: Floats, values: Floats, name: str, colour: str, *, legend: bool) -> list[Figure]:
    shown = _thin(len(steps))
    x = steps[shown].tolist()
    window = smoothing_window(len(steps))
    line = {
        "type": "scatter",
        "mode": "lines+markers" if len(steps) < 12 else "lines",
        "name": label(name),
        "x": x,
        "y": moving_mean(values, window)[shown].tolist(),
        "line": {"color": colour, "width": 2},
        "marker": {"size": 5},
        "showlegend": legend,
        "connectgaps": True,
        "hovertemplate": "step %{x}: %{y:.4g}",
    }
    if window == 1:
        return [line]
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": label(name),
        "x": x,
        "y": values[shown].tolist(),
        "marker": {"color": colour, "size": 3, "opacity": 0.35},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    return [points, line]


def _path(steps: Floats, distance: Floats, values: Floats, name: str, colour: str, *, peak: bool) -> list[Figure]:
    window = smoothing_window(len(steps))
    smooth_distance, smooth = moving_mean(distance, window), moving_mean(values, window)
    shown = _thin(len(steps))
    common = {"type": "scatter", "name": label(name)}
    traces: list[Figure] = [
        common
        | {
            "mode": "markers",
            "x": distance[shown].tolist(),
            "y": values[shown].tolist(),
            "marker": {"color": colour, "size": 4, "opacity": 0.28},
            "hoverinfo": "skip",
        },
        common
        | {
            "mode": "lines",
            "x": smooth_distance[shown].tolist(),
            "y": smooth[shown].tolist(),
            "customdata": steps[shown].tolist(),
            "line": {"color": colour, "width": 2.5},
            "hovertemplate": "step %{customdata}: %{y:.3g} at √KL %{x:.2f}",
        },
    ]
    if peak:
        best = int(np.nanargmax(smooth))
        traces.append(
            common
            | {
                "mode": "markers",
                "x": [float(smooth_distance[best])],
                "y": [float(smooth[best])],
                "marker": {"color": colour, "size": 13, "symbol": "star", "line": {"color": "#ffffff", "width": 1}},
                "hovertemplate": f"highest: %{{y:.3g}} at step {steps[best]:.0f}",
            }
        )
    return traces


def _joined(kl: Series, other: Series) -> tuple[Floats, Floats, Floats]:
    """The steps at which both are known, sqrt(KL) there (a KL estimate below 0 counts as 0), and the other values."""
    steps, left, right = np.intersect1d(kl.steps, other.steps, return_indices=True)
    known = ~(np.isnan(kl.values[left]) | np.isnan(other.values[right]))
    distance = np.sqrt(np.maximum(kl.values[left][known], 0.0))
    return steps[known], distance, other.values[right][known]


def _known(length: float) -> float:
    return 0.0 if math.isnan(length) else length


def _thin(num_points: int) -> slice:
    return slice(None, None, math.ceil(num_points / MAX_POINTS) or 1)


def _error_bars(rows: Sequence[Mapping[str, float]], name: str, colour: str) -> Figure:
    """Error bars from `name_low` and `name_high`; rows without these have none."""

    def bound(row: Mapping[str, float], side: str) -> float:
        value = row.get(f"{name}_{side}")
        return abs(value - row[name]) if isinstance(value, int | float) else 0.0

    return {
        "type": "data",
        "symmetric": False,
        "array": [bound(row, "high") for row in rows],
        "arrayminus": [bound(row, "low") for row in rows],
        "color": colour,
        "thickness": 1,
        "width": 2,
    }


def _figure(data: list[Figure], x_title: str, y_title: str, *, legend: bool = False) -> Figure:
    layout: Figure = {
        "margin": {"l": 52, "r": 10, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "color": GREY, "size": 11},
        "xaxis": _axis(x_title),
        "yaxis": _axis(y_title),
        "showlegend": legend,
        "hovermode": "closest",
        "hoverlabel": {"font": {"size": 12}},
    }
    if legend:
        layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"}
        layout["legend"] |= {"font": {"size": 10}, "itemwidth": 30}
        layout["margin"]["t"] = 34
    return {"data": data, "layout": layout}


def _axis(title: str) -> Figure:
    return {
        "title": {"text": title, "font": {"size": 11}, "standoff": 6},
        "gridcolor": _GRID,
        "zerolinecolor": _GRID,
        "linecolor": _GRID,
        "tickfont": {"size": 10},
        "nticks": 6,
        "automargin": True,
    }


def _horizontal(y: float) -> Figure:
    line = {"color": GREY, "width": 1, "dash": "dash"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def _vertical(x: float) -> Figure:
    line = {"color": GREY, "width": 1, "dash": "dash"}
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x, "line": line, "layer": "above"}
