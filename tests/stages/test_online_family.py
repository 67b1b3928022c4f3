"""The online family beyond PPO: what a round of sampling leaves for training, and the step of each algorithm once more
in plain loops over transformers' own models."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.stages import reward_functions
from tests.stages.commands import FAST, rows, run_stage, trimtab, write_run_file
from tests.stages.test_online_arithmetic import mean, padded, places, token_logprobs
from tests.stages.test_resume import differences, kill_after, num_rows, start, wait_for_rows
from tests.tiny import write_model_directory
from trimtab import worlds
from trimtab.core import config, seeds
from trimtab.data.chat import Chat
from trimtab.engines.local.learner import LocalLearner
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.scorer import LocalScorer
from trimtab.math.correction import SamplerCorrection, no_correction
from trimtab.math.rewards import RunningMoments
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.runs.run import Run
from trimtab.stages.online import kl_per_token, make_engines
from trimtab.stages.online.checks import Clock
from trimtab.stages.online.data import read_prompts
from trimtab.stages.online.models import load_models
from trimtab.stages.online.rollouts import RolloutBatch
from trimtab.stages.online.samplers import make_samplers
from trimtab.stages.online.sampling import RolloutSource, shape_rewards
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState

ROOT = Path(__file__).parents[2]
TEMPERATURE = 0.9  # that of test_online_arithmetic
LENGTH = 5  # some replies end before it, and some do not


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


@dataclass
class Loop:
    """What the loop works with."""

    settings: OnlineSettings
    chat: Chat
    policy: LocalLearner
    reference: LocalScorer
    source: RolloutSource
    state: OnlineState

    def sample(self, number: int) -> RolloutBatch:
        replies = self.source.draw(number, self.state, Clock())
        return self.source.judge(number, replies, self.state, Clock())


@pytest.fixture
def loop_of(tmp_path):
    """Builds what the loop works with, from a run file's settings; each call in a run of its own."""
    opened = []

    def build(**values):
        settings = config.resolve(OnlineSettings, values, where="the test")
        run = Run.open(tmp_path / f"loop-{len(opened)}", stage="online", settings=config.dump(settings))
        opened.append(run)
        chat = Chat(load_tokenizer(settings.model))
        prompts = read_prompts(settings, chat, run, {})
        models = load_models(settings, chat)
        policy, reference, _ = make_engines(settings, models)
        sampler, greedy = make_samplers(settings, models.policy, chat, prompts)
        state = OnlineState([policy], prompts, settings.seed, settings.kl.initial, RunningMoments())
        source = RolloutSource(sampler, greedy, models.rewards, None, settings)
        return Loop(settings, chat, policy, reference, source, state)

    yield build
    for run in opened:
        run.close()


# ---- dynamic sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "max_rounds"), [("even", 4), ("even", 2), ("flat", 3), ("length", 4)])
def test_groups_without_a_signal_are_replaced_by_those_of_further_prompts(loop_of, base, function, max_rounds):
    values = family(base, function, dynamic_sampling={"max_rounds": max_rounds})
    loop, order = loop_of(**values), loop_of(**values).state.take_prompts(100)
    at = 0
    for number in range(3):
        before = at
        kept, dull, rounds = [], [], 0
        while rounds < max_rounds and len(kept) < 3:
            prompts = order[at : at + 3 - len(kept)]
            at += len(prompts)
            purpose = ("rollouts", number) if rounds == 0 else ("rollouts", number, rounds)
            replies = loop.source.sampler.generate(prompts, group_size=3, seed=seeds.derive(0, *purpose))
            for group in in_threes(replies):
                worth = [getattr(reward_functions, function)(r.prompt, r.response, r.prompt.facts) for r in group]
                (dull if len(set(worth)) == 1 else kept).append((list(group), worth))
            rounds += 1
        filled = dull[: 3 - len(kept)]
        drawn = loop.sample(number)
        assert [list(g.rollouts) for g in drawn.groups] == [g for g, _ in [*kept, *filled]]
        torch.testing.assert_close(drawn.rewards, torch.tensor([w for _, ws in [*kept, *filled] for w in ws]))
        assert drawn.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        counted = {
            name: drawn.metrics[f"rollout/{name}"].value for name in ("rounds", "replaced_groups", "flat_groups")
        }
        assert counted == {
            "rounds": rounds,
            "replaced_groups": len(dull) - len(filled),
            "flat_groups": len(filled),
        }
        assert loop.state.num_prompts_taken == at > before
        # What is logged of rewards is of every reply that was judged, the replaced ones too.
        assert drawn.metrics["reward/mean"].weight == 3 * (at - before)


