"""Tables on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.terminal import visible

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def new_table(*columns: str) -> Table:
    """An empty table with these columns."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for column in columns:
        table.add_column(_plain(column), overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """Adds a row of plain texts."""
    table.add_row(*map(_plain, cells))


def _plain(cell: str) -> Text:
    """The text as it is: a name such as [b] is no markup, and none steers the terminal."""
    from rich.text import Text

    return Text(visible(cell, newline="⏎"))
