"""The first update of each algorithm of the online family, once more in plain loops over transformers' own models; and
every advantage with every loss."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.stages.commands import rows, run_stage
from tests.stages.family import LENGTH, TEMPERATURE, family
from tests.stages.test_online_arithmetic import mean, places, token_logprobs
from trimtab import worlds
from trimtab.core import seeds
from trimtab.data.chat import Chat
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy

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
