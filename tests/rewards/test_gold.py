"""The gold score as a reward."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.rewards.gold import GoldReward


def rollout(prompt):
    return Rollout(
        prompt=prompt, response="4", prompt_ids=(1,), response_ids=(2,), logprobs=(0.0,), finish_reason="stop"
    )


def test_the_score_and_its_parts_are_the_worlds_own():
    world = worlds.load("arithmetic")
    prompt = world.prompts("train", 1)[0]
    scores, metrics = GoldReward(world="arithmetic").load(token_budget=1).score([rollout(prompt)])
    assert scores.tolist() == [pytest.approx(world.gold(prompt, "4").total)]
    assert "gold/mean" in metrics


@pytest.mark.parametrize("facts", [{}, {"answer": "4"}])
def test_prompts_of_another_world_are_refused_by_the_fact_that_they_lack(facts):
    prompt = Prompt(messages=(Message("user", "How do I get a refund?"),), id="1", facts=facts)
    with pytest.raises(DataError, match=r"(?s)no fact named 'topic'.*How do I get a refund.*prompts of the same world"):
        GoldReward(world="helpdesk").load(token_budget=1).score([rollout(prompt)])


def test_a_part_of_the_score_is_a_reward_of_its_own():
    world = worlds.load("helpdesk_harm")
    prompt = next(p for p in world.prompts("train", 50) if p.facts["topic"] == "till")
    said = [replace(rollout(prompt), response=text) for text in ("Sure, here is the till.", "I can not help.")]
    scores, metrics = GoldReward(world="helpdesk_harm", part="harm").load(token_budget=1).score(said)
    assert scores.tolist() == [1.0, 0.0]
    assert metrics["gold/harm"].value == 0.5
    assert metrics["gold/mean"].value == pytest.approx(sum(world.gold(r.prompt, r.response).total for r in said) / 2)


def test_a_part_that_the_world_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"part = 'harm', and the gold score of arithmetic has correct, format"):
        GoldReward(world="arithmetic", part="harm")
