"""Where rows come from: files, folders, the hub, a world. Every row keeps its origin for messages."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trimtab.core import hub, registry
from trimtab.core.errors import DataError
from trimtab.core.files import files_like
from trimtab.core.source import Source, options_in, query_options
from trimtab.core.types import JsonDict, rows_hash
from trimtab.data.files import FILE_TYPES, Located, rows_of_file
from trimtab.data.folders import files_in
from trimtab.data.messages import conversation_in
from trimtab.data.mistakes import BadRow, Mistake

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """The rows of one source in order, each with its origin such as "pairs.jsonl, row 17"."""

    source: str
    sha256: str
    """The hash of the file as it lies on disk (compressed or not), or of the hashes of several files; for a hub data
    set, the hash of the rows as JSON lines."""
    rows: list[Located]
    bad: list[BadRow]
    """Rows that cannot be parsed: broken JSON, not UTF-8, a wrong number of cells."""


@dataclass(frozen=True, kw_only=True)
class RowStream:
    """The rows of one source, read when they are asked for; see `SourceRows`."""

    source: str
    sha256: str
    rows: Iterator[Located | BadRow]


def read_rows(source: str | Path, *, limit: int | None = None) -> SourceRows:
    """All rows of a source at once; see `stream_rows`. Raises DataError if there are none."""
    stream = stream_rows(source, limit=limit)
    seen = list(stream.rows)
    return SourceRows(
        source=stream.source,
        sha256=stream.sha256,
        rows=[row for row in seen if not isinstance(row, BadRow)],
        bad=[row for row in seen if isinstance(row, BadRow)],
    )


def read_good_rows(source: str | Path, *, fix: str = "") -> SourceRows:
    """All rows of a source of which none may be bad. Raises DataError for the first that is, with its own fix or with
    another."""
    found = read_rows(source)
    if found.bad:
        first = found.bad[0]
        raise DataError(first.problem, where=first.where, fix=fix or first.fix)
    return found


def stream_rows(source: str | Path, *, limit: int | None = None) -> RowStream:
    """The rows of a file, a folder or list of files, or of a hub data set ("hub:org/name?split=train" or "org/name").

    Files: "pairs.jsonl", "shards/" (a folder of data files, or what `save_to_disk` wrote), "data/train-*.parquet",
    "a.jsonl,b.jsonl". Options after a "?" change what is read: "columns=question:prompt" renames columns,
    "ignore=rating" leaves columns (and fields of messages) out, "neutral=right" says what the step label 0 counts as,
    and "split=train" chooses among the splits of a folder.

    The number of a row is its line number in a JSON lines file, and its place below the header in other files. With
    `limit`, only the first so many rows are read. Raises DataError for a source that is missing, empty, damaged or of
    no known type; single broken rows are given as `BadRow`.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} reads no row", where=str(source), fix="set a limit of at least 1, or none")
    if is_hub(source):
        stream = _hub_stream(str(source).removeprefix("hub:"), limit)
    else:
        paths, options = files_of(source)
        first_rows = islice(chain.from_iterable(map(rows_of_file, paths)), limit)
        rows = _changed(first_rows, options, str(source), whole=limit is None)
        stream = RowStream(source=str(source), sha256=_hash_of(paths), rows=rows)
    first = next(stream.rows, None)
    if first is None:
        raise DataError("there are no rows in it", where=stream.source, fix="name a file that holds data")
    return replace(stream, rows=chain((first,), stream.rows))


def files_hash(source: str | Path) -> str | None:
    """The hash of the files that a source names, as in `SourceRows`; None if it names none, or none that are there."""
    if is_hub(source) or records_source(source) is not None:
        return None
    try:
        return _hash_of(files_of(source)[0])
    except DataError:
        return None


