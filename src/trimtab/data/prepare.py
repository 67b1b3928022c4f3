"""Turns a source into a table of token ids: read and tokenised in blocks, on every core if it is large, and kept.

Each process reads the whole source but makes records and tokens of its own blocks only: reading is a tenth of the work,
and no text has to be sent between processes. Blocks are put together in the order of the source, so the table is the
same for any number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trimtab.core import types
from trimtab.core.errors import DataError, TrimtabError
from trimtab.data import kept
from trimtab.data.chat import Chat
from trimtab.data.files import is_document
from trimtab.data.layouts import NUM_SHOWN, Loaded, Reading, RecordStream, Seen, load, none_made, stream_records
from trimtab.data.mistakes import BadRow
from trimtab.data.progress import showing_rows
from trimtab.data.sources import files_of, is_hub, records_source
from trimtab.data.tokens import REPLIES, Array, Columns, TokenTable, id_of_two, tokenise

SMALL = 4_000_000
"""A source of at most this many bytes is tokenised in memory by this process, in a second, and is not kept."""
BLOCK = 2000
"""Rows per block."""
MAX_PROCESSES = 8
"""Every process reads the whole source, so more of them gain little."""

Read = Callable[[Array], list[Any]]
Stamp = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class Prepared(Reading):
    """The result of `prepare`."""

    table: TokenTable


@dataclass(frozen=True)
class Records:
    """Which records are read: their kind, source and limit, and the chat whose template must accept them."""

    kind: type
    source: str | Path
    limit: int | None
    chat: Chat

    def stream(self, wanted: Callable[[int], bool] | None = None) -> RecordStream:
        """See `layouts.stream_records`."""
        return stream_records(self.kind, self.source, limit=self.limit, accepts=self.chat.refusal, wanted=wanted)


@dataclass
class _Block:
    """Some rows of a source as columns."""

    columns: Columns
    seen: Seen
    unused: list[str] = field(default_factory=list)


def prepare(
    kind: type,
    source: str | Path,
    chat: Chat,
    *,
    on_bad_row: Literal["stop", "drop"] = "stop",
    limit: int | None = None,
    by_prompt: bool = True,
) -> Prepared:
    """The records that `layouts.load` gives, tokenised. A conversation that the chat template refuses is a bad row too.
    If records are put together `by_prompt`, so is a record whose id belongs to another prompt.

    Raises what `load` raises.
    """
    records_of = Records(kind, source, limit, chat)
    if records_source(source) is not None:
        return _in_memory(records_of, on_bad_row, by_prompt)
    work = _Work(records_of, _stamps(source))
    size = None if is_hub(source) else sum(size for _, size, _ in work.stamps)
    stream = records_of.stream()
    if not stream.by_row:
        return _in_memory(records_of, on_bad_row, by_prompt)
    facts: dict[str, Any] = {"layout": stream.layout, "source": stream.source, "sha256": stream.sha256}
    del stream  # frees the file, which may be in memory whole
    large = size is None or size > SMALL
    key = key_of(records_of, facts["sha256"]) if large else None
    found = kept.read(key) if key is not None else None
    if found is None or (on_bad_row == "stop" and found[1]["kinds"]):
        found = _build(work, key, on_bad_row, num_processes(source) if large else 1)
    columns, note = found
    if not len(columns["row"]):
        raise none_made(kind, facts["source"], note["num_rows"], {})
    seen = Seen(note["num_rows"], Counter(note["kinds"]), [BadRow(*row) for row in note["bad"]])
    return _prepared(
        columns=columns,
        kind=kind,
        read=_read_again(records_of, facts["sha256"], columns),
        place=lambda record: _place(records_of, int(columns["row"][record])),
        seen=seen,
        on_bad_row=on_bad_row,
        by_prompt=by_prompt,
        unused=tuple(note["unused"]),
        others={},
        **facts,
    )


def num_processes(source: str | Path) -> int:
    """How many processes tokenise a large source: one per core, at most `MAX_PROCESSES`. One if this process cannot
    fork, and one for JSON documents, which every process would hold in memory whole."""
    if not is_hub(source) and any(map(is_document, files_of(source)[0])):
        return 1
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


def _prepared(
    *,
    columns: Columns,
    kind: type,
    read: Read,
    place: Callable[[int], str],
    seen: Seen,
    on_bad_row: str,
    by_prompt: bool,
    others: dict[str, int],
    **facts: Any,
) -> Prepared:
    table = TokenTable(columns, REPLIES[kind], REPLIES[kind], read, np.arange(len(columns["row"])))
    wrong = table.with_an_id_of_another_prompt() if by_prompt else []
    if wrong:
        if on_bad_row == "stop":
            record, other = wrong[0]
            one, two = read(np.array([record, other]))
            error = id_of_two(one.prompt, two.prompt, where=place(record), other=place(other))
            raise _counted(error, len(wrong), len(table))
        table = table.part(np.setdiff1d(table.chosen, [record for record, _ in wrong]))
        for record, _ in wrong:
            seen.kinds["id_of_another_prompt"] += 1
            if len(seen.bad) < NUM_SHOWN:
                seen.bad.append(BadRow(place(record), "id_of_another_prompt", "its id is that of another prompt", ""))
    return Prepared(
        table=table,
        counts=seen.counts(len(table), others),
        dropped=tuple(f"{row.where}: {row.problem}" for row in seen.bad),
        **facts,
    )


def _counted(error: DataError, num: int, num_records: int) -> DataError:
    """The error with the number of rows that have the same mistake."""
    return DataError(
        f"{error.problem}\n  {num} of {num_records} rows have the id of another prompt",
        where=error.where,
        fix=f'{error.fix} (FILE?ignore=id); or leave such rows out with on_bad_row = "drop"',
    )


def _in_memory(records_of: Records, on_bad_row: Literal["stop", "drop"], by_prompt: bool) -> Prepared:
    """The result of `prepare` for a source whose records are made all at once."""
    kind, chat = records_of.kind, records_of.chat
    loaded: Loaded[Any] = load(
        kind, records_of.source, on_bad_row=on_bad_row, limit=records_of.limit, accepts=chat.refusal
    )
    return prepare_loaded(kind, loaded, chat, on_bad_row=on_bad_row, by_prompt=by_prompt)


def prepare_loaded(
    kind: type, loaded: Loaded[Any], chat: Chat, *, on_bad_row: Literal["stop", "drop"] = "stop", by_prompt: bool = True
) -> Prepared:
    """The result of `prepare` for records that are in memory."""
    records = loaded.records
    columns, refused = tokenise(chat, records, range(len(records)))
    seen = Seen(num_rows=loaded.counts["rows"])
    for record, error in refused.items():
        seen.note(_refused(f"{loaded.source}, record {record + 1}", error))
    seen.refuse(on_bad_row, num_records=len(columns["row"]))
    found = _prepared(
        columns=columns,
        kind=kind,
        read=lambda chosen: [records[row] for row in columns["row"][chosen]],
        place=lambda record: f"{loaded.source}, record {int(columns['row'][record]) + 1}",
        seen=seen,
        on_bad_row=on_bad_row,
        by_prompt=by_prompt,
        layout=loaded.layout,
        source=loaded.source,
        sha256=loaded.sha256,
        unused=loaded.unused,
        others=loaded.other_counts,
    )
    return dataclasses.replace(found, dropped=(*loaded.dropped, *found.dropped)[:NUM_SHOWN])


def _refused(where: str, error: DataError) -> BadRow:
    return BadRow(where, "template_refuses", error.problem, error.fix)


# ---- building -------------------------------------------------------------------------------------------------------


def _build(work: _Work, key: str | None, on_bad_row: str, processes: int) -> tuple[Columns, dict[str, Any]]:
    keeper = kept.Keeper(key)
    seen, unused, num_records = Seen(), dict[str, None](), 0
    try:
        with showing_rows(work.records.source, work.records.limit, quiet=key is None) as show:
            for block in _in_order(work, processes) if processes > 1 else work.blocks(0, 1):
                keeper.add(block.columns)
                num_records += len(block.columns["row"])
                seen.num_rows += block.seen.num_rows
                seen.kinds.update(block.seen.kinds)
                seen.bad = [*seen.bad, *block.seen.bad][:NUM_SHOWN]
                unused |= dict.fromkeys(block.unused)
                show(seen.num_rows)
        seen.refuse(on_bad_row, num_records=num_records)
        work.refuse_changed()
        note = {
            "num_rows": seen.num_rows,
            "kinds": dict(seen.kinds),
            "bad": [dataclasses.astuple(row) for row in seen.bad],
            "unused": list(unused),
        }
        return keeper.finish(note), note
    except DataError:
        keeper.discard()
        work.refuse_changed()  # half a file may have been read; that it changed is the cause
        raise
    except BaseException:
        keeper.discard()
        raise


def _stamps(source: str | Path) -> tuple[Stamp, ...]:
    """The name, size and modification time of each file; empty for a hub data set."""
    files = () if is_hub(source) else files_of(source)[0]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@dataclass(frozen=True)
class _Work:
    records: Records
    stamps: tuple[Stamp, ...]
    """The stamps of the files, taken just before their hash."""

    def refuse_changed(self) -> None:
        """Raises DataError if a file has changed: the hash is then not that of what was read."""
        if _stamps(self.records.source) != self.stamps:
            raise DataError(
                "the data was changed while it was read",
                where=str(self.records.source),
                fix="wait until it is written, or name a copy, and start again",
            )

    def blocks(self, part: int, num_parts: int) -> Iterator[_Block]:
        """Every `num_parts`-th block, beginning with block number `part`."""

        def own(row: int) -> bool:
            return row // BLOCK % num_parts == part

        stream = self.records.stream(own)
        found: list[tuple[int, str, Any]] = []
        for row, (where, records) in enumerate(stream.rows):
            if own(row):
                found.append((row, where, records))
            if found and (row + 1) % BLOCK == 0:
                yield self._block(found, stream.unused)
                found = []
        if found:
            yield self._block(found, stream.unused)

    def _block(self, found: Sequence[tuple[int, str, Any]], unused: dict[str, None]) -> _Block:
        records, rows = [], []
        for row, _, of_row in found:
            if not isinstance(of_row, BadRow):
                records += of_row
                rows += [row] * len(of_row)
        columns, errors = tokenise(self.records.chat, records, rows)
        refused = {rows[i]: error for i, error in errors.items()}
        seen = Seen()
        for row, where, of_row in found:
            seen.add(where, _refused(where, refused[row]) if row in refused else of_row)
        return _Block(columns, seen, list(unused))


def _in_order(work: _Work, processes: int) -> Iterator[_Block]:
    """The blocks, made by this number of processes, in the order of the source."""
    context = multiprocessing.get_context("fork")
    ends, children = [], []
    for part in range(processes):
        end, other_end = context.Pipe(duplex=False)
        ends.append(end)
        child = context.Process(target=_send_blocks, args=(work, part, processes, other_end, ends), daemon=True)
        with warnings.catch_warnings():
            # The warning is about threads that might hold a lock: those of torch and of the tokenizer, which the child
            # does not use.
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        other_end.close()
        children.append(child)
    try:
        number = 0
        while True:
            block = _received(ends[number % processes], children[number % processes])
            if block is None:
                break
            yield block
            number += 1
    finally:
        for child in children:
            child.kill()
            child.join()


def _received(end: Connection, child: Any) -> _Block | None:
    try:
        found = end.recv()
    except EOFError:
        child.join()
        raise DataError(
            f"a process that tokenises ended with {child.exitcode}",
            where="reading the data",
            fix="see whether memory ran out (-9 is a kill); fewer cores need less: taskset -c 0 trimtab …",
        ) from None
    if isinstance(found, tuple):
        error, problem, where, fix = found
        raise error(problem, where=where, fix=fix)
    block: _Block | None = found
    return block


def _send_blocks(work: _Work, part: int, num_parts: int, end: Connection, inherited: Sequence[Connection]) -> None:
    # As long as a child holds the ends that are read, sending does not fail when the parent is killed: the child would
    # wait for ever, and keep its memory and the lock of the run.
    for other in inherited:
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process of its own already
    try:
        for block in work.blocks(part, num_parts):
            end.send(block)
        end.send(None)
    except TrimtabError as error:
        end.send((type(error), error.problem, error.where, error.fix))
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # nobody waits for more blocks: the parent has ended, or it reports itself that it was stopped
    end.close()


# ---- reading again ---------------------------------------------------------------------------------------------------


def _read_again(records_of: Records, sha256: str, columns: Columns) -> Read:
    """A function that takes record numbers and gives those records, by reading their rows of the source again."""

    def read(chosen: Array) -> list[Any]:
        rows = columns["row"][chosen]
        places = chosen - np.searchsorted(columns["row"], rows)  # a row may give several records
        wanted = set(rows.tolist())
        stream = records_of.stream(wanted.__contains__)
        if stream.sha256 != sha256:
            raise DataError(
                "the data is another than when it was tokenised",
                where=stream.source,
                fix="do not change data while a run reads it; restore it and start the same command again",
            )
        last = max(wanted, default=-1)
        found = {}
        for row, (_, records) in enumerate(stream.rows):
            if row in wanted:
                found[row] = records
            if row >= last:
                break
        return [found[row][place] for row, place in zip(rows.tolist(), places.tolist(), strict=True)]

    return read


def _place(records_of: Records, row: int) -> str:
    """The place of a row, as messages name it: "pairs.jsonl, row 17"."""
    stream = records_of.stream(lambda number: False)
    return next(where for number, (where, _) in enumerate(stream.rows) if number == row)


# ---- the name of what is kept ----------------------------------------------------------------------------------------


def key_of(records_of: Records, sha256: str) -> str | None:
    """The key under which the columns of a source are kept: a hash of its content, of the tokenizer with its template,
    of the versions of the libraries, and of the code that reads and tokenises. None if the tokenizer's rules cannot be
    read, as without a fast backend."""
    chat = records_of.chat
    backend = getattr(chat.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    source = str(records_of.source)
    names = [source] if is_hub(source) else [path.name for path in files_of(source)[0]]
    how = [
        [records_of.kind.__name__, records_of.limit, sha256],
        [names, source.partition("?")[2]],  # a name's ending says how the file is read
        [rules, chat.tokenizer.chat_template, chat.tokenizer.special_tokens_map, type(chat.tokenizer).__name__],
        [importlib.metadata.version(library) for library in ("tokenizers", "transformers", "jinja2")],
        _code_hash(),
    ]
    return hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _code_hash() -> str:
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(types.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
