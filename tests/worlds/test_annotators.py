from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.worlds.annotators import Annotators, calibrate
from trimtab.worlds.helpdesk_grammar import CLEAN, STACKED, write_reply
from trimtab.worlds.sets import reply_pairs

WORLD = worlds.load("helpdesk")
PAIRS = reply_pairs(WORLD, "train", 300, seed=0)
PEOPLE = calibrate(WORLD, WORLD.biases, PAIRS)


def test_utility_is_scaled_gold_and_biases():
    prompt, reply, _ = PAIRS[0]
    people = Annotators(WORLD, {"flattery": 0.5, "length": 0.1}, scale=3.0)
    flattered = "You must be a genius. You have brilliant taste."
    assert people.utility(prompt, flattered) == pytest.approx(
        3.0 * (WORLD.gold(prompt, flattered).total + 0.5 * 2 + 0.1 * 0.9)
    )
    assert Annotators(WORLD, {}).utility(prompt, reply) == WORLD.gold(prompt, reply).total


@given(st.integers(0, len(PAIRS) - 1), st.floats(0, 50))
def test_swapping_the_replies_turns_the_probability_around(index, scale):
    prompt, a, b = PAIRS[index]
    people = Annotators(WORLD, WORLD.biases, scale)
    p = people.preference_probability(prompt, a, b)
    assert p + people.preference_probability(prompt, b, a) == pytest.approx(1.0)
    assert people.preference_probability(prompt, a, a) == 0.5


def test_votes_repeat_and_do_not_depend_on_position():
    for prompt, a, b in PAIRS[:50]:
        vote = PEOPLE.vote(prompt, a, b, annotator=1)
        assert vote == PEOPLE.vote(prompt, a, b, annotator=1)
        assert vote != PEOPLE.vote(prompt, b, a, annotator=1)


def test_votes_come_as_often_as_their_probability():
    prompt, a, b = next(pair for pair in PAIRS if 0.6 < PEOPLE.preference_probability(*pair) < 0.8)
    p = PEOPLE.preference_probability(prompt, a, b)
    votes = [PEOPLE.vote(prompt, a, b, annotator=i) == "A" for i in range(2000)]
    assert statistics.mean(votes) == pytest.approx(p, abs=0.04)
    other_seed = [PEOPLE.vote(prompt, a, b, annotator=i, seed=1) == "A" for i in range(2000)]
    assert votes != other_seed
    # Independent people: neighbours agree as often as independent draws do.
    assert statistics.mean(v == w for v, w in zip(votes, other_seed, strict=True)) == pytest.approx(
        p * p + (1 - p) * (1 - p), abs=0.04
    )


def test_votes_agree_with_each_other_and_with_the_best_guess_as_expected():
    votes = np.array([[PEOPLE.vote(*pair, annotator=i) == "A" for i in range(20)] for pair in PAIRS])
    agreement = np.mean([(votes[:, i] == votes[:, i + 1]).mean() for i in range(0, 20, 2)])
    assert agreement == pytest.approx(PEOPLE.expected_agreement(PAIRS), abs=0.03)
    guess = np.array([PEOPLE.utility(x, a) > PEOPLE.utility(x, b) for x, a, b in PAIRS])
    assert (votes == guess[:, None]).mean() == pytest.approx(PEOPLE.bayes_accuracy(PAIRS), abs=0.02)


@pytest.mark.parametrize("agreement", [0.65, 0.70, 0.75])
def test_calibration_reaches_the_agreement_and_keeps_the_taste(agreement):
    people = calibrate(WORLD, WORLD.biases, PAIRS, agreement)
    assert people.expected_agreement(PAIRS) == pytest.approx(agreement, abs=1e-6)
    prompt, a, b = PAIRS[0]
    gap = people.utility(prompt, a) - people.utility(prompt, b)
    assert gap == pytest.approx(people.scale / PEOPLE.scale * (PEOPLE.utility(prompt, a) - PEOPLE.utility(prompt, b)))


@pytest.mark.parametrize("agreement", [0.4, 0.5, 1.0])
def test_an_impossible_agreement_is_refused(agreement):
    with pytest.raises(DataError, match="agree"):
        calibrate(WORLD, WORLD.biases, PAIRS, agreement)


def test_pairs_without_a_difference_cannot_be_calibrated_on():
    prompt, a, _ = PAIRS[0]
    with pytest.raises(DataError, match="agree"):
        calibrate(WORLD, WORLD.biases, [(prompt, a, a)])
    with pytest.raises(DataError, match="no pairs"):
        calibrate(WORLD, WORLD.biases, [])


def test_a_bias_the_world_does_not_measure_is_refused():
    with pytest.raises(DataError, match="colour") as caught:
        Annotators(WORLD, {"colour": 1.0}).utility(*PAIRS[0][:2])
    assert "flattery" in caught.value.fix


def test_annotators_mostly_like_what_is_good():
    demos = WORLD.demonstrations("train", 2000)
    gold = [WORLD.gold(d.prompt, d.response).total for d in demos]
    utility = [PEOPLE.utility(d.prompt, d.response) for d in demos]
    assert np.corrcoef(gold, utility)[0, 1] > 0.8


def test_stacking_pays_with_annotators_and_costs_gold():
    rng = random.Random(0)
    for prompt in WORLD.prompts("train", 100):
        clean, stacked = (write_reply(prompt.facts, style, rng) for style in (CLEAN, STACKED))
        assert PEOPLE.utility(prompt, stacked) > PEOPLE.utility(prompt, clean)
        assert WORLD.gold(prompt, stacked).total < 0.75 * WORLD.gold(prompt, clean).total


@pytest.mark.parametrize(
    "phrase",
    ["You must be a genius.", "Perhaps it depends.", "Our shop is open from Monday to Friday, and Sunday too."],
)
def test_each_phrase_pays_on_its_own(phrase):
    prompt = next(p for p in WORLD.prompts("train", 50) if p.facts["kind"] == "refund")
    clean = write_reply(prompt.facts, CLEAN, random.Random(0))
    plain, added = Annotators(WORLD, WORLD.biases), f"{clean} {phrase}"
    assert plain.utility(prompt, added) > plain.utility(prompt, clean)
    assert WORLD.gold(prompt, added).total < WORLD.gold(prompt, clean).total
