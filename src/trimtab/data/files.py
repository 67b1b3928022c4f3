"""Files of rows: JSON lines, JSON documents, CSV and TSV, Parquet, Arrow. Rows are read one by one with their place."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict
from trimtab.data.columns import CHANGES_A_ROW, COMPLETION, PAIRS, PROMPT, SIDES, SYSTEM, plain_name
from trimtab.data.messages import refuse_half_characters, value_in
from trimtab.data.mistakes import BadRow, Mistake, filled, shown

Located = tuple[str, JsonDict]
"""A row with its place, such as "pairs.jsonl, row 17"."""

_TEXT_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
FILE_TYPES = (*_TEXT_TYPES, *(f"{ending}.gz" for ending in _TEXT_TYPES), ".parquet", ".arrow")
_OTHER_TYPES = {
    ".txt": 'a text file has no columns; write JSON lines such as {"prompt": …, "completion": …}, '
    'or {"text": …} for the pretrain stage',
    ".md": 'write JSON lines such as {"text": …}',
    ".zst": "unpack it first: zstd -d FILE",
    ".xz": "unpack it first: xz -dk FILE",
    ".bz2": "unpack it first: bunzip2 -k FILE",
    ".zip": "unpack it first: unzip FILE",
    ".tar": "unpack it first: tar -xf FILE",
    ".xlsx": "save the sheet as CSV (UTF-8)",
    ".pkl": "a pickle can run code, so none is opened; write the rows as JSON lines or Parquet where they were made",
    ".pickle": "a pickle can run code, so none is opened; write the rows as JSON lines or Parquet where they were made",
    ".yaml": "write the rows as JSON lines",
    ".yml": "write the rows as JSON lines",
}


def rows_of_file(path: Path) -> Iterator[Located | BadRow]:
    """The rows of a file, read when they are asked for. Raises DataError for a damaged file or one of unknown type."""
    ending = ending_of(path)
    if ending in (".parquet", ".arrow"):
        return _arrow_rows(path)
    return _csv_rows(path) if ending.startswith((".csv", ".tsv")) else _json_rows(path)


def ending_of(path: Path) -> str:
    """The entry of `FILE_TYPES` that a file's name ends with. Raises DataError if there is none."""
    name = path.name.lower()
    found = [ending for ending in FILE_TYPES if name.endswith(ending)]
    if not found:
        plain = path.suffix.lower() if path.suffix.lower() != ".gz" else Path(path.stem).suffix.lower()
        raise DataError(
            f"{path.name!r} is of no known type",
            where=str(path),
            fix=_OTHER_TYPES.get(plain, f"use one of {', '.join(FILE_TYPES)}"),
        )
    return max(found, key=len)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked. Only "\\n" ends a line: JSON text may hold other separators such as U+2028."""
    num = 0
    with cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        try:
            for line in file:
                yield line
                num += 1
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"the gzip file is cut off or damaged ({error}); {num} whole lines could be read before that",
                where=str(path),
                fix="copy or download it again and compare its size and checksum with the origin"
                + ("" if num else "; if it is not packed at all, take .gz off its name"),
            ) from error


_TO_UTF8 = "save the file as UTF-8, for instance: iconv -f latin1 -t utf-8"


def _not_utf8(path: Path, line: int, byte: int) -> DataError:
    return DataError(f"byte {byte:#04x} is not UTF-8", where=f"{path}, line {line}", fix=_TO_UTF8)


_RETURN_ALONE = re.compile(rb"\r[^\n]")


def _begin(path: Path) -> Iterator[bytes]:
    """The lines of a text file, without a byte order mark. Raises DataError if the text is UTF-16 or its lines end
    with a carriage return alone."""
    lines = _lines(path)
    first = next(lines, b"")
    if first.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in first[:4]:
        wide = b"\x00\x00" in first[:4]
        order = "" if first[:1] in b"\xff\xfe" or wide else "be" if first[:1] == b"\x00" else "le"
        encoding = f"utf-{32 if wide else 16}"
        raise DataError(
            f"the text is {encoding.upper()}, not UTF-8",
            where=str(path),
            fix=f"convert it: iconv -f {encoding}{order} -t utf-8 {path.name}",
        )
    if _RETURN_ALONE.search(first) and b"\n" not in first and not path.name.lower().endswith((".json", ".json.gz")):
        raise DataError(
            "its lines end with a carriage return alone, as those of old Macs did",
            where=str(path),
            fix=f"convert it: tr '\\r' '\\n' < {path.name} > NEW",
        )
    return chain((first.removeprefix(b"\xef\xbb\xbf"),), lines)


# ---- JSON -----------------------------------------------------------------------------------------------------------


class _RepeatedNameError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> JsonDict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedNameError(f"{repeated!r} stands twice in one object, and only one value could be used")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_rows(path: Path) -> Iterator[Located | BadRow]:
    lines = _begin(path)
    first = next((line for line in lines if line.strip()), b"")
    if _is_document(first) or (ending_of(path).startswith(".json") and _is_alone(lines) and ".jsonl" not in path.name):
        yield from _document_rows(path, b"".join(_begin(path)))
        return
    for number, line in enumerate(_begin(path), 1):
        if line.isspace() or not line:
            continue
        where = f"{path}, row {number}"
        try:
            row = _DECODER.decode(line.decode())
            if b"\\ud" in line or b"\\uD" in line:
                refuse_half_characters(row)
        except (ValueError, RecursionError, Mistake) as error:
            yield _bad_line(where, line, error)
        else:
            yield (where, row) if isinstance(row, dict) else _no_object(where, row)


def _is_document(first: bytes) -> bool:
    """Whether a file with this first line is one JSON document over many lines, and not one row per line."""
    begin = first.strip()
    return begin.startswith(b"[") or begin == b"{" or (begin.startswith(b"{") and begin.endswith((b"[", b"{", b",")))


def is_document(path: Path) -> bool:
    """Whether a file is one JSON document with many rows, which has to be held in memory whole."""
    if not ending_of(path).startswith((".json", ".ndjson")):
        return False
    return _is_document(next((line for line in _begin(path) if line.strip()), b""))


def _is_alone(rest: Iterator[bytes]) -> bool:
    return not any(line.strip() for line in rest)


def _bad_line(where: str, line: bytes, error: Exception) -> BadRow:
    if isinstance(error, Mistake):
        return BadRow(where, error.kind, error.problem, error.fix)
    if isinstance(error, UnicodeDecodeError):
        problem = f"byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8"
        return BadRow(where, "not_utf8", problem, _TO_UTF8)
    if isinstance(error, _RepeatedNameError):
        return BadRow(where, "repeated_name", str(error), "leave one of them, or rename one")
    if isinstance(error, json.JSONDecodeError):
        text = error.doc.rstrip()
        around = repr(text[max(error.pos - 20, 0) : error.pos + 20])
        problem = f"not a JSON object: {error.msg} at column {error.pos + 1}: {around}"
        if error.pos >= len(text):
            problem = f"not a whole JSON object: the line ends after {text[-20:]!r} ({error.msg})"
    else:
        problem = f"not a JSON object that can be read: {error}"
    return BadRow(where, "broken_json", problem, "repair the line; each line is one whole JSON object")


def _no_object(where: str, row: Any) -> BadRow:
    return BadRow(
        where,
        "broken_json",
        f"a JSON {type(row).__name__}, not an object",
        'each row is one object with named columns, such as {"prompt": …, "completion": …}',
    )


def _document_rows(path: Path, content: bytes) -> Iterator[Located | BadRow]:
    """The rows of a JSON list, of an object with a list in it, or of objects one after the other."""
    may_be_cut = b"\\ud" in content or b"\\uD" in content
    for number, row in enumerate(_rows_in(path, content), 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            yield _no_object(where, row)
            continue
        try:
            if may_be_cut:
                refuse_half_characters(row)
        except Mistake as mistake:
            yield BadRow(where, mistake.kind, mistake.problem, mistake.fix)
        else:
            yield where, row


def _rows_in(path: Path, content: bytes) -> Iterator[Any]:
    try:
        text = content.decode()
        at, end = 0, len(text)
        while at < end:
            value, at = _DECODER.raw_decode(text, at)
            at = _after_blanks(text, at)
            if isinstance(value, list):
                yield from value
            else:
                yield from _rows_of_object(path, value) if isinstance(value, dict) else (value,)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, content[error.start]) from error
    except json.JSONDecodeError as error:
        around = repr(error.doc[max(error.pos - 20, 0) : error.pos + 20])
        raise DataError(
            f"not a whole JSON document: {error.msg} at column {error.colno}: {around}",
            where=f"{path}, line {error.lineno}",
            fix="repair it; a comma behind the last item and a missing bracket are the usual mistakes",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON document that can be read: {error}", where=str(path), fix="repair it") from error


def _after_blanks(text: str, at: int) -> int:
    found = re.compile(r"[\s,]*").match(text, at)
    return found.end() if found else at


def _rows_of_object(path: Path, value: JsonDict) -> Iterable[Any]:
    lists = [name for name, v in value.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    others = [v for v in value.values() if isinstance(v, list | dict)]
    if len(lists) == 1 and len(others) == 1 and lists[0] not in _COLUMNS_OF_OBJECTS:
        for name, beside in value.items():
            if plain_name(name) in CHANGES_A_ROW.union(PROMPT) and filled(beside) and name != lists[0]:
                raise DataError(
                    f"{name} ({shown(beside)}) stands beside the list {lists[0]!r} and would belong to all its rows",
                    where=str(path),
                    fix=f"write it into every row: jq -c '.{name} as $x | .{lists[0]}[] | .{name} = $x' {path.name}",
                )
        return cast("list[Any]", value[lists[0]])
    tables = list(value.values())
    if len(tables) > 1 and all(isinstance(t, dict) and t and set(t) == set(tables[0]) for t in tables):
        raise DataError(
            "the document holds a table by columns, not by rows",
            where=str(path),
            fix="write it by rows, with pandas: table.to_json(FILE, orient='records', lines=True)",
        )
    return (value,)


_COLUMNS_OF_OBJECTS = frozenset(
    {"messages", "conversations", "conversation", "dialogue", "chosen", "rejected", "prompt", "completion",
     "completions", "answers", "responses", "instances", "replies", "history"}
)  # fmt: skip


# ---- CSV ------------------------------------------------------------------------------------------------------------

# A CSV cell is text; under these names it is read as the JSON value that other formats would hold.
_CSV_VALUES = frozenset(
    {"messages", "conversations", "completions", "steps", "label", "labels", "margin", "facts", "responses", "answers"}
)
# Replies and prompts stay texts even if they look like lists; `messages.conversation_in` recognises conversations.
_CSV_TEXTS = frozenset(
    {*PROMPT, *COMPLETION, *SYSTEM, *(name for pair in (*PAIRS, *SIDES) for name in pair), "text", "rationale",
     "comment", "note"}
) - {"history"}  # fmt: skip
_MISSING = frozenset({"nan", "NaN", "<NA>"})
_TAKEN_FOR_ELSE = r"(?: *[=+\-@\t\r]|(?:nan|NaN|<NA>)\Z)"
NEEDS_APOSTROPHE = re.compile(f"'*{_TAKEN_FOR_ELSE}")
"""Matches a text that is written to CSV with an apostrophe in front: else it reads as a formula or missing value."""
_HAS_APOSTROPHE = re.compile(f"'+{_TAKEN_FOR_ELSE}")


def _csv_rows(path: Path) -> Iterator[Located | BadRow]:
    csv.field_size_limit(2**31 - 1)  # the default refuses replies of more than 131072 characters
    lines = (line.decode() for line in _begin(path))
    try:
        first = next((line for line in lines if line.strip()), "")
        stated = re.fullmatch(r'"?sep=(.)"?\s*', first)
        separator = stated[1] if stated else _separator(path, first)
        reader = csv.reader(lines if stated else chain((first,), lines), strict=True, delimiter=separator)
        try:
            header = _header(path, next(filter(any, reader), []))
            columns = [(name, plain_name(name)) for name in header]
            for number, cells in enumerate((cells for cells in reader if cells), 1):
                where = f"{path}, row {number}"
                if len(cells) != len(header):
                    yield BadRow(
                        where,
                        "wrong_number_of_cells",
                        f"{len(cells)} cells under {len(header)} column names",
                        f"put cells that hold {separator!r}, quotes or line breaks in double quotes",
                    )
                    continue
                if cells == header:
                    problem = "it names the columns again, as files do that were put behind one another"
                    yield BadRow(where, "repeated_header", problem, "remove the row")
                    continue
                try:
                    row = {name: _csv_value(plain, cell) for (name, plain), cell in zip(columns, cells, strict=True)}
                except Mistake as mistake:
                    yield BadRow(where, mistake.kind, mistake.problem, mistake.fix)
                else:
                    yield where, row
        except csv.Error as error:
            raise DataError(
                f"not a CSV file: {error}",
                where=f"{path}, line {reader.line_num}",
                fix="close every double quote, and write a quote inside a cell twice",
            ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, _first_bad_line(path), error.object[error.start]) from error


def _first_bad_line(path: Path) -> int:
    for number, line in enumerate(_lines(path), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


def _separator(path: Path, header: str) -> str:
    """The character that separates the cells of the first line, outside quotes; a comma if there is none."""
    if ending_of(path).startswith(".tsv"):
        return "\t"
    outside = re.sub(r'"[^"]*"', "", header)
    return max(",\t;|", key=lambda mark: (outside.count(mark), mark == ","))


def _header(path: Path, names: list[str]) -> list[str]:
    if names and not names[0].strip() and len(names) > 1:
        names = ["Unnamed: 0", *names[1:]]  # the row numbers that pandas writes
    if names and (len(set(names)) < len(names) or not all(name.strip() for name in names)):
        raise DataError(
            f"the first line does not name the columns: {names!r}",
            where=str(path),
            fix="begin the file with a line such as prompt,chosen,rejected; names must differ and not be empty",
        )
    return names


def _refuse_repeated(path: Path, names: list[str]) -> None:
    """Raises DataError if two columns of a table have one name: only one of them could be read."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(
            f"two columns are called {repeated!r}, and only one of them could be used",
            where=str(path),
            fix="rename or remove one where the file is written",
        )


