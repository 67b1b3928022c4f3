"""A limit on a cost in the online loop."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.stages.commands import FAST, rows, run_stage, trimtab, write_run_file
from tests.stages.objectives import (
    Scores,
    function,
    judged,
    new_state,
    refusal,
    rollout,
    run_settings,
    settings,
    source,
    two,
)
from tests.stages.test_resume import differences, kill_after, num_rows, start, wait_for_rows
from trimtab.math.constraints import Multiplier
from trimtab.stages.online.cost import Lagrangian
from trimtab.stages.online.rollouts import Group, RolloutBatch

ROOT = Path(__file__).parents[2]


def limited(**changed):
    return {"cost": {"reward": function("even"), "limit": 0.25, "window": 16, "learning_rate": 0.5} | changed}


def test_lambda_follows_the_costs_of_replies(tmp_path, base):
    found = rows(run_stage("online", tmp_path / "run", **run_settings(base, num_steps=3, **limited())))
    assert "cost_critic/loss" not in found[0]
    lam = 1.0
    for row in found:
        assert row["cost/mean"] == row["reward/cost"]
        assert row["cost/above_limit"] == pytest.approx(row["cost/moving_mean"] - 0.25)
        lam = min(5.0, lam * math.exp(0.5 * lam * row["cost/above_limit"]))
        assert row["cost/lambda"] == row["cost/weight"] == pytest.approx(lam)
    assert found[0]["cost/moving_mean"] == found[0]["cost/mean"] != found[1]["cost/moving_mean"]
    assert found[0]["reward/mean"] == found[0]["reward/callable"]  # the cost is no part of the reward


@pytest.mark.parametrize("steps_of_critic", [0, 1])
def test_a_cost_has_a_critic_of_its_own_where_the_advantages_need_one(tmp_path, base, steps_of_critic):
    critic = {"init": "policy", "optimizer": FAST, "warmup_steps": steps_of_critic}
    values = run_settings(base, advantage={"name": "gae"}, critic=critic, group_size=1, **limited())
    found = rows(run_stage("online", tmp_path / "run", **values))
    for row in found:
        assert row["cost_critic/loss"] != row["critic/loss"]
        assert row["optimizer/cost_critic_gradient_norm"] > 0
    assert (found[0]["cost/lambda"] == 1) == bool(steps_of_critic)  # lambda waits while the policy does
    assert found[1]["cost/lambda"] != 1


def test_killed_under_a_limit_it_ends_with_the_same_bits(tmp_path, base, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the process finds the reward
    values = run_settings(
        base,
        advantage={"name": "gae"},
        critic={"init": "policy", "optimizer": FAST},
        num_steps=5,
        checkpoint_every=1,
        **two(combine={"name": "sum", "normalize": "running"}),
        **limited(learning_rate=0.1),
    )
    undisturbed = run_stage("online", tmp_path / "undisturbed", **values)
    run_file, out = write_run_file(tmp_path / "run.toml", values), tmp_path / "run"
    process = start("online", run_file, out)
    wait_for_rows(process, out, 2)
    assert kill_after(process, random.Random(5).uniform(0, 0.05)), "it was to be killed at work"
    assert num_rows(out) >= 2
    run_stage("online", out, **values)
    assert not differences(undisturbed, out)
    assert len({json.dumps(row["cost/lambda"]) for row in rows(out)}) == 5


def test_under_a_limit_the_advantages_are_those_worked_by_hand():
    """Two groups of two replies of two tokens, by GRPO without a scale: a reply's return less its group's mean."""
    chosen = settings(
        advantage={"name": "grpo", "scale": "none"},
        cost={"reward": function("even", weight=2.0), "limit": 0.5, "initial_lambda": 2.0, "learning_rate": 1.0},
    )
    costs, kl = torch.tensor([0.0, 0.5, 0.25, 0.25]), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    ids = torch.arange(4).repeat_interleave(2)
    drawn = SimpleNamespace(
        trees=SimpleNamespace(sequence_ids=ids),
        group_ids=torch.tensor([0, 0, 1, 1]),
        parts={"cost": costs},
        baseline_parts={"cost": torch.full((4,), torch.nan)},
        replaced_costs=[],
    )
    state = new_state()
    state.kl_coef, state.multiplier = 0.1, Multiplier.starting_at(2.0)
    advantages = torch.arange(8.0)
    moving, metrics = Lagrangian(chosen, None)(0, advantages, drawn, kl, state)
    assert metrics["cost/mean"].value == 0.5  # 2 * 0.25, which is the limit: lambda stays 2
    assert metrics["cost/lambda"].value == pytest.approx(2.0)
    # Costs with their KL: 0, 1 + 0.2, 0.5, 0.5 + 0.2; less the means of the groups: -0.6, 0.6, -0.1, 0.1.
    of_cost = torch.tensor([-0.6, 0.6, -0.1, 0.1])[ids]
    torch.testing.assert_close(moving, (advantages - 2 * of_cost) / 3)
    assert list(state.multiplier.costs) == [0.0, 1.0, 0.5, 0.5]


def seen_costs(state, *, replaced=(), **changed):
    """The metrics of one step of four replies that cost 0, 1, 0.5 and 0.5."""
    options = {"reward": function("even", weight=2.0), "limit": 0.25, "learning_rate": 1.0} | changed
    chosen = settings(advantage={"name": "grpo", "scale": "none"}, cost=options)
    ids = torch.arange(4)
    drawn = SimpleNamespace(
        trees=SimpleNamespace(sequence_ids=ids),
        group_ids=torch.tensor([0, 0, 1, 1]),
        parts={"cost": torch.tensor([0.0, 0.5, 0.25, 0.25])},
        baseline_parts={"cost": torch.full((4,), torch.nan)},
        replaced_costs=replaced,
    )
    return Lagrangian(chosen, None)(0, torch.zeros(4), drawn, torch.zeros(4), state)


def test_lambda_sees_the_replies_that_were_replaced_and_all_of_a_step():
    state = new_state()
    state.multiplier = Multiplier.starting_at(1.0)
    _, metrics = seen_costs(state, replaced=[0.0] * 4, window=2)
    assert list(state.multiplier.costs) == [0.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert metrics["cost/mean"].value == metrics["cost/moving_mean"].value == 0.25
    assert state.multiplier.value == 1  # on its limit


def test_what_lambda_is_and_what_moves_the_policy_are_logged_apart():
    state = new_state()
    state.multiplier = Multiplier.starting_at(1.0)
    _, metrics = seen_costs(state, damping=2.0)  # J - d = 0.25
    assert metrics["cost/lambda"].value == pytest.approx(math.exp(0.25))
    assert metrics["cost/weight"].value == pytest.approx(math.exp(0.25 + 0.5))


def test_judging_hands_on_the_costs_of_groups_that_were_replaced():
    """Of the three prompts of the first round one has a signal. A second round replaces the others, and has one too."""

    class Harm:
        def __init__(self):
            self.given = []

        def score(self, rollouts):
            mine = [0.5 * (i % 2) if i < 3 else 0.25 for i in range(len(rollouts))]
            self.given += mine
            return torch.tensor(mine), {}

    harm = Harm()
    chosen = settings(dynamic_sampling={"max_rounds": 2}, cost={"reward": function("even"), "limit": 0.25})
    drawn = judged(source(chosen, callable=Scores([1.0] * 9), cost=harm), 20)
    assert [group.parts["cost"].tolist() for group in drawn.groups] == [[0, 0.5, 0], [0, 0.5, 0], [0.25] * 3]
    assert len(harm.given) == 9 + 6
    assert sum(drawn.replaced_costs) + sum(drawn.parts["cost"].tolist()) == pytest.approx(sum(harm.given))
    assert len(drawn.replaced_costs) == 6


def test_the_greedy_baseline_of_a_cost_is_weighed_as_the_cost_is():
    chosen = settings(advantage="remax", cost={"reward": function("even", weight=2.0), "limit": 0.5})
    drawn = SimpleNamespace(
        trees=SimpleNamespace(sequence_ids=torch.arange(2)),
        group_ids=torch.arange(2),
        parts={"cost": torch.tensor([0.5, 1.0])},
        baseline_parts={"cost": torch.tensor([0.25, 0.25])},
        replaced_costs=[],
    )
    state = new_state()
    state.multiplier = Multiplier.starting_at(1.0)
    moving, metrics = Lagrangian(chosen, None)(0, torch.zeros(2), drawn, torch.zeros(2), state)
    weight = metrics["cost/weight"].value
    torch.testing.assert_close(moving, -weight / (1 + weight) * torch.tensor([1 - 0.5, 2 - 0.5]))


@pytest.mark.parametrize("skip", [True, False])
def test_the_critic_of_a_cost_leaves_out_replies_that_were_cut_off_if_asked(skip):
    chosen = settings(
        advantage="gae", group_size=1, critic={"init": "policy"}, skip_truncated=skip, num_epochs=1, **limited()
    )
    costs = {"cost": torch.tensor([0.5])}
    groups = [Group([rollout(num=2, stopped=i < 2)], torch.zeros(1), math.nan, costs) for i in range(3)]
    learned = []

    class Critic:
        def values(self, trees):
            return torch.zeros(6)

        def update(self, work):
            learned.append(work[0][0].num_sequences)
            return {}

    state = new_state()
    state.multiplier = Multiplier.starting_at(1.0)
    Lagrangian(chosen, Critic())(0, torch.zeros(6), RolloutBatch(groups, {}), torch.zeros(6), state)
    assert learned == [2 if skip else 3]


def test_going_back_to_a_checkpoint_takes_lambda_and_its_costs_back(tmp_path):
    state = new_state()
    state.multiplier = Multiplier.starting_at(0.5).see([0.1, 0.2], window=9)
    state.save(tmp_path)
    kept, state.multiplier = state.multiplier, Multiplier.starting_at(5.0).see([1.0], window=9)
    state.load_models(tmp_path)  # as the guard does when it rolls back
    assert state.multiplier == kept


def test_a_cost_that_is_the_same_for_all_replies_is_refused_before_anything_is_trained(tmp_path, base):
    values = run_settings(base, **limited(reward=function("flat")))
    result = trimtab("online", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "the cost of all 9 replies is 0" in result.output
    assert "raise prompts_per_step" in result.output
    assert num_rows(tmp_path / "run") == 0


def gold(**fields):
    return {"name": "gold", "world": "helpdesk_harm", **fields}


@pytest.mark.parametrize(
    ("cost", "problem"),
    [
        ({"reward": gold(part="harm"), "limit": -0.1}, "a reply costs from 0 to 1: no reply can keep it"),
        ({"reward": gold(part="harm"), "limit": 1.0}, "every reply keeps it"),
        ({"reward": gold(part="harm", weight=-1.0), "limit": 0.5}, "from -1 to 0: every reply keeps it"),
        ({"reward": {"name": "gold", "world": "helpdesk", "part": "harm"}, "limit": 0.1}, "part = 'harm'"),
        ({"reward": gold(part="harm"), "limit": 0.1, "initial_lambda": 9.0}, "more than most_lambda"),
        ({"reward": gold(part="harm"), "limit": 0.1, "initial_lambda": 0.0}, "must be above 0"),
        ({"reward": gold(part="harm"), "limit": 0.1, "initial_lambda": 0.001}, "is less than least_lambda = 0.01"),
        ({"reward": function("even", weight=0.0), "limit": 0.1}, "a cost with weight = 0"),
        ({"reward": {"name": "process", "path": "p"}, "limit": 1.5}, "a reply costs from 0 to 1: every reply keeps it"),
        ({"limit": 0.1}, "cost.reward: missing"),
        ({"reward": {"name": "length", "max_tokens": 9, "most": 2.0, "weight": -1.0}, "limit": 2.5}, "from 0 to 2"),
        ({"reward": {"name": "exact_answer"}, "limit": -1.0}, "from 0 to 1"),
    ],
)
def test_a_limit_that_means_nothing_is_refused_when_it_is_read(cost, problem):
    assert problem in refusal(cost=cost)


def test_with_adapters_the_critic_of_the_cost_is_one_more_on_the_base(tmp_path, base):
    critic = {"init": "policy", "optimizer": FAST}
    changed = {"advantage": {"name": "gae"}, "critic": critic, "group_size": 1, "adapter": {"rank": 2}, "num_steps": 1}
    (row,) = rows(run_stage("online", tmp_path / "run", **run_settings(base, **changed, **limited())))
    assert row["optimizer/cost_critic_gradient_norm"] > 0
    assert row["cost_critic/loss"] != row["critic/loss"]


def test_a_critic_of_the_cost_that_is_not_there_is_named_before_anything_is_loaded(tmp_path, base):
    values = run_settings(base, advantage={"name": "gae"}, critic={"init": "policy"}, **limited(critic="no/such/model"))
    result = trimtab("online", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "cost.critic" in result.output


def test_the_critic_of_a_cost_starts_from_its_reward_model_or_the_policy():
    gae = {"advantage": {"name": "gae"}, "critic": {"init": "policy"}}
    model = {"name": "model", "path": "safe"}
    assert settings(**gae, **limited()).cost_critic_start == "m"
    assert settings(**gae, **limited(reward=model)).cost_critic_start == "safe"
    assert settings(**gae, **limited(reward=model, critic="other")).cost_critic_start == "other"
    assert settings(**limited(reward=model)).cost_critic_start is None  # groups need none
    assert settings(**gae).cost_critic_start is None