def in_threes(values):
    return [values[i : i + 3] for i in range(0, len(values), 3)]


def test_without_dynamic_sampling_flat_groups_stay_and_teach_nothing(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **family(base, "flat"))
    for row in rows(out):
        assert row["optimizer/policy_gradient_norm"] == 0
        assert "rollout/rounds" not in row
    assert {s["reward"] for s in rows(out, "samples.jsonl")} == {0.0}


def test_killed_in_a_step_that_refills_it_ends_with_the_same_bits(tmp_path, base, monkeypatch):
    """Rounds differ from step to step, so the place in the prompts is no multiple of anything."""
    monkeypatch.chdir(ROOT)  # where the process finds the reward
    settings = family(
        base,
        "even",
        advantage={"name": "rloo"},
        dynamic_sampling={"max_rounds": 3},
        num_steps=6,
        checkpoint_every=1,
        shaping={"normalize": True},
        kl={"name": "adaptive", "coef": 0.1, "target": 0.5, "horizon": 30.0},
    )
    undisturbed = run_stage("online", tmp_path / "undisturbed", **settings)
    assert len({row["rollout/rounds"] for row in rows(undisturbed)}) > 1
    run_file, out = write_run_file(tmp_path / "run.toml", settings), tmp_path / "run"
    process = start("online", run_file, out)
    wait_for_rows(process, out, 2)
    assert kill_after(process, random.Random(1).uniform(0, 0.05)), "it was to be killed at work"
    assert num_rows(out) >= 2
    run_stage("online", out, **settings)
    assert not differences(undisturbed, out)


# ---- rewards that fail ---------------------------------------------------------------------------------------------


def test_a_reply_that_cannot_be_judged_stops_the_run_or_is_left_out_and_counted(tmp_path, base):
    run_file = write_run_file(tmp_path / "run.toml", family(base, "picky"))
    result = trimtab("online", run_file, "--out", tmp_path / "stopped")
    assert result.exit_code == 2
    assert "of 9 replies got no reward from callable" in result.output
    assert "on_failed_reward = 'drop'" in result.output

    out = run_stage("online", tmp_path / "run", **family(base, "picky", on_failed_reward="drop"))
    samples = rows(out, "samples.jsonl")
    for number, row in enumerate(rows(out), start=1):
        used = [s for s in samples if s["step"] == number]
        assert all(len(s["response"]) % 2 == 0 for s in used)
        assert row["rollout/unjudged"] == row["reward/callable_failed"] == 9 - len(used) > 0
        assert row["reward/mean"] == pytest.approx(mean([s["reward"] for s in used]))
        assert not math.isnan(row["policy/loss"])


def test_a_step_in_which_nothing_can_be_judged_stops_even_where_replies_may_be_left_out(tmp_path, base):
    run_file = write_run_file(tmp_path / "run.toml", family(base, "speechless", on_failed_reward="drop"))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "none of 9 replies got a reward" in result.output


def test_a_prompt_none_of_whose_replies_was_judged_is_refilled_with_dynamic_sampling(loop_of, base):
    values = family(base, "patient", on_failed_reward="drop", dynamic_sampling={"max_rounds": 6})
    drawn = loop_of(**values).sample(0)
    assert len(drawn.groups) == 3
    assert all(g.rollouts[0].prompt.facts["answer"] % 2 == 0 for g in drawn.groups)
    assert drawn.metrics["rollout/unjudged"].value > 0


# ---- baselines, shaping, corrections, KL ---------------------------------------------------------------------------