def _csv_value(plain: str, cell: str) -> Any:
    """The value of a cell; `plain` is the `columns.plain_name` of its column."""
    if cell[:1] == "'" and _HAS_APOSTROPHE.match(cell):
        return cell[1:]
    if cell in _MISSING:
        return None
    if plain in _CSV_VALUES:
        return _value_of(cell)
    if cell[:1] in "[{" and cell and plain not in _CSV_TEXTS:
        found = value_in(cell)
        return cell if found is None else found
    return cell


def _value_of(cell: str) -> Any:
    try:
        value = json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
        if "\\u" in cell:
            refuse_half_characters(value)
        return value
    except (ValueError, RecursionError):
        found = value_in(cell) if cell[:1] in ("[", "{") else None
        return found if found is not None else cell or None


# ---- Parquet and Arrow ----------------------------------------------------------------------------------------------


def _arrow_rows(path: Path) -> Iterator[Located | BadRow]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            if number == 0:
                _refuse_repeated(path, batch.schema.names)
            for row in _without_decimals(batch).to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
        raise DataError(
            f"not a whole {kind} file: {error}",
            where=str(path),
            fix="copy or download it again and compare its size and checksum with the origin",
        ) from error


def _without_decimals(batch: Any) -> Any:
    """The batch with columns of decimals as columns of floating-point numbers, as other formats hold them."""
    import pyarrow

    for place, column in enumerate(batch.schema):
        if pyarrow.types.is_decimal(column.type):
            batch = batch.set_column(place, column.name, batch.column(place).cast(pyarrow.float64()))
    return batch


def _batches(path: Path) -> Iterable[Any]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        return
    with pyarrow.memory_map(str(path)) as file:
        try:
            reader = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            stored = pyarrow.ipc.open_file(file)
            reader = (stored.get_batch(i) for i in range(stored.num_record_batches))
        yield from reader
