"""The gold score as a reward."""

from __future__ import annotations

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
