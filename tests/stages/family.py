"""Short runs of the online family against plain functions, as run files."""

from __future__ import annotations

from tests.stages.commands import FAST

TEMPERATURE = 0.9  # that of test_online_arithmetic
LENGTH = 5  # some replies end before it, and some do not
TRUNCATE = {"kind": "truncate"}


def reward(name):
    return [{"name": "callable", "function": f"tests.stages.reward_functions:{name}"}]


def family(base, function="length", **changed):
    """Two short steps of GRPO against a plain function."""
    return {
        "model": str(base),
        "prompts": "world:arithmetic?num=12",
        "rewards": reward(function),
        "advantage": {"name": "grpo"},
        "kl": {"name": "fixed", "coef": 0.0},
        "sampling": {"max_new_tokens": LENGTH, "temperature": TEMPERATURE},
        "prompts_per_step": 3,
        "group_size": 3,
        "num_steps": 2,
        "num_epochs": 1,
        "optimizer": FAST,
        "sample_every": 1,
        "num_samples": 100,
    } | changed


def lagging(base, lag, **changed):
    """Five steps of GRPO whose rollouts lag."""
    return family(base, engine={"max_staleness": lag}, correction=TRUNCATE, num_steps=5) | changed
