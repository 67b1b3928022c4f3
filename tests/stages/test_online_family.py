"""The online family beyond PPO: what a round of sampling leaves for training, and what goes into an update."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.stages import reward_functions
from tests.stages.commands import FAST, rows, run_stage, trimtab, write_run_file
from tests.stages.family import LENGTH, TEMPERATURE, family
from tests.stages.test_online_arithmetic import mean, padded, places
from tests.stages.test_resume import differences, kill_after, num_rows, start, wait_for_rows
from tests.tiny import write_model_directory
from trimtab.core import config, seeds
from trimtab.data.chat import Chat
from trimtab.engines.local.learner import LocalLearner
from trimtab.engines.local.scorer import LocalScorer
from trimtab.math.correction import SamplerCorrection, no_correction
from trimtab.models.load import load_tokenizer
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
        state = OnlineState([policy], prompts, settings.seed, settings.kl.initial)
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
        every_worth = torch.tensor([w for _, ws in [*kept, *dull] for w in ws])
        assert drawn.metrics["reward/std"].value == pytest.approx(float(every_worth.std(correction=0)), rel=1e-5)


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


# ---- replies that were cut off -------------------------------------------------------------------------------------


def test_where_every_reply_is_cut_off_skipping_them_leaves_the_policy_where_it_is(tmp_path):
    endless = write_model_directory(tmp_path / "endless")
    settings = family(endless, "length", sampling={"max_new_tokens": 2}, skip_truncated=True)
    out = tmp_path / "run"
    result = trimtab("online", write_run_file(tmp_path / "run.toml", settings), "--out", out)
    assert "replies of the first step ends within sampling.max_new_tokens = 2" in result.output
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
