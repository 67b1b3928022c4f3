"""Numbers about text that need no model: diversity, repetition and length.

A word is a maximal run of letters, digits, underscores and inner apostrophes, in lower case; every other visible
character is a word of its own. Scripts written without spaces therefore count a run of characters as one word.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\uff07", "'"))
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of a text, lower-cased; see the module's first lines for what a word is."""
    return _WORD.findall(text.lower())


def straight_apostrophes(text: str) -> str:
    """The text with `'` for every typographic apostrophe, as phrases that are looked for are written; none is longer
    or shorter then."""
    return text.translate(_APOSTROPHES)


def distinct_n(texts: Sequence[str], n: int, *, num_words: int | None = None) -> float:
    """Share of different n-grams among all n-grams of the texts (Li et al., arXiv:1510.03055); nan if there are none.

    The ratio falls as text grows, so compare two models at an equal number of words: with `num_words`, only that many
    words are read, beginning with the first text.
    """
    grams: list[tuple[str, ...]] = []
    left = math.inf if num_words is None else num_words
    for text in texts:
        tokens = words(text)
        tokens = tokens[: int(min(left, len(tokens)))]
        left -= len(tokens)
        grams.extend(_ngrams(tokens, n))
    return len(set(grams)) / len(grams) if grams else math.nan


VOCABULARY = 30_522
"""Words of the vocabulary in `expectation_adjusted_distinct`: those of the tokenizer in its paper."""


def expectation_adjusted_distinct(texts: Sequence[str], *, vocabulary: int = VOCABULARY) -> float:
    """Different words over the number expected if C words were drawn evenly from V (Liu et al., arXiv:2202.13587).

        EAD = N / (V * (1 - ((V - 1) / V)^C))

    Unlike distinct-1 it does not fall as texts grow. nan if there are no words.
    """
    tokens = [word for text in texts for word in words(text)]
    if not tokens:
        return math.nan
    expected = -vocabulary * math.expm1(len(tokens) * math.log1p(-1 / vocabulary))
    return len(set(tokens)) / expected


def repetition(text: str, n: int = 4) -> float:
    """Share of a reply's n-grams that repeat an earlier one: 1 - distinct-n within the reply, 0 if it is too short."""
    grams = _ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_BLEU_MARKS = (
    (re.compile(r"([\{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


@lru_cache(maxsize=64)
def _bleu_counts(text: str) -> tuple[int, tuple[Counter[tuple[str, ...]], ...]]:
    """The number of tokens and the counts of n-grams, n from 1 to 4, by the rules of mteval-v13a."""
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        line = line.replace(entity, character)
    line = f" {line} "
    for pattern, spaced in _BLEU_MARKS:
        line = pattern.sub(spaced, line)
    tokens = line.split()
    return len(tokens), tuple(Counter(_ngrams(tokens, n)) for n in range(1, 5))


def sentence_bleu(text: str, reference: str) -> float:
    """BLEU-4 in [0, 1] of one text against another (Papineni et al., ACL 2002, section 2.3).

    As sacrebleu computes it with `effective_order`: orders longer than the text are left out, and an order without a
    match counts half of what the order before it without one did.
    """
    (length, found), (reference_length, wanted) = _bleu_counts(text), _bleu_counts(reference)
    logs, smoothing = [], 1.0
    for grams, others in zip(found, wanted, strict=True):
        total = grams.total()
        if not total:
            break
        correct = (grams & others).total()
        if not correct:
            smoothing *= 2
        logs.append(math.log(correct / total if correct else 1 / (smoothing * total)))
    if not logs or not (found[0] & wanted[0]):
        return 0.0
    penalty = 1.0 if length >= reference_length else math.exp(1 - reference_length / length)
    return penalty * math.exp(sum(logs) / len(logs))


def self_bleu(texts: Sequence[str], *, num_pairs: int = 200, seed: int = 0) -> float:
    """Mean BLEU-4 in [0, 1] of one text against another over random pairs: higher is less diverse.

    After Zhu et al. (arXiv:1802.01886), with one reference at a time so that the number does not depend on how many
    texts there are. All ordered pairs are used if there are at most `num_pairs`. nan for fewer than two texts.
    """
    num = len(texts)
    if num < 2:
        return math.nan
    # pair number k is (i, j): i = k // (num - 1), and j skips i
    total = num * (num - 1)
    chosen = np.arange(total)
    if total > num_pairs:
        chosen = np.random.default_rng(seed).choice(total, size=num_pairs, replace=False, shuffle=False)
    scores = []
    for k in chosen.tolist():
        i, j = divmod(k, num - 1)
        j += j >= i
        scores.append(sentence_bleu(texts[i], texts[j]))
    return float(np.mean(scores))


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of all texts over their bytes after DEFLATE: higher is more redundant (Shaib et al., arXiv:2403.00553)."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else math.nan


def length_stats(texts: Sequence[str]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum of the number of words."""
    if not texts:
        return dict.fromkeys(("words_mean", "words_median", "words_p95", "words_max"), math.nan)
    counts = np.array([len(words(text)) for text in texts])
    return {
        "words_mean": float(counts.mean()),
        "words_median": float(np.median(counts)),
        "words_p95": float(np.quantile(counts, 0.95)),
        "words_max": float(counts.max()),
    }


def text_stats(texts: Sequence[str], *, num_words: int | None = None) -> dict[str, float]:
    """All statistics of this module for one model's replies; `num_words` is as in `distinct_n`."""
    return {
        **length_stats(texts),
        "distinct_1": distinct_n(texts, 1, num_words=num_words),
        "distinct_2": distinct_n(texts, 2, num_words=num_words),
        "self_bleu": self_bleu(texts),
        "repetition_4": float(np.mean([repetition(text) for text in texts])) if texts else math.nan,
        "compression_ratio": compression_ratio(texts),
    }


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
