"""Checks that the pairs of each prompt are those of one ranking, for a loss that learns from whole rankings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from trimtab.batches.pairs import Compared, ranks_of
from trimtab.core.errors import DataError
from trimtab.data.mistakes import Mistake
from trimtab.data.pairs import Comparisons, Groups


def only_rankings(
    comparisons: Comparisons,
    *,
    ties: str,
    on_bad_row: Literal["stop", "drop"],
    where: str,
    counts: dict[str, int],
) -> Comparisons:
    """The prompts whose pairs are all pairs of one ranking.

    Raises DataError for the first that are not if `on_bad_row` is "stop" or no prompt is left. Else their pairs are
    left out and counted by what is wrong: `dropped_ranking_gap`, `dropped_ranking_tie`, `dropped_soft_label`,
    `dropped_with_margin`. With `ties = "refuse"` a ranking with tied replies is one of them.
    """
    groups = comparisons.groups
    wrong: dict[int, Mistake] = {}
    for number in range(len(groups)):
        try:
            _refuse(_compared(groups, number), ties)
        except Mistake as mistake:
            wrong[number] = mistake
    if not wrong:
        return comparisons
    kinds = Counter(mistake.kind for mistake in wrong.values())
    if on_bad_row == "stop" or len(wrong) == len(groups):
        without = '; or leave such prompts out with on_bad_row = "drop"' if len(wrong) < len(groups) else ""
        first, shown = next(iter(wrong.items()))
        prompt = groups.table.part(groups.order[groups.starts[first] :][:1]).records()[0].prompt
        raise DataError(
            f"the replies to {prompt.text[:60]!r}: {shown}\n  {len(wrong)} of {len(groups)} prompts give no ranking: "
            + ", ".join(f"{num} {kind}" for kind, num in kinds.most_common()),
            where=where,
            fix=f'{shown.fix}{without}; or learn from the pairs with loss = "bradley_terry"',
        )
    sizes = np.diff(groups.starts)
    for number, found in wrong.items():
        counts[f"dropped_{found.kind}"] = counts.get(f"dropped_{found.kind}", 0) + int(sizes[number])
    kept = ~np.isin(np.arange(len(groups)), list(wrong))
    return Comparisons(
        replace(
            groups,
            order=groups.order[np.repeat(kept, sizes)],
            starts=np.concatenate([[0], np.cumsum(sizes[kept])]),
        )
    )


def _compared(groups: Groups, number: int) -> tuple[list[Compared], int]:
    """The pairs of a prompt, and its number of different replies; found by hashes, without making a tree."""
    places: dict[int, int] = {}
    table = groups.table
    sides = table.columns["reply_hash"].reshape(-1, table.num_replies)
    found = []
    for record in groups.records(number):
        chosen, rejected = (places.setdefault(int(text), len(places)) for text in sides[record])
        margin, label = float(table.columns["margin"][record]), float(table.columns["label"][record])
        found.append(Compared(chosen, rejected, margin, label))
    return found, len(places)


def _refuse(found: tuple[Sequence[Compared], int], ties: str) -> None:
    """Raises Mistake if the pairs of a prompt are not a ranking that a loss over rankings can learn from."""
    compared, num_replies = found
    if (label := min(pair.label for pair in compared)) < 1:
        raise Mistake(
            "soft_label",
            f"a pair has the label {label:g}, and a ranking is an order",
            "take the preferred reply as surely better with FILE?ignore=label (of a feedback project: [labels] rule = "
            '"majority")',
        )
    if any(pair.margin > 0 for pair in compared):
        raise Mistake(
            "with_margin", "a pair has a margin, and a ranking is an order", "leave the column out: FILE?ignore=margin"
        )
    try:
        ranks = ranks_of(compared, num_replies)
    except ValueError as error:
        raise Mistake(
            "ranking_gap", f"a ranking with a gap: {error}", "give all pairs of the ranking, or the ranked list itself"
        ) from error
    if ties == "refuse" and len(set(ranks)) < num_replies:
        raise Mistake(
            "ranking_tie",
            f"{num_replies} replies share {len(set(ranks))} ranks",
            'set loss.ties = "breslow", by which tied replies are chosen among all that are not better',
        )
