"""Templates of pages. Whatever a template writes is escaped."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]{3,6}\U000e007f)"  # the flags of England, Scotland and Wales, which are seen
    "|[\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\u3164"
    "\ufeff\uffa0\ufff9-\ufffb\U000e0001\U000e0020-\U000e007f]"
)
"""Invisible characters that change how text reads or hide some; no script needs them. Joiners are not among them."""


def visible(text: str) -> str:
    """The text in which invisible characters, such as those that reverse others, are shown by name."""
    return _INVISIBLE.sub(lambda found: found[1] or f"⟨U+{ord(found[0]):04X}⟩", text)


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
