"""Tables on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def new_table(*columns: str) -> Table:
    """An empty table with these columns."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """Adds a row of plain texts."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))  # a name such as [b] is no markup
