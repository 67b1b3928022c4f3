"""The card of a reward model: how well it orders held-out replies, and by which simple features it may do so."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from trimtab.core.types import PreferencePair, prompt_id
from trimtab.evals.text import words
from trimtab.stats import (
    Floats,
    Interval,
    auc,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
    spearman,
    wilson,
    win_rate,
)

Bools = NDArray[np.bool_]
Strings = NDArray[np.str_]

SIDES = ("chosen", "rejected")
LENGTH_MATCHED = 0.1
"""Two replies are of equal length when they differ by less than this share of the longer one."""
LENGTH_ONLY = 0.95
"""A model is called a scorer of length if its rewards and the lengths of the replies have at least this Spearman
correlation, up or down. Lengths in tokens, letters and words agree better than this with each other."""
FEWEST_REPLIES = 20
"""Number of replies below which no model is called a scorer of length: a few are in any order by chance."""
MOST_TRAINING_PAIRS = 4000
"""Number of pairs that the bag of words is trained on; it learns little from more."""


@dataclass(frozen=True)
class BagOfWords:
    """A linear score of word counts. As a judge it knows words but neither order nor meaning."""

    weights: Mapping[str, float]

    def score(self, text: str) -> float:
        """Sum of the weights of the words; unknown words count nothing."""
        return sum(self.weights.get(word, 0.0) for word in words(text))


def fit_bag_of_words(
    chosen: Sequence[str], rejected: Sequence[str], *, l2: float = 1e-3, max_words: int = 20_000
) -> BagOfWords:
    """Logistic regression on differences of word counts of training pairs, without intercept.

        minimise  mean_i log(1 + exp(-w . (counts(chosen_i) - counts(rejected_i)))) + l2 / 2 |w|^2

    The words are the `max_words` that occur in the most replies.
    """
    counts = [(Counter(words(a)), Counter(words(b))) for a, b in zip(chosen, rejected, strict=True)]
    frequency = Counter(word for pair in counts for side in pair for word in side)
    # ties broken by the word itself, so that the vocabulary does not depend on the order of the pairs
    vocabulary = [word for word, _ in sorted(frequency.items(), key=lambda item: (-item[1], item[0]))[:max_words]]
    column = {word: i for i, word in enumerate(vocabulary)}
    rows, columns, entries = [], [], []
    for row, (a, b) in enumerate(counts):
        for sign, side in ((1, a), (-1, b)):
            for word, count in side.items():
                if word in column:
                    rows.append(row)
                    columns.append(column[word])
                    entries.append(float(sign * count))
    features = scipy.sparse.csr_array((entries, (rows, columns)), shape=(len(counts), len(vocabulary)))

    def loss(weights: Floats) -> tuple[float, Floats]:
        margins = np.asarray(features.dot(weights))
        gradient = l2 * weights - np.asarray(features.T.dot(scipy.special.expit(-margins))) / len(counts)
        return float(np.logaddexp(0.0, -margins).mean() + l2 / 2 * weights @ weights), gradient

    start = np.zeros(len(vocabulary))
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return BagOfWords(dict(zip(vocabulary, found.x.tolist(), strict=True)))


def _bag_of_words_of(pairs: Sequence[PreferencePair]) -> BagOfWords | None:
    """A bag of words trained on the first 4000 of these pairs that have a right side; None if none has one."""
    decided = [pair for pair in pairs if pair.label != 0.5][:MOST_TRAINING_PAIRS]
    return fit_bag_of_words([p.chosen for p in decided], [p.rejected for p in decided]) if decided else None


def cross_fitted_bag_of_words(pairs: Sequence[PreferencePair]) -> tuple[Floats, Floats] | None:
    """Scores of the chosen and the rejected replies, [num_pairs] each, by a bag of words that was trained on the pairs
    of the other half of the prompts (at most 4000 of them). Pairs with an even label are not trained on.

    Prompts go to the two halves in turn, in the order of their ids. None if a half would have nothing to train on.
    """
    prompts = [prompt_id(pair.prompt.messages) for pair in pairs]
    half_of = {prompt: number % 2 for number, prompt in enumerate(sorted(set(prompts)))}
    halves = np.array([half_of[prompt] for prompt in prompts])
    scores = np.zeros((2, len(pairs)))
    for half in (0, 1):
        judge = _bag_of_words_of([pair for pair, own in zip(pairs, halves, strict=True) if own != half])
        if judge is None:
            return None
        for i in np.flatnonzero(halves == half).tolist():
            scores[:, i] = judge.score(pairs[i].chosen), judge.score(pairs[i].rejected)
    return scores[0], scores[1]


def prompt_correlation(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Intraclass correlation of the two rewards of a pair: 1 if the reward depends on the prompt alone, about 0 if it
    does not depend on it, below 0 if replies to one prompt differ more than replies to any.

        1 - mean((chosen - rejected)^2) / (2 s^2),   s^2 the sample variance of all rewards

    nan if all rewards are equal.
    """
    a, b = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    both = np.concatenate([a, b])
    if both.size < 2 or np.ptp(both) == 0:
        return math.nan
    return float(1 - np.square(a - b).mean() / (2 * both.var(ddof=1)))


