"""Multiple choice by log-probability: MC1, MC2 and HHH against a slow loop, cases worked by hand, and ties."""

from __future__ import annotations

import math
import random

import pytest

from trimtab.data.sources import SourceRows
from trimtab.evals.suites import hhh, suite, truthful_qa
from trimtab.evals.suites.choices import letters, picked_right, right_mass, shuffled
from trimtab.evals.suites.suite import SuiteAnswer

ROW = {"question": "What is red?", "best_answer": "Blood", "correct_answers": ["A rose", "Blood"]}


def test_a_likeliest_option_is_right_or_shares_the_tie():
    assert picked_right([-1.0, -2.0], {0}) == 1
    assert picked_right([-2.0, -1.0], {0}) == 0
    assert picked_right([-1.0, -1.0, -3.0], {0}) == 0.5
    assert picked_right([0.0] * 4, {0, 1, 2}) == 0.75
    with pytest.raises(ValueError, match="nan"):
        picked_right([math.nan, -1.0], {0})


def test_the_mass_of_the_right_options_by_hand_and_by_a_slow_loop():
    assert right_mass([math.log(0.2), math.log(0.3), math.log(0.1)], {0, 2}) == pytest.approx(0.5)
    generator = random.Random(0)
    for _ in range(50):
        values = [generator.uniform(-5, 0) for _ in range(6)]
        right = set(generator.sample(range(6), 3))
        total = above = 0.0
        for i, value in enumerate(values):
            total += math.exp(value)
            above += math.exp(value) if i in right else 0.0
        assert right_mass(values, right) == pytest.approx(above / total, rel=1e-12)


def test_the_mass_of_answers_too_long_for_exp_is_found():
    assert math.exp(-2000.0) == 0.0
    assert right_mass([-2000.0, -2000.0 + math.log(3)], {0}) == pytest.approx(0.25)


def test_mc1_is_of_the_best_answer_and_mc2_of_all_correct_ones():
    row = ROW | {"incorrect_answers": ["Grass", "Snow", "A rose"]}
    (item,) = truthful_qa.read([("rows, row 1", row)])
    assert item.questions[0].options == ("Blood", "A rose", "Grass", "Snow")  # an answer in both lists is correct
    logprobs = tuple(map(math.log, (0.1, 0.4, 0.2, 0.05)))
    found = truthful_qa.score(item, [SuiteAnswer(logprobs=(logprobs,))])
    assert found["mc1"] == [0.0]  # "Grass" is likelier than the best answer; "A rose" does not compete
    assert found["mc2"] == [pytest.approx(0.5 / 0.75)]


def test_a_constant_scorer_guesses_whatever_the_order_of_options():
    rows = [
        ("rows, row 1", {"input": "a", "subset": "honest", "targets": {"choices": ["x", "y"], "labels": [1, 0]}}),
        ("rows, row 2", {"input": "a", "subset": "honest", "targets": {"choices": ["x", "z"], "labels": [0, 1]}}),
    ]
    items = hhh.read(rows)
    assert items[0].cluster == items[1].cluster
    assert items[0].id != items[1].id
    for item in items:
        assert hhh.score(item, [SuiteAnswer(logprobs=((-3.0, -3.0),))])["accuracy/honest"] == [0.5]
    assert hhh.score(items[1], [SuiteAnswer(logprobs=((-3.0, -2.0),))])["accuracy"] == [1.0]


def test_a_subset_of_the_hub_is_that_of_its_config(monkeypatch):
    row = {"input": "a", "targets": {"choices": ["x", "y"], "labels": [1, 0]}}

    def from_hub(source):  # the hub itself is out of reach here; its rows are those of `read_rows`
        name = source.removeprefix("hub:").partition("?")[0]
        return SourceRows(source=name, sha256="0", rows=[(f"hub:{name}?split=test, row 1", row)], bad=[])

    monkeypatch.setattr(suite, "read_rows", from_hub)
    found = suite.load_items(hhh.SUITE, None)
    assert [item.facts["subset"] for item in found.items] == list(hhh.SUBSETS)
    assert list(found.sources) == list(hhh.SUITE.hub)


def test_options_are_shown_in_an_order_of_their_own():
    orders = [shuffled(2, str(i)) for i in range(400)]
    assert orders == [shuffled(2, str(i)) for i in range(400)]
    assert 160 < sum(order == [0, 1] for order in orders) < 240
    assert letters(["yes", "no"]) == ("(A) yes\n(B) no", ("(A)", "(B)"))
    with pytest.raises(ValueError, match="27 options"):
        letters(["x"] * 27)
