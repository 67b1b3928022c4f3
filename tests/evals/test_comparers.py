from __future__ import annotations

import numpy as np
import pytest

from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.evals.comparers import (
    LENGTH,
    Opinion,
    RecordedComparer,
    ReplyPair,
    ScoreComparer,
    agreement,
    agreement_of_words,
    verdicts_by,
)
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import win_rate_of


def prompt(text, *more):
    return Prompt(messages=(*more, Message("user", text)))


def pair(text, reply, other):
    return ReplyPair(prompt=prompt(text), reply=reply, baseline_reply=other)


class Positional:
    """A judge that always prefers the reply that it sees first."""

    name = "first"

    def compare(self, pairs):
        return [(Opinion(1.0, "model"), Opinion(0.0, "baseline")) for _ in pairs]


class Leftmost:
    """A judge that always prefers the model's side."""

    name = "left"

    def compare(self, pairs):
        return [(Opinion(1.0),) for _ in pairs]


def test_scores_are_compared_and_equal_ones_tie_and_unknown_ones_say_nothing():
    scores = {"good": 2.0, "bad": -1.0, "also good": 2.0, "unread": np.nan}
    comparer = ScoreComparer("by hand", lambda texts: np.array([scores[text] for _, text in texts]))
    pairs = [
        pair("p", "good", "bad"),
        pair("q", "bad", "good"),
        pair("r", "good", "also good"),
        pair("s", "good", "unread"),
    ]
    found, num_unjudged = verdicts_by(comparer, pairs, model="mine", baseline="base")
    assert [(v.prompt, v.verdict) for v in found] == [("p", 1.0), ("q", 0.0), ("r", 0.5)]
    assert num_unjudged == 1
    assert {(v.model, v.baseline, v.judge, v.length) for v in found[:1]} == {("mine", "base", "by hand", 4)}
    assert [own[0].verdict for own in LENGTH.compare([pair("p", "a b c", "a b"), pair("q", "a", "b")])] == [1.0, 0.5]


def test_a_judge_of_positions_gives_even_models_and_is_seen_through():
    found, _ = verdicts_by(Positional(), [pair(str(i), "x", "y") for i in range(5)], model="m", baseline="b")
    rate = win_rate_of(found)
    assert (rate.rate.value, rate.first_shown.value, rate.flip_fraction) == (0.5, 1.0, 1.0)


def test_recorded_verdicts_are_found_from_either_side_by_prompt_and_texts():
    asked = prompt("and now?", Message("user", "hi"), Message("assistant", "hello"))
    given = [
        PairVerdict(prompt="p", model="m", baseline="b", verdict=1.0, shown_first="model").with_replies("x", "y"),
        PairVerdict(prompt=asked.id, model="m", baseline="b", verdict=0.5).with_replies("x", "y"),
        PairVerdict(prompt="p", model="m", baseline="b", verdict=1.0),  # without texts
    ]
    comparer = RecordedComparer("people", given)
    assert comparer.compare([pair("p", "x", "y"), pair("p", "y", "x")]) == [
        (Opinion(1.0, "model"),),
        (Opinion(0.0, "baseline"),),
    ]
    assert comparer.compare([ReplyPair(prompt=asked, reply="y", baseline_reply="x")]) == [(Opinion(0.5),)]
    assert comparer.compare([pair("q", "x", "y"), pair("q", "same", "same")]) == [(), (Opinion(0.5),)]


def chosen_longer(num, share, generator):
    """Pairs of distinct prompts whose chosen reply is the longer one with this probability."""
    pairs = []
    for i in range(num):
        sides = ["w " * 20, "w " * 10] if generator.random() < share else ["w " * 10, "w " * 20]
        pairs.append(PreferencePair(prompt=prompt(str(i)), chosen=sides[0], rejected=sides[1]))
    return pairs


def test_agreement_is_the_share_of_pairs_ordered_as_people_do():
    pairs = [
        PreferencePair(prompt=prompt("p"), chosen="a b", rejected="a"),
        PreferencePair(prompt=prompt("q"), chosen="a", rejected="a b"),
        PreferencePair(prompt=prompt("r"), chosen="a", rejected="b"),
        PreferencePair(prompt=prompt("s"), chosen="a b", rejected="a", label=0.5),
        PreferencePair(prompt=prompt("t"), chosen="a b c", rejected="a", label=0.6),
    ]
    found = agreement(pairs, LENGTH)
    assert found.rate.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert (found.rate.count, found.num_ties, found.num_unjudged) == (4, 1, 0)


def test_a_comparer_that_knows_nothing_agrees_with_half_of_the_pairs_even_if_it_always_takes_one_side():
    pairs = chosen_longer(400, 0.7, np.random.default_rng(0))
    left = agreement(pairs, Leftmost())
    assert left.rate.low < 0.5 < left.rate.high
    assert agreement(pairs, Positional()).rate.value == 0.5
    constant = agreement(pairs, ScoreComparer("constant", lambda texts: np.zeros(len(texts))))
    assert (constant.rate.value, constant.num_ties) == (0.5, 400)
    assert agreement(pairs, LENGTH).rate.value == pytest.approx(
        np.mean([len(p.chosen) > len(p.rejected) for p in pairs])
    )


def test_pairs_of_one_prompt_are_resampled_together():
    pairs = [
        PreferencePair(
            prompt=prompt(str(i)), chosen="a b" if i % 2 else "a", rejected=("a" if i % 2 else "a b") + " " * k
        )
        for i in range(20)
        for k in range(10)
    ]
    clustered = agreement(pairs, LENGTH).rate
    assert clustered.high - clustered.low > 0.3  # Wilson over 200 pairs would give 0.14


def test_pairs_that_a_comparer_does_not_know_are_counted_and_in_no_rate():
    pairs = chosen_longer(3, 1.0, np.random.default_rng(0))
    known = PairVerdict(prompt="0", model="m", baseline="b", verdict=1.0).with_replies(
        pairs[0].chosen, pairs[0].rejected
    )
    found = agreement(pairs, RecordedComparer("people", [known]))
    assert (found.rate.value, found.rate.count, found.num_unjudged) == (1.0, 1, 2)


def test_a_bag_of_words_learns_from_the_other_half_of_the_prompts():
    generator = np.random.default_rng(0)
    pairs = [
        PreferencePair(
            prompt=prompt(str(i)), chosen=f"{'yes' if generator.random() < 0.9 else 'no'} {i}", rejected=f"well {i}"
        )
        for i in range(60)
    ]
    found = agreement_of_words(pairs)
    assert found.rate.value > 0.8
    assert found.rate.count == 60
    assert agreement_of_words([PreferencePair(prompt=prompt("p"), chosen="a", rejected="b", label=0.5)]) is None
