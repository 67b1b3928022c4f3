"""Several rewards in the online loop: normalised apart, and gated."""

from __future__ import annotations

import math

import pytest
import torch

from tests.stages.commands import rows, run_stage, trimtab, write_run_file
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
from trimtab.core.errors import ConfigError, DataError, EngineError
from trimtab.core.types import Message, Prompt
from trimtab.math.combining import SafetyGate, WeightedSum
from trimtab.math.rewards import RunningMoments, moments_of
from trimtab.rewards.combined import CombinedReward, RewardPart, is_flagged, part_names, refuse_unread_flags
from trimtab.stages.online.checks import check_scores
from trimtab.stages.online.draws import Draw, load_draws, save_draws
from trimtab.stages.online.rollouts import Group, RolloutBatch
from trimtab.stages.online.sampling import shape_rewards


def batch_of(**parts):
    """One group with these scores; their weights are those of `two`."""
    scores = {name: torch.tensor(values) for name, values in parts.items()}
    rewards = 0.5 * scores["callable"] + 2 * scores["callable_2"]
    greedy = {name: float(values[0]) for name, values in scores.items()}
    group = Group([None] * len(rewards), rewards, float(rewards[0]), scores, greedy)
    finished = type("Done", (RolloutBatch,), {"finished": torch.ones(len(rewards), dtype=torch.bool)})
    return finished([group], {})


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
    (kept,) = load_draws(save_draws([Draw(0, 0, 0, RolloutBatch([group], {}, 0, [0.3]))], tmp_path), tmp_path)
    (found,) = kept.rollouts.groups
    assert kept.rollouts.replaced_costs == [0.3]
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
    check_scores(parts, settings(**two()), pays_tokens=True)  # which can not be normalised
    said = capsys.readouterr().err
    assert "change the weights" in said
    assert "combine.normalize" not in said
    check_scores(parts, settings(**two(combine={"name": "gate", "safety": "callable"})))  # nothing is added up
    check_scores(parts, settings(**two(combine={"name": "sum", "normalize": "running"})))
    check_scores(parts | {"callable": torch.tensor([390.0, 0.0])}, settings(**two()))
    check_scores(parts | {"callable_2": torch.tensor([1.0, 1.0])}, settings(**two()))  # says nothing of its scale yet
    assert not capsys.readouterr().err


def test_a_cost_that_is_the_same_for_all_replies_is_said_with_its_weight():
    limited = {"cost": {"reward": function("flat", weight=-2.0), "limit": 0.25}}
    with pytest.raises(EngineError, match=r"the cost of all 2 replies is 0\.5"):
        check_scores({"cost": torch.tensor([-0.25, -0.25])}, settings(**two(**limited)))


def test_advantages_of_each_reward_apart_run(tmp_path, base):
    apart = {"advantage": {"name": "grpo", "per_reward": True}, "kl_in": "loss"}
    found = rows(run_stage("online", tmp_path / "run", **run_settings(base, **two(), **apart)))
    assert all(math.isfinite(row["policy/loss"]) and row["optimizer/policy_gradient_norm"] > 0 for row in found)


APART = {"name": "grpo", "per_reward": True}
MODEL = {"name": "model", "path": "m"}
MODEL_AND_ANSWER = [MODEL, {"name": "exact_answer"}]
GATE_OF_ANSWER = {"name": "gate", "safety": "exact_answer"}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"advantage": {"name": "grpo", "per_reward": True}}, "per_reward = true with one reward"),
        (two(advantage={"name": "grpo", "per_reward": True}), "the KL belongs to none of the rewards"),
        (two(advantage={"name": "grpo", "per_reward": True}, shaping={"clip": 1.0}), "which is never made"),
        (two(advantage={"name": "grpo", "per_reward": True}, combine={"name": "gate", "safety": "callable"}), "leave"),
        (two(advantage=APART, kl_in="loss", combine={"name": "sum", "normalize": "running"}), "leave combine out"),
        (two(advantage=APART, kl_in="loss", whiten_rewards=True), "does not read the rewards of tokens"),
        ({"rewards": MODEL_AND_ANSWER, "combine": GATE_OF_ANSWER}, "at least 0: as logits they are never below"),
        (
            {"rewards": [MODEL, {"name": "process", "path": "p"}], "combine": {"name": "gate", "safety": "process"}},
            "the threshold 0.15 (the logit -1.73)",
        ),
        ({"cost": {"reward": function("even"), "limit": 0.1}, "whiten_rewards": True}, "whiten_rewards = true with a"),
        ({"rewards": [function("length", weight=0.0), function("even", weight=0.0)]}, "every reward has weight = 0"),
        ({"combine": {"name": "gate", "safety": "callable"}}, "chooses between two rewards, and there are 1"),
        (two(combine={"name": "gate", "safety": "safe"}), "the rewards are callable and callable_2"),
        (two(combine={"name": "gate", "safety": "callable"}, shaping={"normalize": True}), "both scale the rewards"),
        ({"combine": {"name": "sum", "normalize": "running"}}, "shaping.normalize = true"),
    ],
)
def test_combinations_that_can_not_be_are_refused(changed, problem):
    assert problem in refusal(**changed)


