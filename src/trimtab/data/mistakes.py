"""What is wrong with one row, in the words that an error or a summary uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn


class Mistake(Exception):
    """Something wrong with one row; `load` adds where the row is.

    One that is not `droppable` shows that the whole file means something else than was thought: leaving out the rows
    that show it would keep just the wrong ones.
    """

    def __init__(self, kind: str, problem: str, fix: str, *, droppable: bool = True) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.fix, self.droppable = kind, problem, fix, droppable


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, which mistake (a short name that is counted), and what to do."""

    where: str
    kind: str
    problem: str
    fix: str


def wrong_type(name: str, value: Any, wanted: str) -> NoReturn:
    """Raises the Mistake of a value of the wrong type."""
    raise Mistake(
        "wrong_type", f"{name} is {shown(value)} ({type(value).__name__}); {wanted} is needed", f"make {name} {wanted}"
    )


def shown(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def filled(value: Any) -> bool:
    """Whether a cell says something: not missing, not empty, not an empty list written as text."""
    return value is not None and value not in ("", "[]", "{}", "null") and value != [] and value != {}
