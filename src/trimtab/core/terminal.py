"""What a terminal shows: texts of strangers, which must not steer it, and notes beside the results of a command."""

from __future__ import annotations

import sys
import unicodedata

_OBEYED = ("Cc", "Cs")
"""The Unicode categories of what a terminal obeys, and of half a character, which UTF-8 cannot hold."""
_UNSEEN = (*_OBEYED, "Cf", "Co", "Cn", "Zl", "Zp")
"""Those, and the categories of what else cannot be seen, such as marks that reverse other characters."""


def visible(text: str, *, newline: str = "⏎\n") -> str:
    """The text with control, formatting and other invisible characters spelled out, so that a terminal obeys none, and
    with `newline` for each line break."""
    return "".join(newline if c == "\n" else _spelled(c) if unicodedata.category(c) in _UNSEEN else c for c in text)


def printable(text: str) -> str:
    """`visible` on one line: every run of white space, line breaks among it, becomes one blank."""
    return visible(" ".join(text.split()))


def say(text: str) -> None:
    """Prints what a model said as it is, with line breaks and tabs; what a terminal would obey is spelled out. Joiners,
    which the words of many scripts need, stay."""
    print("".join(_spelled(c) if c not in "\n\t" and unicodedata.category(c) in _OBEYED else c for c in text))


def note(text: str) -> None:
    """Prints "note: " and the text on stderr: what a person should know who reads the results."""
    print(f"note: {text}", file=sys.stderr)


def warn(text: str) -> None:
    """Prints "warning: " and the text on stderr: what may be wrong with the results."""
    print(f"warning: {text}", file=sys.stderr)


def _spelled(character: str) -> str:
    code = ord(character)
    # The control pictures block has a sign for each of the first 32.
    return chr(0x2400 + code) if code < 0x20 else f"\\u{{{code:x}}}"
