"""Reads votes from files: a table in any of its formats, or a feedback project."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trimtab.core.errors import DataError, EngineError, install
from trimtab.core.types import JsonDict
from trimtab.data.sources import read_rows
from trimtab.votes.table import COLUMNS, NOT_JUDGED, VoteTable, refuse_rows, text_of, votes_from_rows


def read_votes(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    annotator_columns: Sequence[str] = (),
    missing: Sequence[str] = (),
    order: Sequence[str] = (),
) -> VoteTable:
    """The votes of a feedback project (its TOML file) or of a table (JSON lines, CSV, Parquet, hub).

    `votes_from_rows` says which columns a table has. `columns` maps these to the columns of another table; "+" joins
    several, as in {"item": "document+system"}. `annotator_columns` are the columns with one annotator's choices each,
    for a table with one row for each item. `missing` are further choices that are no judgement, `order` the categories
    from low to high. Of a project's export, votes on gold and quiz items, decisions and votes of banned people are left
    out and counted as `not_counted`. Raises DataError with the first mistakes.
    """
    path = Path(source)
    if path.suffix == ".toml":
        if columns or annotator_columns or missing or order:
            raise DataError(
                "columns, missing choices and an order are those of a table, and this is a project",
                where=str(path),
                fix="leave them away; or export the votes (--layout votes) and read that table",
            )
        return _project_votes(path)
    table = read_rows(source)
    if table.bad:
        refuse_rows([(bad.where, bad.problem) for bad in table.bad], table.bad[0].fix)
    rows: list[tuple[str, JsonDict]] = [(where, _renamed(row, columns or {}, where)) for where, row in table.rows]
    if annotator_columns:
        rows = list(_long(rows, annotator_columns))
    counted = _counted(rows)
    votes = votes_from_rows(counted, missing=missing, order=order)
    left_out = {"not_counted": len(rows) - len(counted)} if len(counted) < len(rows) else {}
    return replace(votes, counts={**votes.counts, "rows": len(rows), **left_out})


def _counted(rows: Sequence[tuple[str, JsonDict]]) -> list[tuple[str, JsonDict]]:
    """The votes of a project's export (with the columns purpose and banned) that the project itself counts: those on
    tasks, and then those of tasks asked again, by people who are not banned. Of another table all rows."""
    if not rows or not {"purpose", "banned"} <= rows[0][1].keys():
        return list(rows)
    cast = [(where, row) for where, row in rows if text_of(row["banned"]).lower() != "true"]
    first = [(where, row) for where, row in cast if row["purpose"] == "task"]
    judged = {_asked(row) for _, row in first if text_of(row.get("choice")) not in NOT_JUDGED}
    again = [(where, row) for where, row in cast if row["purpose"] == "reask" and _asked(row) in judged]
    return first + again


def _asked(row: JsonDict) -> tuple[str, str]:
    return text_of(row.get("item")), text_of(row.get("annotator"))


def _project_votes(path: Path) -> VoteTable:
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}", where=str(path), fix="name a project file or a vote table")
    try:
        from trimtab.feedback.votes import votes_of  # a table is read without the libraries of a store
    except ModuleNotFoundError as missing:
        raise EngineError(
            f"a project needs {missing.name}, which is not installed", where=str(path), fix=install("feedback")
        ) from missing
    return votes_of(path)


def _renamed(row: JsonDict, columns: Mapping[str, str], where: str) -> JsonDict:
    """The row with the columns of `columns` added. Raises DataError for a name or a column that does not exist."""
    named = dict(row)
    for name, source in columns.items():
        parts = source.split("+")
        absent = [part for part in parts if part not in row]
        if name not in COLUMNS or absent:
            raise DataError(
                f"no column is called {', '.join(map(repr, absent))}; there are {', '.join(row)}"
                if absent
                else f"{name!r} is no column of a vote table",
                where=where,
                fix=f"write NAME=COLUMN with a NAME of {', '.join(COLUMNS)} and a COLUMN of the file",
            )
        named[name] = row[parts[0]] if len(parts) == 1 else " + ".join(text_of(row[part]) for part in parts)
    return named


def _long(rows: Iterable[tuple[str, JsonDict]], annotators: Sequence[str]) -> Iterable[tuple[str, JsonDict]]:
    """One row for each vote, from rows with a column for each annotator. An item without a name gets its row number."""
    for number, (where, row) in enumerate(rows, 1):
        absent = [name for name in annotators if name not in row]
        if absent:
            raise DataError(
                f"no column is called {', '.join(map(repr, absent))}; there are {', '.join(row)}",
                where=where,
                fix="name the columns that hold one annotator's choices each",
            )
        for name in annotators:
            yield where, {"item": str(number), **row, "annotator": name, "choice": row[name]}
