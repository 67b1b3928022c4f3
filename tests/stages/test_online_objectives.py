"""Several rewards in the online loop: normalised apart, gated, and under a limit on a cost."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.stages.commands import FAST, rows, run_stage, trimtab, write_run_file
from tests.stages.test_resume import differences, kill_after, num_rows, start, wait_for_rows
from trimtab.core import config
from trimtab.core.errors import ConfigError
from trimtab.math.combining import SafetyGate, WeightedSum
from trimtab.math.constraints import Multiplier
from trimtab.math.rewards import RunningMoments, moments_of
from trimtab.stages.online.checks import check_scores
from trimtab.stages.online.cost import Lagrangian
from trimtab.stages.online.draws import Draw, load_draws, save_draws
from trimtab.stages.online.rollouts import Group, RolloutBatch
from trimtab.stages.online.sampling import shape_rewards
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState

ROOT = Path(__file__).parents[2]
FUNCTIONS = "tests.stages.reward_functions"


def function(name, **fields):
    return {"name": "callable", "function": f"{FUNCTIONS}:{name}", **fields}


def two(**changed):
    """Rewards of unlike units: characters, and whether their number is even."""
    return {"rewards": [function("length", weight=0.5), function("even", weight=2.0)]} | changed


def run_settings(base, **changed):
    """Two short steps of GRPO."""
    return {
        "model": str(base),
        "prompts": "world:arithmetic?num=12",
        "rewards": [function("length")],
        "advantage": {"name": "grpo"},
        "kl": {"name": "fixed", "coef": 0.05},
        "sampling": {"max_new_tokens": 5},
        "prompts_per_step": 3,
        "group_size": 3,
        "num_steps": 2,
        "num_epochs": 1,
        "optimizer": FAST,
        "sample_every": 1,
        "num_samples": 100,
    } | changed


def settings(**changed):
    return config.resolve(OnlineSettings, run_settings("m", **changed), where="the test")


def refusal(**changed):
    with pytest.raises(ConfigError) as found:
        settings(**changed)
    return str(found.value)


def batch_of(**parts):
    """One group with these scores; their weights are those of `two`."""
    scores = {name: torch.tensor(values) for name, values in parts.items()}
    rewards = 0.5 * scores["callable"] + 2 * scores["callable_2"]
    greedy = {name: float(values[0]) for name, values in scores.items()}
    group = Group([None] * len(rewards), rewards, float(rewards[0]), scores, greedy)
    finished = type("Done", (RolloutBatch,), {"finished": torch.ones(len(rewards), dtype=torch.bool)})
    return finished([group], {})


def new_state():
    return OnlineState([], [], 0, 0.0, RunningMoments())


# ---- normalised apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["running", "frozen"])
def test_each_reward_is_normalised_by_what_was_seen_of_it(normalize):
    chosen, state = settings(**two(combine={"name": "sum", "normalize": normalize})), new_state()
    steps = [
        {"callable": [100.0, 300.0, 500.0], "callable_2": [0.0, 1.0, 1.0]},
        {"callable": [700.0, 200.0, 900.0], "callable_2": [1.0, 1.0, 0.0]},
    ]
    for number in range(2):
        shaped = shape_rewards(batch_of(**steps[number]), chosen, state)
        seen = steps[: number + 1] if normalize == "running" else steps[:1]
        expected = torch.zeros(3)
        for name, weight in (("callable", 0.5), ("callable_2", 2.0)):
            values = torch.tensor([x for step in seen for x in step[name]])
            normal = (torch.tensor(steps[number][name]) - values.mean()) / values.std(correction=0)
            expected += weight * normal
        torch.testing.assert_close(shaped.rewards, expected)
        torch.testing.assert_close(shaped.baselines, expected[:1].expand(3))  # the greedy reply is the first
        assert [weight for weight, _ in shaped.parts] == [0.5, 2.0]


def test_without_normalisation_the_rewards_are_the_sum_as_it_was():
    drawn = batch_of(callable=[1.0, 2.0], callable_2=[0.0, 1.0])
    shaped = shape_rewards(drawn, settings(**two()), new_state())
    assert shaped.rewards.tolist() == drawn.rewards.tolist() == [0.5, 3.0]


def test_moments_of_each_reward_are_kept_in_a_checkpoint(tmp_path):
    state = new_state()
    state.part_moments = {"a": moments_of(torch.tensor([0.1, 1 / 3])), "b": RunningMoments()}
    state.save(tmp_path)
    kept = new_state()
    kept.load(tmp_path)
    assert kept.part_moments == state.part_moments


def test_scores_of_each_reward_are_kept_with_rollouts_that_were_drawn_ahead(tmp_path):
    group = Group([], torch.tensor([1 / 3]), 0.5, {"a": torch.tensor([0.1]), "cost": torch.tensor([1 / 7])}, {"a": 0.2})
    (kept,) = load_draws(save_draws([Draw(0, 0, 0, RolloutBatch([group], {}))], tmp_path), tmp_path)
    (found,) = kept.rollouts.groups
    assert {name: scores.tolist() for name, scores in found.parts.items()} == {
        name: scores.tolist() for name, scores in group.parts.items()
    }
    assert found.baseline_parts == group.baseline_parts


def test_rewards_on_scales_far_apart_are_named_with_what_to_do(capsys):
    parts = {"callable": torch.tensor([1000.0, 0.0]), "callable_2": torch.tensor([0.0, 1.0])}
    check_scores(parts, settings(**two()))
    said = capsys.readouterr().err
    assert "the reward callable varies 250 times as much as callable_2" in said
    assert "combine.normalize=running" in said
    check_scores(parts, settings(**two(combine={"name": "sum", "normalize": "running"})))
    check_scores(parts | {"callable": torch.tensor([390.0, 0.0])}, settings(**two()))
    check_scores(parts | {"callable_2": torch.tensor([1.0, 1.0])}, settings(**two()))  # says nothing of its scale yet
    assert not capsys.readouterr().err


def test_advantages_of_each_reward_apart_run(tmp_path, base):
    apart = {"advantage": {"name": "grpo", "per_reward": True}, "kl_in": "loss"}
    found = rows(run_stage("online", tmp_path / "run", **run_settings(base, **two(), **apart)))
    assert all(math.isfinite(row["policy/loss"]) and row["optimizer/policy_gradient_norm"] > 0 for row in found)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"advantage": {"name": "grpo", "per_reward": True}}, "per_reward = true with one reward"),
        (two(advantage={"name": "grpo", "per_reward": True}), "the KL belongs to none of the rewards"),
        (two(advantage={"name": "grpo", "per_reward": True}, shaping={"clip": 1.0}), "which is never made"),
        (two(advantage={"name": "grpo", "per_reward": True}, combine={"name": "gate", "safety": "callable"}), "leave"),
        ({"combine": {"name": "gate", "safety": "callable"}}, "chooses between two rewards, and there are 1"),
        (two(combine={"name": "gate", "safety": "safe"}), "the rewards are callable and callable_2"),
        (two(combine={"name": "gate", "safety": "callable"}, shaping={"normalize": True}), "both scale the rewards"),
        ({"combine": {"name": "sum", "normalize": "running"}}, "shaping.normalize = true"),
    ],
)
def test_combinations_that_can_not_be_are_refused(changed, problem):
    assert problem in refusal(**changed)


# ---- the gate ------------------------------------------------------------------------------------------------------


def test_the_gate_judges_each_reply_and_whitens_those_of_a_step(tmp_path, base):
    gate = {"name": "gate", "safety": "callable_2", "flag": "level"}
    rewards = [function("length"), function("even")]
    out = run_stage("online", tmp_path / "flagged", **run_settings(base, rewards=rewards, combine=gate))
    for row in rows(out):  # the level of every sum is above 0, so that all prompts are flagged
        assert row["reward/gated"] == 9
        assert row["reward/flagged_fraction"] == row["reward/gated_fraction"] == 1
        assert row["reward/mean"] == row["reward/callable_2"]
    first = [s["reward"] for s in rows(out, "samples.jsonl") if s["step"] == 1]
    assert sum(first) == pytest.approx(0, abs=1e-4)
    assert sum(x * x for x in first) / 9 == pytest.approx(1, abs=1e-4)


def test_a_flag_that_no_prompt_has_is_named(tmp_path, base):
    gate = {"name": "gate", "safety": "callable_2", "flag": "unsafe"}
    run_file = write_run_file(tmp_path / "run.toml", run_settings(base, **two(combine=gate)))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "no fact 'unsafe'" in result.output


# ---- a limit on a cost ---------------------------------------------------------------------------------------------


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
        assert row["cost/lambda"] == pytest.approx(lam)
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


def test_a_group_that_differs_in_its_cost_alone_has_a_signal():
    same, costs = torch.ones(2), torch.tensor([0.0, 1.0])
    assert not Group([None] * 2, same, math.nan, {"a": same, "b": costs}).has_signal
    assert Group([None] * 2, same, math.nan, {"a": same, "cost": costs}).has_signal


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
        ({"limit": 0.1}, "cost.reward: missing"),
        ({"reward": {"name": "length", "max_tokens": 9, "most": 2.0, "weight": -1.0}, "limit": 2.5}, "from 0 to 2"),
        ({"reward": {"name": "exact_answer"}, "limit": -1.0}, "from 0 to 1"),
    ],
)
def test_a_limit_that_means_nothing_is_refused_when_it_is_read(cost, problem):
    assert problem in refusal(cost=cost)


def test_the_defaults_of_the_run_file_are_the_plain_sum_and_no_limit():
    assert settings().combine == WeightedSum()
    assert settings().cost is None
    assert SafetyGate(safety="a").threshold == 0.15


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
