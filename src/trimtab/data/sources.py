"""Where rows come from: JSON lines, CSV, Parquet, the hub, a world. Every row keeps its origin for messages."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
import re
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.types import Demonstration, JsonDict, Prompt, to_dict

FILE_TYPES = (".jsonl", ".jsonl.gz", ".ndjson", ".csv", ".csv.gz", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# A CSV cell is text; under these names it is read as the JSON value that the other formats would have.
_CSV_VALUES = frozenset({"messages", "completions", "steps", "label", "labels", "margin", "facts"})


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, which mistake (a short name that is counted), and what to do."""

    where: str
    kind: str
    problem: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one source in order, each with its origin such as "pairs.jsonl, row 17"."""

    source: str
    sha256: str
    """Of the file as it lies on disk (compressed or not); of the rows as JSON lines for a hub data set."""
    rows: list[tuple[str, JsonDict]]
    bad: list[BadRow]
    """Rows that are no table row at all: broken JSON, not UTF-8, a wrong number of cells."""


def read_rows(source: str | Path, *, limit: int | None = None) -> Rows:
    """The rows of a file (by its ending) or of a hub data set ("hub:org/name?split=train" or "org/name").

    A row of a JSON lines file is its line number, of other files its place below the header. With `limit` only the
    first so many rows are read. Raises DataError for a source that is missing, empty, damaged or of no known type;
    single broken rows are given back in `bad`.
    """
    if is_hub(source):
        return _read_hub(str(source).removeprefix("hub:"), limit)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"there is no file {str(path)!r}" if not path.is_dir() else f"{str(path)!r} is a folder, not a file",
            where=str(source),
            fix="name a file, a hub data set ('hub:org/name?split=train'), a world ('world:helpdesk?num=1000') or a "
            "project of judgements ('feedback:project.toml')",
        )
    if not path.name.endswith(FILE_TYPES):
        raise DataError(
            f"{path.name!r} is of no known type", where=str(path), fix=f"use one of {', '.join(FILE_TYPES)}"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix == ".parquet":
        found: Iterator[tuple[str, JsonDict] | BadRow] = _parquet_rows(path)
    else:
        plain = _unzip(path, content) if path.suffix == ".gz" else content
        found = _csv_rows(path, plain) if ".csv" in path.suffixes else _json_rows(path, plain)
    seen = list(islice(found, limit))
    if not seen:
        raise DataError("there are no rows in it", where=str(path), fix="name a file that holds data")
    return Rows(
        source=str(source),
        sha256=digest,
        rows=[row for row in seen if not isinstance(row, BadRow)],
        bad=[row for row in seen if isinstance(row, BadRow)],
    )


def is_hub(source: str | Path) -> bool:
    """True for "hub:…" and for "org/name" where no such path exists and the name does not end like a data file."""
    text = str(source)
    if text.startswith("hub:"):
        return True
    return bool(_HUB_NAME.fullmatch(text)) and not text.endswith((*FILE_TYPES, ".json")) and not Path(text).exists()


def is_world(source: str | Path) -> bool:
    """True for "world:…"."""
    return str(source).startswith("world:")


def is_feedback(source: str | Path) -> bool:
    """True for "feedback:project.toml"."""
    return str(source).startswith("feedback:")


def read_feedback(kind: type, source: str) -> tuple[list[Any], str, dict[str, int]]:
    """The records of a feedback project, their SHA-256, and counts of what was left out.

    The votes are read by the layer that owns them, which stands above this one: it is named here, as a run file names
    a class, and loaded when it is asked for.
    """
    found: tuple[list[Any], str, dict[str, int]] = importlib.import_module("trimtab.feedback.source").records(
        kind, source
    )
    return found


def read_world(source: str, *, demonstrations: bool) -> list[Prompt] | list[Demonstration]:
    """Prompts, or prompts with their replies, of "world:helpdesk?split=train&num=1000&seed=0" (those are the defaults).

    `seed` says which prompts are drawn; the rules of a world do not depend on it. Raises DataError for an option that
    does not exist, and what `trimtab.worlds.load` raises for a name that does not.
    """
    from trimtab import worlds

    name, options = _options(source.removeprefix("world:"), source, {"split": "train", "num": "1000", "seed": "0"})
    split = options["split"]
    if split not in ("train", "validation", "test"):
        raise DataError(f"no split is called {split!r}", where=source, fix="use train, validation or test")
    try:
        num, seed = int(options["num"]), int(options["seed"])
    except ValueError:
        raise DataError(
            f"num={options['num']!r} and seed={options['seed']!r} must be whole numbers",
            where=source,
            fix="write for instance 'world:helpdesk?num=1000&seed=0'",
        ) from None
    world = worlds.load(name)
    draw: Any = world.demonstrations if demonstrations else world.prompts
    records: list[Any] = draw(split, num, seed=seed)
    return records


def rows_hash(rows: Sequence[JsonDict]) -> str:
    """SHA-256 of the rows as JSON lines with sorted keys; values that JSON has no word for count as their text."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def records_hash(records: Sequence[Any]) -> str:
    """`rows_hash` of records."""
    return rows_hash([to_dict(record) for record in records])


