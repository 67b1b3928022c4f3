from __future__ import annotations

import math

import pytest

from tests.reports.fabricate import card
from trimtab.core.files import finite
from trimtab.reports.card_sentences import amount, card_sentences
from trimtab.stats import Interval


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "count": 50}


def test_a_whole_card_says_what_it_holds():
    known = card() | {
        "shuffled_replies": 0.61,
        "shuffled_replies_low": 0.5,
        "shuffled_replies_high": 0.7,
        "by_slice": {"school_maths": {"accuracy": 0.8, "low": 0.7, "high": 0.9, "count": 40}},
        "degenerate": {"prompt_copied": {"above_rejected": estimate(0.04, 0.01, 0.1)}},
        "styles": {"heading": estimate(0.31, 0.25, 0.4), "hedge": estimate(-0.5, -0.6, -0.4)},
        "num_probes_unscored": 3,
    }
    said = " ".join(card_sentences(known))
    assert "the model itself, shown another prompt, 61% [50%, 70%]" in said
    assert "a score that ignores the replies 50%" in said
    assert "By slice: school_maths 80% [70%, 90%] of 40." in said
    assert "prompt copied 4% [1%, 10%]" in said
    assert "heading +0.31 [0.25, 0.40], hedge -0.50 [-0.60, -0.40]" in said
    assert "3 changed replies are left out" in said
    assert "divided by the temperature" in said


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.0026, 0.00207, 0.00323, "+0.0026 [0.0021, 0.0032]"),  # rewards of a model that has hardly learned
        (-12345.6, -13000.0, -12000.0, "-12346 [-13000, -12000]"),
        (-3e-18, -0.01, 0.01, "0.000 [-0.010, 0.010]"),
        (0.0, 0.0, 0.0, "0.00 [0.00, 0.00]"),
        (0.00061, math.nan, math.nan, "+0.000610"),
    ],
)
def test_an_amount_of_reward_is_told_in_the_decimals_of_its_bounds(value, low, high, said):
    assert amount(Interval(value, low, high, 50)) == said


def test_what_a_correction_leaves_is_told_in_the_decimals_of_what_there_was():
    accuracy = {"accuracy": 0.6, "low": 0.5, "high": 0.7, "count": 20}
    length = {"std_tokens": 154.0, "none": {"premium": estimate(0.0079, 0.0053, 0.0105), "accuracy": accuracy}}
    length["lowess"] = {"premium": estimate(-2e-9, -0.001, 0.001), "accuracy": accuracy}
    (said,) = card_sentences({"length": length})
    assert "goes with +0.0079 [0.0053, 0.0105] of reward; with length_correction = 'lowess' 0.0000, and" in said


def test_it_says_how_many_pairs_were_to_be_ordered():
    known = {"accuracy": 0.7, "num_pairs": 12, "num_even": 2}
    assert "right about 7 of 10 pairs, ties half; 2 more have an even label" in card_sentences(known)[1]
    assert card_sentences(known | {"num_even": 0})[1] == "It is right about 8.4 of 12 pairs, ties half."
    (said,) = card_sentences(finite(known | {"accuracy": float("nan"), "num_even": 12}))
    assert "there was nothing to order, because all 12 pairs have even labels" in said


@pytest.mark.parametrize(
    ("kind", "said"), [("constant", "this is a constant"), ("length", "this is a scorer of length")]
)
def test_a_simple_scorer_is_called_by_name(kind, said):
    assert said in " ".join(card_sentences(card() | {"resembles": kind}))


def test_rewards_against_the_labels_have_no_temperature():
    assert "no temperature makes them better" in " ".join(card_sentences(card() | {"temperature": 999.99}))


def test_a_card_with_less_says_less():
    assert card_sentences({}) == []
    assert len(card_sentences({"accuracy": 0.7})) == 1
    assert card_sentences(finite({"accuracy": float("nan"), "ece": None})) == []
