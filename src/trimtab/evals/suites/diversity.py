"""Diversity of several replies to one prompt, at an equal number of words: falling figures are mode collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.core.errors import DataError
from trimtab.data.files import Located
from trimtab.data.mistakes import shown
from trimtab.evals.suites.suite import ItemScores, Question, Suite, SuiteAnswer, SuiteItem, SuiteMetric, text_of
from trimtab.evals.text import distinct_n, expectation_adjusted_distinct, self_bleu, words

NUM_REPLIES = 4
NUM_WORDS = 20
"""Words that are read of each reply, so that longer replies do not look less diverse."""


def read(rows: Sequence[Located]) -> list[SuiteItem]:
    """One item for each prompt, sampled several times. An instruction of Self-Instruct comes with the input of its
    first instance, if it has one."""
    items = []
    for row in rows:
        prompt = text_of(row, "instruction", "prompt")
        instances = row[1].get("instances") or [{}]
        if not isinstance(instances, list) or not isinstance(instances[0], dict):
            raise DataError(
                f"instances is {shown(instances)}",
                where=row[0],
                fix='give a list such as [{"input": …}], or leave it out',
            )
        if given := str(instances[0].get("input") or "").strip():
            prompt += f"\n\n{given}"
        items.append(
            SuiteItem(
                id=str(row[1].get("id") or row[0]), questions=(Question(turns=(prompt,), num_samples=NUM_REPLIES),)
            )
        )
    return items


def score(_item: SuiteItem, answers: Sequence[SuiteAnswer]) -> ItemScores:
    """Figures of the first words of the replies. A prompt with a reply of fewer words says nothing about them, since
    lengths would differ; whether replies are the same is always known."""
    replies = answers[0].replies
    beginnings = [" ".join(words(reply)[:NUM_WORDS]) for reply in replies]
    num_same = len(replies) - len(set(replies))
    found = {"repeated": [num_same / (len(replies) - 1)], "too_short": [0.0]}
    if any(len(words(reply)) < NUM_WORDS for reply in replies):
        return found | {"too_short": [1.0]}
    figures = {
        "distinct_2": distinct_n(beginnings, 2),
        "distinct_1": distinct_n(beginnings, 1),
        "ead": expectation_adjusted_distinct(beginnings),
        "self_bleu": self_bleu(beginnings),
    }
    assert all(map(math.isfinite, figures.values()))
    return {name: [value] for name, value in figures.items()} | found


SUITE = Suite(
    paper="arXiv:1510.03055, arXiv:2202.13587, arXiv:1802.01886",
    files=("self_instruct/user_oriented_instructions.jsonl.gz",),
    hub=("hub:HuggingFaceH4/instruction-dataset?split=test",),
    read=read,
    score=score,
    metrics=(
        SuiteMetric("distinct_2", "different pairs of words among all"),
        SuiteMetric("distinct_1", "different words among all"),
        SuiteMetric("ead", "different words over those expected of a vocabulary"),
        SuiteMetric("self_bleu", "BLEU of one reply against another", better="lower"),
        SuiteMetric("repeated", "replies equal to another", better="lower"),
        SuiteMetric("too_short", "prompts left out: a reply is too short", better="neither"),
    ),
    max_new_tokens=64,
    temperature=1.0,
    notes=(
        f"{NUM_REPLIES} replies to a prompt, {NUM_WORDS} words of each; figures at other numbers cannot be compared",
        "more is not better without end: noise is diverse",
    ),
)
