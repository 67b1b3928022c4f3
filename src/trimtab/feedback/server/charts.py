"""Plots as SVG drawn by the server: they need no script and follow the page's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from trimtab.stats import Interval

_WIDTH = 460
_NAMES = 130
_ROW = 22


def intervals(
    rows: Sequence[tuple[str, Interval]], *, low: float = 0.0, high: float = 1.0, aim: float | None = None, title: str
) -> Markup:
    """A point with its interval for each row, and a dashed line at `aim`, the value that is wished for."""
    known = [(name, interval) for name, interval in rows if not math.isnan(interval.value)][:40]
    if not known:
        return Markup('<p class="soft">Nothing to show yet.</p>')
    height = len(known) * _ROW + 26
    left, right = _NAMES, _WIDTH - 14

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(left + share * (right - left), 1)

    parts = []
    for i in range(5):
        value = low + i * (high - low) / 4
        parts.append(f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="4" y2="{height - 20}"/>')
        parts.append(f'<text x="{x(value)}" y="{height - 6}" text-anchor="middle">{value:.2g}</text>')
    if aim is not None:
        parts.append(f'<line class="aim" x1="{x(aim)}" x2="{x(aim)}" y1="4" y2="{height - 20}"/>')
    for i, (name, interval) in enumerate(known):
        y = 15 + i * _ROW
        shown = name if len(name) <= 18 else name[:17] + "…"
        parts.append(f'<text class="name" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>')
        if not math.isnan(interval.low):
            line = f'<line class="whisker" x1="{x(interval.low)}" x2="{x(interval.high)}" y1="{y}" y2="{y}"/>'
            parts.append(line)
        parts.append(
            f'<circle class="point" cx="{x(interval.value)}" cy="{y}" r="4"><title>{escape(interval)}</title></circle>'
        )
    return _svg(parts, height, title)


def columns(values: Sequence[int], *, labels: Sequence[str], title: str) -> Markup:
    """A column for each count, with the first and the last label."""
    if not values:
        return Markup('<p class="soft">Nothing to show yet.</p>')
    height, top = 170, max(values) or 1
    width = (_WIDTH - 50) / len(values)
    parts = []
    for value in (0, top / 2, top):
        y = round(height - 24 - value / top * (height - 40), 1)
        parts.append(f'<line class="grid" x1="36" x2="{_WIDTH - 10}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="30" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for i, value in enumerate(values):
        tall = round(value / top * (height - 40), 1)
        x = round(38 + i * width, 2)
        parts.append(
            f'<rect class="column" x="{x}" y="{round(height - 24 - tall, 1)}" width="{max(1.0, width - 1.5):.2f}" '
            f'height="{tall}"><title>{escape(labels[i])}: {value}</title></rect>'
        )
    for i, anchor in ((0, "start"), (len(values) - 1, "end")):
        x = 38 if anchor == "start" else _WIDTH - 10
        if anchor == "start" or len(values) > 1:
            parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">{escape(labels[i])}</text>')
    return _svg(parts, height, title)


def _svg(parts: Sequence[str], height: int, title: str) -> Markup:
    """The parts as one SVG. Names in `parts` are already escaped."""
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")