def test_the_baseline_of_remax_is_the_worth_of_the_reply_that_transformers_decodes_greedily(loop_of, base):
    shaping = {"clip": 2.0, "missing_eos_penalty": 7.0}
    loop = loop_of(**family(base, advantage={"name": "remax"}, group_size=2, shaping=shaping))
    drawn = loop.sample(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), load_tokenizer(base)
    expected = []
    for group in drawn.groups:
        prompt = torch.tensor([group.rollouts[0].prompt_ids])
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=LENGTH,
            eos_token_id=sorted(loop.chat.stop_ids),
            pad_token_id=tokenizer.pad_token_id,
        )[0, prompt.shape[1] :]
        expected += [reward_functions.length(None, loop.chat.decode_response(ids.tolist()), {})] * 2
    torch.testing.assert_close(drawn.baselines, torch.tensor(expected))
    shaped = shape_rewards(drawn, loop.settings, loop.state)
    rewards, baselines = shaped.rewards, shaped.baselines
    # Shaped as rewards are, but for the charge: it belongs to the reply that was cut off, not to its prompt.
    assert baselines.tolist() == [pytest.approx(min(e, 2.0)) for e in expected]
    cut = [7.0 if r.finish_reason == "length" else 0.0 for r in drawn.rollouts]
    torch.testing.assert_close(rewards, drawn.rewards.clamp(max=2.0) - torch.tensor(cut))


def test_the_schedule_of_the_policy_begins_when_the_critic_is_warm(tmp_path, base):
    linear = FAST | {"schedule": "linear"}
    critic = {"init": "policy", "warmup_steps": 2, "optimizer": linear}
    values = family(base, advantage={"name": "gae"}, critic=critic, optimizer=linear, num_steps=5, group_size=1)
    found = rows(run_stage("online", tmp_path / "run", **values))
    policy = [row.get("optimizer/policy_learning_rate") for row in found]
    critic_rates = [row["optimizer/critic_learning_rate"] for row in found]
    assert policy == [None, None, *(pytest.approx(1e-3 * (1 - i / 3)) for i in range(3))]
    assert critic_rates == [pytest.approx(1e-3 * (1 - i / 5)) for i in range(5)]


def test_exact_kl_in_the_reward_is_that_of_the_two_softmaxes_at_every_sampled_token(loop_of, base, other):
    loop = loop_of(**family(base, reference=str(other), kl_in="reward", kl_estimator="exact"))
    drawn = loop.sample(0)
    none = torch.full((drawn.trees.num_trained,), torch.nan)
    paid = kl_per_token(drawn.trees, none, loop.policy, loop.reference, loop.settings)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, other))
    with torch.no_grad():
        p = (policy(**padded(drawn.rollouts)).logits / TEMPERATURE).log_softmax(-1)
        q = (reference(**padded(drawn.rollouts)).logits / TEMPERATURE).log_softmax(-1)
    slow = []
    for b, _, place in places(drawn.rollouts):
        at = [math.exp(a) * (a - c) for a, c in zip(p[b, place - 1].tolist(), q[b, place - 1].tolist(), strict=True)]
        slow.append(math.fsum(at))
    torch.testing.assert_close(paid, torch.tensor(slow), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("correction", "weights", "bounded"),
    [
        # ratios of tokens: 2, 1/2, 1 | 4, 1; of sequences: 1 | 4; their geometric means: 1 | 2
        (SamplerCorrection(high=1.5), [1.5, 0.5, 1.0, 1.5, 1.0], 2 / 5),
        (SamplerCorrection(kind="mask", low=0.6, high=3.0), [2.0, 0.0, 1.0, 0.0, 1.0], 2 / 5),
        (SamplerCorrection(level="sequence", high=3.0), [1.0, 1.0, 1.0, 3.0, 3.0], 2 / 5),
        (SamplerCorrection(kind="mask", level="sequence", high=3.0), [1.0, 1.0, 1.0, 0.0, 0.0], 2 / 5),
        (SamplerCorrection(level="sequence_mean", high=3.0), [1.0, 1.0, 1.0, 2.0, 2.0], 0.0),
        (SamplerCorrection(kind="mask", level="sequence_mean", high=1.5), [1.0, 1.0, 1.0, 0.0, 0.0], 2 / 5),
    ],
)
def test_weights_of_a_sampler_that_is_not_the_policy_by_hand(correction, weights, bounded):
    ratios = torch.tensor([2.0, 0.5, 1.0, 4.0, 1.0])
    sampled = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1])
    found, metrics = correction(sampled + ratios.log(), sampled, torch.tensor([0, 0, 0, 1, 1]), 2)
    torch.testing.assert_close(found, torch.tensor(weights))
    raw = {"token": [2, 0.5, 1, 4, 1], "sequence": [1, 1, 1, 4, 4], "sequence_mean": [1, 1, 1, 2, 2]}[correction.level]
    assert metrics["rollout/ratio_mean"].value == pytest.approx(sum(raw) / 5)
    assert metrics["rollout/ratio_max"].value == pytest.approx(max(raw))
    assert metrics["rollout/ratio_bounded_fraction"].value == pytest.approx(bounded)
    # Per token, sampled by the sampler: KL(sampler || policy) is the mean of r - 1 - log r.
    k3 = [r - 1 - math.log(r) for r in (2.0, 0.5, 1.0, 4.0, 1.0)]
    assert metrics["rollout/sampler_kl"].value == pytest.approx(sum(k3) / 5)
    assert metrics["rollout/effective_fraction"].value == pytest.approx(sum(raw) ** 2 / sum(r * r for r in raw) / 5)


