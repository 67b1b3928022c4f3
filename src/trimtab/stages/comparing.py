"""Compares files of replies: pairs the replies of two models, and loads what scores them.

What a comparer says becomes verdicts, and `evals` says what those are worth. Nothing is sampled here: `trimtab
generate` writes the replies, so that the same ones can be compared by a world, a reward model and people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, PreferencePair, Prompt, from_dict, prompt_id
from trimtab.data.layouts import load
from trimtab.data.sources import read_rows, records_source
from trimtab.engines.device import device_of
from trimtab.evals.comparers import LENGTH, ReplyPair, ScoreComparer
from trimtab.rewards.gold import GoldScorer
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import TOKEN_BUDGET, rewards_of
from trimtab.stats import Floats

RepliesByPrompt = dict[str, tuple[Prompt, list[str]]]
"""Replies by the id of their prompt's messages."""


def scored_comparer(by: str, *, device: str | None = None) -> ScoreComparer:
    """A comparer by score: "length", the gold of a world ("world:helpdesk"), or a reward model (a directory or hub id).

    A reply that a reward model has not enough positions to read cannot be judged by it.
    """
    if by == LENGTH.name:
        return LENGTH
    if by.startswith("world:"):
        gold = GoldScorer(worlds.load(by.removeprefix("world:")))
        return ScoreComparer(by, lambda texts: np.array([gold.gold(prompt, text).total for prompt, text in texts]))
    scorer: Any = RewardModel(path=by).load(token_budget=TOKEN_BUDGET, device=device_of(device))

    def score(texts: Sequence[tuple[Prompt, str]]) -> Floats:
        return rewards_of(scorer, texts, unread="nan")

    return ScoreComparer(by, score)


def read_pairs(source: str) -> list[PreferencePair]:
    """The pairs of a source, in any layout of them."""
    return load(PreferencePair, source).records


def read_replies(source: str) -> RepliesByPrompt:
    """The replies of a file of `trimtab generate`, empty ones too, or of demonstrations in any layout."""
    found: RepliesByPrompt = {}
    for prompt, reply in _generated(source) or [(d.prompt, d.response) for d in load(Demonstration, source).records]:
        found.setdefault(prompt_id(prompt.messages), (prompt, []))[1].append(reply)
    return found


def _generated(source: str) -> list[tuple[Prompt, str]]:
    """The replies of rows as `trimtab generate` writes them; none if the rows are others."""
    if records_source(source) is not None:
        return []
    read = read_rows(source)
    rows = [row for _, row in read.rows]
    known = all(isinstance(row.get("response"), str) and isinstance(row.get("response_ids"), list) for row in rows)
    if read.bad or not known:
        return []
    return [(from_dict(Prompt, row["prompt"]), row["response"]) for row in rows]


def pair_replies(model: str | Path, baseline: str | Path) -> tuple[list[ReplyPair], int]:
    """The replies of two files to the same prompts, the first of the one with the first of the other and so on, and the
    number of replies without a partner. Raises DataError if no prompt is in both."""
    ours, theirs = read_replies(str(model)), read_replies(str(baseline))
    pairs = [
        ReplyPair(prompt=prompt, reply=reply, baseline_reply=other)
        for key, (prompt, replies) in ours.items()
        if key in theirs
        for reply, other in zip(replies, theirs[key][1], strict=False)
    ]
    if not pairs:
        raise DataError(
            "the two files have no prompt in common",
            where=f"{model} and {baseline}",
            fix="have both models answer the same prompts, with the same system turn",
        )
    num_all = sum(len(replies) for _, replies in [*ours.values(), *theirs.values()])
    return pairs, num_all - 2 * len(pairs)
