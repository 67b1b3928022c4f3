"""Charts as one SVG file, for the pages under docs/evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from markupsafe import escape

from trimtab.core.files import write_whole
from trimtab.reports.charts import Chart

_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#5c6675}text.title{font-size:14px;font-weight:600;fill:#1c2330}"
    "text.value{fill:inherit}.grid{stroke:#e2e6ec}"
)


def write_picture(charts: Mapping[str, Chart], path: Path) -> None:
    """Draws charts under each other, each with its title and its legend."""
    parts, top, width = [], 10, 0.0
    for title, chart in charts.items():
        text = str(chart.__html__())
        text = text[text.index('<svg class="chart"') :]
        across, height = (float(size) for size in re.search(r'viewBox="0 0 (\S+) (\S+)"', text).groups())
        parts.append(f'<text class="title" x="12" y="{top + 14}">{escape(title)}</text>')
        legend = "".join(f'<tspan fill="{colour}">● </tspan>{escape(name)}  ' for name, colour in chart.legend)
        parts.append(f'<text x="12" y="{top + 34}" xml:space="preserve">{legend}</text>')
        parts.append(text.replace("<svg ", f'<svg x="0" y="{top + 44}" width="{across}" height="{height}" ', 1))
        top, width = top + 64 + int(height), max(width, across)
    write_whole(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n',
    )