@pytest.mark.parametrize("changed", [{"precision": "bfloat16"}, {"sampling": {"precision": "bfloat16"}}])
def test_another_precision_is_weighed_without_being_asked(tmp_path, base, changed):
    settings = config.resolve(OnlineSettings, family(base, **changed), where="the test")
    assert settings.weigh == SamplerCorrection()
    (first, *_) = rows(run_stage("online", tmp_path / "run", **family(base, **changed)))
    assert 1e-4 < first["rollout/logprob_difference"] < 0.1
    assert 0.999 < first["rollout/effective_fraction"] < 1
    assert 0 < first["rollout/sampler_kl"] < 1e-3
    assert first["policy/kl"] == 0  # policy and reference compute in one precision, on one path


def test_truncated_sampling_is_not_weighed_without_being_asked(base):
    changed = {"sampling": {"precision": "bfloat16", "top_k": 8}}
    settings = config.resolve(OnlineSettings, family(base, **changed), where="the test")
    assert settings.weigh is no_correction


def test_a_truncated_sampler_is_weighed_back_to_the_policy(loop_of, base):
    """Under top-k, what is drawn has more probability than the policy gives it: the ratios are below 1, and their
    expectation is the policy's mass on the kept tokens."""
    values = family(base, sampling={"max_new_tokens": LENGTH, "top_k": 8}, correction={"kind": "truncate", "high": 2.0})
    loop = loop_of(**values)
    drawn = loop.sample(0)
    trees = drawn.trees
    with torch.no_grad():
        old = loop.policy.role(trees).logprobs
    weights, metrics = loop.settings.correction(old, drawn.logprobs, trees.sequence_ids, trees.num_sequences)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        probs = model(**padded(drawn.rollouts)).logits.softmax(-1)
    mass = torch.stack([probs[b, place - 1].topk(8).values.sum() for b, _, place in places(drawn.rollouts)])
    torch.testing.assert_close(weights, mass, rtol=1e-4, atol=1e-5)
    assert metrics["rollout/ratio_mean"].value == pytest.approx(float(mass.mean()), rel=1e-4)
    assert metrics["rollout/ratio_mean"].value < 1


# ---- a single update: the sampler has said what the old policy gave ------------------------------------------------


def test_a_single_update_does_not_score_the_policy_again(tmp_path, base, monkeypatch):
    """From the second step on only the reference is asked, and the model is the one that scoring first would give."""
    asked = []
    score = LocalScorer.logprobs
    monkeypatch.setattr(LocalScorer, "logprobs", lambda *args: asked.append(1) or score(*args))
    settings = family(base, kl_in="loss", kl={"name": "fixed", "coef": 0.04}, num_steps=3)
    out = run_stage("online", tmp_path / "short", **settings)
    assert len(asked) == 2 + 1 + 1
    assert all(row["rollout/logprob_difference"] == row["policy/log_ratio_max"] < 1e-4 for row in rows(out)[1:])
    monkeypatch.setattr(OnlineSettings, "scores_old_policy", lambda *_: True)
    long = run_stage("online", tmp_path / "long", **settings)
    assert len(asked) == 4 + 6
    expected = load_file(long / "model" / "model.safetensors")
    for name, weight in load_file(out / "model" / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_epochs": 2},
        {"num_minibatches": 2},
        {"precision": "bfloat16"},
        {"sampling": {"precision": "bfloat16"}},
        {"sampling": {"top_k": 8}},
        {"correction": {"kind": "truncate"}},
        {"critic": {"warmup_steps": 3}},
    ],
)
def test_more_updates_or_another_distribution_score_every_step(base, changed):
    settings = config.resolve(OnlineSettings, family(base, **changed), where="the test")
    assert all(settings.scores_old_policy(number) for number in range(3))


