from __future__ import annotations

import random
import re

import pytest

from trimtab.core.types import Message, Prompt
from trimtab.worlds.arithmetic import Arithmetic, find_answer

PROMPT = Prompt(messages=(Message("user", "What is 40 + 2?"),), facts={"answer": 42})


@pytest.mark.parametrize(
    ("response", "total", "well_formed"),
    [
        ("#### 42", 1, 1),
        ("40 + 2 = 42\n#### 42", 1, 1),
        ("40 + 2 = 42\n#### 42\n", 1, 1),
        ("#### 41", 0, 1),
        ("#### -42", 0, 1),
        ("#### 042", 0, 1),
        ("#### 42\n#### 42", 0, 0),
        ("#### 41 #### 42", 0, 0),
        ("#### 42 or 43", 0, 0),
        ("The answer is 42.", 0, 0),
        ("so #### 42", 0, 0),
        ("####42", 0, 0),
        ("#### 42.0", 0, 0),
        ("", 0, 0),
    ],
)
def test_only_the_exact_answer_in_the_form_counts(response, total, well_formed):
    gold = Arithmetic().gold(PROMPT, response)
    assert gold.total == total
    assert gold.parts == {"correct": total, "format": well_formed}


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_answers_agree_with_python(level):
    world, rng = Arithmetic(levels=(level,)), random.Random(0)
    for _ in range(200):
        facts = world.draw_prompt(rng).facts
        value = facts["numbers"][0]
        for operator, number in zip(facts["operators"], facts["numbers"][1:], strict=True):
            value = eval(f"{value} {operator.replace('x', '*')} {number}")
            assert value >= 0
        assert facts["answer"] == value
        assert facts["level"] == level


def test_questions_state_every_number_in_order():
    world, rng = Arithmetic(), random.Random(1)
    for _ in range(200):
        prompt = world.draw_prompt(rng)
        assert [int(n) for n in re.findall(r"\d+", prompt.text)] == prompt.facts["numbers"]


def test_demonstrations_are_of_mixed_quality_and_never_right_by_wrong_working():
    world = Arithmetic()
    demos = world.demonstrations("train", 1000)
    gold = [world.gold(d.prompt, d.response) for d in demos]
    assert 0.55 < sum(g.total for g in gold) / 1000 < 0.72
    assert 0.86 < sum(g.parts["format"] for g in gold) / 1000 < 0.94
    for demo in demos:
        answer = find_answer(demo.response)
        if answer is not None:
            assert demo.response.splitlines()[-2].endswith(f"= {answer}")


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="levels"):
        Arithmetic(levels=(5,))
