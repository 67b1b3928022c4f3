"""Right answers in the ways that people and models write them, and wrong ones that look like them."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from pathlib import Path

import pytest

from trimtab.core.types import Prompt
from trimtab.data.layouts import load
from trimtab.rewards.answers import ExactAnswer, as_number
from trimtab.rewards.written import same_text

SHARED = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in ../shared/data")

RIGHT = [
    ("72", "\\text{72}"),
    ("B", "\\text{B}"),
    ("B", "\\textbf{(B)}"),
    ("B", "(B)"),
    ("B", "B."),
    ("B", "B) Paris"),
    ("72", "72 apples"),
    ("72", "x = 72"),
    ("72", "**72**"),
    ("72", "$72$"),
    ("72", "$72"),
    ("72", "\\boxed{72}"),
    ("(1, 2)", "(1,2)"),
    ("(1,2)", "\\left(1,\\ 2\\right)"),
    ("(1,2)", "( 1 , 2 )"),
    ("1000", "1,000"),
    ("1000", "1 000"),
    ("1000", "1{,}000"),
    ("1000", "1\\,000"),
    ("1000", "1'000"),
    ("1000000", "1 000 000"),
    ("1234567", "1,234,567"),
    ("72", "72\\text{ cm}"),
    ("72", "72\\ \\mathrm{cm}^2"),
    ("72", "72 cm²"),
    ("72", "72cm"),
    ("72", "72 km/h"),
    ("72", "$72 per day"),
    ("72", "72 dollars"),
    ("50%", "50 percent"),
    ("50", "50%"),
    ("50%", "50\\%"),
    ("90", "90^\\circ"),
    ("90", "90°"),
    ("1/2", "\\frac{1}{2}"),
    ("0.5", "1/2"),
    ("1/2", "\\dfrac12"),
    ("1.5", "1\\frac{1}{2}"),
    ("1.5", "1 1/2"),
    ("-1/2", "-\\frac{1}{2}"),
    ("-1/2", "\\frac{-1}{2}"),
    ("72", "The answer is 72."),
    ("72", "Answer: 72"),
    ("72", "3 * 24 = 72"),
    ("72", "3 x 24 = 72"),
    ("72", "total = 72"),
    ("72 apples", "72"),
    ("72 apples", "72 apples"),
    ("$18", "18 dollars"),
    ("5000", "5 thousand"),
    ("30000", "3 \\times 10^4"),
    ("30000", "3 x 10^{4}"),
    ("Blue sky", "blue  sky."),
    ("Yes", "yes"),
    ("True", "true"),
    ("\\{1,2\\}", "\\{2, 1\\}"),
    ("[1, 2)", "[1,2)"),
    ("x=3", "x = 3"),
    ("3", "x=3"),
    ("x = 3", "3"),
    ("[1,2]", "x \\in [1,2]"),
    ("2x+1", "2x + 1"),
    ("2\\sqrt{3}", "2 \\sqrt{3}"),
    ("(0.5, 2)", "\\left(\\frac{1}{2}, 2\\right)"),
    ("1, 2", "1,2"),
    ("-7", "−7"),
    ("-7", "- 7"),
    ("72", "+72"),
    ("7.0", "7"),
    ("0.25", ".25"),
    ("72", "72,"),
    ("10", "$10.00"),
    ("72", "Anna has 72 apples."),
    ("72", "72 (apples)"),
    ("1,000 m", "1000 meters"),
    ("72", "72 \\text{ apples}"),
    ("72", "\\mathbf{72}"),
    ("18", "\\$18"),
    ("18", "\\$18.00"),
    ("12", "12 hours"),
    ("-3", "x=-3"),
    ("42", "\\(42\\)"),
    ("72 \\text{ cm}", "72 cm"),
    ("5", "$x = 5$"),
    ("Paris", "\\text{Paris}"),
    ("Monday", "monday"),
    ("72", "72 apples in total"),
    ("72", "72 apples, in total"),
]
WRONG = [
    ("72", "27"),
    ("72", "72.5"),
    ("72", "72 or 73"),
    ("72", "71 and 72"),
    ("72", "72 73"),
    ("72", "more than 72"),
    ("72", "at least 72"),
    ("72", "not 72"),
    ("72", "70-72"),
    ("72", "between 70 and 72"),
    ("72", "72x"),
    ("72", "72\\pi"),
    ("72", "72\\sqrt{2}"),
    ("72", "72^2"),
    ("72", "72/2"),
    ("72", "72 thousand"),
    ("72", "7 2"),
    ("72", "72%%x"),
    ("5 km", "5 m"),
    ("$5", "5 cents"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,3)"),
    ("(1,2)", "(1,2,3)"),
    ("B", "C"),
    ("B", "A or B"),
    ("B", "AB"),
    ("B", ""),
    ("50%", "0.5"),
    ("1/2", "0.51"),
    ("1/2", "1/3"),
    ("1/2", "2/1"),
    ("1000", "1.000"),
    ("1000", "1,00"),
    ("1000", "1 00"),
    ("12", "1 2"),
    ("72", "x = 5 or x = 72"),
    ("72", "x = 5, x = 72"),
    ("x = 3", "y = 3"),
    ("-7", "7"),
    ("7", "-7"),
    ("1.5", "1 1/3"),
    ("72", "72 apples and 3 pears"),
    ("72", "72 apples, not pears"),
    ("72", "72 apples, in total 80"),
    ("72", "seventy"),
    ("Blue sky", "blue sea"),
    ("x", "X"),
    ("2x+1", "2x+12"),
    ("\\{1,2\\}", "\\{1,3\\}"),
    ("72", "72 hundred"),
    ("72", "x > 72"),
    ("72", "72 !"),
    ("72", "|72| - 1"),
    ("5", "5x"),
    ("5", "5 x"),
    ("2", "x^2"),
    ("2", "x_2"),
    ("72", "negative 72"),
    ("72", "minus 72"),
    ("1", "1, 2"),
    ("1", "\\text{1 or 2}"),
    ("72", "72 = x - 3"),
    ("B", "B or C"),
    ("B", "(A)(B)"),
    ("72", "72 times 2"),
    ("72", "2 times 72"),
    ("3", "3i"),
    ("8", "2^3 - 8"),
    ("72", "half of 72"),
    ("72", "72 dozen"),
    ("72", "no 72"),
    ("72", "72?"),
]


def score(reply, rollout, **facts):
    return ExactAnswer().load(token_budget=1).score([rollout(reply, **facts)])[0].item()


@pytest.mark.parametrize(("right", "given"), RIGHT)
def test_a_right_answer_is_right_however_it_is_written(right, given, rollout):
    assert same_text(right, given)
    assert score(f"So it is.\n#### {given}", rollout, answer=right) == 1
    assert score(f"So it is \\boxed{{{given}}}.", rollout, answer=right) == 1


@pytest.mark.parametrize(("right", "given"), WRONG)
def test_a_wrong_answer_is_wrong_however_alike_it_looks(right, given, rollout):
    assert not same_text(right, given)
    assert score(f"So it is.\n#### {given}", rollout, answer=right) == 0
    assert score(f"So it is \\boxed{{{given}}}.", rollout, answer=right) == 0


@pytest.mark.parametrize("answer", [72, 72.0, "72", "It is 9 * 8.\n#### 72", "so \\boxed{72}", "72 apples"])
def test_the_right_answer_may_be_a_number_a_text_or_a_worked_answer(answer, rollout):
    assert score("#### 72", rollout, answer=answer) == 1
    assert score("#### 71", rollout, answer=answer) == 0


@pytest.mark.parametrize("answer", ["", "  ", None, math.nan, math.inf, [72], {"answer": 72}, "####", "\\boxed{}"])
def test_a_reference_that_is_no_answer_cannot_be_judged(answer, rollout, caplog):
    assert math.isnan(score("#### 72", rollout, answer=answer))
    assert "which is no answer" in caplog.text


def test_large_and_small_numbers_of_a_file_keep_their_value(rollout):
    assert score("#### 100000000000000000000", rollout, answer=1e20) == 1
    assert score("#### 0.00001", rollout, answer=1e-5) == 1


@pytest.mark.parametrize("text", ["9" * 5000, "\\text{" * 400, "x = " * 500, "1 " * 3000, "\\frac" * 900, "(" * 2000])
def test_hostile_answers_are_read_at_once(text, rollout):
    start = time.process_time()
    assert score(f"#### {text}", rollout, answer="72") == 0
    assert time.process_time() - start < 1.0


@real_data
def test_every_answer_of_gsm8k_is_itself_and_none_of_its_neighbours():
    path = SHARED / "gsm8k" / "train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        worked = [json.loads(line)["answer"] for line in lines]
    answers = [str(p.facts["answer"]) for p in load(Prompt, str(path)).records]
    assert len(answers) == len(worked)
    for answer in dict.fromkeys(answers):
        number = as_number(answer)
        assert number is not None
        for written in (answer, f"{answer} apples", f"x = {answer}", f"\\text{{{answer}}}", f"The answer is {answer}."):
            assert same_text(answer, written), (answer, written)
        for other in (number + 1, -number if number else 1, number * 10 + 1):
            assert not same_text(answer, str(other)), (answer, other)
    values = {answer: as_number(answer) for answer in answers}
    for answer, other in itertools.pairwise(answers):
        assert same_text(answer, other) == (values[answer] == values[other])
