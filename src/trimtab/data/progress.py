"""Shows how far the reading of a large source is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimtab.data.sources import files_of, is_hub

_QUIET_SECONDS = 10.0
"""Seconds between two lines of progress if the output is not a terminal."""


@contextmanager
def showing_rows(source: str | Path, limit: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how many rows were read: as a bar on a terminal, else as a line now and then."""
    if quiet:
        yield lambda num: None
        return
    console = Console(stderr=True)
    total = num_rows(source)
    total = limit if total is None or (limit is not None and limit < total) else total
    name = Path(str(source)).name
    began = last = time.perf_counter()
    of_all = f" of {total:,}" if total is not None else ""
    if not console.is_terminal:
        read = 0

        def line(num: int) -> None:
            nonlocal last, read
            read, now = num, time.perf_counter()
            if now - last >= _QUIET_SECONDS:
                last = now
                print(f"reading {name}: {num:,}{of_all} rows", file=sys.stderr, flush=True)

        yield line
        print(f"{name}: {read:,} rows tokenised in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(f"reading {name}", total=total)
        yield lambda num: progress.update(task, completed=num)


def num_rows(source: str | Path) -> int | None:
    """The approximate number of rows of a source; None if it cannot be found quickly."""
    if is_hub(source):
        return None
    num = 0
    for path in files_of(source)[0]:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            num += pyarrow.parquet.read_metadata(path).num_rows
        elif path.suffix in (".jsonl", ".ndjson"):
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    num += block.count(b"\n")
        else:
            return None
    return num
