"""The card of a reward model: how well it orders held-out replies, and by which simple features it may do so."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from trimtab.core.types import PreferencePair, prompt_id
from trimtab.evals.text import words
from trimtab.stats import (
    Floats,
    Interval,
    auc,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
    spearman,
    wilson,
    win_rate,
)

LENGTH_MATCHED = 0.1
"""Two replies are of equal length when they differ by less than this share of the longer one."""


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
    num_margin_bins: int = 5,
    num_calibration_bins: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """The card of a reward model on held-out pairs, as JSON values; the reward stage's summary.

    `score_chosen` and `score_rejected` are its rewards, [num_pairs]. Pairs with an even label (0.5) have no right side.
    They are left out of every accuracy and of `auc`, and counted in `num_even`; `reliability`, `ece` and `temperature`
    compare with the labels, even ones too. If there are `training_pairs`, a bag of words is trained on them, and
    `bag_of_words` is its accuracy on `pairs`. `bayes_accuracy` is the highest accuracy that any judge could reach
    against these noisy annotators. If it is not given, it is the mean of max(p, 1 - p) over `probability_chosen` (the
    known chance that a simulated annotator prefers `chosen`) if every label is 1; otherwise it is absent, because
    several votes are more often right than one. `share_of_bayes` says how far accuracy goes from chance (0) to that
    limit (1). Lengths are in words. `seed` decides only which side of a pair is put first for calibration.
    """
    chosen = np.asarray(score_chosen, dtype=np.float64)
    rejected = np.asarray(score_rejected, dtype=np.float64)
    num_pairs = len(pairs)
    if not num_pairs or chosen.shape != (num_pairs,) or rejected.shape != (num_pairs,):
        raise ValueError(f"{num_pairs} pairs need one score for each side; got {chosen.shape} and {rejected.shape}")
    chosen_lengths = np.array([len(words(pair.chosen)) for pair in pairs], dtype=np.float64)
    rejected_lengths = np.array([len(words(pair.rejected)) for pair in pairs], dtype=np.float64)

    labels = np.array([pair.label for pair in pairs], dtype=np.float64)
    decided = labels != 0.5
    # rows of one prompt may have ids of their own
    prompts = [prompt_id(pair.prompt.messages) for pair in compress(pairs, decided)]

    def share_right(chosen_scores: Floats, rejected_scores: Floats) -> Interval:
        return ordering_accuracy(chosen_scores[decided], rejected_scores[decided], prompts)

    accuracy = share_right(chosen, rejected)
    longer = share_right(chosen_lengths, rejected_lengths)
    card: dict[str, Any] = {
        "num_pairs": num_pairs,
        "num_even": num_pairs - int(decided.sum()),
        **accuracy.named("accuracy"),
        **longer.named("longer_wins"),
        "auc": auc(np.concatenate([chosen[decided], rejected[decided]]), np.repeat([1.0, 0.0], decided.sum())),
        "length_spearman": spearman(
            np.concatenate([chosen, rejected]), np.concatenate([chosen_lengths, rejected_lengths])
        ),
        "by_margin": _by_margin((chosen - rejected)[decided], num_margin_bins),
        "by_length": _by_length(
            np.concatenate([chosen, rejected]), np.concatenate([chosen_lengths, rejected_lengths]), num_margin_bins
        ),
    }

    difference = chosen_lengths - rejected_lengths
    matched = np.abs(difference) < LENGTH_MATCHED * np.maximum(chosen_lengths, rejected_lengths)
    slices = {
        "length_matched": matched | (difference == 0),
        "chosen_shorter": difference < 0,
        "chosen_longer": difference > 0,
    }
    card["slices"] = {
        name: _share(ordering_accuracy(chosen[m & decided], rejected[m & decided])) for name, m in slices.items()
    }

    if training_pairs:
        judge = fit_bag_of_words([pair.chosen for pair in training_pairs], [pair.rejected for pair in training_pairs])
        bag_of_words = share_right(
            np.array([judge.score(pair.chosen) for pair in pairs]),
            np.array([judge.score(pair.rejected) for pair in pairs]),
        )
        card |= bag_of_words.named("bag_of_words")

    # random orientation: with the chosen reply always first, no outcome would be below a half
    flipped = np.random.default_rng(seed).random(num_pairs) < 0.5
    logits = np.where(flipped, rejected - chosen, chosen - rejected)
    outcomes = np.where(flipped, 1 - labels, labels)
    forecasts = scipy.special.expit(logits)
    card["reliability"] = [
        dataclasses.asdict(b) for b in reliability_bins(forecasts, outcomes, num_bins=num_calibration_bins)
    ]
    card["ece"] = expected_calibration_error(forecasts, outcomes)
    # one temperature changes no order, so it is fitted on the very pairs that it describes, with either side first
    card["temperature"] = fit_temperature(chosen - rejected, labels)

    if bayes_accuracy is None and probability_chosen is not None and (labels == 1).all():
        p = np.asarray(probability_chosen, dtype=np.float64)
        bayes_accuracy = float(np.maximum(p, 1 - p).mean())
    if bayes_accuracy is not None:
        card["bayes_accuracy"] = bayes_accuracy
        if bayes_accuracy > 0.5:
            card["share_of_bayes"] = (accuracy.value - 0.5) / (bayes_accuracy - 0.5)
    return card


def _share(interval: Interval) -> dict[str, float]:
    return {"accuracy": interval.value, "low": interval.low, "high": interval.high, "count": interval.count}


def _by_margin(margins: Floats, num_bins: int) -> list[dict[str, float]]:
    """Accuracy in equal-mass bins of the absolute reward difference: a useful model is right when it is certain."""
    sizes = np.abs(margins)
    bins: list[dict[str, float]] = []
    for members in np.array_split(np.argsort(sizes, kind="stable"), min(num_bins, sizes.size)) if sizes.size else ():
        share = ordering_accuracy(margins[members], np.zeros(members.size))
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