def test_a_gate_that_a_bounded_score_can_close_is_none_to_refuse():
    higher = settings(rewards=MODEL_AND_ANSWER, combine=GATE_OF_ANSWER | {"threshold": 0.6})
    assert higher.combine.logit == pytest.approx(0.405, abs=1e-3)  # an answer is worth 0 or 1, on both sides of it
    turned = settings(rewards=[MODEL, {"name": "exact_answer", "weight": -2.0}], combine=GATE_OF_ANSWER)
    assert -2.0 < turned.combine.logit < 0.0  # a right answer is worth -2 here


def test_a_limited_cost_may_be_all_that_is_trained_for():
    limited = settings(rewards=[function("length", weight=0.0)], cost={"reward": function("even"), "limit": 0.1})
    assert limited.cost.limit == 0.1


def test_an_advantage_of_the_users_own_need_not_know_of_parts(tmp_path):
    file = tmp_path / "mine.py"
    flags = "needs_critic = needs_greedy = needs_group = whiten = False"
    file.write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\n"
        f"class Mine:\n    {flags}\n    def __call__(self, episodes):\n        return episodes.rewards\n"
    )
    assert not settings(advantage=f"{file}:Mine", **two()).reads_parts


def test_no_reward_is_called_cost(monkeypatch):
    monkeypatch.setattr("trimtab.core.registry.name_of", lambda kind, cls: "cost")
    with pytest.raises(ConfigError, match="a reward is registered under the name 'cost'"):
        part_names([object()])


# ---- judging -------------------------------------------------------------------------------------------------------


def test_scores_and_payments_stay_with_their_replies_if_one_is_dropped():
    chosen = settings(**two(advantage="reinforce_pp", on_failed_reward="drop", prompts_per_step=2))
    whole, tokens = Scores([1.0, 2.0, 3.0, 4.0, math.nan, 6.0]), Scores([float(i) for i in range(12)], each=2)
    groups = judged(source(chosen, callable=whole, callable_2=tokens), 2).groups
    assert [len(group.rollouts) for group in groups] == [3, 2]
    assert groups[1].parts["callable"].tolist() == [4.0, 6.0]
    assert groups[1].parts["callable_2"].tolist() == [6 + 7, 10 + 11]
    # A half of the first reward at the last token, and twice the second where it is paid.
    assert groups[1].paid.tolist() == [12, 14 + 2, 20, 22 + 3]
    assert groups[1].rewards.tolist() == [28, 45]


def test_a_reward_of_the_users_own_that_pays_tokens_is_refused_where_its_payments_would_be_lost():
    for changed, said in [
        ({}, "rewards that pay single tokens and the advantage GRPO"),
        ({"advantage": "reinforce_pp", "shaping": {"normalize": True}}, "they are of the reward of a whole reply"),
    ]:
        with pytest.raises(ConfigError, match=said) as caught:
            judged(source(settings(**changed), callable=Scores([0.0] * 18, each=2)), 3)
        assert "one number for each reply" in caught.value.fix
        assert caught.value.where == "rewards, step 2"


def test_a_reply_whose_cost_is_not_known_is_not_judged():
    costs, scores = [0.0, math.nan], [1.0, 2.0]
    both = CombinedReward([RewardPart("a", 1.0, Scores(scores)), RewardPart("cost", 1.0, Scores(costs))])
    total, _, metrics = both.score_parts([rollout(num=2), rollout(num=2)])
    assert total.isnan().tolist() == [False, True]
    assert metrics["reward/cost_failed"].value == 1


def test_the_greedy_baseline_is_whitened_with_the_rewards():
    chosen = settings(**two(combine={"name": "gate", "safety": "callable_2"}))
    shaped = shape_rewards(batch_of(callable=[2.0, 6.0], callable_2=[0.0, 0.0]), chosen, new_state())
    assert shaped.rewards.tolist() == pytest.approx([-1, 1], abs=1e-4)  # of the rewards 1 and 3
    assert shaped.baselines.tolist() == pytest.approx([-1, -1], abs=1e-4)  # the greedy reply's is 1 too


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


FLAGS = {
    "0": False, "false": False, "No": False, "": False, " ": False, None: False, 0: False, "0.0": False,
    "1": True, "true": True, "YES": True, 1: True, 2: True,
}  # fmt: skip


