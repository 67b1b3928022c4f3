"""PPO through the command line, option by option; `test_online_arithmetic.py` recomputes the numbers themselves."""

import itertools
import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests.stages.commands import FAST, online_settings, rows, run_stage, summary, trimtab, write_run_file
from trimtab.engines.local import agreement
from trimtab.engines.local.learner import LocalLearner
from trimtab.engines.local.sampler import Sampling
from trimtab.stages.online.checks import say_truncation

GOLD = {"name": "gold", "world": "arithmetic"}


def run(tmp_path, base, reward_run, name="run", **changed):
    return run_stage("online", tmp_path / name, **online_settings(base, reward_run / "model", **changed))


def weights(directory):
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, base, reward_run):
    """Two steps with the settings that every test below starts from."""
    return run(tmp_path_factory.mktemp("plain"), base, reward_run)


def test_two_steps_log_what_reports_read(plain, base, reward_run):
    first, second = rows(plain)
    for name in (
        *("reward/mean", "reward/std", "gold/mean", "gold/correct", "policy/kl", "policy/kl_k3", "policy/entropy"),
        *("policy/clip_fraction", "policy/approx_kl", "policy/loss", "critic/loss", "critic/explained_variance"),
        *("critic/clip_fraction", "rollout/length_mean", "rollout/truncated_fraction", "rollout/logprob_difference"),
        *("kl/coef", "optimizer/policy_gradient_norm", "optimizer/critic_gradient_norm", "time/generate_seconds"),
        *("time/score_seconds", "time/logprobs_seconds", "time/update_seconds", "time/step_seconds"),
    ):
        assert name in first, name
    assert first["policy/kl"] == 0  # nothing has moved yet
    assert second["policy/kl_k3"] > 0
    assert first["rollout/logprob_difference"] < 1e-4
    assert first["optimizer/policy_updates"] == 4
    assert first["policy/epochs"] == 2
    samples = rows(plain, "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 4 + [2] * 4
    assert {"prompt", "response", "reward", "gold", "kl", "length"} <= samples[0].keys()
    before, after = weights(base), weights(plain / "model")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    assert summary(plain)["num_steps"] == 2
    assert json.loads((plain / "environment.json").read_text())["paths"].keys() == {"sampler", "form"}


def test_every_prompt_comes_once_before_any_comes_again(plain):
    prompts = [row["prompt"] for row in rows(plain, "samples.jsonl")]
    assert len(set(prompts)) == 8


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_leaves_the_reward_alone(tmp_path, base, other, estimator, reward_run):
    changed = {"kl_in": "loss", "kl_estimator": estimator, "num_steps": 1, "num_epochs": 1, "num_minibatches": 1}
    out = run(tmp_path, base, reward_run, reference=str(other), kl={"name": "fixed", "coef": 0.5}, **changed)
    (row,) = rows(out)
    assert row["policy/kl_loss"] > 0
    # gamma = 1 and no values yet: a token's return is the score times lam to the number of tokens that follow
    samples = rows(out, "samples.jsonl")
    returns = [s["reward"] * 0.95**k for s in samples for k in range(s["length"])]
    expected = sum(returns) / len(returns)
    assert row["critic/return_mean"] == pytest.approx(expected, abs=1e-6)
    if estimator == "k3":
        tokens = sum(s["length"] for s in samples)
        assert row["policy/kl_loss"] == pytest.approx(row["policy/kl_k3"] * len(samples) / tokens, rel=1e-4)


@pytest.mark.parametrize("init", ["policy", "value_head"])
def test_a_new_critic_begins_at_zero_and_learns(tmp_path, base, init, reward_run):
    critic = {"init": init} | ({"optimizer": FAST} if init == "policy" else {})
    first, second = rows(run(tmp_path, base, reward_run, critic=critic, shaping={"missing_eos_penalty": 1.0}))
    assert first["critic/value_mean"] == 0
    assert second["critic/value_mean"] < 0  # hardly any of these replies ends, so the returns are near -1
    assert ("optimizer/critic_updates" in first) == (init == "policy")


def test_a_critic_from_the_reward_model_begins_with_its_head(tmp_path, base, reward_run):
    out = run(tmp_path, base, reward_run, critic={"init": "reward", "optimizer": FAST})
    assert rows(out)[0]["critic/value_mean"] != 0


def test_a_value_head_leaves_no_trace_in_the_model(tmp_path, base, reward_run):
    out = run(tmp_path, base, reward_run, critic={"init": "value_head"})
    assert weights(out / "model").keys() == weights(base).keys()


def test_while_the_critic_warms_up_the_policy_stays(tmp_path, base, reward_run):
    critic = {"init": "policy", "optimizer": FAST, "warmup_steps": 2}
    kl = {"name": "adaptive", "coef": 0.1, "target": 0.01, "horizon": 20.0}
    out = run(tmp_path, base, reward_run, critic=critic, kl=kl, num_steps=4, checkpoint_every=2)
    before, after = weights(base), load_file(out / "checkpoints" / "step-00000002" / "policy.safetensors")
    assert all((before[name] == after[f"weight/model.{name}"]).all() for name in before)
    assert [row.get("optimizer/policy_updates") for row in rows(out)] == [None, None, 4, 4]
    *early, late = [row["kl/coef"] for row in rows(out)]
    assert early == [0.1] * 3 != [late] * 3
    assert rows(out)[0]["optimizer/critic_updates"] == 4


def test_the_adaptive_coefficient_follows_its_formula(tmp_path, base, reward_run):
    kl = {"name": "adaptive", "coef": 0.1, "target": 0.01, "horizon": 20.0}
    found = rows(run(tmp_path, base, reward_run, kl=kl, num_steps=3))
    for before, after in itertools.pairwise(found):
        error = min(max(before["policy/kl"] / 0.01 - 1, -0.2), 0.2)
        assert after["kl/coef"] == pytest.approx(before["kl/coef"] * (1 + error * 4 / 20))
    assert found[1]["kl/coef"] != found[2]["kl/coef"]


def test_rewards_are_clipped_and_then_pay_for_a_missing_end(tmp_path, base, reward_run):
    shaping = {"normalize": True, "clip": 0.5, "missing_eos_penalty": 2.0}
    out = run(tmp_path, base, reward_run, shaping=shaping)
    samples = rows(out, "samples.jsonl")
    assert {row["finish_reason"] for row in samples} <= {"stop", "length"}
    for row in samples:
        paid = 2.0 if row["finish_reason"] == "length" else 0.0
        assert -0.5 <= row["reward"] + paid <= 0.5
    assert any(row["finish_reason"] == "length" for row in samples)
    found = rows(out)
    of_step = [sum(abs(abs(s["reward"] + 2.0) - 0.5) < 1e-6 for s in samples if s["step"] == n) / 4 for n in (1, 2)]
    assert [row["reward/clipped_fraction"] for row in found] == of_step


def test_normalised_rewards_of_the_first_step_have_mean_zero_and_deviation_one(tmp_path, base, reward_run):
    samples = rows(run(tmp_path, base, reward_run, shaping={"normalize": True}, num_steps=1), "samples.jsonl")
    rewards = [row["reward"] for row in samples]
    mean = sum(rewards) / len(rewards)
    assert mean == pytest.approx(0, abs=1e-5)
    assert sum((r - mean) ** 2 for r in rewards) / len(rewards) == pytest.approx(1, rel=1e-4)


def test_several_rewards_add_up_with_their_weights(tmp_path, base, reward_run):
    gold = GOLD | {"weight": 3.0}
    model = {"name": "model", "path": str(reward_run / "model"), "weight": 0.5}
    out = run(tmp_path, base, reward_run, rewards=[gold, model])
    for row in rows(out):
        total = 3.0 * row["gold/mean"] + 0.5 * row["reward/model"]
        assert row["reward/mean"] == pytest.approx(total, rel=1e-5)


def test_an_entropy_bonus_spreads_the_policy_out(tmp_path, base, plain, reward_run):
    out = run(tmp_path, base, reward_run, entropy_coef=1.0)
    assert rows(out)[1]["policy/entropy"] > rows(plain)[1]["policy/entropy"]


def test_demonstrations_are_mixed_in(tmp_path, base, plain, reward_run):
    out = run(
        tmp_path, base, reward_run, pretraining_mix={"data": "world:arithmetic?num=6", "batch_size": 4, "coef": 5.0}
    )
    first, second = rows(out)
    assert second["loss/pretraining"] < first["loss/pretraining"]
    assert "loss/train" not in first  # which is the loss that a supervised stage minimises
    assert "loss/pretraining" not in rows(plain)[0]
    assert first["optimizer/policy_updates"] == 4


def test_passes_end_once_the_policy_has_moved_too_far(tmp_path, base, plain, reward_run):
    found = rows(run(tmp_path, base, reward_run, stop_kl=1e-9, num_epochs=4))
    assert [row["policy/epochs"] for row in found] == [1, 1]
    assert [row["policy/stopped_early_fraction"] for row in found] == [1, 1]
    single = rows(run(tmp_path, base, reward_run, name="single", stop_kl=1e-9, num_epochs=1))
    assert [row["policy/stopped_early_fraction"] for row in single] == [0, 0]  # there was no further pass to leave out
    assert [row["policy/stopped_early_fraction"] for row in rows(plain)] == [0, 0]


def test_groups_are_rollouts_of_one_prompt(tmp_path, base, reward_run):
    samples = rows(run(tmp_path, base, reward_run, group_size=2), "samples.jsonl")
    assert len(samples) == 16
    for one, other in zip(samples[::2], samples[1::2], strict=True):
        assert one["prompt"] == other["prompt"]
        assert one["response"] != other["response"]


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": {"name": "ppo", "aggregation": "sequence_mean"}},
        {"loss": {"name": "ppo", "dual_clip": 3.0, "clip_high": 0.28}},
        {"whiten_rewards": True},
        {"advantage": {"name": "gae", "whiten": False}},
        {"advantage": {"name": "gae", "gamma": 0.9, "lam": 0.5}},
    ],
    ids=str,
)
def test_each_option_changes_the_run_and_nothing_breaks(tmp_path, base, reward_run, changed):
    options = {"critic": {"init": "reward", "optimizer": {"learning_rate": 1e-2}}, "optimizer": {"learning_rate": 1e-2}}
    usual = run(tmp_path, base, reward_run, name="usual", num_epochs=4, **options)
    out = run(tmp_path, base, reward_run, num_epochs=4, **options | changed)
    before, after = weights(usual / "model"), weights(out / "model")
    assert any((before[name] != after[name]).any() for name in before) or "dual_clip" in str(changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"critic": {"init": "reward"}, "rewards": [GOLD]}, "no reward is a reward model"),
        ({"critic": {"init": "value_head", "warmup_steps": 1}}, "cannot learn alone"),
        ({"rewards": []}, "rewards is empty"),
        ({"num_minibatches": 5}, "a minibatch holds whole prompts"),
        ({"sampling": {"max_prompt_tokens": 3}}, "raise sampling.max_prompt_tokens"),
        ({"los": {"name": "ppo"}}, "loss"),
        ({"loss": {"name": "pppo"}}, "'ppo'"),
    ],
)
def test_a_mistake_is_answered_with_what_to_change(tmp_path, base, changed, said, reward_run):
    run_file = write_run_file(tmp_path / "run.toml", online_settings(base, reward_run / "model", **changed))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("sampling", "correction", "noted"),
    [({}, None, False), ({"top_p": 0.9}, None, True), ({"top_k": 5}, None, True), ({"top_p": 0.9}, "truncate", False)],
)
def test_replies_of_a_truncated_distribution_are_said_to_be_unweighed(sampling, correction, noted, capsys):
    settings = SimpleNamespace(sampling=Sampling(**sampling), correction=correction)
    say_truncation(settings)
    assert ("trained on unweighed" in capsys.readouterr().err) == noted


