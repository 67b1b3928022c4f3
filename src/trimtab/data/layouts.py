"""Loads records from the dataset layouts of the ecosystem, which are recognised by their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, Literal, cast

from trimtab.core.errors import DataError
from trimtab.core.source import Source
from trimtab.core.types import JsonDict, Message, Prompt, Record, records_hash
from trimtab.data.formats import LAYOUTS, Layout, LayoutReading
from trimtab.data.messages import READ_FIELDS, unread_fields
from trimtab.data.mistakes import BadRow, Mistake, filled
from trimtab.data.recognise import named, recognise, with_new_columns
from trimtab.data.sources import RowStream, records_source, stream_rows

NUM_SHOWN = 5
"""How many bad rows an error or a summary quotes; the others are counted."""
Accepts = Callable[[Sequence[Message]], Mistake | None]
"""Takes the turns of a prompt and gives what is wrong with them, or None."""
_NUM_LOOKED_AT = 1000
"""How many of the first rows are used to recognise the layout of a source."""


OnBadRow = Literal["stop", "drop"]
"""What is done about a row that cannot be used: the data is refused, or the row is left out and counted."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is known of a source once its rows are records."""

    layout: str
    """Name of the layout that was recognised."""
    source: str
    sha256: str
    """See `SourceRows.sha256`; for a world, the hash of the records."""
    counts: dict[str, int]
    """`rows` read, `records` kept, and `dropped_<mistake>` for each mistake that was met."""
    dropped: tuple[str, ...]
    """The first few dropped rows: where each one is, and what was wrong with it."""
    unused: tuple[str, ...] = ()
    """Columns, and fields of messages, that hold values but are not part of the records."""

    @property
    def report(self) -> JsonDict:
        """What a run reports about the reading: the layout, what was not used, and dropped rows by kind of mistake."""
        dropped = {k.removeprefix("dropped_"): num for k, num in self.counts.items() if k.startswith("dropped_")}
        return {"layout": self.layout, "not_used": list(self.unused), "dropped": dropped}

    @property
    def num_dropped(self) -> int:
        """How many rows were dropped; `dropped` has the first few only."""
        return sum(num for name, num in self.counts.items() if name.startswith("dropped_"))

    @property
    def left_out(self) -> str:
        """The sentence that counts the dropped rows."""
        return f"{self.num_dropped} rows are left out, because they cannot be used"

    @property
    def other_counts(self) -> dict[str, int]:
        """The counts besides `rows` and `records`."""
        return {name: num for name, num in self.counts.items() if name not in ("rows", "records")}


@dataclass(frozen=True, kw_only=True)
class Loaded(Reading, Generic[Record]):
    """The result of `load`."""

    records: list[Record]


def load(
    kind: type[Record],
    source: str | Path,
    *,
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
    accepts: Accepts | None = None,
) -> Loaded[Record]:
    """The records of a source (`sources.stream_rows`, "world:…" or "feedback:…"), in whatever layout it has.

    With "stop", bad rows raise one DataError that shows the first and counts all by kind of mistake; with "drop", they
    are left out and counted. `limit` reads only the first so many rows. `accepts` says what is wrong with a prompt for
    the model it is for, such as a turn that its chat template refuses. Raises DataError for a source that cannot be
    read, for a layout that is not known or holds no such records, and if no row is left.
    """
    if (own := records_source(source)) is not None:
        whole = _load_records(own, kind, str(source), limit)
        return whole if accepts is None else _accepted(whole, accepts, on_bad_row)
    stream = stream_records(kind, source, limit=limit, accepts=accepts)
    made: list[Any] = []
    seen = Seen()
    for where, found in stream.rows:
        if seen.add(where, found):
            made += cast("list[Any]", found)
    seen.refuse(on_bad_row, num_records=len(made))
    kept, counted = stream.collect(made)
    if not kept:
        raise none_made(kind, stream.source, seen.num_rows, counted)
    return Loaded(
        records=kept,
        layout=stream.layout,
        source=stream.source,
        sha256=stream.sha256,
        counts=seen.counts(len(kept), counted),
        dropped=tuple(f"{row.where}: {row.problem}" for row in seen.bad),
        unused=tuple(stream.unused),
    )


def none_made(kind: type, source: str, num_rows: int, counted: Mapping[str, int]) -> DataError:
    """The error for rows that have no mistake but give no record."""
    return DataError(
        f"no {kind.__name__} can be made of {num_rows} rows: "
        + (", ".join(f"{num} {name}" for name, num in counted.items() if num) or "none says which is better"),
        where=source,
        fix="use data in which one reply is preferred",
    )


