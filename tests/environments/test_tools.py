"""The calculator against Python, the search against a slow one, and what neither may do."""

import contextlib
import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.environments.tools import BM25, MAX_EXPRESSION, ToolError, calculate, words


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2", "3"),
        ("473 * 17", "8041"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("2 ** 3 ** 2", "512"),
        ("-2 ** 2", "-4"),
        ("2 ** -2", "0.25"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.333333333333"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("0.1 + 0.2", "0.3"),
        ("10 - 3 - 2", "5"),
        ("8 / 4 / 2", "1"),
        ("--5", "5"),
        ("2 * -3", "-6"),
        (" .5*4. ", "2"),
        ("10 ** 30", "1" + "0" * 30),
        ("1 ** (10 ** 29)", "1"),
        ("(-1) ** 7", "-1"),
        ("0 ** 0", "1"),
        ("0 ** 999999999", "0"),
    ],
)
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("5 % (2 - 2)", "division by zero"),
        ("(1", "ends too early"),
        ("(1 2", "not closed"),
        ("1)", "doing there"),
        ("1 2", "doing there"),
        ("* 3", "number is missing"),
        ("2 ** 0.5", "whole numbers"),
        ("9 ** 9 ** 9 ** 9", "too large"),
        ("10 ** 31", "too large"),
        ("10 ** 16 * 10 ** 16", "too large"),
        ("2 ** -10000000", "too large"),
        ("9" * 40, "too large"),
        ("__import__('os')", "cannot read"),
        ("a + 1", "cannot read"),
        ("1e9", "cannot read"),
        ("1; 2", "cannot read"),
        ("(" * 90 + "1" + ")" * 90, "too many"),
        ("-" * 150 + "1", "too many"),
        ("1+" * MAX_EXPRESSION + "1", "longer than"),
    ],
)
def test_what_cannot_be_calculated_is_said_and_takes_no_time(expression, why):
    started = time.perf_counter()
    with pytest.raises(ToolError, match=why):
        calculate(expression)
    assert time.perf_counter() - started < 0.5


@given(st.text(alphabet="0123456789+-*/%(). e_x[]'\n", max_size=60))
def test_any_text_gives_a_number_or_a_tool_error(text):
    with contextlib.suppress(ToolError):
        assert math.isfinite(float(calculate(text)))


def test_whole_numbers_are_those_of_python():
    rng = random.Random(0)
    for _ in range(300):
        text = str(rng.randint(0, 99))
        for _ in range(rng.randint(1, 5)):
            text += f" {rng.choice(['+', '-', '*', '//', '%'])} {rng.choice(['', '-'])}{rng.randint(1, 99)}"
        assert calculate(text) == str(eval(text))


PASSAGES = ["The blue lamp costs 473.", "The red lamp, a red one, costs 12.", "Blue chairs", "", "the the the lamp"]


def slow_scores(passages, query, k1=1.2, b=0.75):
    """BM25 word by word from its definition."""
    split = [words(p) for p in passages]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for passage in split:
        score = 0.0
        for word in set(words(query)):
            containing = sum(word in other for other in split)
            rarity = math.log(1 + (len(split) - containing + 0.5) / (containing + 0.5))
            num = passage.count(word)
            score += rarity * num * (k1 + 1) / (num + k1 * (1 - b + b * len(passage) / mean)) if num else 0.0
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["blue lamp", "red", "THE lamp costs", "chairs blue blue", "473"])
def test_the_search_ranks_by_bm25(query):
    scores = slow_scores(PASSAGES, query)
    order = sorted((i for i in range(len(PASSAGES)) if scores[i]), key=lambda i: (-scores[i], i))
    assert BM25(PASSAGES).search(query, 10) == [PASSAGES[i] for i in order]
    assert BM25(PASSAGES).search(query, 1) == [PASSAGES[order[0]]]


def test_nothing_is_found_with_words_that_do_not_occur():
    assert BM25(PASSAGES).search("sofa", 3) == []
    assert BM25([]).search("lamp", 3) == []