def test_a_finished_run_is_left_alone_and_fresh_begins_again(tmp_path, base, reward_run):
    out = run(tmp_path, base, reward_run)
    first = (out / "metrics.jsonl").read_bytes()
    again = trimtab("online", out / "settings.toml", "--out", out)
    assert again.exit_code == 0
    assert "is finished" in again.output
    assert (out / "metrics.jsonl").read_bytes() == first
    assert trimtab("online", out / "settings.toml", "--out", out, "--fresh").exit_code == 0
    assert len(rows(out)) == 2


def test_a_sampler_that_is_not_the_policy_is_refused_before_any_update(tmp_path, base, reward_run, monkeypatch):
    monkeypatch.setitem(agreement.MAX_LOGPROB_DIFFERENCE, "float32", -1.0)
    monkeypatch.setattr(LocalLearner, "update", lambda *_: pytest.fail("it trained"))
    run_file = write_run_file(tmp_path / "run.toml", online_settings(base, reward_run / "model"))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "sampler and policy disagree" in result.output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rewards": [{"name": "length", "max_tokens": 4, "weight": 0}]}, "every reward has weight = 0"),
        ({"critic": {"init": "policy", "warmup_steps": 2}}, "critic.warmup_steps = 2 of num_steps = 2"),
        ({"critic": {"init": "policy", "loss": {"aggregation": "constant_length"}}}, "critic.loss.aggregation"),
        ({"optimizer": {"weight_decay": 1e6}}, "each update would take away the whole of every weight"),
        ({"engine": {"workers": 9999}}, "workers = 9999 on a machine of"),
    ],
)
def test_settings_that_train_nothing_or_cannot_be_meant_are_refused(tmp_path, base, reward_run, changed, said):
    run_file = write_run_file(tmp_path / "run.toml", online_settings(base, reward_run / "model", **changed))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.output
