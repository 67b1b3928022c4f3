"""What a page that stands alone is made of: its headline and sections of text, charts, tables and samples.

`templates/page.html` writes it. The page loads nothing and runs no script; its security policy says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from markupsafe import Markup

from trimtab.core.files import UNCHANGED, write_out
from trimtab.reports.charts import Chart
from trimtab.reports.headline import Tile, Verdict
from trimtab.reports.markup import REPORTS


@dataclass(frozen=True)
class Panel:
    """A chart with its title, its unit and how to read it."""

    title: str
    unit: str
    how_to_read: str
    chart: Chart


@dataclass(frozen=True)
class Panels:
    """Panels side by side, as many as fit on the screen."""

    kind: ClassVar = "panels"
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Text:
    """A paragraph, in the voice of a remark, of a hint how to read something, or a heading."""

    kind: ClassVar = "text"
    text: str
    voice: Literal["soft", "how", "heading"] = "soft"


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first cell of each row is its name."""

    kind: ClassVar = "table"
    rows: Sequence[Sequence[object]]
    head: Sequence[str] = ()
    code: bool = False
    """Whether the last cell is written as code."""


@dataclass(frozen=True)
class ReplyCard:
    """A reply, with who gave it and its scores as (name, number, "up", "down" or "" against the other side)."""

    who: str
    text: str
    scores: Sequence[tuple[str, str, str]] = ()
    prompt: str | None = None
    """Shown above the reply, if its neighbours answer other prompts."""


@dataclass(frozen=True)
class SampleCard:
    """Replies side by side, to one prompt unless each has its own."""

    kind: ClassVar = "sample"
    replies: Sequence[ReplyCard]
    prompt: str | None = None


@dataclass(frozen=True)
class Folded:
    """Parts that stay folded until the reader opens them."""

    kind: ClassVar = "folded"
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Command:
    """What to type to get the figures beside it again."""

    kind: ClassVar = "command"
    text: str


Part = Panels | Text | Table | SampleCard | Folded | Command


@dataclass(frozen=True)
class Section:
    """Parts under a title, to which the contents point if it has an anchor; without a title, parts alone."""

    parts: Sequence[Part]
    title: str = ""
    anchor: str = ""
    chips: Sequence[tuple[str, str]] = ()
    """Short labels as (text, "good", "unclear" or "")."""


@dataclass(frozen=True)
class Report:
    """A whole page. Every text may come from a file of a stranger."""

    title: str
    about: str
    sections: Sequence[Section]
    footer: str = "Brackets are 95% intervals. This page holds everything it shows, loads nothing and runs no script."
    verdict: Verdict | None = None
    tiles: Sequence[Tile] = ()
    alarms: Sequence[str] = ()
    chips: Sequence[tuple[str, str]] = ()


def render(page: Report) -> str:
    """The page as HTML text. A lone surrogate, which JSON can carry and UTF-8 cannot, becomes a question mark."""
    style = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    text = REPORTS.get_template("page.html").render(page=page, style=style)
    return text.encode("utf-8", errors="replace").decode()


def write(page: Report, path: Path, *, kept: str = UNCHANGED) -> Path:
    """Writes the page whole where the user wants it, and returns the path; see `write_out`."""
    write_out(path, render(page), kept=kept)
    return path


def settings_table(values: Mapping[str, Any]) -> Table:
    """Nested settings as a table, with one row for each key path."""
    return Table(list(_flat(values)), code=True)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{path}{key}", plain
