from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize

from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.evals.reward_card import (
    calibration,
    cross_fitted_bag_of_words,
    fit_bag_of_words,
    ordering_accuracy,
    prompt_correlation,
    resembles,
    reward_card,
)
from trimtab.evals.text import words
from trimtab.stats import wilson, win_rate

PROMPT = Prompt(messages=(Message("user", "Where is my parcel?"),))


def pair(chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt=PROMPT, chosen=chosen, rejected=rejected)


def simulated(num_pairs: int = 4000, length_bias: float = 0.0) -> dict[str, object]:
    """Utilities compared by Bradley-Terry annotators; the reward is the utility plus a taste for length."""
    generator = np.random.default_rng(0)
    utilities = generator.normal(size=(num_pairs, 2))
    lengths = generator.integers(1, 30, size=(num_pairs, 2))
    p_first = 1 / (1 + np.exp(-(utilities[:, 0] - utilities[:, 1])))
    first = generator.uniform(size=num_pairs) < p_first
    rewards = utilities + length_bias * lengths
    rows = np.arange(num_pairs)
    chosen, rejected = np.where(first, 0, 1), np.where(first, 1, 0)
    return {
        "pairs": [
            pair("word " * a, "word " * b) for a, b in zip(lengths[rows, chosen], lengths[rows, rejected], strict=True)
        ],
        "score_chosen": rewards[rows, chosen],
        "score_rejected": rewards[rows, rejected],
        "probability_chosen": np.where(first, p_first, 1 - p_first),
    }


