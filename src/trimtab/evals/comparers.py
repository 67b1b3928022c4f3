"""Comparers: whatever can say which of two replies to a prompt is better, behind one protocol.

A world's gold, a reward model and a simple rule compare the scores that they give to both replies (`ScoreComparer`). A
file of verdicts and people's votes are looked up (`RecordedComparer`). A judge model asks itself in both orders. All of
them give verdicts, so win rates, paired tests and agreement with people are computed in one way for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trimtab.core.types import PreferencePair, Prompt
from trimtab.evals.reward_card import cross_fitted_bag_of_words, ordering_accuracy
from trimtab.evals.text import words
from trimtab.evals.verdicts import PairVerdict, Side, prompt_name
from trimtab.stats import Floats, Interval

ScoreTexts = Callable[[Sequence[tuple[Prompt, str]]], Floats]
"""Scores of replies to prompts, [B]; nan for a reply that cannot be judged."""


@dataclass(frozen=True, kw_only=True)
class ReplyPair:
    """A model's reply beside a baseline's to the same prompt."""

    prompt: Prompt
    reply: str
    baseline_reply: str


@dataclass(frozen=True)
class Opinion:
    """What a comparer says of a pair: `Opinion(1.0)` if the model's reply is better."""

    verdict: float
    """As `PairVerdict.verdict`."""
    shown_first: Side | None = None
    """Whose reply the comparer saw first, if it sees them in an order."""


class Comparer(Protocol):
    """Compares replies."""

    @property
    def name(self) -> str:
        """The judge in its verdicts."""

    def compare(self, pairs: Sequence[ReplyPair]) -> list[tuple[Opinion, ...]]:
        """What it says of each pair, in their order: nothing of a pair that it cannot judge, two opinions if it looks
        at a pair in both orders."""


@dataclass(frozen=True)
class ScoreComparer:
    """Prefers the reply with the higher score; equal scores are a tie."""

    name: str
    score: ScoreTexts

    def compare(self, pairs: Sequence[ReplyPair]) -> list[tuple[Opinion, ...]]:
        """See `Comparer`. Both replies are scored in one call, so that equal replies tie."""
        texts = [(pair.prompt, text) for pair in pairs for text in (pair.reply, pair.baseline_reply)]
        scores = np.asarray(self.score(texts), dtype=np.float64).reshape(-1, 2)
        gaps = scores[:, 0] - scores[:, 1]
        return [() if np.isnan(gap) else (Opinion(0.5 if gap == 0 else float(gap > 0)),) for gap in gaps.tolist()]


class RecordedComparer:
    """Says what verdicts that were given before say of the same two replies, whichever models wrote them."""

    def __init__(self, name: str, verdicts: Iterable[PairVerdict]) -> None:
        self.name = name
        self._known: dict[tuple[str, str, str], list[Opinion]] = {}
        for given in verdicts:
            for one in (given, given.turned()):
                if one.reply is not None and one.baseline_reply is not None:
                    own = self._known.setdefault((one.prompt, one.reply, one.baseline_reply), [])
                    own.append(Opinion(one.verdict, one.shown_first))

    def compare(self, pairs: Sequence[ReplyPair]) -> list[tuple[Opinion, ...]]:
        """See `Comparer`. A pair of equal replies is a tie, judged or not."""
        return [
            (Opinion(0.5),)
            if pair.reply == pair.baseline_reply
            else tuple(self._known.get((prompt_name(pair.prompt), pair.reply, pair.baseline_reply), ()))
            for pair in pairs
        ]


LENGTH = ScoreComparer("length", lambda texts: np.array([float(len(words(text))) for _, text in texts]))
"""Prefers the longer reply, in words: what a comparer has to be better than."""


def verdicts_by(
    comparer: Comparer, pairs: Sequence[ReplyPair], *, model: str, baseline: str
) -> tuple[list[PairVerdict], int]:
    """The comparer's verdicts on a model's replies, and the number of pairs that it could not judge."""
    found: list[PairVerdict] = []
    opinions = comparer.compare(pairs)
    for pair, own in zip(pairs, opinions, strict=True):
        found += [
            PairVerdict(
                prompt=prompt_name(pair.prompt),
                model=model,
                baseline=baseline,
                verdict=one.verdict,
                shown_first=one.shown_first,
                judge=comparer.name,
            ).with_replies(pair.reply, pair.baseline_reply)
            for one in own
        ]
    return found, sum(not own for own in opinions)


@dataclass(frozen=True, kw_only=True)
class ComparerAgreement:
    """How often a comparer prefers the reply that people prefer."""

    comparer: str
    rate: Interval
    """A tie of the comparer counts half. Prompts that repeat are resampled whole; otherwise the interval is Wilson's.
    `count` is the number of pairs."""
    num_ties: int
    num_unjudged: int
    """Pairs of which the comparer says nothing; they are in no rate."""


def agreement(pairs: Sequence[PreferencePair], comparer: Comparer, *, seed: int = 0) -> ComparerAgreement:
    """The agreement of a comparer with the labels of the pairs that have a right side (a label above 0.5).

    Each pair is shown to it with a side drawn at random as the model's, so that a comparer that knows nothing agrees
    with half of them, also one that always prefers the same side.
    """
    decided = [pair for pair in pairs if pair.label != 0.5]
    flipped = np.random.default_rng(seed).random(len(decided)) < 0.5
    shown = [
        ReplyPair(prompt=pair.prompt, reply=pair.rejected, baseline_reply=pair.chosen)
        if flip
        else ReplyPair(prompt=pair.prompt, reply=pair.chosen, baseline_reply=pair.rejected)
        for pair, flip in zip(decided, flipped, strict=True)
    ]
    means = np.array(
        [np.mean([one.verdict for one in own]) if own else np.nan for own in comparer.compare(shown)], dtype=np.float64
    )
    return _agreement(comparer.name, decided, np.where(flipped, 1 - means, means))


def agreement_of_words(pairs: Sequence[PreferencePair]) -> ComparerAgreement | None:
    """The agreement of a bag of words that learned from the pairs of the other half of the prompts; None if there is
    nothing to learn from. It knows words, and neither order nor meaning."""
    decided = [pair for pair in pairs if pair.label != 0.5]
    scores = cross_fitted_bag_of_words(decided) if decided else None
    if scores is None:
        return None
    gaps = scores[0] - scores[1]
    return _agreement("bag of words", decided, np.where(gaps == 0, 0.5, gaps > 0).astype(np.float64))


def _agreement(name: str, pairs: Sequence[PreferencePair], for_chosen: Floats) -> ComparerAgreement:
    """From what a comparer says for the chosen side of each pair, [num_pairs]."""
    judged = ~np.isnan(for_chosen)
    sides = np.sign(for_chosen[judged] - 0.5)
    prompts = [prompt_name(pair.prompt) for pair, known in zip(pairs, judged, strict=True) if known]
    return ComparerAgreement(
        comparer=name,
        rate=ordering_accuracy(sides, np.zeros(sides.size), prompts),
        num_ties=int((sides == 0).sum()),
        num_unjudged=int((~judged).sum()),
    )
