"""The building blocks of every page: its frame with the security policy, panels with charts, tables, folded parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import plotly.offline

from trimtab.reports.charts import Figure
from trimtab.reports.markup import Html, join, script_hash, script_json, tag


def document(title: str, body: Html) -> str:
    """The whole page around a body. It may run only its own two scripts, named by their hashes, and load nothing."""
    plotly_js, page_js = plotly.offline.get_plotlyjs(), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src {script_hash(plotly_js)} {script_hash(page_js)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(_asset("page.css"))),
    )
    # the scripts are large and come last, so that the browser reads the text first
    scripts = join(tag("script", Html(plotly_js)), tag("script", Html(page_js)))
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', body), scripts), lang='en')}\n"


class Panels:
    """Makes the panels of one page, and gives each figure a name of its own."""

    def __init__(self) -> None:
        self._num_figures = 0

    def panel(
        self, title: str, unit: str, how_to_read: str, figure: Figure, *, size: str = "", choices: Sequence[str] = ()
    ) -> Html:
        """A chart with its title, unit and how to read it. Its buttons show the parts in `choices`; "" is the total."""
        self._num_figures += 1
        name = f"figure-{self._num_figures}"
        buttons = [
            tag("button", choice or "total", type="button", data_part=choice, aria_pressed="false" if i else "true")
            for i, choice in enumerate(choices)
        ]
        return tag(
            "figure",
            tag("figcaption", tag("span", title, class_="title"), " ", tag("span", unit, class_="unit")),
            tag("div", tag("span", "Gold:", class_="soft"), buttons, class_="choices") if buttons else None,
            tag("div", class_="chart", data_figure=name, role="img", aria_label=title),
            tag("script", script_json(figure), type="application/json", id=name),
            tag("p", how_to_read, class_="how"),
            class_=f"card panel {size}".rstrip(),
        )


def grid(panels: Sequence[Html]) -> Html | None:
    """Panels side by side, as many as fit on the screen; None if there are no panels."""
    return tag("div", *panels, class_="charts") if panels else None


def folded(title: str, body: object) -> Html:
    """A part of the page that stays folded until the reader opens it."""
    return tag("details", tag("summary", title), body)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A table of rows. The first cell of each row is its name."""
    cells = [tag("tr", [tag("td", cell, class_=None if i else "key") for i, cell in enumerate(row)]) for row in rows]
    top = tag("tr", [tag("th", cell) for cell in head]) if head else None
    return tag("div", tag("table", top, cells), class_="scroll")


def settings_table(values: Mapping[str, Any]) -> Html:
    """Nested settings as a table, with one row for each key path."""
    return table((), [(name, tag("code", _plain(value))) for name, value in _flat(values)])


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _asset(name: str) -> str:
    return resources.files("trimtab.reports").joinpath(name).read_text(encoding="utf-8")
