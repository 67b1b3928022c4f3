import gzip
import importlib.util
import json
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import worlds
from trimtab.core.errors import EngineError
from trimtab.core.types import Prompt
from trimtab.data.layouts import load
from trimtab.rewards.answers import ExactAnswer, as_number, find_answer

SHARED = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in ../shared/data")
with_maths = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs pip install 'trimtab[math]'")


def scores(rollouts, **settings):
    return ExactAnswer(**settings).load(token_budget=1).score(rollouts)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("1,234,567", 1234567),
        ("$18", 18),
        ("-$5.50", Fraction(-11, 2)),
        ("−7", -7),
        ("3.1400", Fraction(157, 50)),
        (".5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("50%", 50),
        ("+6.", 6),
        (" 8 ", 8),
        (r"\$18", 18),
        (r"50\%", 50),
        ("10{,}000", 10000),
        (r"10,\!000", 10000),
        ("12,34", None),
        ("1/0", None),
        ("5 apples", None),
        ("1e5", None),
        ("", None),
        ("9" * 300, None),
        ("x", None),
    ],
)
def test_plain_numbers_have_their_exact_value(text, value):
    assert as_number(text) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_a_number_is_the_same_however_it_is_written(number, num_zeros):
    written = [f"{number}", f"{number:,}", f"${number}", f"{number}.{'0' * num_zeros}", f"{2 * number}/2", f"{number}%"]
    assert {as_number(text) for text in written} == {number}


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("so it is 4.\n#### 4", "4"),
        ("#### 3\nno:\n#### 4\nbye", "4"),
        ("####4", "4"),
        ("####", None),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{\\frac{1}{2", None),
        ("\\boxed{}", None),
        ("\\boxed{5} #### 4", "4"),
        ("the answer is 4", None),
    ],
)
def test_the_last_answer_in_the_first_form_counts(reply, found):
    assert find_answer(reply, ("hashes", "boxed")) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [("3 and 1,200.50, then", "1,200.50"), ("costs $18.", "$18"), ("-3", "-3"), ("x2 y", None), ("no", None)],
)
def test_the_last_number_is_found_where_that_is_asked_for(reply, found):
    assert find_answer(reply, ("hashes", "last_number")) == found


def test_right_answers_are_one_and_all_others_zero(rollout):
    replies = ["#### 1,000", "#### $1000.00", "#### 1001", "1000", "#### ", "#### one thousand"]
    values, metrics = scores([rollout(r, answer="1000") for r in replies])
    assert values.tolist() == [1, 1, 0, 0, 0, 0]
    assert metrics["reward/exact_answer_found"].value == 4 / 6
    assert metrics["reward/mean"].value == pytest.approx(1 / 3)


def test_other_answers_are_compared_as_texts(rollout):
    assert scores([rollout("#### Blue  sky.", answer="Blue sky")])[0].item() == 1


def test_a_prompt_without_an_answer_cannot_be_judged(rollout, caplog):
    values, _ = scores([rollout("#### 4"), rollout("#### 4", answer=4)])
    assert math.isnan(values[0])
    assert values[1] == 1
    assert "reward exact_answer could not judge 1 of 2 replies" in caplog.text
    assert "no fact 'answer'" in caplog.text


def test_the_arithmetic_world_agrees_with_the_reward(rollout):
    world, rng = worlds.load("arithmetic"), random.Random(0)
    prompts = world.prompts("train", 200)
    replies = [world.write_reply(p, rng) for p in prompts]
    rollouts = [rollout(r, **p.facts) for p, r in zip(prompts, replies, strict=True)]
    gold = [world.gold(p, r).total for p, r in zip(prompts, replies, strict=True)]
    assert 0.3 < sum(gold) / len(gold) < 0.9
    assert scores(rollouts)[0].tolist() == gold


@real_data
def test_the_worked_answers_of_gsm8k_are_right_and_their_neighbours_wrong(rollout):
    path = SHARED / "gsm8k" / "train.jsonl.gz"
    prompts = load(Prompt, str(path)).records
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        replies = [json.loads(line)["answer"] for line in lines]
    facts = [p.facts["answer"] for p in prompts]
    assert scores([rollout(r, answer=a) for r, a in zip(replies, facts, strict=True)])[0].eq(1).all()
    wrong = [str(as_number(a) + 1) for a in facts]
    assert scores([rollout(r, answer=a) for r, a in zip(replies, wrong, strict=True)])[0].eq(0).all()


def test_mathematics_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'trimtab\[math\]'"):
        ExactAnswer(maths=True).load(token_budget=1)


@with_maths
def test_equal_mathematics_is_right_however_it_is_written(rollout):
    cases = [
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac{1}{2}", r"\dfrac{2}{4}", 1),
        (r"2\sqrt{3}", r"\sqrt{12}", 1),
        (r"x^2+2x+1", r"(x+1)^2", 1),
        (r"\{1,2\}", r"\{2,1\}", 1),
        (r"\pi", "3", 0),
        (r"\frac{1}{2}", "nonsense", 0),
        (r"\frac{1}{2}", r"\frac{", 0),
    ]
    values, _ = scores([rollout(rf"\boxed{{{g}}}", answer=r) for r, g, _ in cases], maths=True)
    assert values.tolist() == [expected for _, _, expected in cases]


@with_maths
def test_several_answers_are_no_answer(rollout):
    several = ["1$ or $2", r"1\) \(2", r"1\] \[2", r"1 \text{ or } 2", "1, 2"]
    rights = (r"\frac{2}{2}", r"\frac{4}{2}")
    replies = [rollout(rf"\boxed{{{given}}}", answer=right) for given in several for right in rights]
    assert scores(replies, maths=True)[0].eq(0).all()


@with_maths
def test_hostile_mathematics_neither_hangs_nor_stops_the_others(rollout, caplog):
    hostile = [r"9^{9^{9^{9^{9}}}}", r"\frac{" * 500 + "}" * 500]
    rollouts = [rollout(rf"\boxed{{{text}}}", answer=r"\frac{1}{2}") for text in hostile]
    values, _ = scores([*rollouts, rollout(r"\boxed{0.5}", answer=r"\frac{1}{2}")], maths=True, seconds=1.0)
    assert not values[:-1].eq(1).any()
    assert values[-1] == 1
    if values.isnan().any():
        assert "no judgement within 1 s" in caplog.text


def test_no_form_is_refused():
    with pytest.raises(ValueError, match="forms is empty"):
        ExactAnswer(forms=())


def test_scores_are_float32(rollout):
    assert scores([rollout("#### 1", answer=1)])[0].dtype == torch.float32
