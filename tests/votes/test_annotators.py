from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from trimtab.votes.annotators import annotator_cards, hasty_votes, left_bias
from trimtab.votes.table import VoteTable, votes_from_rows


def votes_of(rows) -> VoteTable:
    names = ("item", "annotator", "choice", "shown_left", "seconds")
    return votes_from_rows([("", dict(zip(names, row, strict=False))) for row in rows])


def simulated(num_items=300, annotators=("ann", "bob", "cy"), lean=(0.0, 0.0, 1.5), seed=0) -> VoteTable:
    """Votes on items of known difference, sides shown at random, with a lean to the left for each annotator."""
    generator = np.random.default_rng(seed)
    better = generator.normal(scale=1.5, size=num_items)
    rows = []
    for i in range(num_items):
        for name, gamma in zip(annotators, lean, strict=True):
            a_left = generator.random() < 0.5
            left = generator.random() < 1 / (1 + math.exp(-((1 if a_left else -1) * better[i] + gamma)))
            rows.append(
                (str(i), name, "A" if left == a_left else "B", "A" if a_left else "B", generator.uniform(5, 20))
            )
    return votes_of(rows)


def test_a_lean_to_the_left_is_found_and_flagged():
    cards = {card.name: card for card in annotator_cards(simulated())}
    assert cards["cy"].left_bias.low > 0.5
    assert any(flag.startswith("leans to the left") for flag in cards["cy"].flags)
    for name in ("ann", "bob"):
        assert cards[name].left_bias.low < 0.25
        assert not cards[name].flags


def test_the_lean_is_the_maximum_of_its_penalised_likelihood():
    votes = simulated(num_items=25)
    found = left_bias(votes)

    def loss(parameters):
        beta, gamma = parameters[0], parameters[1:]
        total = 0.005 * (parameters @ parameters)
        for item, who, choice, a_left in zip(votes.item, votes.annotator, votes.choice, votes.a_left, strict=True):
            others = (votes.item == item) & (votes.annotator != who)
            a, b = sum(votes.choice[others] == 0), sum(votes.choice[others] == 1)
            x = (1 if a_left else -1) * math.log((a + 0.5) / (b + 0.5))
            y = 1 if (choice == 0) == (a_left == 1) else -1
            total += math.log1p(math.exp(-y * (beta * x + gamma[who])))
        return total

    best = scipy.optimize.minimize(loss, np.zeros(4), tol=1e-10)
    assert [interval.value for interval in found] == pytest.approx(best.x[1:], abs=1e-4)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.sampled_from(["A", "tie", "B"]), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.data(),
)
def test_no_figure_of_an_annotator_depends_on_which_reply_is_called_a(rows, data):
    turn = [data.draw(st.booleans()) for _ in range(4)]
    other = {"A": "B", "B": "A", "tie": "tie"}
    before = [(str(i), who, choice, "A" if left else "B") for i, who, choice, left in rows]
    after = [
        (i, who, other[choice], other[left]) if turn[int(i)] else (i, who, choice, left)
        for i, who, choice, left in before
    ]
    for one, two in zip(annotator_cards(votes_of(before)), annotator_cards(votes_of(after)), strict=True):
        assert one.left_bias.value == pytest.approx(two.left_bias.value, abs=1e-6, nan_ok=True)
        for name in ("agreement", "left", "ties", "consistency"):
            assert getattr(one, name).value == pytest.approx(getattr(two, name).value, nan_ok=True), name
        assert (one.longest_run, one.num_votes) == (two.longest_run, two.num_votes)


def test_agreement_of_one_with_the_others_worked_by_hand():
    rows = [
        ("1", "ann", "A"),
        ("1", "bob", "A"),
        ("1", "cy", "B"),
        ("2", "ann", "B"),
        ("2", "bob", "A"),
        ("3", "ann", "A"),
    ]
    cards = {card.name: card for card in annotator_cards(votes_of(rows))}
    # item 1: ann against {A, B}: half; cy against {A, A}: none. Item 2: ann and bob differ. Item 3: nobody else
    assert (cards["ann"].agreement.value, cards["ann"].agreement.count) == (0.25, 2)
    assert (cards["bob"].agreement.value, cards["cy"].agreement.value) == (0.25, 0.0)


