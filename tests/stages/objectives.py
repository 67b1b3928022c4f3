"""Online settings with several rewards, and rewards and replies that say what they are told."""

from __future__ import annotations

import pytest
import torch

from tests.stages.family import family
from trimtab.core import config
from trimtab.core.errors import ConfigError
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.rewards.combined import CombinedReward, RewardPart
from trimtab.stages.online.checks import Clock
from trimtab.stages.online.sampling import RolloutSource
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState

FUNCTIONS = "tests.stages.reward_functions"


def function(name, **fields):
    return {"name": "callable", "function": f"{FUNCTIONS}:{name}", **fields}


def two(**changed):
    """Rewards of unlike units: characters, and whether their number is even."""
    return {"rewards": [function("length", weight=0.5), function("even", weight=2.0)]} | changed


def run_settings(base, **changed):
    """Two short steps of GRPO."""
    return family(base, kl={"name": "fixed", "coef": 0.05}, sampling={"max_new_tokens": 5}) | changed


def settings(**changed):
    return config.resolve(OnlineSettings, run_settings("m", **changed), where="the test")


def refusal(**changed):
    with pytest.raises(ConfigError) as found:
        settings(**changed)
    return str(found.value)


def new_state():
    return OnlineState([], [], 0, 0.0)


GREETING = Prompt(messages=(Message("user", "Hi"),))


def rollout(*, num=1, prompt=GREETING, stopped=True):
    return Rollout(
        prompt=prompt, response="x", prompt_ids=(1,), response_ids=(2,) * num, logprobs=(-1.0,) * num,
        finish_reason="stop" if stopped else "length",
    )  # fmt: skip


class Scores:
    """A reward that gives each reply, or each token of two, what it is told."""

    def __init__(self, values, *, each=1):
        self.values = values
        self.each = each

    def score(self, rollouts):
        return torch.tensor(self.values[: self.each * len(rollouts)]), {}


class Sampler:
    """Draws replies of two tokens."""

    def generate(self, prompts, *, group_size, seed):
        return [rollout(num=2, prompt=prompt) for prompt in prompts for _ in range(group_size)]


def source(chosen, *, weights=(0.5, 2.0), cost=None, greedy=None, **scores):
    parts = [RewardPart(n, w, reward) for (n, reward), w in zip(scores.items(), weights, strict=False)]
    parts += [RewardPart("cost", 1.0, cost)] if cost is not None else []
    return RolloutSource(Sampler(), greedy, CombinedReward(parts, chosen.combine), None, chosen)


def judged(drawn_from, num_prompts):
    prompts = [Prompt(messages=(Message("user", f"Hi {i}"),)) for i in range(num_prompts)]
    state = OnlineState([], prompts, 0, 0.0)
    return drawn_from.judge(1, drawn_from.draw(1, state, Clock()), state, Clock())