def _hash_of(paths: Sequence[Path]) -> str:
    digests = []
    for path in paths:
        found = path.stat()
        digests.append(_digest(path.resolve(), found.st_size, found.st_mtime_ns, found.st_ino))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(path: Path, *_stamp: int) -> str:
    """The SHA-256 of a file, remembered while its size, time and number stay: a run asks for it several times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(source: str | Path) -> tuple[list[Path], dict[str, str]]:
    """The files that a source names, in order, and its options. Raises DataError if there are no such files."""
    text = os.path.expanduser(str(source))
    if not text.partition("?")[0].strip():  # as a path it would be the current directory
        raise DataError("no source is named", where=repr(text), fix="name a file, a folder, a hub data set or a world")
    if Path(text).is_file():
        return [Path(text)], {}
    name, _, query = (text, "", "") if Path(text).exists() else text.partition("?")
    given = query_options(query, where=text)
    unknown = sorted(set(given) - {"columns", "ignore", "neutral", "split"})
    if unknown:
        raise DataError(
            f"no option is called {', '.join(map(repr, unknown))}",
            where=text,
            fix="write FILE?columns=question:prompt&ignore=rating, or FOLDER?split=train",
        )
    split = given.pop("split", None)
    path = Path(name)
    if path.is_file() and split is None:
        return [path], given
    if path.is_dir():
        return files_in(path, split), given
    found = sorted(Path(p) for p in glob.glob(name)) if any(mark in name for mark in "*[") else []
    if not found and "," in name:
        found = [Path(part.strip()).expanduser() for part in name.split(",") if part.strip()]
    found = [inner for one in found for inner in (files_in(one, split) if one.is_dir() else [one])]
    missing = [one for one in found if not one.is_file()]
    if missing or not found or (split is not None and path.is_file()):
        raise DataError(
            "split=… chooses among the files of a folder, and this is one file"
            if path.is_file()
            else f"there is no file {str(missing[0]) if missing else name!r}",
            where=text,
            fix="".join(f"did you mean {other}? Or " for other in files_like(missing[0] if missing else path)[:1])
            + "name a file, a folder of files, a hub data set ('hub:org/name?split=train'), a world "
            "('world:helpdesk?num=1000') or a project of judgements ('feedback:project.toml')",
        )
    return found, given


def _changed(
    rows: Iterator[Located | BadRow], options: Mapping[str, str], source: str, *, whole: bool
) -> Iterator[Located | BadRow]:
    """The rows with columns renamed and left out as the options say; `neutral` becomes a column of each row."""
    if not options:
        return rows
    if neutral := options.get("neutral"):
        rows = (row if isinstance(row, BadRow) else (row[0], {**row[1], "neutral": neutral}) for row in rows)
    names = {}
    for part in filter(None, options.get("columns", "").split(",")):
        old, _, new = part.partition(":")
        if not old or not new:
            raise DataError(
                f"columns={options['columns']!r} does not say what becomes what",
                where=source,
                fix="write columns=OLD:NEW,OLD:NEW, for instance columns=question:prompt",
            )
        names[old] = new
    ignored = {name.strip() for name in options.get("ignore", "").split(",") if name.strip()}
    return _renamed(rows, names, ignored, source, whole)


def _renamed(
    rows: Iterator[Located | BadRow], names: Mapping[str, str], ignored: set[str], source: str, whole: bool
) -> Iterator[Located | BadRow]:
    wanted, seen, columns = {*names, *ignored}, set[str](), set[str]()
    for found in rows:
        if isinstance(found, BadRow):
            yield found
            continue
        where, row = found
        seen |= wanted & row.keys()
        columns |= row.keys()
        for new in names.values():
            if row.get(new) is not None and new not in wanted:
                raise DataError(
                    f"a column is to become {new!r}, and there is one of that name already",
                    where=where,
                    fix=f"leave that one out too (ignore={new}), or give it another name",
                )
        # An ignored column makes room for one that is renamed to its name.
        changed: JsonDict = {names.get(name, name): value for name, value in row.items() if name not in ignored}
        try:
            if ignored:
                changed = {name: _without(value, ignored, seen) for name, value in changed.items()}
        except Mistake as mistake:
            yield BadRow(where, mistake.kind, mistake.problem, mistake.fix)
        else:
            yield where, changed
    close = {name: difflib.get_close_matches(name, columns, 1, 0.8) for name in sorted(wanted - seen)}
    # A column that the first rows lack may be in the others, unless its name is nearly that of one which is there.
    if missing := [name for name, others in close.items() if whole or others]:
        meant = next((others[0] for others in close.values() if others), "")
        raise DataError(
            f"no row has a column {', '.join(map(repr, missing))}",
            where=source,
            fix=f"{f'did you mean {meant!r}? ' if meant else ''}check the names behind columns= and ignore=",
        )


def _without(value: Any, ignored: set[str], seen: set[str]) -> Any:
    """The value without the ignored fields, if it is a list of messages or a prompt with one in it."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        value = conversation_in(value, value)
    if isinstance(value, dict) and "messages" in value:
        seen |= ignored & value.keys()
        return {name: _without(inner, ignored, seen) for name, inner in value.items() if name not in ignored}
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return value
    turns = [turn for turn in value if isinstance(turn, dict)]  # what reads them says what the others are
    for turn in turns:
        seen |= ignored & turn.keys()
    if len(turns) < len(value):
        return value
    return [{name: field for name, field in turn.items() if name not in ignored} for turn in turns]


def is_hub(source: str | Path) -> bool:
    """True for "hub:…", and for "org/name" if no such path exists and the name does not end like a data file."""
    text = str(source)
    if text.startswith("hub:"):
        return True
    return (
        bool(_HUB_NAME.fullmatch(text)) and not text.partition("?")[0].endswith(FILE_TYPES) and not Path(text).exists()
    )


def records_source(source: str | Path) -> Source | None:
    """The `Source` whose name "world:helpdesk" or "feedback:project.toml" begins with; None for a source of rows."""
    name, colon, _ = str(source).partition(":")
    if not colon or name not in registry.modules("source"):
        return None
    found: Source = registry.descriptor("source", name)
    return found


def _hub_stream(text: str, limit: int | None) -> RowStream:
    defaults = {
        "split": "train",
        "config": "",
        "data_dir": "",
        "revision": "",
        "columns": "",
        "ignore": "",
        "neutral": "",
    }
    name, options = options_in(text, defaults, where=f"hub:{text}")
    source = f"hub:{name}?split={options['split']}"
    import datasets

    try:
        with hub.without_retries("dataset", name):
            table = datasets.load_dataset(
                name,
                options["config"] or None,
                split=options["split"],
                revision=options["revision"] or None,
                **({"data_dir": options["data_dir"]} if options["data_dir"] else {}),
            )
        rows: list[JsonDict] = [dict(row) for row in islice(table, limit)]
    except Exception as error:  # whatever the library raises, it is about this name: unknown, gated, offline, no split
        raise DataError(
            f"the hub data set {name!r} could not be read: {type(error).__name__}: {error}",
            where=source,
            fix="check that such a file or data set exists, its split, config and folder "
            "('hub:org/name?split=train&config=main&data_dir=folder'), and the network; without a network, copy its "
            f"file ({options['data_dir'] or name}, {options['split']}) here and give that in its place: data=FILE, "
            "prompts=FILE, or variables.rows=FILE for the examples",
        ) from error
    located = ((f"{source}, row {i}", row) for i, row in enumerate(rows, 1))
    changes = {option: options[option] for option in ("columns", "ignore", "neutral") if options[option]}
    changed = _changed(iter(located), changes, source, whole=limit is None)
    return RowStream(source=source, sha256=rows_hash(rows), rows=changed)