@dataclass
class Seen:
    """A tally of the rows of a source: their number, and the bad rows among them."""

    num_rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """The number of bad rows for each kind of mistake, for example {"broken_json": 2}."""
    bad: list[BadRow] = field(default_factory=list)
    """The first few bad rows."""

    def add(self, where: str, found: Any) -> bool:
        """Counts a row. True if it holds records."""
        self.num_rows += 1
        if isinstance(found, BadRow):
            self.note(found)
        return not isinstance(found, BadRow)

    def note(self, bad: BadRow) -> None:
        """Notes the mistake of a row that is counted already."""
        self.kinds[bad.kind] += 1
        self.bad = [*self.bad, bad][:NUM_SHOWN]

    def refuse(self, on_bad_row: str, *, num_records: int) -> None:
        """Raises DataError if there are bad rows and they are not to be dropped or no record is left."""
        if self.bad and (on_bad_row == "stop" or not num_records):
            raise _all_mistakes(self.bad, self.kinds, self.num_rows)

    def counts(self, num_records: int, others: dict[str, int]) -> dict[str, int]:
        """The counts of `Loaded`."""
        dropped = {f"dropped_{kind}": num for kind, num in sorted(self.kinds.items())}
        return {"rows": self.num_rows, "records": num_records} | others | dropped


@dataclass
class RecordStream:
    """The rows of a source as records, made when they are asked for."""

    source: str
    sha256: str
    layout: str
    rows: Iterator[tuple[str, Any]]
    """For each row, its place and a list of its records, a BadRow, or None if the row is not `wanted`."""
    collect: Callable[[list[Any]], tuple[list[Any], dict[str, int]]]
    """Takes the records of all rows one after the other; gives the final records and further counts."""
    by_row: bool
    """Whether every row gives its records without the other rows."""
    unused: dict[str, None]
    """See `Loaded.unused`; complete once the rows are read."""


def stream_records(
    kind: type,
    source: str | Path,
    *,
    limit: int | None = None,
    accepts: Accepts | None = None,
    wanted: Callable[[int], bool] | None = None,
) -> RecordStream:
    """The rows of a file or hub data set as records of a kind; see `load`. `wanted` takes the number of a row, counted
    from 0, and says whether its records are made."""
    stream = stream_rows(source, limit=limit)
    unused: dict[str, None] = {}
    found, first_reading = _begin(stream, kind, unused)

    def rows() -> Iterator[tuple[str, Any]]:
        reading = first_reading
        for number, row in enumerate(found):
            if isinstance(row, BadRow):
                yield row.where, row
            elif wanted is not None and not wanted(number):
                yield row[0], None
            else:
                assert reading is not None
                if not row[1].keys() <= reading.seen and reading.layout.gather is None:
                    reading = with_new_columns(reading, row[1], where=row[0], source=stream.source)
                yield row[0], _made(row[0], row[1], reading, stream.source, accepts, unused)

    return RecordStream(
        source=stream.source,
        sha256=stream.sha256,
        layout=first_reading.layout.name if first_reading else "",
        rows=rows(),
        collect=first_reading.collect if first_reading else lambda made: (made, {}),
        by_row=first_reading is None
        or (first_reading.layout.gather is None and kind not in first_reading.layout.collect),
        unused=unused,
    )


def _made(
    where: str,
    columns: JsonDict,
    reading: LayoutReading,
    source: str,
    accepts: Accepts | None,
    unused: dict[str, None],
) -> list[Any] | BadRow:
    try:
        records = reading.records(columns, reading.plain(columns))
        if accepts is not None:
            _refuse_unless(accepts, records)
    except Mistake as mistake:
        return _placed(where, mistake, reading, source)
    if reading.layout.gather is None:
        _note_unused(columns, reading, unused)
    return records


def kinds_of(source: str | Path) -> tuple[type, ...]:
    """The kinds of record that a file or hub data set can give, judged by its first rows; its main kind comes first."""
    _, reading = _begin(stream_rows(source, limit=_NUM_LOOKED_AT), None, {})
    return tuple(reading.layout.converters) if reading else ()


