"""Rewards of steps in online training: where they are paid, who credits them, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.stages.commands import FAST, online_settings, rows, run_stage, trimtab, without_times, write_run_file
from trimtab.core.errors import EngineError
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.math.advantages import GAE, Episodes, rewards_to_go
from trimtab.rewards.base import by_reply
from trimtab.stages.online import rewards_per_token
from trimtab.stages.online.draws import Draw, load_draws, save_draws
from trimtab.stages.online.rollouts import Group, RolloutBatch

IDS = torch.tensor([0, 0, 0, 0, 1, 1])
STEPS = torch.tensor([0.0, 0.5, 0.0, 0.25, 1.0, 0.0])
PLAIN = SimpleNamespace(kl_in="reward", whiten_rewards=False)


def test_steps_are_paid_where_they_end_and_shaping_and_kl_beside_them():
    """Reply 0 is paid 0.5 and 0.25, and shaping took 1 off; reply 1 is paid 1 at its first token. By hand."""
    shaped = torch.tensor([-0.25, 1.0])
    kl = torch.tensor([0.1, 0.0, 0.2, 0.0, 0.0, 0.3])
    paid = rewards_per_token(shaped, STEPS, kl, IDS, 2.0, PLAIN)
    torch.testing.assert_close(paid, torch.tensor([-0.2, 0.5, -0.4, 0.25 - 1.0, 1.0, -0.6]))
    usual = torch.tensor([-0.2, 0.0, -0.4, -0.25, 0.0, 1.0 - 0.6])
    torch.testing.assert_close(rewards_per_token(shaped, None, kl, IDS, 2.0, PLAIN), usual)


def test_a_token_is_credited_with_the_steps_that_come_after_it():
    assert rewards_to_go(STEPS, IDS, gamma=1.0).tolist() == [0.75, 0.75, 0.25, 0.25, 1.0, 0.0]
    values = torch.tensor([0.3, 0.1, 0.4, 0.2, 0.6, 0.5])
    episodes = Episodes(STEPS, values, IDS, torch.tensor([0, 1]), torch.full((2,), torch.nan))
    gamma, lam, slow = 0.9, 0.8, []
    for start, end in ((0, 4), (4, 6)):
        for t in range(start, end):  # A_t = sum over k of (gamma lam)^k delta_(t + k)
            deltas = [
                float(STEPS[k]) + gamma * (float(values[k + 1]) if k + 1 < end else 0.0) - float(values[k])
                for k in range(t, end)
            ]
            slow.append(sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas)))
    torch.testing.assert_close(GAE(gamma=gamma, lam=lam, whiten=False)(episodes), torch.tensor(slow))


def rollout(num):
    return Rollout(
        prompt=Prompt(messages=(Message("user", "Hi"),)), response="x", prompt_ids=(1,), response_ids=(2,) * num,
        logprobs=(-1.0,) * num, finish_reason="stop",
    )  # fmt: skip


def test_rewards_of_tokens_are_added_up_by_reply_and_those_of_replies_are_left_alone():
    rollouts = [rollout(4), rollout(2)]
    torch.testing.assert_close(by_reply(STEPS, rollouts), torch.tensor([0.75, 1.0]))
    whole = torch.tensor([3.0, 4.0])
    assert by_reply(whole, rollouts) is whole
    assert by_reply(torch.tensor([torch.nan, 1.0, 2.0]), [rollout(1), rollout(2)]).isnan().tolist() == [True, False]


def test_another_number_of_rewards_is_refused():
    with pytest.raises(EngineError, match="a reward gave 5 numbers for 2 replies of 6 tokens"):
        by_reply(torch.zeros(5), [rollout(4), rollout(2)])


def test_replies_of_one_token_that_were_scored_together_are_paid_their_reward():
    groups = [Group([rollout(1), rollout(1)], torch.tensor([0.5, 0.25]), 0.0), Group([rollout(2)], STEPS[:1], 0.0)]
    assert RolloutBatch(groups, {}).paid is None
    groups[1] = Group([rollout(2)], torch.tensor([0.5]), 0.0, paid=STEPS[:2])
    assert RolloutBatch(groups, {}).paid.tolist() == [0.5, 0.25, 0.0, 0.5]


def test_a_checkpoint_keeps_what_tokens_are_paid(tmp_path):
    group = Group([rollout(4), rollout(2)], torch.tensor([0.75, 1.0]), 0.5, paid=STEPS)
    plain = Group([rollout(4)], torch.tensor([0.75]), 0.5)
    found = save_draws([Draw(3, 2, 8, RolloutBatch([group, plain], {}))], tmp_path)
    back, other = load_draws(found, tmp_path)[0].rollouts.groups
    assert torch.equal(back.paid, STEPS)
    assert other.paid is None
    assert "paid" not in json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[1])


# --- runs ---


@pytest.fixture(scope="module")
def process_model(tmp_path_factory, base):
    """A process model whose steps end with a blank, which the tiny policy often writes."""
    directory = tmp_path_factory.mktemp("credit")
    data = directory / "steps.jsonl"
    found = [{"prompt": f"{i}?", "completions": [f"{i}+{i}", f"####{i}"], "labels": [1, i % 2]} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    loss = {"name": "process", "separator": " ", "labels_from": "people"}
    options = {"data": str(data), "held_out_data": str(data), "loss": loss, "optimizer": FAST, "max_steps": 1}
    return run_stage("reward", directory / "run", model=str(base), **options) / "model"


def made(base, model, **changed):
    reward = {"name": "process", "path": str(model), "credit": "differences"}
    sampling = {"max_new_tokens": 16}
    return online_settings(base, model, rewards=[reward], sampling=sampling, sample_every=0) | changed


def test_ppo_is_paid_by_steps_and_goes_on_bit_for_bit(tmp_path, base, process_model):
    settings = made(base, process_model, checkpoint_every=1)
    whole = rows(run_stage("online", tmp_path / "whole", **settings))
    assert 0 < whole[0]["reward/mean"] < 1  # the lowest step, by the labels of people
    assert whole[0]["reward/process_steps"] > 1
    run_stage("online", tmp_path / "part", **settings | {"num_steps": 1})
    part = run_stage("online", tmp_path / "part", **settings)
    assert without_times(rows(part)) == without_times(whole)


def test_credit_changes_the_update_and_not_the_reward(tmp_path, base, process_model):
    """The first step's replies and their rewards are the same; what is learnt from them is not."""
    by = {}
    for credit in ("reply", "differences"):
        reward = {"name": "process", "path": str(process_model), "credit": credit}
        options = {"advantage": "reinforce_pp", "num_steps": 1, "rewards": [reward]}
        by[credit] = rows(run_stage("online", tmp_path / credit, **made(base, process_model, **options)))[0]
    assert by["reply"]["reward/mean"] == pytest.approx(by["differences"]["reward/mean"], rel=1e-5)
    assert by["reply"]["optimizer/policy_gradient_norm"] != by["differences"]["optimizer/policy_gradient_norm"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"advantage": "grpo", "group_size": 2}, "gives all tokens of a reply the advantage of its sum"),
        ({"advantage": "rloo", "group_size": 2}, "gives all tokens of a reply the advantage of its sum"),
        ({"shaping": {"normalize": True}}, "they are of the reward of a whole reply"),
        ({"shaping": {"clip": 1.0}}, "they are of the reward of a whole reply"),
        ({"combine": {"name": "sum", "normalize": "running"}}, "it combines the rewards of whole replies"),
        ({"sampling": {"stop": ["\n\n"]}}, "a reply that is cut at a text may end inside a token"),
    ],
)
def test_what_would_lose_the_credit_of_steps_is_refused(tmp_path, base, process_model, changed, said):
    both = [*made(base, process_model)["rewards"], "exact_answer"]
    settings = made(base, process_model) | ({"rewards": both} if "combine" in changed else {}) | changed
    file = write_run_file(tmp_path / "run.toml", settings)
    result = trimtab("online", file, "--out", tmp_path / "none")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_best_of_n_and_evaluation_use_it_by_name(tmp_path, base, process_model):
    reward = {"name": "process", "path": str(process_model), "aggregate": "product"}
    options = {"prompts": "world:arithmetic?num=8", "rewards": [reward], "sampling": {"max_new_tokens": 32}}
    out = run_stage("select", tmp_path / "select", model=str(base), replies_per_prompt=2, **options)
    scores = [r["reward"] for row in rows(out, "replies.jsonl") for r in row["replies"]]
    assert all(0 < score < 1 for score in scores)
    done = run_stage("evaluate", tmp_path / "evaluate", model=str(base), num_prompts=8, **options)
    assert 0 < json.loads((done / "summary.json").read_text())["policy"]["process"] < 1
