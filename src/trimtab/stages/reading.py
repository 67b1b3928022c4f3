"""Reads the data of a run: what was read is recorded, and a source that may grow is read only once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from trimtab.batches.trees import Tree
from trimtab.core.errors import DataError
from trimtab.core.files import json_text, read_json, write_whole, writing
from trimtab.core.terminal import note
from trimtab.core.types import Demonstration, Record, from_dict, to_dict
from trimtab.data.chat import Chat
from trimtab.data.layouts import Loaded, load
from trimtab.data.pairs import WhenTooLong, group
from trimtab.data.prepare import Prepared, prepare, prepare_loaded
from trimtab.data.sources import records_source
from trimtab.data.tokens import Lazy, TokenTable
from trimtab.runs.run import Run

SURELY_SOME = 20
"""So many prompts expected to be held out: that none is happens once in 500 million times by chance."""
FEW = 5
"""Records left out that are counted and not spoken of."""


def read(kind: type[Record], source: str, run: Run, **options: Any) -> Loaded[Record]:
    """The result of `load`, with its hash written to the run's data.json.

    A project of judgements may grow while a run goes on. Its records are written into the run when they are first read,
    so that a resumed run trains on what it began with; a new run sees the project as it is by then.
    """
    loaded = _snapshot(kind, source, run, **options) if is_live(source) else load(kind, source, **options)
    run.add_data(source, loaded.sha256, len(loaded.records), loaded.report, kind=kind.__name__)
    return loaded


def prepare_data(
    kind: type,
    source: str,
    run: Run,
    chat: Chat,
    *,
    on_bad_row: Literal["stop", "drop"],
    limit: int | None = None,
    by_prompt: bool = True,
) -> Prepared:
    """The result of `prepare`, with its hash written to the run's data.json. A project of judgements is read as it was
    when the run began."""
    options: dict[str, Any] = {"on_bad_row": on_bad_row, "limit": limit}
    if is_live(source):
        loaded: Loaded[Any] = _snapshot(kind, source, run, accepts=chat.refusal, **options)
        prepared = prepare_loaded(kind, loaded, chat, on_bad_row=on_bad_row, by_prompt=by_prompt)
    else:
        prepared = prepare(kind, source, chat, by_prompt=by_prompt, **options)
    run.add_data(source, prepared.sha256, len(prepared.table), prepared.report, kind=kind.__name__)
    return prepared


def read_split(kind: type, settings: Any, run: Run, chat: Chat) -> tuple[TokenTable, TokenTable, dict[str, int]]:
    """The records of `settings.data` to train on, those to judge by, and counts of what was read of `data`. Those to
    judge by are the records of `held_out_data`; without it, a share of `data`."""
    prepared = prepare_data(kind, settings.data, run, chat, on_bad_row=settings.on_bad_row, limit=settings.limit)
    counts = dict(prepared.counts)
    if settings.held_out_data is None:
        return *hold_out(prepared.table, settings.held_out, where=settings.data), counts
    judged = prepare_data(kind, settings.held_out_data, run, chat, on_bad_row=settings.on_bad_row)
    trained, judged_by = (table.of("messages_hash") for table in (prepared.table, judged.table))
    say_trained_on(trained, judged_by, settings, counts)
    return prepared.table, judged.table, counts


def say_trained_on(trained: ArrayLike, judged: ArrayLike, settings: Any, counts: dict[str, int]) -> None:
    """Says on stderr and counts how many of the prompts to judge by are trained on too, given the names of both: what
    is measured on these says nothing about new prompts. A share that is held out of `data` has none."""
    names = np.unique(judged)
    if num := int(np.isin(names, trained).sum()):
        counts["held_out_prompts_trained_on"] = num
        note(
            f"{settings.held_out_data}: {num:,} of {len(names):,} held-out prompts are trained on too, so what "
            "is measured on them is no measure of new prompts"
        )


def is_live(source: str) -> bool:
    """Whether the source may grow while a run goes on."""
    own = records_source(source)
    return own is not None and own.live


def _snapshot(kind: type[Record], source: str, run: Run, **options: Any) -> Loaded[Record]:
    # Another limit, or another way with bad rows, gives other records of the same source.
    asked = [kind.__name__, source, options.get("limit"), options.get("on_bad_row")]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    path: Path = run.directory / "snapshots" / f"{name}.json"
    if path.exists():
        kept = read_json(path, fix="restore it, or begin again with --fresh: it holds the judgements as they were")
        records = [from_dict(kind, row) for row in kept["records"]]
        told = {name: tuple(kept[name]) for name in ("dropped", "unused")}
        return Loaded(**kept | told | {"records": records})
    loaded = load(kind, source, **options)
    kept = vars(loaded) | {"records": [to_dict(record) for record in loaded.records]}
    with writing("the judgements", path):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json_text(kept))
    return loaded


def read_demonstration_trees(
    source: str,
    run: Run,
    chat: Chat,
    *,
    max_tokens: int,
    on_too_long: WhenTooLong,
    on_bad_row: Literal["stop", "drop"],
    counts: dict[str, int],
    owner: str,
    where: str,
    fix: str,
    limit: int | None = None,
) -> Sequence[Tree]:
    """Demonstrations beside the data that a stage is about, each as a tree of its own and fitted to `max_tokens`.

    What was dropped or truncated is added to `counts` under names that begin with `owner`. Raises DataError with
    `where` and `fix` when none is left: before anything is trained, since the stage could not be finished.
    """
    prepared = prepare_data(Demonstration, source, run, chat, on_bad_row=on_bad_row, limit=limit, by_prompt=False)
    found: dict[str, int] = {"records": len(prepared.table)}
    groups = group(prepared.table, chat, max_tokens=max_tokens, on_too_long=on_too_long, counts=found, alone=True)
    say_too_long(found, max_tokens)
    counts |= {f"{owner}_{name}": num for name, num in found.items() if name != "records"}
    if not len(groups):
        raise DataError(
            f"none of {len(prepared.table)} demonstrations has at most max_tokens = {max_tokens} tokens",
            where=where,
            fix=fix,
        )
    return Lazy(len(groups), lambda i: groups.tree(i)[0])


def say_too_long(counts: Mapping[str, int], max_tokens: int) -> None:
    """Says on stderr at once when more than a few records are too long, and left out or cut."""
    told = {
        "dropped_too_long": "are left out: they are longer than",
        "truncated_too_long": "have a prompt that is cut on its left and loses its beginning: they are longer than",
    }
    for name, what in told.items():
        if (num := counts.get(name, 0)) > FEW:
            note(f"{num:,} of {counts['records']:,} records {what} max_tokens = {max_tokens}")


def say_prompts_left_out(counts: Mapping[str, int], num: int, *, longest: int) -> None:
    """Says on stderr at once when more than a few of `num` prompts are left out."""
    told = {
        "dropped_long_prompts": f"they are longer than sampling.max_prompt_tokens = {longest}",
        "dropped_repeated_prompts": "they repeat another, and each is asked once",
    }
    for name, why in told.items():
        if counts.get(name, 0) > FEW:
            note(f"{counts[name]:,} of {num:,} prompts are left out: {why}")


def hold_out(table: TokenTable, share: float, *, where: str) -> tuple[TokenTable, TokenTable]:
    """The records to train on and the share held out, by prompt (`data.split`).

    Raises DataError if nothing is held out of so many prompts that chance cannot be the reason: then a part of them was
    held out before by the same rule, as `feedback:project.toml?split=train` does. Of few prompts it is only said.
    """
    train, rest = table.split(share)
    if share and not len(rest) and len(table):
        num = len(np.unique(table.of("messages_hash")))
        if num * share >= SURELY_SOME:
            raise DataError(
                f"held_out = {share} holds out none of {num} prompts: these are what was left when others were held "
                "out by the same rule",
                where=where,
                fix="set held_out = 0 to train without validation; or, if the stage has held_out_data, name the others "
                "there, such as feedback:project.toml?split=held_out",
            )
        note(f"{where}: none of {num} prompts is held out, so nothing is validated")
    return train, rest