def test_a_sampler_gone_stale_is_found_by_the_update(tmp_path, base, monkeypatch):
    told = RolloutBatch.logprobs.func
    since = []
    monkeypatch.setattr(RolloutBatch, "logprobs", property(lambda rollouts: told(rollouts) - 0.5 * len(since)))
    update = LocalLearner.update
    monkeypatch.setattr(LocalLearner, "update", lambda *args: (update(*args), since.append(1))[0])
    run_file = write_run_file(tmp_path / "run.toml", family(base))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "disagree by 0.5 nats" in result.output
    assert "step 2, in its only update" in result.output
    assert len(rows(tmp_path / "run")) == 1


# ---- the step of each algorithm ------------------------------------------------------------------------------------

ALGORITHMS = {
    "grpo": {
        "loss": {"name": "ppo", "aggregation": "sequence_mean"},
        "kl_in": "loss",
        "kl": {"name": "fixed", "coef": 0.04},
    },
    "dr_grpo": {
        "advantage": {"name": "grpo", "scale": "none"},
        "loss": {"name": "ppo", "aggregation": "constant_length", "length": LENGTH},
    },
    "dapo": {
        "loss": {"name": "ppo", "clip_high": 0.28},
        "shaping": {"missing_eos_penalty": 1.0},
        "skip_truncated": True,
    },
    "batch scale, cispo": {"advantage": {"name": "grpo", "scale": "batch"}, "loss": {"name": "cispo"}},
    "gspo": {"loss": {"name": "gspo"}, "skip_truncated": True},
    "rloo": {
        "advantage": {"name": "rloo"},
        "loss": {"name": "reinforce", "aggregation": "constant_length", "length": 1},
        "kl": {"name": "fixed", "coef": 0.05},
    },
    "reinforce_pp": {"advantage": {"name": "reinforce_pp"}, "kl": {"name": "fixed", "coef": 0.05}},
    "reinforce_pp with a baseline": {
        "advantage": {"name": "reinforce_pp", "baseline": "group"},
        "kl": {"name": "fixed", "coef": 0.05},
        "kl_in": "loss",
        "kl_estimator": "k2",
    },
    "reinforce_pp, k3 in the reward": {
        "advantage": {"name": "reinforce_pp", "gamma": 0.9},
        "kl_estimator": "k3",
        "kl": {"name": "fixed", "coef": 0.05},
    },
    "remax": {"advantage": {"name": "remax"}, "loss": {"name": "reinforce"}, "kl": {"name": "fixed", "coef": 0.05}},
}


