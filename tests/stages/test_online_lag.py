"""Rollouts that lag by a fixed number of steps: against a loop that applies the lag by hand, in one thread and in two,
and what is refused."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.stages.commands import rows, run_stage, trimtab, without_times, write_run_file
from tests.stages.family import TEMPERATURE, family, lagging, reward
from tests.stages.test_online_arithmetic import mean, places, token_logprobs
from tests.stages.test_resume import differences
from trimtab import worlds
from trimtab.core import config, seeds
from trimtab.core.errors import EngineError
from trimtab.data.chat import Chat
from trimtab.engines.episodes import EpisodeLimits, EpisodeSampler
from trimtab.engines.local import agreement
from trimtab.engines.local.learner import LocalLearner
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.stages import online
from trimtab.stages.online import rollout_queue
from trimtab.stages.online.state import OnlineState

PROMPTS = worlds.load("arithmetic").prompts("train", 12)
BRIEF = {"name": "length", "max_tokens": 1, "per_token": 0.3, "most": 5.0}
"""A reward that may be scored in any thread; `family` has one that may not."""


def metrics(out, *without):
    return [{k: v for k, v in row.items() if k not in without} for row in without_times(rows(out))]


# ---- a loop that applies the lag by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 2])
def test_a_run_with_a_lag_is_a_slow_loop_that_keeps_old_weights(tmp_path, base, lag):
    """Every step samples with a model made from the weights of `lag` steps ago, and makes two updates on all replies by
    the decoupled loss, in plain loops over transformers' own model."""
    rate = 5e-3
    out = run_stage(
        "online",
        tmp_path / "run",
        **lagging(base, lag, num_epochs=2, optimizer={"learning_rate": rate, "max_gradient_norm": 1e9}),
    )
    chat = Chat(load_tokenizer(base))
    policy = AutoModelForCausalLM.from_pretrained(base).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    versions = [copy.deepcopy(policy.state_dict())]
    prompts = OnlineState([], PROMPTS, 0, 0.0)
    samples, logged, weighed = rows(out, "samples.jsonl"), rows(out), []
    for number in range(5):
        version = max(0, number - lag)
        old = load_causal(base)
        old.load_state_dict(versions[version])
        sampler = LocalSampler(
            Policy(old, pad_id=chat.pad_id, temperature=TEMPERATURE),
            chat,
            Sampling(max_new_tokens=5, temperature=TEMPERATURE),
        )
        seed = seeds.derive(0, "rollouts", number)
        rollouts = sampler.generate(prompts.take_prompts(3), group_size=3, seed=seed)
        assert [r.response for r in rollouts] == [s["response"] for s in samples if s["step"] == number + 1]
        weighed.append(decoupled_updates(policy, optimizer, rollouts))
        versions.append(copy.deepcopy(policy.state_dict()))
        row = logged[number]
        assert row["rollout/version"] == version
        assert row["rollout/staleness_mean"] == row["rollout/staleness_max"] == number - version
        assert row["rollout/ratio_mean"] == pytest.approx(weighed[-1], rel=1e-4)
    assert max(abs(w - 1) for w in weighed) > 0.01, "the lag is to be seen"
    begun, found = load_file(base / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    by_name = policy.state_dict()
    for name, weight in found.items():
        moved = float((by_name[name] - begun[name]).norm())
        assert float((weight - by_name[name]).norm()) <= 0.01 * moved + 1e-6, name


def decoupled_updates(policy, optimizer, rollouts):
    """Two updates: the clipped surrogate to the policy as the step began, each token weighed by how that policy differs
    from the one that drew it, at most by 2. Returns the mean of these weights before they are bounded."""
    behaviour = [x for r in rollouts for x in r.logprobs]
    rewards = [len(r.response) / 10 for r in rollouts]
    advantages = []
    for g in range(3):
        group = rewards[3 * g : 3 * g + 3]
        deviation = (sum((r - mean(group)) ** 2 for r in group) / 2) ** 0.5
        advantages += [(r - mean(group)) / (deviation + 1e-4) for r in group]
    with torch.no_grad():
        proximal = token_logprobs(policy, rollouts)[0].tolist()
    raw = [float(torch.tensor(p - b).exp()) for p, b in zip(proximal, behaviour, strict=True)]
    for _ in range(2):
        logprobs, losses = token_logprobs(policy, rollouts)[0], []
        for m, (b, _, _) in enumerate(places(rollouts)):
            ratio = (logprobs[m] - proximal[m]).exp()
            surrogate = torch.minimum(ratio * advantages[b], ratio.clamp(0.8, 1.2) * advantages[b])
            losses.append(-min(raw[m], 2.0) * surrogate)
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    return mean(raw)


def test_without_a_lag_nothing_is_kept_or_logged_for_it(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **family(base, engine={"max_staleness": 0}))
    assert not any(name.startswith(("rollout/stale", "rollout/version", "time/wait")) for r in rows(out) for name in r)
    (saved,) = (out / "checkpoints").iterdir()
    assert {p.name for p in saved.iterdir()} == {"SHA256SUMS", "policy.safetensors", "state.json"}


def test_a_lag_longer_than_the_run_trains_on_rollouts_of_the_start(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **lagging(base, 9, num_steps=3))
    assert [(row["rollout/version"], row["rollout/staleness_max"]) for row in rows(out)] == [(0, 0), (0, 1), (0, 2)]


# ---- a sampler with weights of its own, in a thread of its own -----------------------------------------------------


class CopySampler:
    """Samples from a copy of the policy."""

    may_draw_meanwhile = True
    sampler = "a copy"

    def __init__(self, policy, chat, sampling):
        self.policy = policy
        self.copy = copy.deepcopy(policy)
        self.local = LocalSampler(self.copy, chat, sampling)
        self.threads = []
        self.fails = None
        """What it raises when it is asked for the third time."""

    def sync(self):
        assert threading.current_thread() is threading.main_thread()
        self.copy.load_state_dict(self.policy.state_dict())

    def generate(self, prompts, *, group_size, seed):
        self.threads.append(threading.current_thread().name)
        if self.fails is not None and len(self.threads) == 3:
            raise self.fails
        return self.local.generate(prompts, group_size=group_size, seed=seed)


@pytest.fixture
def own_weights(monkeypatch):
    """Runs of the online stage sample from a copy of the policy; the copies made, newest last."""
    made = []

    def make_samplers(settings, policy, chat, prompts, make):
        samplers = online.samplers.make_samplers(settings, policy, chat, prompts, make)
        made.extend(None if s is None else CopySampler(policy, chat, s.sampling) for s in samplers)
        return made[-2], made[-1]

    monkeypatch.setattr(online, "make_samplers", make_samplers)
    monkeypatch.setattr(rollout_queue, "_LAST_SECONDS", 30.0)
    return made


KINDS = {
    "a reward for any thread": {"rewards": [BRIEF]},
    "a reward for the loop's thread": {},
    "a reward that draws noise": {"rewards": reward("noisy")},
    "greedy baselines": {"rewards": [BRIEF], "advantage": {"name": "remax"}},
    "dynamic sampling": {"rewards": [BRIEF], "dynamic_sampling": {"max_rounds": 3}},
    "dynamic sampling that waits for the loop": {"dynamic_sampling": {"max_rounds": 3}},
}


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_drawing_while_the_policy_learns_gives_the_bits_of_drawing_before(tmp_path, base, own_weights, kind, lag):
    settings = lagging(base, lag, checkpoint_every=2, **KINDS[kind])
    out = run_stage("online", tmp_path / "own", **settings)
    (sampler, greedy) = own_weights
    apart = lag > 0 and kind != "dynamic sampling that waits for the loop"
    for one in filter(None, (sampler, greedy)):
        assert set(one.threads) == {"rollouts" if apart else "MainThread"}
        assert len(one.threads) == 5 or "dynamic" in kind
    # Step 3 follows a checkpoint, before which the thread was waited for; that belongs to it.
    assert ["time/wait_for_rollouts_seconds" in row for row in rows(out)[:3]] == [apart] * 3
    assert all("time/sync_seconds" in row for row in rows(out)[: 5 - lag])
    with pytest.MonkeyPatch.context() as undone:
        undone.setattr(online, "make_samplers", online.samplers.make_samplers)
        shared = run_stage("online", tmp_path / "shared", **settings)
    watched = ("rollout/logprob_difference",)
    assert metrics(out, *watched) == metrics(shared, *watched)
    assert rows(out, "samples.jsonl") == rows(shared, "samples.jsonl")
    assert (out / "model/model.safetensors").read_bytes() == (shared / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "error", [EngineError("no more", where="here", fix="rest"), KeyError("x"), KeyboardInterrupt()]
)
def test_a_failure_in_the_thread_is_raised_in_the_loop(tmp_path, base, own_weights, monkeypatch, error):
    made = online.make_samplers

    def failing(*arguments):
        samplers = made(*arguments)
        samplers[0].fails = error
        return samplers

    monkeypatch.setattr(online, "make_samplers", failing)
    run_file = write_run_file(tmp_path / "run.toml", lagging(base, 1, rewards=[BRIEF], checkpoint_every=1))
    out = tmp_path / "run"
    if isinstance(error, KeyError):
        with pytest.raises(KeyError, match="x"):
            trimtab("online", run_file, "--out", out)
    else:
        result = trimtab("online", run_file, "--out", out)
        assert result.exit_code == (2 if isinstance(error, EngineError) else 130)
        assert ("no more" if isinstance(error, EngineError) else "goes on after step 1") in result.output
    assert not [t for t in threading.enumerate() if t.name == "rollouts"]
    # What could not be drawn belonged to the third step, and to the checkpoint of the second.
    assert len(rows(out)) == 2
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setattr(online, "make_samplers", made)
    run_stage("online", out, **lagging(base, 1, rewards=[BRIEF], checkpoint_every=1))
    undisturbed = run_stage("online", tmp_path / "undisturbed", **lagging(base, 1, rewards=[BRIEF]))
    assert not differences(undisturbed, out)


def test_what_a_checkpoint_waits_for_is_logged_by_the_next_step(tmp_path, base, own_weights, monkeypatch):
    generate = CopySampler.generate

    def slow(self, *arguments, **options):
        time.sleep(0.5)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(CopySampler, "generate", slow)
    out = run_stage("online", tmp_path / "run", **lagging(base, 1, rewards=[BRIEF], checkpoint_every=1, num_steps=3))
    assert [row["time/wait_for_rollouts_seconds"] > 0.2 for row in rows(out)] == [True, True, True]


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_a_failure_names_the_step_and_the_last_good_checkpoint(
    tmp_path, base, own_weights, monkeypatch, checkpoint_every
):
    made = online.make_samplers

    def failing(*arguments):
        samplers = made(*arguments)
        samplers[0].fails = EngineError("no more", where="here", fix="rest")
        return samplers

    monkeypatch.setattr(online, "make_samplers", failing)
    settings = lagging(base, 1, rewards=[BRIEF], checkpoint_every=checkpoint_every)
    result = trimtab("online", write_run_file(tmp_path / "run.toml", settings), "--out", tmp_path / "run")
    assert f"where: here, step 3 of {tmp_path / 'run'}" in result.output
    known = "the last good checkpoint is" if checkpoint_every == 1 else "there is no checkpoint yet"
    assert f"fix:   rest; {known}" in result.output


def test_a_sampler_that_hangs_does_not_keep_a_failed_run(tmp_path, base, own_weights, monkeypatch):
    monkeypatch.setattr(rollout_queue, "_LAST_SECONDS", 0.2)
    going_on = threading.Event()
    generate = CopySampler.generate

    def hangs(self, *arguments, **options):
        if len(self.threads) == 1:
            going_on.wait(60)
        return generate(self, *arguments, **options)

    def fails(self, *arguments):
        raise EngineError("the loss is nan", where="here", fix="lower the rate")

    monkeypatch.setattr(CopySampler, "generate", hangs)
    monkeypatch.setattr(LocalLearner, "update", fails)
    run_file = write_run_file(tmp_path / "run.toml", lagging(base, 1, rewards=[BRIEF]))
    began = time.monotonic()
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert "the loss is nan" in result.output
    assert time.monotonic() - began < 50
    (left,) = (t for t in threading.enumerate() if t.name == "rollouts")
    assert left.daemon
    going_on.set()
    left.join()


def test_a_sampler_whose_weights_are_not_the_policys_is_refused_in_the_first_step(
    tmp_path, base, other, own_weights, monkeypatch
):
    strange = load_causal(other).state_dict()
    monkeypatch.setattr(CopySampler, "sync", lambda self: self.copy.model.load_state_dict(strange))
    monkeypatch.setattr(LocalLearner, "update", lambda *_: pytest.fail("it trained"))
    run_file = write_run_file(tmp_path / "run.toml", lagging(base, 2, rewards=[BRIEF]))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "sampler and policy disagree" in result.output
    assert "or weigh them with [correction] and engine.max_staleness = 0" in result.output


def test_a_sampler_that_shares_the_weights_is_compared_at_every_draw(tmp_path, base, monkeypatch):
    compared = []
    compare = agreement.logprob_difference
    monkeypatch.setattr(
        "trimtab.engines.local.sampler.logprob_difference", lambda *a: compared.append(compare(*a)) or compared[-1]
    )
    out = run_stage("online", tmp_path / "run", **lagging(base, 2))
    assert len(compared) == 5
    assert max(compared) < 1e-4
    assert ["rollout/logprob_difference" in row for row in rows(out)] == [True, False, False, False, False]
    assert rows(out)[3]["rollout/sampler_kl"] > 1e-6


def test_the_local_sampler_and_episodes_never_draw_while_the_policy_learns(base):
    chat = Chat(load_tokenizer(base))
    policy = Policy(load_causal(base), pad_id=chat.pad_id)
    local = LocalSampler(policy, chat, Sampling())
    episodes = EpisodeSampler(policy, chat, Sampling(), SimpleNamespace(stop=()), EpisodeLimits())
    assert not local.may_draw_meanwhile
    assert not episodes.may_draw_meanwhile
    before = local.generate(PROMPTS, group_size=2, seed=0)
    local.sync()
    episodes.sync()
    assert local.generate(PROMPTS, group_size=2, seed=0) == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rewards", [{"rewards": [BRIEF]}, {}], ids=["any thread", "the loop's thread"])
def test_asked_to_stop_while_the_thread_draws_it_saves_what_was_drawn(
    tmp_path, base, own_weights, monkeypatch, sent, rewards
):
    settings = lagging(base, 2, **rewards)
    undisturbed = run_stage("online", tmp_path / "undisturbed", **settings)
    update, asked = LocalLearner.update, []

    def interrupted(self, work):
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), sent)
        return update(self, work)

    run_file, out = write_run_file(tmp_path / "run.toml", settings), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(LocalLearner, "update", interrupted)
        result = trimtab("online", run_file, "--out", out)
    assert result.exit_code == 128 + sent
    assert "stopped after step 3 of 5" in result.output
    (saved,) = (out / "checkpoints").iterdir()
    stored = [json.loads(line) for line in (saved / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in stored] == [4] * 3 + [5] * 3
    run_stage("online", out, **settings)
    assert not differences(undisturbed, out)


# ---- what is refused, and what a plan rehearses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"correction": None}, "add the table [correction]"),
        ({"loss": {"name": "reinforce"}}, "the loss Reinforce, which does not bound its ratios"),
        ({"engine": {"max_staleness": -1}}, "max_staleness = -1"),
    ],
)
def test_a_lag_that_would_train_on_old_replies_as_if_they_were_new_is_refused(tmp_path, base, changed, said):
    settings = {k: v for k, v in (lagging(base, 1) | changed).items() if v is not None}
    result = trimtab("online", write_run_file(tmp_path / "run.toml", settings), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_losses_that_bound_their_ratios_go_with_a_lag(base, loss):
    config.resolve(online.OnlineSettings, lagging(base, 1, loss={"name": loss}), where="the test")


def test_a_stage_that_draws_no_rollouts_knows_no_lag(tmp_path, base):
    settings = {"model": str(base), "data": "world:arithmetic?num=8", "engine": {"max_staleness": 1}}
    result = trimtab("sft", write_run_file(tmp_path / "run.toml", settings), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "max_staleness" in result.output


def test_a_plan_rehearses_without_a_lag(base):
    table = lagging(base, 2, engine={"max_staleness": 2, "timeout_seconds": 60.0})
    settings = config.resolve(online.OnlineSettings, table, where="the test")
    assert online.few_steps(table, settings)["engine"] == {"max_staleness": 0, "timeout_seconds": 60.0}
    assert "engine" not in online.few_steps(family(base), config.resolve(online.OnlineSettings, family(base), where=""))