def resembles(rewards: ArrayLike, lengths: ArrayLike) -> Literal["constant", "length"] | None:
    """The simple scorer that these rewards of replies are those of, if they are: "constant" if all are equal, "length"
    if they rise or fall with the length of the reply alone (see `LENGTH_ONLY` and `FEWEST_REPLIES`)."""
    flat = np.asarray(rewards, dtype=np.float64)
    if np.ptp(flat) == 0:
        return "constant"
    return "length" if flat.size >= FEWEST_REPLIES and abs(spearman(flat, lengths)) >= LENGTH_ONLY else None


def calibration(logits: ArrayLike, outcomes: ArrayLike, *, num_bins: int = 10) -> dict[str, Any]:
    """Reliability bins, expected calibration error (over 15 bins) and Brier score of sigmoid(logits), as JSON values.

    Outcomes are 0 or 1, or a probability in between. The replies of each pair have to be in random order: if the chosen
    reply is always the first, every outcome is at least a half and the bins show nothing.
    """
    forecasts = scipy.special.expit(np.asarray(logits, dtype=np.float64))
    bins = reliability_bins(forecasts, outcomes, num_bins=num_bins)
    return {
        "reliability": [dataclasses.asdict(one) for one in bins],
        "ece": expected_calibration_error(forecasts, outcomes),
        "brier": brier_score(forecasts, outcomes),
    }


def ordering_accuracy(
    chosen_scores: ArrayLike, rejected_scores: ArrayLike, prompts: Sequence[str] | None = None
) -> Interval:
    """Share of pairs whose chosen side scores higher, with a tie as half a pair, and its interval.

    If there are several `prompts` (ids) and some repeat, pairs of one prompt are not independent, so whole prompts are
    resampled. Otherwise the interval is Wilson's.
    """
    if prompts is not None and 1 < len(set(prompts)) < len(prompts):
        return win_rate(chosen_scores, rejected_scores, groups=prompts)
    margins = np.asarray(chosen_scores, dtype=np.float64) - np.asarray(rejected_scores, dtype=np.float64)
    return wilson(float((margins > 0).sum() + 0.5 * (margins == 0).sum()), margins.size)