@pytest.mark.parametrize("changed", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_the_first_update_of_each_algorithm_is_what_its_definition_says(tmp_path, base, other, changed):
    changed = {"skip_truncated": False} | changed
    out = run_stage("online", tmp_path / "run", **family(base, reference=str(other), num_steps=1) | changed)
    (logged,) = rows(out)
    samples = rows(out, "samples.jsonl")
    rollouts = sampled_again(base, samples)
    loss, kl_loss, norm = update_by_hand(rollouts, base, other, changed)
    assert logged["policy/loss"] == pytest.approx(loss, rel=1e-4, abs=2e-6)
    assert logged["optimizer/policy_gradient_norm"] == pytest.approx(norm, rel=2e-4)
    if changed.get("kl_in") == "loss":
        assert logged["policy/kl_loss"] == pytest.approx(kl_loss, rel=1e-4)
    assert {s["finish_reason"] for s in samples} == {"stop", "length"}, "both kinds are to be there"


def sampled_again(base, samples, top_k=0, group_size=3):
    chat = Chat(load_tokenizer(base))
    policy = Policy(load_causal(base), pad_id=chat.pad_id, temperature=TEMPERATURE)
    by_text = {p.text: p for p in worlds.load("arithmetic").prompts("train", 12)}
    prompts = [by_text[s["prompt"]] for s in samples[::3]]
    sampling = Sampling(max_new_tokens=LENGTH, temperature=TEMPERATURE, top_k=top_k)
    found = LocalSampler(policy, chat, sampling).generate(
        prompts, group_size=group_size, seed=seeds.derive(0, "rollouts", 0)
    )
    if not top_k:
        assert [r.response for r in found] == [s["response"] for s in samples]
    return found


def update_by_hand(rollouts, base, other, changed):
    """The policy loss, the KL loss and the norm of the gradient, before anything has moved: every ratio is 1."""
    policy = AutoModelForCausalLM.from_pretrained(base).eval()
    reference = AutoModelForCausalLM.from_pretrained(other).eval()
    logprobs, _ = token_logprobs(policy, rollouts)
    with torch.no_grad():
        ref = token_logprobs(reference, rollouts)[0]
    d = logprobs - ref
    kl_coef = changed.get("kl", {}).get("coef", 0.0)
    in_loss = changed.get("kl_in") == "loss"
    estimate = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[
        changed.get("kl_estimator", "k3" if in_loss else "k1")
    ]
    scores = [len(r.response) / 10 for r in rollouts]
    if penalty := changed.get("shaping", {}).get("missing_eos_penalty"):
        scores = [s - penalty * (r.finish_reason == "length") for s, r in zip(scores, rollouts, strict=True)]

    # [b][t], then what is still to come
    rewards = [[0.0] * len(r.response_ids) for r in rollouts]
    for m, (b, t, _) in enumerate(places(rollouts)):
        rewards[b][t] -= 0.0 if in_loss else kl_coef * float(estimate[m].detach())
    for b, score in enumerate(scores):
        rewards[b][-1] += score
    advantage = {"gamma": 1.0, "scale": "group", "baseline": "none"} | changed.get("advantage", {"name": "grpo"})
    returns = [sum(row) for row in rewards]
    advantages = advantages_by_hand(advantage, rewards, returns, rollouts, base)

    kept = [not changed["skip_truncated"] or r.finish_reason == "stop" for r in rollouts]
    loss_settings = {"name": "ppo", "aggregation": "token_mean"} | changed.get("loss", {})
    name = loss_settings["name"]
    if name == "gspo":
        loss_settings["aggregation"] = "sequence_mean"
    of_sequence = [[] for _ in rollouts]
    kl_of_sequence = [[] for _ in rollouts]
    for m, (b, t, _) in enumerate(places(rollouts)):
        a = advantages[b][t]
        if name in ("reinforce", "cispo"):  # their value is that of the log-probability, not of the ratio
            term = -a * logprobs[m]
        elif name == "gspo":
            own = [k for k, (owner, _, _) in enumerate(places(rollouts)) if owner == b]
            term = -a * torch.exp(sum(logprobs[k] - logprobs[k].detach() for k in own) / len(own))
        else:
            term = -a * torch.exp(logprobs[m] - logprobs[m].detach())
        of_sequence[b].append(term)
        kl_of_sequence[b].append(estimate[m])

    def average(terms):
        terms = [row for row, keep in zip(terms, kept, strict=True) if keep]
        if loss_settings["aggregation"] == "token_mean":
            return mean([x for row in terms for x in row])
        if loss_settings["aggregation"] == "sequence_mean":
            return mean([mean(row) for row in terms])
        return sum(x for row in terms for x in row) / (len(terms) * loss_settings["length"])

    loss, kl_loss = average(of_sequence), average(kl_of_sequence)
    (loss + kl_coef * kl_loss * in_loss).backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in policy.parameters()))
    return loss.item(), kl_loss.item(), norm


