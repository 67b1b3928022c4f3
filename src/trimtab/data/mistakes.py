"""The mistakes of single rows, in the words that an error or a summary uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn


class Mistake(Exception):
    """Something wrong with one row; `load` adds where the row is.

    A mistake that is not `droppable` shows that the whole file means something else than was thought: if only the rows
    that show this were dropped, the rows that are wrong without showing it would be kept.
    """

    def __init__(self, kind: str, problem: str, fix: str, *, droppable: bool = True) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.fix, self.droppable = kind, problem, fix, droppable


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, the kind of mistake (a short name that is counted), and what to do.

    For example `BadRow("a.jsonl, row 3", "empty_response", "chosen is empty", "write a reply in chosen, ...")`.
    """

    where: str
    kind: str
    problem: str
    fix: str


def wrong_type(name: str, value: Any, wanted: str) -> NoReturn:
    """Raises a Mistake for a value of the wrong type."""
    raise Mistake(
        "wrong_type", f"{name} is {shown(value)} ({type(value).__name__}); {wanted} is needed", f"make {name} {wanted}"
    )


def shown(value: Any) -> str:
    """The value as Python prints it, shortened if it is longer than 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def filled(value: Any) -> bool:
    """Whether a cell holds something: it is not missing, not empty, and not an empty list or object written as text."""
    return value is not None and value not in ("", "[]", "{}", "null") and value != [] and value != {}
