"""What an environment wrote is attended to and never trained on, and the online stage runs in one."""

from __future__ import annotations

import json

import pytest
import torch

from tests.stages.commands import FAST, online_settings, rows, run_stage, trimtab, without_times, write_run_file
from tests.stages.test_online_invariance import CHANGES, FAMILY
from trimtab.batches.rollouts import PolicyBatch, in_groups, rollout_trees
from trimtab.core.types import Message, Observation, Prompt
from trimtab.data.chat import Chat
from trimtab.engines.episodes import EpisodeLimits, EpisodeSampler
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.sampler import Sampling
from trimtab.math.advantages import GAE, Episodes, token_rewards
from trimtab.math.losses.policy import PPO, EntropyBonus, KLPenalty, Reinforce
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.stages import online

TEXTS = ("I want a refund!", "What is 12 + 30?", "Item: lamp. Policy: refund within 30 days.", "Thank you")


class Interrupting:
    """Says something after every stop."""

    stop = ("e", "n", "a")

    def reset(self, prompt, *, seed):
        return None

    def step(self, state, turn):
        return Observation(text=" refund of 30 days\n", new_turn=len(turn) % 2 == 0)


@pytest.fixture(scope="module")
def episodes(base):
    """Two episodes for each of four prompts, of a model whose replies sometimes end."""
    chat = Chat(load_tokenizer(base))
    limits = EpisodeLimits(max_turns=4)
    policy = Policy(load_causal(base), pad_id=chat.pad_id)
    generator = EpisodeSampler(policy, chat, Sampling(max_new_tokens=50), Interrupting(), limits)
    prompts = [Prompt(messages=(Message("user", text),)) for text in TEXTS]
    found = generator.generate(prompts, group_size=2, seed=3)
    assert sum(len(r.observations) for r in found) > 8
    return found


def batch_of(rollouts):
    """A batch of made-up numbers about the tokens that the policy chose."""
    trees = rollout_trees(in_groups(rollouts, 2))
    draw = torch.Generator().manual_seed(0)
    old = torch.tensor([x for r in rollouts for x in r.logprobs])
    assert trees.num_trained == len(old) == sum(sum(r.response_mask) for r in rollouts)

    def near(x, scale):
        return x + scale * torch.randn(len(old), generator=draw)

    zeros = torch.zeros(len(old))
    return PolicyBatch(
        trees=trees,
        old_logprobs=near(old, 0.2),
        correction=near(zeros, 0.1) + 1,
        ref_logprobs=near(old, 0.5),
        old_values=near(zeros, 1.0),
        advantages=near(zeros, 1.0),
        returns=near(zeros, 1.0),
    )


def update(base, rollouts, losses, *, token_budget=10**9, order=None, tree_form=True):
    role = Policy(load_causal(base), pad_id=0)
    assert role.tree_form
    role.tree_form = tree_form
    optimizer = AdamW(learning_rate=1e-3, max_gradient_norm=1e9)
    learner = LocalLearner(role, optimizer, token_budget=token_budget, num_updates=1, name="policy")
    whole = batch_of(rollouts)
    metrics = learner.update([(whole if order is None else whole.select(order), losses)])
    gradient = torch.cat([p.grad.flatten() for p in learner.parameters.values() if p.grad is not None])
    return gradient, {name: metric.value for name, metric in metrics.items()}


def slow_gradient(base, rollouts, *, train_observations=False):
    """REINFORCE token by token from its definition: one sequence at a time, the model's plain forward, a sum over the
    tokens that the policy chose, divided by their number. With it, what reaches each row of logits."""
    batch = batch_of(rollouts)
    model = load_causal(base)
    weights = iter((batch.advantages * batch.correction).tolist())
    total, num, reached = torch.zeros(()), 0, []
    for r in rollouts:
        logits = model(input_ids=torch.tensor([r.prompt_ids + r.response_ids])).logits[0]
        logits.retain_grad()
        reached.append(logits)
        for place, (token, chosen) in enumerate(zip(r.response_ids, r.response_mask, strict=True)):
            if chosen or train_observations:
                weight = next(weights) if chosen else 1.0
                total = total - weight * logits[len(r.prompt_ids) + place - 1].log_softmax(-1)[token]
                num += 1
    (total / num).backward()
    gradient = torch.cat([p.grad.flatten() for _, p in model.named_parameters()])
    return gradient, [logits.grad for logits in reached]


def test_the_update_is_that_of_the_policys_own_tokens_alone(base, episodes):
    fast, _ = update(base, episodes, [Reinforce()])
    slow, reached = slow_gradient(base, episodes)
    assert float((fast - slow).norm() / slow.norm()) < 1e-5
    for r, gradient in zip(episodes, reached, strict=True):
        rows_of_response = gradient[len(r.prompt_ids) - 1 : -1].abs().sum(-1) > 0
        assert rows_of_response.tolist() == list(r.response_mask)
    wrong, _ = slow_gradient(base, episodes, train_observations=True)
    assert float((wrong - slow).norm() / slow.norm()) > 0.1, "observations hardly matter here; the test shows nothing"


@pytest.mark.parametrize("tree_form", [True, False])
def test_no_observed_token_is_ever_a_target(base, episodes, tree_form):
    trees = rollout_trees(in_groups(episodes, 2))
    chosen = [t for r in episodes for t, c in zip(r.response_ids, r.response_mask, strict=True) if c]
    assert trees.targets.tolist() == chosen
    # Yet what was observed is attended to: another observation gives other log-probabilities behind it.
    role = Policy(load_causal(base), pad_id=0)
    role.tree_form = tree_form
    first = next(r for r in episodes if r.observations)
    (start, end), ids = first.observations[0], list(first.response_ids)
    ids[start:end] = [token + 1 for token in ids[start:end]]
    changed = [type(first)(**{**first.__dict__, "response_ids": tuple(ids)})]
    with torch.no_grad():
        before, after = (role(rollout_trees([g])).logprobs for g in ([first], changed))
    assert torch.equal(before[:start], after[:start])
    assert (before[start:] != after[start:]).all()


