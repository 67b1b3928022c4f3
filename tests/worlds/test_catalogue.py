from __future__ import annotations

import random
import re

import pytest

from trimtab import worlds
from trimtab.core.types import Message, Prompt
from trimtab.environments.tools import BM25, calculate
from trimtab.worlds.catalogue import COLOURS, THINGS, Catalogue

PROMPT = Prompt(messages=(Message("user", "Price of 2 x blue lamp?"),), facts={"answer": 946})


@pytest.mark.parametrize(
    ("response", "total", "well_formed"),
    [
        ("#### 946", 1, 1),
        ("Action: search[blue lamp]\nObservation: The blue lamp costs 473.\n#### 946", 1, 1),
        ("#### 945", 0, 1),
        ("946", 0, 0),
        ("Action: calculate[473 * 2]\nObservation: 946\n", 0, 0),
        ("#### 946\n#### 946", 0, 0),
        ("", 0, 0),
    ],
)
def test_only_the_exact_answer_in_the_form_counts(response, total, well_formed):
    gold = Catalogue().gold(PROMPT, response)
    assert gold.total == total
    assert gold.parts == {"correct": total, "format": well_formed}


def test_the_corpus_lists_every_thing_once_and_the_search_finds_it_first():
    world = Catalogue(seed=3)
    index = BM25(world.corpus())
    assert len(set(index.passages)) == len(COLOURS) * len(THINGS)
    for colour in COLOURS:
        for thing in THINGS:
            price = world.price(f"{colour} {thing}")
            assert index.search(f"{colour} {thing}", 1) == [f"The {colour} {thing} costs {price}."]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_answers_follow_from_the_corpus(level):
    world, rng = Catalogue(levels=(level,)), random.Random(0)
    prices = dict(re.fullmatch(r"The (.*) costs (\d+)\.", line).groups() for line in world.corpus())
    for _ in range(50):
        prompt = world.draw_prompt(rng)
        things, num = prompt.facts["things"], prompt.facts["num"]
        sum_ = " + ".join(prices[thing] for thing in things)
        assert calculate(f"({sum_}) * {num}") == str(prompt.facts["answer"])
        assert all(thing in prompt.text for thing in things)


def test_prices_change_with_the_seed_of_the_world():
    assert Catalogue(seed=1).corpus() != Catalogue(seed=2).corpus()
    assert Catalogue(seed=1).corpus() == Catalogue(seed=1).corpus()


def test_demonstrations_that_use_the_tools_are_right_and_the_others_hardly_ever():
    world = worlds.load("catalogue")
    demos = world.demonstrations("train", 400)
    right = [world.gold(d.prompt, d.response).total for d in demos]
    assert 0.4 < sum(right) / len(right) < 0.7
    for demo, total in zip(demos, right, strict=True):
        if "calculate" in demo.response:
            assert total == 1
            assert str(demo.prompt.facts["answer"]) in demo.response


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="levels are some of"):
        Catalogue(levels=(4,))