def reward_card(
    pairs: Sequence[PreferencePair],
    *,
    score_chosen: ArrayLike,
    score_rejected: ArrayLike,
    training_pairs: Sequence[PreferencePair] = (),
    probability_chosen: ArrayLike | None = None,
    bayes_accuracy: float | None = None,
    slices: Sequence[str] = (),
    num_margin_bins: int = 5,
    num_calibration_bins: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """The card of a reward model on held-out pairs, as JSON values; the reward stage's summary.

    `score_chosen` and `score_rejected` are its rewards, [num_pairs]. Pairs with an even label (0.5) have no right side.
    They are left out of every accuracy and of `auc`, and counted in `num_even`; `reliability`, `ece`, `brier` and
    `temperature` compare with the labels, even ones too, and `calibrated` has the first three after the rewards were
    divided by the temperature. Intervals of accuracies resample whole prompts. `slices` names the slice of each pair,
    if there are any, and `by_slice` has the accuracy in each.

    `bag_of_words` is the accuracy of a bag of words that was trained on the `training_pairs`, or without any on the
    other half of the prompts. `random` is the accuracy of a score that knows nothing or sees only the prompt: it ties
    every pair. `prompt_correlation` says how far the reward itself is one of the prompt, and `resembles` names the
    simple scorer that it amounts to, if it does.

    `bayes_accuracy` is the highest accuracy that any judge could reach against these noisy annotators. If it is not
    given, it is the mean of max(p, 1 - p) over `probability_chosen` (the known chance that a simulated annotator
    prefers `chosen`) if every label is 1; otherwise it is absent, because several votes are more often right than one.
    `share_of_bayes` says how far accuracy goes from chance (0) to that limit (1). Lengths are in words. `seed` decides
    only which side of a pair is put first for calibration.
    """
    chosen = np.asarray(score_chosen, dtype=np.float64)
    rejected = np.asarray(score_rejected, dtype=np.float64)
    num_pairs = len(pairs)
    if not num_pairs or chosen.shape != (num_pairs,) or rejected.shape != (num_pairs,):
        raise ValueError(f"{num_pairs} pairs need one score for each side; got {chosen.shape} and {rejected.shape}")
    if slices and len(slices) != num_pairs:
        raise ValueError(f"{num_pairs} pairs need one slice each; got {len(slices)}")
    labels = np.array([pair.label for pair in pairs], dtype=np.float64)
    # rows of one prompt may have other ids
    right = _Accuracy(labels != 0.5, np.array([prompt_id(pair.prompt.messages) for pair in pairs]))
    chosen_words, rejected_words = (
        np.array([len(words(getattr(pair, side))) for pair in pairs], dtype=np.float64) for side in SIDES
    )
    rewards, lengths = np.concatenate([chosen, rejected]), np.concatenate([chosen_words, rejected_words])
    accuracy = right.of(chosen, rejected)
    decided = right.decided
    card: dict[str, Any] = {
        "num_pairs": num_pairs,
        "num_even": num_pairs - int(decided.sum()),
        **accuracy.named("accuracy"),
        **right.of(chosen_words, rejected_words).named("longer_wins"),
        "auc": auc(np.concatenate([chosen[decided], rejected[decided]]), np.repeat([1.0, 0.0], decided.sum())),
        "random": 0.5,
        "resembles": resembles(rewards, lengths),
        "length_spearman": spearman(rewards, lengths),
        "prompt_correlation": prompt_correlation(chosen, rejected),
        "by_margin": _by_margin((chosen - rejected)[decided], right.prompts[decided], num_margin_bins),
        "by_length": _by_length(rewards, lengths, num_margin_bins),
    }
    named = np.array(slices)
    for table, parts in (
        ("slices", _slices_of_length(chosen_words, rejected_words)),
        ("by_slice", {name: named == name for name in dict.fromkeys(slices)}),
    ):
        card[table] = {name: as_share(right.of(chosen, rejected, among)) for name, among in parts.items()}
    if by_words := _scores_by_words(pairs, training_pairs):
        card |= right.of(*by_words).named("bag_of_words")
    card |= _as_probabilities(chosen - rejected, labels, num_bins=num_calibration_bins, seed=seed)
    if bayes_accuracy is None and probability_chosen is not None and (labels == 1).all():
        p = np.asarray(probability_chosen, dtype=np.float64)
        bayes_accuracy = float(np.maximum(p, 1 - p).mean())
    return card | ({} if bayes_accuracy is None else _of_bayes(accuracy.value, bayes_accuracy))


def _of_bayes(accuracy: float, limit: float) -> dict[str, float]:
    """The highest accuracy that any judge could reach, and how far this one goes from chance to that limit."""
    share = {"share_of_bayes": (accuracy - 0.5) / (limit - 0.5)} if limit > 0.5 else {}
    return {"bayes_accuracy": limit} | share


@dataclass(frozen=True)
class _Accuracy:
    """The accuracy of scores on pairs, among those that have a right side."""

    decided: Bools
    """[num_pairs], whether a pair has a right side."""
    prompts: Strings
    """[num_pairs], the prompt of each pair."""

    def of(self, chosen: Floats, rejected: Floats, among: Bools | None = None) -> Interval:
        """The share of the pairs whose chosen side scores higher, or of those `among` them."""
        kept = self.decided if among is None else self.decided & among
        return ordering_accuracy(chosen[kept], rejected[kept], self.prompts[kept].tolist())


def _slices_of_length(chosen: Floats, rejected: Floats) -> dict[str, Bools]:
    """The pairs of replies of equal length, with a shorter chosen reply, and with a longer one."""
    difference = chosen - rejected
    matched = np.abs(difference) < LENGTH_MATCHED * np.maximum(chosen, rejected)
    return {
        "length_matched": matched | (difference == 0),
        "chosen_shorter": difference < 0,
        "chosen_longer": difference > 0,
    }


def _scores_by_words(
    pairs: Sequence[PreferencePair], training_pairs: Sequence[PreferencePair]
) -> tuple[Floats, Floats] | None:
    """Scores of both sides by a bag of words of the training pairs, or without any of the other half of the prompts;
    None if there is nothing to train it on."""
    if not training_pairs:
        return cross_fitted_bag_of_words(pairs)
    judge = _bag_of_words_of(training_pairs)
    if judge is None:
        return None
    chosen, rejected = (np.array([judge.score(getattr(pair, side)) for pair in pairs]) for side in SIDES)
    return chosen, rejected


def _as_probabilities(margins: Floats, labels: Floats, *, num_bins: int, seed: int) -> dict[str, Any]:
    """What the margins [num_pairs] say of the labels as logits, and after a division by the fitted temperature."""
    # random orientation: with the chosen reply always first, no outcome would be below a half
    flipped = np.random.default_rng(seed).random(margins.size) < 0.5
    logits = np.where(flipped, -margins, margins)
    outcomes = np.where(flipped, 1 - labels, labels)
    # one temperature changes no order, so it is fitted on the very pairs that it describes
    temperature = fit_temperature(logits, outcomes)
    calibrated = calibration(logits / temperature, outcomes, num_bins=num_bins)
    return {
        "temperature": temperature,
        **calibration(logits, outcomes, num_bins=num_bins),
        "calibrated": calibrated,
    }


def as_share(interval: Interval) -> dict[str, float]:
    """An accuracy as the tables of a card hold it."""
    return {"accuracy": interval.value, "low": interval.low, "high": interval.high, "count": interval.count}


def _by_margin(margins: Floats, prompt_ids: Strings, num_bins: int) -> list[dict[str, float]]:
    """Accuracy in equal-mass bins of the absolute reward difference: a useful model is right when it is certain."""
    sizes = np.abs(margins)
    bins: list[dict[str, float]] = []
    for members in np.array_split(np.argsort(sizes, kind="stable"), min(num_bins, sizes.size)) if sizes.size else ():
        share = ordering_accuracy(margins[members], np.zeros(members.size), prompt_ids[members].tolist())
        bins.append(
            {
                "low": float(sizes[members[0]]),
                "high": float(sizes[members[-1]]),
                **share.named("accuracy"),
                "count": members.size,
            }
        )
    return bins


def _by_length(rewards: Floats, lengths: Floats, num_bins: int) -> list[dict[str, float]]:
    """Mean reward in equal-mass bins of reply length, over both sides of every pair."""
    return [
        {
            "low": float(lengths[members[0]]),
            "high": float(lengths[members[-1]]),
            "mean_length": float(lengths[members].mean()),
            "mean_reward": float(rewards[members].mean()),
            "count": members.size,
        }
        for members in np.array_split(np.argsort(lengths, kind="stable"), min(num_bins, lengths.size))
    ]