@pytest.mark.parametrize("changed", CHANGES, ids=str)
@pytest.mark.parametrize("loss", [PPO(aggregation="sequence_mean"), *FAMILY], ids=lambda x: type(x).__name__)
def test_the_same_update_for_any_split_order_and_form_with_observations(base, episodes, loss, changed):
    averaged = {"aggregation": loss.aggregation, "length": loss.length}
    losses = [loss, EntropyBonus(coef=0.1, **averaged), KLPenalty(coef=0.3, **averaged)]
    changed = {**changed, **({"order": [i for i in changed["order"] if i < 4]} if "order" in changed else {})}
    gradient, metrics = update(base, episodes, losses)
    other_gradient, other_metrics = update(base, episodes, losses, **changed)
    assert float((gradient - other_gradient).norm() / gradient.norm()) < 1e-5
    assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_score_stands_at_the_policys_last_token_and_advantages_pass_over_observations(episodes):
    trees = rollout_trees(in_groups(episodes, 2))
    ids, num = trees.sequence_ids, trees.num_sequences
    rewards = token_rewards(torch.arange(num) + 1.0, torch.zeros(len(ids)), ids, kl_coef=0.1)
    found = Episodes(rewards, torch.zeros(len(ids)), ids, torch.arange(num) // 2, torch.zeros(num))
    advantages = iter(GAE(gamma=0.9, lam=1.0)(found).tolist())
    for i, r in enumerate(episodes):
        own = sum(r.response_mask)
        for place in range(own):  # discounted by the policy's tokens: what was observed takes no time
            assert next(advantages) == pytest.approx((i + 1) * 0.9 ** (own - 1 - place), rel=1e-5)


def settings_of(base, **changed):
    return (
        online_settings(base, base)
        | {
            "prompts": "world:catalogue?num=8",
            "world": "catalogue",
            "rewards": [{"name": "gold", "world": "catalogue"}],
            "environment": {"name": "react", "corpus": "world:catalogue"},
            "episodes": {"max_turns": 3, "max_observation_tokens": 30},
            "sampling": {"max_new_tokens": 40, "stop": ["e", "n"]},
            "group_size": 2,
        }
        | changed
    )


@pytest.mark.parametrize(
    "changed",
    [{}, {"advantage": "remax"}, {"advantage": "grpo", "kl_in": "loss"}],
    ids=["critic", "greedy", "group"],
)
def test_two_steps_in_an_environment(tmp_path, base, changed):
    found = rows(run_stage("online", tmp_path / "run", **settings_of(base, **changed)))
    for row in found:
        assert row["rollout/turns"] == 8 * row["rollout/turns_mean"]
        assert row["rollout/logprob_difference"] < 1e-4
        assert {"rollout/out_of_turns", "rollout/out_of_tokens", "rollout/cut_observations"} <= row.keys()
    assert found[0]["rollout/tool_calls"] == 0  # a random model has yet to learn how to call


def test_tools_that_are_called_are_counted(tmp_path, base, monkeypatch):
    """A policy that cannot spell gets the error's text; with these stop texts every stop is a call gone wrong."""
    monkeypatch.setattr("trimtab.environments.react.ReActEnvironment.stop", ("e", "n", "a", "r"))
    found = rows(run_stage("online", tmp_path / "run", **settings_of(base)))
    assert found[0]["rollout/tool_errors"] > 0
    assert found[0]["rollout/observation_tokens"] > 0
    samples = rows(tmp_path / "run", "samples.jsonl")
    assert any("Observation: error" in row["response"] for row in samples)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_in_an_environment_that_is_resumed_ends_as_one_that_was_not(tmp_path, base, monkeypatch, lag):
    engine = {"correction": {"kind": "truncate"}, "engine": {"max_staleness": lag}} if lag else {}
    settings = settings_of(base, num_steps=3, checkpoint_every=1, optimizer=FAST, **engine)
    whole = run_stage("online", tmp_path / "whole", **settings)

    def die(number, step=online.train_step, **rest):
        if number == 2:
            raise Killed
        return step(number, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(online, "train_step", die)
        with pytest.raises(Killed):
            run_stage("online", tmp_path / "part", **settings)
    assert 0 < len(rows(tmp_path / "part")) < 3
    part = run_stage("online", tmp_path / "part", **settings)
    assert without_times(rows(part)) == without_times(rows(whole))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("reakt", "no environment is called 'reakt'; did you mean 'react'"),
        ({"name": "react"}, "needs a corpus"),
        ({"name": "react", "corpus": "world:catalogue", "tool": "x"}, "did you mean environment.tools"),
        ({"name": "react", "corpus": "nothing.jsonl"}, "there is no file"),
    ],
)
def test_a_mistake_in_the_environment_is_explained(tmp_path, base, environment, message):
    run_file = write_run_file(tmp_path / "run.toml", settings_of(base, environment=environment))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_the_settings_of_a_run_in_an_environment_can_be_run_again(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **settings_of(base, num_steps=1))
    again = trimtab("online", out / "settings.toml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert json.dumps(without_times(rows(out))) == json.dumps(without_times(rows(tmp_path / "again")))