def test_repeats_measure_consistency():
    rows = [("1", "ann", "A"), ("1", "ann", "A"), ("2", "ann", "A"), ("2", "ann", "B"), ("2", "bob", "B")]
    ann, bob = annotator_cards(votes_of(rows))
    assert (ann.consistency.value, ann.consistency.count) == (0.5, 2)
    assert math.isnan(bob.consistency.value)


def test_the_same_side_over_and_over_is_flagged_where_the_screen_is_known():
    generator = np.random.default_rng(0)
    rows = [(str(i), "careful", generator.choice(["A", "B"]), generator.choice(["A", "B"])) for i in range(100)]
    rows += [(str(i), "lazy", side, side) for i, side in enumerate(generator.choice(["A", "B"], size=100))]
    careful, lazy = annotator_cards(votes_of(rows))
    assert lazy.longest_run == 100
    assert "the same answer 100 times in a row" in lazy.flags
    assert careful.longest_run < 15
    assert not [flag for flag in careful.flags if "row" in flag]
    unknown = annotator_cards(votes_of([(str(i), "sorted", "A") for i in range(100)]))[0]
    assert math.isnan(unknown.run_p_value)
    assert not unknown.flags


def test_runs_are_as_likely_as_simulation_says():
    generator = np.random.default_rng(0)
    draws = generator.integers(2, size=(4000, 60))
    runs = [
        max(len(run) for run in "".join(map(str, row)).replace("01", "0 1").replace("10", "1 0").split())
        for row in draws
    ]
    rows = [(str(i), "ann", "A" if i < 9 or i % 2 else "B", "A") for i in range(60)]
    card = annotator_cards(votes_of(rows))[0]
    assert card.longest_run == 10
    assert card.run_p_value == pytest.approx(np.mean(np.array(runs) >= 10), abs=0.01)


def test_speed_counts_reading():
    short = votes_of([("1", "ann", "A", "A", 1.0), ("1", "bob", "A", "A", 30.0), ("1", "cy", "A", "A", "")])
    assert hasty_votes(short).tolist() == [True, False, False]
    texts = {"prompt": "p", "response_a": "x" * 500, "response_b": "y" * 500}
    rows = [{**texts, "annotator": str(i), "choice": "A", "seconds": 20 + i} for i in range(9)]
    long = votes_from_rows([("", row) for row in [*rows, {**texts, "annotator": "fast", "choice": "A", "seconds": 3}]])
    assert hasty_votes(long).tolist() == [True] + [False] * 8 + [True]
    cards = annotator_cards(short)
    assert [card.median_seconds for card in cards[:2]] == [1.0, 30.0]
    assert math.isnan(cards[2].median_seconds)


def test_votes_in_a_wink_are_flagged():
    rows = [
        (str(i), name, "A", "A", seconds)
        for i in range(40)
        for name, seconds in (("slow", 12.0), ("wink", 0.5), ("calm", 9.0))
    ]
    flags = {card.name: card.flags for card in annotator_cards(votes_of(rows))}
    assert any("faster than reading" in flag for flag in flags["wink"])
    assert not any("faster" in flag for flag in flags["slow"] + flags["calm"])


def test_who_disagrees_with_everybody_is_flagged():
    generator = np.random.default_rng(0)
    rows = []
    for i in range(80):
        truth = generator.choice(["A", "B"])
        rows += [(str(i), name, truth) for name in ("ann", "bob", "cy")]
        rows.append((str(i), "contrary", "B" if truth == "A" else "A"))
    cards = {card.name: card for card in annotator_cards(votes_of(rows))}
    assert any("less than usual" in flag for flag in cards["contrary"].flags)
    assert not cards["ann"].flags


def test_the_lean_of_somebody_who_shares_no_item_is_the_logit_of_left():
    votes = votes_of([(str(i), "ann", "A" if i < 36 else "B", "A") for i in range(40)])
    found = left_bias(votes)[0]
    expected = scipy.optimize.brentq(lambda g: 36 - 40 / (1 + math.exp(-g)) - 0.01 * g, 0, 9)
    assert found.value == pytest.approx(expected, abs=1e-8)  # the logit of 0.9, but for the ridge
    assert found.value == pytest.approx(math.log(9), abs=0.02)
    error = 1 / math.sqrt(40 * 0.9 * 0.1)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.02)


def test_no_votes_make_no_cards():
    assert annotator_cards(votes_of([])) == []
    assert math.isnan(left_bias(votes_of([("1", "ann", "A")]))[0].value)
