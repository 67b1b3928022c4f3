"""A project as a data source: `data = "feedback:project.toml?split=train"`."""

from __future__ import annotations

from contextlib import closing
from typing import Any, cast
from urllib.parse import parse_qsl

from trimtab.core.errors import DataError
from trimtab.core.source import FoundRecords, Source
from trimtab.core.types import (
    Comparison,
    Demonstration,
    LabelledResponse,
    PreferencePair,
    Prompt,
    SteppedResponse,
    prompt_id,
    records_hash,
)
from trimtab.feedback import labels
from trimtab.feedback.store import open_store

SPLITS = ("all", "train", "held_out")


def records(kind: type, source: str) -> FoundRecords:
    """The records of "feedback:PROJECT.toml?split=train", their SHA-256, and counts.

    `split` is all (the default), train or held_out, as the project's `[labels]` say. Raises DataError if the project
    has no such records, and whatever opening the project raises.
    """
    path, _, query = source.removeprefix("feedback:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    split = cast(labels.LabelSplit, options.pop("split", "all"))
    if options or split not in SPLITS:
        raise DataError(
            f"no option is called {', '.join(options)}" if options else f"no split is called {split!r}",
            where=source,
            fix="write for instance feedback:project.toml?split=train; splits are all, train and held_out",
        )
    with closing(open_store(path, must_exist=True)) as store:
        settings = store.project.settings
        with store.read() as connection:
            counts: dict[str, int] = {}
            found: list[Any]
            if kind is PreferencePair:
                found, counts = labels.preference_pairs(connection, settings.labels, split)
            elif kind is Comparison:
                found, counts = labels.comparisons(connection, settings.labels, split)
            elif kind is LabelledResponse:
                points = settings.task.rating_scale
                found, counts = labels.labelled_responses(connection, settings.labels, points, split)
            elif kind is SteppedResponse:
                found, counts = labels.stepped_responses(connection, settings.labels, split)
            elif kind is Demonstration:
                found, counts = labels.demonstrations(connection, settings.labels, split)
            elif kind is Prompt:
                pairs, counts = labels.preference_pairs(connection, settings.labels, split)
                by_content = {prompt_id(pair.prompt.messages): pair.prompt for pair in pairs}  # files number rows alike
                found = list(by_content.values())
            else:
                raise DataError(
                    f"a feedback project gives no {kind.__name__}", where=source, fix="use a file or another source"
                )
    if not found:
        counted = ", ".join(f"{num} {name.replace('_', ' ')}" for name, num in counts.items()) or "no votes"
        raise DataError(
            f"the project has no {kind.__name__} yet ({counted})",
            where=source,
            fix=f"collect votes of the kind {settings.task.kind!r}, or relax [labels] min_votes and min_agreement",
        )
    return found, records_hash(found), counts | {"rows": counts.get("votes", len(found)), "records": len(found)}


def check(kind: type, source: str) -> None:
    """Reads the records, because only all of its votes show what a project holds. Raises what `records` raises."""
    records(kind, source)


SOURCE = Source(title="a feedback project", natural=PreferencePair, live=True, read=records, check=check)
