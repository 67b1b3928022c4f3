"""Templates of pages. Whatever a template writes is escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_INVISIBLE = {
    ord(c): f"⟨U+{ord(c):04X}⟩"
    for c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200e\u200f\u2060\ufeff\u00ad"
}
"""Invisible characters that change how text reads; right-to-left scripts do not need them."""


def visible(text: str) -> str:
    """The text in which invisible characters, such as those that reverse others, are shown by name."""
    return text.translate(_INVISIBLE)


def _text(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def templates(*directories: Path, all_visible: bool) -> Environment:
    """The templates of directories, in which a name without a value is an error.

    With `all_visible` every text goes through `visible`; pages on which a text can be edited choose where themselves.
    """
    return Environment(
        loader=FileSystemLoader(directories),
        autoescape=True,
        finalize=_text if all_visible else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


REPORTS = templates(Path(__file__).parent / "templates", all_visible=True)
"""The templates of charts and of pages that stand alone."""