def _begin(stream: RowStream, kind: type | None, unused: dict[str, None]) -> tuple[Iterable[Any], LayoutReading | None]:
    """All rows of the stream, and how they are to be read as `kind`; None if all of them are broken."""
    rows: Iterator[Any] = stream.rows
    first = list(islice(rows, _NUM_LOOKED_AT))
    good = [row for found in first if not isinstance(found, BadRow) for row in found[1:]]
    while not good and (more := next(rows, None)) is not None:  # nothing but broken rows so far
        first.append(more)
        good = [] if isinstance(more, BadRow) else [more[1]]
    if not good:
        return first, None
    reading = recognise(good, where=stream.source, kind=kind)
    everything: Iterable[Any] = chain(first, rows)
    gather = reading.layout.gather
    return (everything if gather is None else gather(_noting(everything, reading, unused))), reading


def _noting(rows: Iterable[Any], reading: LayoutReading, unused: dict[str, None]) -> Iterator[Any]:
    for row in rows:
        if not isinstance(row, BadRow):
            _note_unused(row[1], reading, unused)
        yield row


def _refuse_unless(accepts: Accepts, records: Sequence[Any]) -> None:
    for record in records:
        mistake = accepts(record.messages if isinstance(record, Prompt) else record.prompt.messages)
        if mistake is not None:
            raise mistake


def _accepted(loaded: Loaded[Record], accepts: Accepts, on_bad_row: str) -> Loaded[Record]:
    """The loaded records without those that are not accepted, which are counted as bad rows."""
    seen: Seen = Seen(num_rows=loaded.counts["rows"])
    kept: list[Record] = []
    for number, record in enumerate(loaded.records, 1):
        try:
            _refuse_unless(accepts, [record])
        except Mistake as mistake:
            where = f"{loaded.source}, record {number}"
            seen.note(BadRow(where, mistake.kind, mistake.problem, mistake.fix))
        else:
            kept.append(record)
    seen.refuse(on_bad_row, num_records=len(kept))
    dropped = tuple(f"{row.where}: {row.problem}" for row in seen.bad)
    return replace(loaded, records=kept, counts=seen.counts(len(kept), loaded.other_counts), dropped=dropped)


def _placed(where: str, mistake: Mistake, reading: LayoutReading, source: str) -> BadRow:
    """The mistake as a BadRow. Raises DataError if it shows that the whole file means something else."""
    problem = mistake.problem
    called = [f"{new} is the column {old!r}" for old, new in reading.names.items() if new != old and new in problem]
    problem += f" ({', '.join(called)})" if called else ""
    fix = named(mistake.fix, source, reading.names)
    if not mistake.droppable:
        raise DataError(problem, where=where, fix=fix)
    return BadRow(where, mistake.kind, problem, fix)


def _note_unused(row: JsonDict, reading: LayoutReading, unused: dict[str, None]) -> None:
    """Notes the columns of the row, and the fields of its messages, that are not part of the records."""
    for name in sorted(row.keys() - reading.used - unused.keys()) if reading.kind is not Prompt else ():
        if filled(row[name]):
            unused[name] = None
    for name, value in row.items():
        if name in reading.used and value and (type(value) is not str or value[0] in "[{"):
            read = reading.layout.reads if reading.names.get(name, name) in reading.layout.uses else READ_FIELDS
            unused |= dict.fromkeys(unread_fields(name, value, read))


def _load_records(own: Source, kind: type[Record], source: str, limit: int | None) -> Loaded[Record]:
    """The records of a source of records, such as a world; with a limit, the first of them and their hash."""
    found, sha256, counts = own.read(kind, source)
    records = cast("list[Record]", found)[:limit]
    return Loaded(
        records=records,
        layout=own.title,
        source=source,
        sha256=sha256 if len(records) == len(found) else records_hash(records),
        counts={"rows": len(records)} | counts | {"records": len(records)},
        dropped=(),
    )


def _all_mistakes(bad: list[BadRow], kinds: Counter[str], num_rows: int) -> DataError:
    num_bad = kinds.total()
    summary = ", ".join(f"{num} {kind}" for kind, num in kinds.most_common())
    quoted = [f"\n    {row.where}: {row.problem}" for row in bad[1:NUM_SHOWN]]
    more = [f"\n    and {num_bad - NUM_SHOWN} more"] if num_bad > NUM_SHOWN else []
    droppable = 'on_bad_row = "drop"' in bad[0].fix
    drop = (
        '; or leave such rows out with on_bad_row = "drop" (in a command: --on-bad-row drop)'
        if num_bad < num_rows and not droppable
        else ""
    )
    return DataError(
        f"{bad[0].problem}\n  {num_bad} of {num_rows} rows cannot be used: {summary}" + "".join(quoted + more),
        where=bad[0].where,
        fix=f"{bad[0].fix}{drop}",
    )


__all__ = ["LAYOUTS", "NUM_SHOWN", "Layout", "Loaded", "kinds_of", "load", "recognise"]
