"""HTML that is safe by construction: every text is escaped unless this module made it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from typing import Any

_VOID = frozenset({"meta", "br", "img"})
# Control characters that reverse text, even beyond the end of their own; right-to-left scripts do not need them.
_TURNING = {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Html(str):
    """Text that is already HTML, and so is not escaped. Only this module and the page's own constants make it."""

    __slots__ = ()


def visible(text: str) -> str:
    """The text with controls of writing direction spelled out, so that it cannot rearrange the text around it."""
    return text.translate(_TURNING)


def escape(value: object) -> Html:
    """The value as HTML text, safe inside an element and inside a quoted attribute."""
    return value if isinstance(value, Html) else Html(html.escape(visible(str(value)), quote=True))


def join(*children: object) -> Html:
    """The children one after the other. None adds nothing; a list or tuple adds its members."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        elif child is not None:
            parts.append(escape(child))
    return Html("".join(parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An HTML element. The attribute `class_` is written class, and `data_x` is written data-x.

    None or False leaves an attribute out; True writes it without a value. Names of elements and attributes are the
    page's own and are not escaped.
    """
    written = []
    for key, value in attributes.items():
        shown = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {shown}")
        elif value is not None and value is not False:
            written.append(f' {shown}="{escape(value)}"')
    opening = f"<{name}{''.join(written)}>"
    return Html(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def script_json(value: Any) -> Html:
    """The value as JSON that cannot end the script element it stands in, nor a line of JavaScript.

    Not-a-number and infinities become null.
    """
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # ASCII only, so U+2028 and U+2029 are escapes already; < > & occur inside strings only
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def script_hash(source: str) -> str:
    """The source expression that allows exactly this script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    if isinstance(value, float):
        # five digits draw the same picture in half the bytes; the largest numbers round to infinity
        rounded = float(f"{value:.5g}")
        return rounded if math.isfinite(rounded) else None
    return value
