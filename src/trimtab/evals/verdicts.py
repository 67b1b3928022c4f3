"""Verdicts on replies of a model against replies of a baseline, read from files.

Two layouts are known. The plain one has a row such as

    {"prompt": "Is 7 prime?", "model": "mine", "baseline": "base", "verdict": 1.0,
     "length": 31, "baseline_length": 240, "shown_first": "baseline", "judge": "anna"}

of which the last four are optional. The other is that of AlpacaEval's annotations: `instruction`, `output_1`,
`output_2`, `generator_1` (the baseline), `generator_2`, and `preference` from 1 to 2, where 2 says that the second
output is better; in older files 0 is a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.core.errors import DataError
from trimtab.data.mistakes import shown
from trimtab.data.sources import read_rows

Side = Literal["model", "baseline"]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "plain": ("prompt", "model", "baseline", "verdict"),
    "alpaca_eval": ("instruction", "generator_1", "generator_2", "preference"),
}
"""The columns that each layout must have."""


@dataclass(frozen=True, kw_only=True)
class PairVerdict:
    """One judgement of a model's reply beside a baseline's reply to the same prompt."""

    prompt: str
    model: str
    baseline: str
    verdict: float
    """How far the model's reply is preferred, in [0, 1]: 1 if it is better, 0 if the baseline's is, 0.5 for a tie."""
    length: int | None = None
    """Characters of the model's reply; None if unknown, as for the baseline's."""
    baseline_length: int | None = None
    shown_first: Side | None = None
    """Whose reply was shown first; None if unknown, or if the order was drawn anew for every prompt."""
    judge: str = ""
    where: str = ""
    """The file and row of the verdict, for messages."""


@dataclass(frozen=True, kw_only=True)
class VerdictFiles:
    """The verdicts of some files, and how many of their rows are not among them."""

    verdicts: tuple[PairVerdict, ...]
    sha256: dict[str, str]
    """The hash of each file, by its name as it was given."""
    num_missing: int
    """Rows whose verdict is null: the judge gave none that could be read."""
    num_repeated: int
    """Rows that repeat a verdict exactly, prompt, models, order and judge included."""


def read_verdicts(sources: Sequence[str | Path]) -> VerdictFiles:
    """All verdicts of the files. Raises DataError for rows of no layout, without a prompt or a model's name, with a
    verdict out of range, and for two verdicts of one judge that contradict each other."""
    found: list[PairVerdict] = []
    hashes: dict[str, str] = {}
    num_missing = 0
    for source in sources:
        read = read_rows(source)
        hashes[read.source] = read.sha256
        if read.bad:
            raise DataError(
                f"{len(read.bad)} rows cannot be read, and a win rate over the others could be biased; the first: "
                f"{read.bad[0].problem}",
                where=read.bad[0].where,
                fix=read.bad[0].fix,
            )
        for where, row in read.rows:
            verdict = _of_row(row, where=where)
            num_missing += verdict is None
            if verdict is not None:
                found.append(verdict)
    kept = without_repeats(found)
    if not kept:
        raise DataError(
            f"none of the {num_missing} rows holds a verdict",
            where=", ".join(map(str, sources)),
            fix="have the replies judged, or name other files",
        )
    return VerdictFiles(verdicts=kept, sha256=hashes, num_missing=num_missing, num_repeated=len(found) - len(kept))


def without_repeats(verdicts: Iterable[PairVerdict]) -> tuple[PairVerdict, ...]:
    """The verdicts in order, each judgement once. Raises DataError if one judge gave one pair of replies two different
    verdicts in the same order."""
    seen: dict[tuple[str, str, str, str, str | None], PairVerdict] = {}
    for verdict in verdicts:
        key = (verdict.prompt, verdict.model, verdict.baseline, verdict.judge, verdict.shown_first)
        first = seen.setdefault(key, verdict)
        if first.verdict != verdict.verdict:
            raise DataError(
                f"two verdicts on {verdict.model!r} against {verdict.baseline!r} contradict each other: "
                f"{first.verdict:g} and {verdict.verdict:g}, for the prompt {shown(verdict.prompt)}",
                where=f"{first.where} and {verdict.where}",
                fix="remove one of them; if two judges gave them, name the judges in a column `judge`, and if the "
                "replies were shown in another order, say it in a column `shown_first` (model or baseline)",
            )
    return tuple(seen.values())


def _of_row(row: dict[str, Any], *, where: str) -> PairVerdict | None:
    """The verdict of a row, or None if its value is null."""
    layout = next((name for name, columns in LAYOUTS.items() if set(columns) <= set(row)), None)
    if layout is None:
        nearest = max(LAYOUTS.values(), key=lambda columns: len(set(columns) & set(row)))
        raise DataError(
            f"a row without {', '.join(column for column in nearest if column not in row)}; it has {', '.join(row)}",
            where=where,
            fix="give each row the columns prompt, model, baseline and verdict, or those of AlpacaEval's annotations",
        )
    lengths: tuple[float | None, ...]
    if layout == "plain":
        low, high, value = 0.0, 1.0, _number(row["verdict"])
        names = {key: row[key] for key in ("prompt", "model", "baseline")}
        lengths = (_number(row.get("length")), _number(row.get("baseline_length")))
        shown_first = _side(row.get("shown_first") or None, where=where)
        judge = row.get("judge")
    else:
        low, high, value = 1.0, 2.0, _number(row["preference"])
        value = 1.5 if value == 0 else value
        names = {"prompt": row["instruction"], "model": row["generator_2"], "baseline": row["generator_1"]}
        outputs = (row.get("output_2"), row.get("output_1"))
        lengths = tuple(len(text) if isinstance(text, str) else text for text in outputs)
        shown_first = None  # AlpacaEval draws the order of each prompt, and stores the outputs in their own order
        judge = row.get("annotator")
    for key, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"the {key} is {name!r}",
                where=where,
                fix=f"give the row its {key} as text; verdicts are grouped by it",
            )
    if value is None:
        return None
    if not isinstance(value, float) or not low <= value <= high:
        raise DataError(
            f"a verdict of {value!r}; this layout has numbers from {low:g} to {high:g}",
            where=where,
            fix=f"write {high:g} if the model's reply is better, {low:g} if the baseline's is, else their middle",
        )
    for length in lengths:
        if length is not None and (
            isinstance(length, bool) or not isinstance(length, float | int) or not length >= 0 or length % 1
        ):
            raise DataError(
                f"a length of {length!r}",
                where=where,
                fix="give the number of characters of each reply, or leave both columns out",
            )
    return PairVerdict(
        **names,
        verdict=value - low,
        length=None if lengths[0] is None else int(lengths[0]),
        baseline_length=None if lengths[1] is None else int(lengths[1]),
        shown_first=shown_first,
        judge="" if judge is None else str(judge),
        where=where,
    )


def _side(value: Any, *, where: str) -> Side | None:
    if value is None or value == "model" or value == "baseline":
        return value  # type: ignore[no-any-return]
    raise DataError(
        f"shown_first is {value!r}", where=where, fix="write whose reply was shown first: model or baseline"
    )


def _number(cell: Any) -> Any:
    """A number, or the text of one as in a CSV file, as a float; None for an empty cell; anything else as it is."""
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bool):
        return cell
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell
