"""Rollouts written by hand."""

from __future__ import annotations

import pytest

from trimtab.core.types import Message, Prompt, Rollout


@pytest.fixture
def rollout():
    """A function that makes a rollout of a reply; `num_tokens` are made up."""

    def make(response, num_tokens=3, observed=0, **facts):
        return Rollout(
            prompt=Prompt(messages=(Message("user", "Try it."),), facts=facts),
            response=response,
            prompt_ids=(1, 2),
            response_ids=tuple(range(num_tokens + observed)),
            logprobs=(-1.0,) * num_tokens,
            finish_reason="stop",
        )

    return make
