"""Turns votes into preference pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from trimtab.core.types import Comparison, Message, PreferencePair, Prompt


@dataclass(frozen=True)
class Judged:
    """One judgement of two replies; `share` is the probability that the first is preferred."""

    prompt: Prompt
    response_a: str
    response_b: str
    share: float
    annotator: str


@dataclass
class _Tally:
    prompt: Prompt
    first: str
    second: str
    votes: list[float] = field(default_factory=list)
    """1 for `first`, 0 for `second`, 0.5 for a tie."""


def to_pairs(
    comparisons: Iterable[Comparison | Judged],
    *,
    labels: Literal["majority", "soft"] = "majority",
    ties: Literal["drop", "half"] = "half",
    min_agreement: float = 0.5,
) -> tuple[list[PreferencePair], dict[str, int]]:
    """One pair for each two replies that were compared, in the order in which they first appear, and the counts.

    Votes over the same two replies to the same messages are put together, whichever reply was shown as A and whatever
    ids the rows have. With "soft", the `label` of a pair is the share of votes for the preferred reply; with "majority"
    it is 1. A tie counts as half a vote for each side ("half") or not at all ("drop"). Pairs are left out and counted
    if their replies are identical, if no vote counts, if the votes are even, or if the share is below `min_agreement`.
    """
    counts = {
        "comparisons": 0,
        "ties": 0,
        "judged_pairs": 0,
        "dropped_identical_pair": 0,
        "dropped_only_ties": 0,
        "dropped_even_votes": 0,
        "dropped_low_agreement": 0,
        "pairs": 0,
    }
    tallies: dict[tuple[tuple[Message, ...], frozenset[str]], _Tally] = {}
    for comparison in comparisons:
        share = _SHARES[comparison.choice] if isinstance(comparison, Comparison) else comparison.share
        counts["comparisons"] += 1
        counts["ties"] += share == 0.5
        a, b = comparison.response_a, comparison.response_b
        # Votes are grouped by the conversation and not by its id: a file may give every row an id of its own.
        tally = tallies.setdefault((comparison.prompt.messages, frozenset((a, b))), _Tally(comparison.prompt, a, b))
        if share != 0.5 or ties == "half":
            tally.votes.append(share if a == tally.first else 1 - share)

    pairs = []
    for tally in tallies.values():
        counts["judged_pairs"] += 1
        if tally.first == tally.second:
            counts["dropped_identical_pair"] += 1
            continue
        if not tally.votes:
            counts["dropped_only_ties"] += 1
            continue
        for_first = sum(tally.votes) / len(tally.votes)
        share = max(for_first, 1 - for_first)
        if share == 0.5:
            counts["dropped_even_votes"] += 1
        elif share < min_agreement:
            counts["dropped_low_agreement"] += 1
        else:
            chosen, rejected = (tally.first, tally.second) if for_first > 0.5 else (tally.second, tally.first)
            label = share if labels == "soft" else 1.0
            pairs.append(PreferencePair(prompt=tally.prompt, chosen=chosen, rejected=rejected, label=label))
    counts["pairs"] = len(pairs)
    return pairs, counts


_SHARES = {"A": 1.0, "B": 0.0, "tie": 0.5}