def advantages_by_hand(advantage, rewards, returns, rollouts, base):
    """[b][t]"""
    name, groups = advantage["name"], [b // 3 for b in range(len(rollouts))]
    of_group = [[r for r, other in zip(returns, groups, strict=True) if other == g] for g in groups]
    if name == "grpo":
        centred = [r - statistics.mean(group) for r, group in zip(returns, of_group, strict=True)]
        scales = {
            "group": [statistics.stdev(group) + 1e-4 for group in of_group],
            "batch": [statistics.stdev(returns) + 1e-4] * len(returns),
            "none": [1.0] * len(returns),
        }[advantage["scale"]]
        return [[c / s] * len(row) for c, s, row in zip(centred, scales, rewards, strict=True)]
    if name == "rloo":
        others = [(sum(group) - r) / 2 for r, group in zip(returns, of_group, strict=True)]
        return [[r - o] * len(row) for r, o, row in zip(returns, others, rewards, strict=True)]
    to_go = [
        [sum(r * advantage["gamma"] ** k for k, r in enumerate(row[t:])) for t in range(len(row))] for row in rewards
    ]
    if name == "remax":
        greedy = sampled_again(base, [{"prompt": r.prompt.text} for r in rollouts], top_k=1, group_size=1)
        return [[x - len(greedy[g].response) / 10 for x in row] for g, row in zip(groups, to_go, strict=True)]
    if advantage["baseline"] == "group":
        means = [statistics.mean(group) for group in of_group]
        to_go = [[x - m for x in row] for m, row in zip(means, to_go, strict=True)]
    every = [x for row in to_go for x in row]
    centre, deviation = statistics.mean(every), statistics.pstdev(every)
    return [[(x - centre) / math.sqrt(deviation**2 + 1e-8) for x in row] for row in to_go]


ADVANTAGES = ["gae", "grpo", "rloo", "reinforce_pp", "remax"]
LOSSES = ["ppo", "gspo", "cispo", "reinforce"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_advantage_goes_with_every_loss(tmp_path, base, advantage, loss):
    critic = {"critic": {"init": "value_head"}} if advantage == "gae" else {}
    settings = family(base, advantage={"name": advantage}, loss={"name": loss}, num_minibatches=2, **critic)
    out = run_stage("online", tmp_path / "run", **settings)
    first, second = rows(out)
    for row in (first, second):
        assert all(math.isfinite(value) for value in row.values() if value is not None)
        assert row["optimizer/policy_updates"] == 2
        assert row["optimizer/policy_gradient_norm"] > 0
    assert ("critic/loss" in first) == (advantage == "gae")
    assert second["policy/kl_k3"] > 0
    before, after = load_file(base / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)


# ---- replies that were cut off -------------------------------------------------------------------------------------


def test_where_every_reply_is_cut_off_skipping_them_leaves_the_policy_where_it_is(tmp_path):
    endless = write_model_directory(tmp_path / "endless")
    settings = family(endless, "length", sampling={"max_new_tokens": 2}, skip_truncated=True)
    out = run_stage("online", tmp_path / "run", **settings)
    before, after = load_file(endless / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert {s["finish_reason"] for s in rows(out, "samples.jsonl")} == {"length"}
    assert all((before[name] == after[name]).all() for name in before)
    assert all("optimizer/policy_updates" not in row for row in rows(out))


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"group_size": 1}, "group_size = 1 with advantage GRPO"),
        (
            {"group_size": 1, "advantage": {"name": "remax"}, "dynamic_sampling": {"max_rounds": 2}},
            "group_size = 1 with dynamic_sampling",
        ),
        ({"dynamic_sampling": {"max_rounds": 1}}, "max_rounds = 1"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "kl_estimator = 'k1' with kl_in = 'loss'"),
        ({"kl_in": "loss", "kl_estimator": "exact"}, "kl_estimator = 'exact' with kl_in = 'loss'"),
        ({"loss": {"name": "ppo", "aggregation": "constant_length"}}, "give length (usually max_new_tokens)"),
        ({"correction": {"high": 0.9}}, "1 must lie between them"),
        ({"correction": {"kind": "truncate", "low": 0.5}}, "only kind = 'mask' has a lower bound"),
        ({"loss": {"name": "gspo", "clip_low": 0.0}}, "clip_low"),
        ({"advantage": {"name": "reinforce_pp", "gamma": 1.5}}, "gamma = 1.5; it must be at least 0 and at most 1"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_loaded(tmp_path, base, changed, said):
    run_file = write_run_file(tmp_path / "run.toml", family(base, **changed))
    result = trimtab("online", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_prompt_without_its_fact_is_answered_before_the_first_step(tmp_path, base):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"{i}?", "answer": "" if i == 3 else str(i)} for i in range(8)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = family(base, prompts=str(prompts), rewards=[{"name": "exact_answer"}])
    result = trimtab("online", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "1 of 8 prompts have no fact 'answer'" in result.output


def test_replies_whose_greedy_reply_cannot_be_judged_are_left_out_too(tmp_path, base):
    remax = {"advantage": {"name": "remax"}, "loss": {"name": "reinforce"}}
    out = run_stage("online", tmp_path / "other", **family(base, "picky", on_failed_reward="drop", **remax))
    for row in rows(out):
        assert row["rollout/unjudged"] >= row["reward/callable_failed"]
        assert not math.isnan(row["policy/loss"])
