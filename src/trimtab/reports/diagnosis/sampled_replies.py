"""The replies that a run has written, early and late, and words that nearly all late ones share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evals.text import words
from trimtab.reports.collect import RunRecord
from trimtab.reports.headline import number

MIN_REPLIES = 8
"""The fewest replies on each side: with fewer, even none against all is hardly beyond chance."""
SHARED_WORDS = 8
"""Words and marks in a row. Courteous phrases are shorter (the longest of the help desk has seven), and are shared by
many good replies."""
SHARED_BY = 0.8
"""The share of the late replies that hold these words."""
SHARED_BEFORE = 0.2
"""The share of the early replies that may hold them too."""
SHARED_PROMPTS = 3
"""The fewest different prompts that they answer: the replies to one prompt may well be alike."""


@dataclass(frozen=True)
class SharedPhrase:
    """Words in a row that nearly all late replies hold, and few early ones."""

    text: str
    """Its words, with a space between them."""
    before: int
    num_before: int
    after: int
    num_after: int


def sides_of(run: RunRecord) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """The replies of the first and of the last third of the steps that have any; of an evaluation, those of the
    baseline and of the policy."""
    if run.stage == "evaluate":
        before = [
            {**row, "response": row["baseline_response"]} for row in run.samples if is_text(row, "baseline_response")
        ]
        return before, [row for row in run.samples if is_text(row, "response")]
    rows = [row for row in run.samples if is_text(row, "response") and number(row, "step") is not None]
    steps = sorted({number(row, "step") or 0.0 for row in rows})
    if len(steps) < 2:
        return [], []
    third = max(1, len(steps) // 3)
    early, late = set(steps[:third]), set(steps[-third:])
    return [row for row in rows if number(row, "step") in early], [row for row in rows if number(row, "step") in late]


def is_text(row: Mapping[str, Any], key: str) -> bool:
    """Whether the row of samples holds a text under this key."""
    return isinstance(row.get(key), str)


def shared_phrase(run: RunRecord) -> SharedPhrase | None:
    """The words in a row that most late replies share, if nearly all do, to several prompts, and few early ones did."""
    before, after = sides_of(run)
    if min(len(before), len(after)) < MIN_REPLIES:
        return None
    early, late = ([_runs_of(row["response"]) for row in side] for side in (before, after))
    counts = Counter(one for runs in late for one in runs)
    earlier = Counter(one for runs in early for one in runs)
    able = [
        (num, one)
        for one, num in counts.items()
        if num >= SHARED_BY * len(after) and earlier[one] <= SHARED_BEFORE * len(before)
    ]
    if not able:
        return None
    num, found = max(able)
    if len({row.get("prompt") for row, runs in zip(after, late, strict=True) if found in runs}) < SHARED_PROMPTS:
        return None
    return SharedPhrase(" ".join(found), earlier[found], len(before), num, len(after))


def holds_words(reply: str, text: str) -> bool:
    """Whether the words of a text stand in a reply, in a row."""
    return f" {text} " in f" {' '.join(words(reply))} "


def _runs_of(reply: str) -> set[tuple[str, ...]]:
    said = words(reply)
    return {tuple(said[i : i + SHARED_WORDS]) for i in range(len(said) - SHARED_WORDS + 1)}