@pytest.mark.parametrize("value", [*FLAGS, True, False, "True", "FALSE"])
def test_a_flag_is_read_as_it_is_written_in_tables(value):
    prompt = Prompt(messages=(Message("user", "Hi"),), facts={"unsafe": value})
    assert is_flagged(prompt, "unsafe") == FLAGS.get(value, value == "True")


def test_a_flag_that_is_missing_in_some_prompts_flags_none_and_another_spelling_is_refused():
    flagged, other, odd = (
        Prompt(messages=(Message("user", "Hi"),), facts=facts) for facts in ({"unsafe": True}, {}, {"unsafe": "maybe"})
    )
    gate = SafetyGate(safety="b", flag="unsafe")
    refuse_unread_flags(gate, [other, flagged], where="p.jsonl")
    both = CombinedReward([RewardPart(name, 1.0, Scores(v)) for name, v in {"a": [5.0, 5.0], "b": [1.0, 1.0]}.items()])
    gated = CombinedReward(both.parts, gate)
    assert gated.score_parts([rollout(num=2, prompt=p) for p in (flagged, other)])[0].tolist() == [1.0, 5.0]
    with pytest.raises(DataError, match="the flag 'unsafe' is 'maybe', which is neither yes nor no"):
        refuse_unread_flags(gate, [flagged, odd], where="p.jsonl")
    with pytest.raises(DataError, match="none of 1 prompts has the fact 'unsafe'"):
        refuse_unread_flags(gate, [other], where="p.jsonl")
    refuse_unread_flags(gate, [other], where="p.jsonl", needed=False)
    refuse_unread_flags(WeightedSum(), [odd], where="p.jsonl")


def test_the_flags_of_the_guards_own_prompts_are_read_before_the_first_step(tmp_path, base):
    file = tmp_path / "guard.jsonl"
    file.write_text("".join(f'{{"prompt": "{i}?", "level": "high"}}\n' for i in range(3)))
    gate = {"name": "gate", "safety": "callable_2", "flag": "level"}
    guard = {"prompts": str(file), "measure": [function("brief")], "num_prompts": 2}
    values = run_settings(base, **two(combine=gate, guard=guard))
    result = trimtab("online", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "the flag 'level' is 'high'" in " ".join(result.output.split())


def test_a_flag_that_no_prompt_has_is_named(tmp_path, base):
    gate = {"name": "gate", "safety": "callable_2", "flag": "unsafe"}
    run_file = write_run_file(tmp_path / "run.toml", run_settings(base, **two(combine=gate)))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "has the fact 'unsafe'" in " ".join(result.output.split())


def test_a_group_that_differs_in_its_cost_alone_has_a_signal():
    same, costs = torch.ones(2), torch.tensor([0.0, 1.0])
    assert not Group([None] * 2, same, math.nan, {"a": same, "b": costs}).has_signal(parts_apart=False)
    assert Group([None] * 2, same, math.nan, {"a": same, "cost": costs}).has_signal(parts_apart=False)


def test_a_group_of_one_sum_has_a_signal_if_its_parts_are_scaled_apart():
    right, brief = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 2.0])
    group = Group([None] * 4, right + 0.5 * brief, math.nan, {"a": right, "b": brief})
    assert not group.has_signal(parts_apart=False)
    assert group.has_signal(parts_apart=True)
    assert not Group([None] * 4, right * 0, math.nan, {"a": right * 0}).has_signal(parts_apart=True)
    grpo = {"advantage": {"name": "grpo", "per_reward": True}, "kl_in": "loss"}
    assert settings(**two(**grpo)).scales_parts
    assert settings(**two(combine={"name": "sum", "normalize": "running"})).scales_parts
    assert not settings(**two()).scales_parts


@pytest.mark.parametrize(
    ("paid", "differs"),
    [
        ([[0.5, 0.5], [0.0, 1.0]], True),
        ([[1.0, 0.0], [0.0, 1.0]], True),
        ([[0.0, 0.0, 1.0], [0.0, 1.0]], False),  # both get 1 at their end
        ([[0.5, 0.5], [0.0, 0.5, 0.5]], False),
    ],
)
def test_a_group_of_one_sum_has_a_signal_if_it_is_paid_at_other_tokens(paid, differs):
    replies = [rollout(num=len(own)) for own in paid]
    group = Group(replies, torch.ones(2), math.nan, paid=torch.tensor([x for own in paid for x in own]))
    assert group.has_signal(parts_apart=False) == differs


def test_the_defaults_of_the_run_file_are_the_plain_sum_and_no_limit():
    assert settings().combine == WeightedSum()
    assert settings().cost is None
    assert SafetyGate(safety="a").threshold == 0.15