def _options(text: str, source: str, defaults: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Name and options of "name?key=value&key=value"."""
    name, _, query = text.partition("?")
    given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(given) - set(defaults))
    if unknown or not name:
        raise DataError(
            f"no option is called {', '.join(map(repr, unknown))}" if unknown else "the source has no name",
            where=source,
            fix=f"write NAME?key=value&key=value with the keys {', '.join(defaults)}",
        )
    return name, {**defaults, **given}


def _read_hub(text: str, limit: int | None) -> Rows:
    name, options = _options(text, f"hub:{text}", {"split": "train", "config": "", "revision": ""})
    source = f"hub:{name}?split={options['split']}"
    import datasets

    try:
        table = datasets.load_dataset(
            name, options["config"] or None, split=options["split"], revision=options["revision"] or None
        )
        rows: list[JsonDict] = [dict(row) for row in islice(table, limit)]
    except Exception as error:  # whatever the library raises, it is about this name: unknown, gated, offline, no split
        raise DataError(
            f"the hub data set {name!r} could not be read: {type(error).__name__}: {error}",
            where=source,
            fix="check that such a file or data set exists, its split and config "
            "('hub:org/name?split=train&config=main'), and the network",
        ) from error
    if not rows:
        raise DataError("there are no rows in it", where=source, fix="choose another split")
    located = [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)]
    return Rows(source=source, sha256=rows_hash(rows), rows=located, bad=[])


def _unzip(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        whole_lines = _readable_lines(content)
        raise DataError(
            f"the gzip file is cut off or damaged ({error}); {whole_lines} whole lines could be read before that",
            where=str(path),
            fix="copy or download it again and compare its size and checksum with the origin",
        ) from error


def _readable_lines(content: bytes) -> int:
    num = 0
    try:
        with gzip.open(io.BytesIO(content)) as lines:
            for line in lines:
                num += line.endswith(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pass
    return num


def _json_rows(path: Path, content: bytes) -> Iterator[tuple[str, JsonDict] | BadRow]:
    if content[:64].lstrip().startswith(b"["):
        raise DataError(
            "this is one JSON list, not JSON lines (one object on each line)",
            where=str(path),
            fix="convert it, for instance: jq -c '.[]' list.json > lines.jsonl",
        )
    # Only "\n" ends a line: JSON text may hold other line separators such as U+2028.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield BadRow(
                where,
                "not_utf8",
                f"byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8",
                "save the file as UTF-8, for instance: iconv -f latin1 -t utf-8",
            )
        except json.JSONDecodeError as error:
            yield BadRow(
                where,
                "broken_json",
                f"not a JSON object: {error.msg} at column {error.colno}: {_excerpt(error.doc, error.pos)}",
                "repair the line; each line is one whole JSON object",
            )
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                yield BadRow(
                    where,
                    "broken_json",
                    f"a JSON {type(row).__name__}, not an object",
                    'each line is one object with named columns, such as {"prompt": …, "completion": …}',
                )


def _csv_rows(path: Path, content: bytes) -> Iterator[tuple[str, JsonDict] | BadRow]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"byte {content[error.start]:#04x} is not UTF-8",
            where=f"{path}, line {line}",
            fix="save the file as UTF-8, for instance: iconv -f latin1 -t utf-8",
        ) from error
    csv.field_size_limit(2**31 - 1)  # the default refuses replies of more than 131072 characters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if header and (len(set(header)) < len(header) or not all(name.strip() for name in header)):
            raise DataError(
                f"the first line does not name the columns: {header!r}",
                where=str(path),
                fix="begin the file with a line such as prompt,chosen,rejected; names must differ and not be empty",
            )
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            where = f"{path}, row {number}"
            if len(cells) != len(header):
                yield BadRow(
                    where,
                    "wrong_number_of_cells",
                    f"{len(cells)} cells under {len(header)} column names",
                    "put cells that hold commas, quotes or line breaks in double quotes",
                )
            else:
                yield where, {name: _csv_value(name, cell) for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(
            f"not a CSV file: {error}",
            where=f"{path}, line {reader.line_num}",
            fix="close every double quote, and write a quote inside a cell twice",
        ) from error


def _csv_value(name: str, cell: str) -> Any:
    if name not in _CSV_VALUES:
        return cell
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except json.JSONDecodeError:
        return cell or None


def _parquet_rows(path: Path) -> Iterator[tuple[str, JsonDict] | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        batches = table.iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"not a whole Parquet file: {error}",
            where=str(path),
            fix="copy or download it again and compare its size and checksum with the origin",
        ) from error


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(position - 20, 0) : position + 20])