def test_a_small_card_worked_by_hand():
    lengths = [(10, 5), (10, 20), (20, 20), (100, 95)]
    card = reward_card(
        [pair("word " * a, "word " * b) for a, b in lengths],
        score_chosen=[2.0, 1.0, 0.0, 5.0],
        score_rejected=[1.0, 1.0, 3.0, 0.0],
        num_margin_bins=2,
    )
    assert card["accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (card["accuracy_low"], card["accuracy_high"]) == (wilson(2.5, 4).low, wilson(2.5, 4).high)
    assert card["longer_wins"] == (1 + 0 + 0.5 + 1) / 4
    # pairs 3 and 4 are of equal length: 20 = 20 and |100 - 95| < 10
    assert card["slices"]["length_matched"]["accuracy"] == (0 + 1) / 2
    half = wilson(0.5, 1)
    assert card["slices"]["chosen_shorter"] == {"accuracy": 0.5, "low": half.low, "high": half.high, "count": 1}
    assert card["slices"]["chosen_longer"]["count"] == 2
    small, large = card["by_margin"]
    assert (small["low"], small["high"], small["accuracy"], small["count"]) == (0, 1, 0.75, 2)
    assert (large["low"], large["high"], large["accuracy"], large["count"]) == (3, 5, 0.5, 2)
    # wins of a chosen reward over any rejected one: 2 beats 1, 1, 0; 1 beats 0 and ties 1, 1; 0 ties 0; 5 beats all
    assert card["auc"] == (3 + 2 + 0.5 + 4) / 16
    assert "bayes_accuracy" not in card
    assert "bag_of_words" not in card


def test_the_true_utility_reaches_the_bayes_limit_and_is_calibrated():
    card = reward_card(**simulated())
    assert card["accuracy_low"] <= card["bayes_accuracy"] <= card["accuracy_high"]
    assert card["share_of_bayes"] == pytest.approx(1, abs=0.1)
    assert card["temperature"] == pytest.approx(1, abs=0.1)
    assert card["ece"] < 0.05
    assert abs(card["length_spearman"]) < 0.05
    accuracies = [b["accuracy"] for b in card["by_margin"]]
    assert accuracies == sorted(accuracies)


def test_calibration_is_not_degenerate_though_chosen_comes_first():
    low, *_, high = reward_card(**simulated())["reliability"]
    assert low["mean_probability"] < 0.2
    assert high["mean_probability"] > 0.8
    assert low["accuracy"] == pytest.approx(low["mean_probability"], abs=0.06)
    assert high["accuracy"] == pytest.approx(high["mean_probability"], abs=0.06)


def test_a_taste_for_length_shows():
    card = reward_card(**simulated(length_bias=0.2))
    assert card["length_spearman"] > 0.6
    assert card["slices"]["chosen_longer"]["accuracy"] > card["slices"]["chosen_shorter"]["accuracy"] + 0.4
    rewards = [b["mean_reward"] for b in card["by_length"]]
    assert rewards == sorted(rewards)


def test_a_card_given_the_bayes_limit_passes_it_on():
    card = reward_card(**simulated(), bayes_accuracy=0.9)
    assert card["bayes_accuracy"] == 0.9
    assert card["share_of_bayes"] == pytest.approx((card["accuracy"] - 0.5) / 0.4)


def test_a_card_is_plain_json():
    card = reward_card(**simulated(50), training_pairs=[pair("word", ""), pair("word word", "word")])
    assert json.loads(json.dumps(card)) == card
    # the only word counts for the chosen side, so this bag of words is the longer-wins baseline
    assert card["bag_of_words"] == card["longer_wins"]


def test_the_bag_of_words_learns_nothing_from_even_pairs():
    """Pairs with an even label have no right side, which a regression on their sides would invent."""
    decided = [pair("word", ""), pair("word word", "word")]
    even = [replace(pair("", "word word word"), label=0.5) for _ in range(20)]
    found = reward_card(**simulated(50), training_pairs=[*even, *decided])
    assert found["bag_of_words"] == found["longer_wins"]
    assert "bag_of_words" not in reward_card(**simulated(50), training_pairs=even)


def test_a_card_of_even_pairs_alone_has_no_accuracy():
    card = reward_card([replace(pair("a", "b"), label=0.5)] * 3, score_chosen=[1.0] * 3, score_rejected=[0.0] * 3)
    assert (card["num_pairs"], card["num_even"]) == (3, 3)
    assert all(np.isnan(card[name]) for name in ("accuracy", "longer_wins", "auc"))
    assert card["by_margin"] == []
    assert "bag_of_words" not in card


def test_scores_that_do_not_match_the_pairs_are_refused():
    with pytest.raises(ValueError, match="1 pairs need one score for each side"):
        reward_card([pair("a", "b")], score_chosen=[1.0], score_rejected=[1.0, 2.0])


def test_the_bag_of_words_minimises_the_stated_loss():
    chosen, rejected, l2 = ["good reply", "good good thing", "bad luck"], ["bad reply", "a thing", "bad bad"], 0.1
    judge = fit_bag_of_words(chosen, rejected, l2=l2)
    vocabulary = sorted({w for text in chosen + rejected for w in words(text)})

    def loss(weights):
        total = 0.0
        for a, b in zip(chosen, rejected, strict=True):
            margin = sum(w * (words(a).count(v) - words(b).count(v)) for v, w in zip(vocabulary, weights, strict=True))
            total += np.log1p(np.exp(-margin))
        return total / 3 + l2 / 2 * np.sum(np.square(weights))

    slow = scipy.optimize.minimize(loss, np.zeros(len(vocabulary)), tol=1e-12)
    assert [judge.weights[v] for v in vocabulary] == pytest.approx(slow.x, abs=1e-3)
    assert judge.score("good bad unseen") == pytest.approx(judge.weights["good"] + judge.weights["bad"])


def test_the_bag_of_words_finds_the_word_that_decides():
    generator = np.random.default_rng(0)
    fillers = [f"word{i}" for i in range(30)]

    def texts(extra: str, num: int) -> list[str]:
        return [" ".join([*generator.choice(fillers, 8), extra]) for _ in range(num)]

    judge = fit_bag_of_words(texts("thanks", 300), texts("whatever", 300))
    held_out = ([judge.score(t) for t in texts("thanks", 100)], [judge.score(t) for t in texts("whatever", 100)])
    assert ordering_accuracy(*held_out).value > 0.95


def test_the_vocabulary_keeps_the_commonest_words_whatever_the_order_of_the_pairs():
    chosen, rejected = ["b a", "c a"], ["a d", "a e"]
    here = fit_bag_of_words(chosen, rejected, max_words=3)
    there = fit_bag_of_words(chosen[::-1], rejected[::-1], max_words=3)
    assert set(here.weights) == set(there.weights) == {"a", "b", "c"}


def labelled(*labels: float) -> list[PreferencePair]:
    return [
        PreferencePair(prompt=Prompt(messages=(Message("user", str(i)),)), chosen="a", rejected="b", label=label)
        for i, label in enumerate(labels)
    ]


def test_a_model_that_knows_how_sure_the_voters_are_is_calibrated():
    margin = np.full(100, np.log(0.6 / 0.4))
    card = reward_card(labelled(*[0.6] * 100), score_chosen=margin, score_rejected=np.zeros(100))
    assert card["ece"] == pytest.approx(0, abs=1e-12)
    assert card["temperature"] == pytest.approx(1, abs=1e-4)
    assert card["accuracy"] == 1


def test_an_even_label_has_no_right_side():
    card = reward_card(labelled(1.0, 0.5, 0.5), score_chosen=[1.0, 0.0, 0.0], score_rejected=[0.0, 3.0, 2.0])
    assert (card["accuracy"], card["auc"], card["num_pairs"], card["num_even"]) == (1, 1, 3, 2)
    assert sum(part["count"] for part in card["by_margin"]) == 1
    assert np.isnan(reward_card(labelled(0.5), score_chosen=[1.0], score_rejected=[0.0])["accuracy"])


def test_the_limit_of_single_votes_is_none_for_majorities():
    chances = {"probability_chosen": [0.7, 0.7], "score_chosen": [1.0, 1.0], "score_rejected": [0.0, 0.0]}
    assert reward_card(labelled(1.0, 1.0), **chances)["bayes_accuracy"] == pytest.approx(0.7)
    assert "bayes_accuracy" not in reward_card(labelled(1.0, 2 / 3), **chances)


def asked(question: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt=Prompt(messages=(Message("user", question),)), chosen=chosen, rejected=rejected)


def test_a_constant_scorer_gets_half_of_the_pairs_and_is_called_one():
    pairs = [asked(str(i // 2), "word " * (i + 2), "word") for i in range(6)]
    card = reward_card(pairs, score_chosen=np.full(6, 0.3), score_rejected=np.full(6, 0.3))
    assert (card["accuracy"], card["auc"], card["resembles"]) == (0.5, 0.5, "constant")
    assert all(part["accuracy"] == 0.5 for part in card["by_margin"])
    assert np.isnan(card["prompt_correlation"])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scorer_of_length_is_called_one_in_whatever_unit_it_counts(sign):
    generator = np.random.default_rng(1)

    def text() -> str:
        letters = generator.integers(1, 10, size=generator.integers(3, 80))
        return " ".join("a" * n for n in letters)

    pairs = [asked(str(i), text(), text()) for i in range(100)]
    by_letters = [[sign * len(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected")]
    card = reward_card(pairs, score_chosen=by_letters[0], score_rejected=by_letters[1])
    assert card["resembles"] == "length"
    noisy = [np.array(side) + generator.normal(0, 100, 100) for side in by_letters]
    assert reward_card(pairs, score_chosen=noisy[0], score_rejected=noisy[1])["resembles"] is None


def test_what_scores_resemble_worked_by_hand():
    assert resembles([2.0, 2.0], [1.0, 5.0]) == "constant"
    rising = np.arange(20.0)
    assert resembles(rising**3, rising) == "length"
    assert resembles(-rising, rising) == "length"
    assert resembles(rising[:19], rising[:19]) is None  # too few to tell
    assert resembles(np.roll(rising, 7), rising) is None
    assert resembles(rising, np.full(20, 4.0)) is None  # of one length


def test_accuracy_by_slice_counts_the_pairs_of_each():
    pairs = [asked(str(i), "a", "b") for i in range(3)]
    scores = {"score_chosen": [1.0, 0.0, 1.0], "score_rejected": [0.0, 1.0, 0.0]}
    card = reward_card(pairs, **scores, slices=["maths", "maths", "talk"])
    assert card["by_slice"]["maths"]["accuracy"] == 0.5
    assert card["by_slice"]["talk"] == {
        "accuracy": 1.0,
        "low": wilson(1, 1).low,
        "high": wilson(1, 1).high,
        "count": 1,
    }
    assert reward_card(pairs, **scores)["by_slice"] == {}
    with pytest.raises(ValueError, match="3 pairs need one slice each; got 1"):
        reward_card(pairs, **scores, slices=["maths"])


def test_intervals_of_slices_resample_prompts():
    pairs = [asked(str(i // 4), "a a", "b") for i in range(40)]
    chosen = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 4)
    card = reward_card(pairs, score_chosen=chosen, score_rejected=np.full(40, 0.5))
    clustered = win_rate(chosen, np.full(40, 0.5), groups=[str(i // 4) for i in range(40)])
    part = card["slices"]["chosen_longer"]
    assert (part["low"], part["high"]) == (clustered.low, clustered.high)
    # four pairs that stand or fall together count as about one
    naive = wilson(24, 40)
    assert part["high"] - part["low"] > 1.5 * (naive.high - naive.low)


def test_the_share_of_the_prompt_in_the_reward():
    assert prompt_correlation([1.0, 2.0], [1.0, 2.0]) == 1  # the prompt alone
    # mean 1.5, s^2 = (4 * 0.25) / 3 = 1/3; both pairs differ by 1, so 1 - 1 / (2/3)
    assert prompt_correlation([2.0, 1.0], [1.0, 2.0]) == pytest.approx(-0.5)
    rewards = np.random.default_rng(0).normal(size=(2, 5000))
    assert prompt_correlation(rewards.max(0), rewards.min(0)) == pytest.approx(0, abs=0.05)


def test_calibration_worked_by_hand():
    logits, outcomes = np.log([1 / 3, 1 / 3, 3, 3]), [0, 1, 1, 1]  # forecasts 1/4, 1/4, 3/4, 3/4
    found = calibration(logits, outcomes, num_bins=2)
    assert found["brier"] == pytest.approx((1 / 16 + 9 / 16 + 1 / 16 + 1 / 16) / 4)
    # one bin for each of so few forecasts
    assert found["ece"] == pytest.approx((0.25 + 0.75 + 0.25 + 0.25) / 4)
    assert [one["count"] for one in found["reliability"]] == [2, 2]


def test_the_temperature_mends_a_model_that_is_too_sure():
    sure = simulated()
    sure |= {side: 5 * sure[side] for side in ("score_chosen", "score_rejected")}
    card = reward_card(**sure)
    assert card["temperature"] == pytest.approx(5, abs=0.4)
    assert card["ece"] > 0.1
    assert card["calibrated"]["ece"] < 0.03
    assert card["calibrated"]["brier"] < card["brier"]


def test_the_bag_of_words_without_training_pairs_learns_from_the_other_half_of_the_prompts():
    pairs = [asked(str(i), f"good thing {i}", f"bad thing {i}") for i in range(10)]
    chosen, rejected = cross_fitted_bag_of_words(pairs)
    assert (chosen > rejected).all()
    assert reward_card(pairs, score_chosen=np.zeros(10), score_rejected=np.zeros(10))["bag_of_words"] == 1
    # words that occur under one prompt alone are unknown to the half that has not seen them
    own = [asked(str(i), f"yes{i}", f"no{i}") for i in range(10)]
    chosen, rejected = cross_fitted_bag_of_words(own)
    assert (chosen == 0).all()
    assert (rejected == 0).all()
    assert cross_fitted_bag_of_words(own[:1]) is None
