"""One step of PPO, from the sampled tokens to the trained weights, once more: plain loops over padded rows of
transformers' own models, an optimizer of torch's own, and nothing of trimtab's but the tokens."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.stages.commands import online_settings, rows, run_stage
from trimtab import worlds
from trimtab.core import seeds
from trimtab.data.chat import Chat
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy

TEMPERATURE = 0.9
SAMPLING = {"max_new_tokens": 8, "temperature": TEMPERATURE}
OPTIMIZER = {"learning_rate": 3e-3, "max_gradient_norm": 0.5, "weight_decay": 0.01}

VARIANTS = {
    "usual": {},
    "whitened rewards, a shorter horizon": {
        "whiten_rewards": True,
        "advantage": {"name": "gae", "gamma": 0.9, "lam": 0.5, "whiten": False},
    },
    "every sequence the same, both clips, entropy": {
        "loss": {"name": "ppo", "aggregation": "sequence_mean", "dual_clip": 1.02, "clip_low": 0.02, "clip_high": 0.01},
        "entropy_coef": 0.1,
    },
    "k2 in the loss": {"kl_in": "loss", "kl_estimator": "k2", "kl": {"name": "fixed", "coef": 0.3}},
    "k3 in the loss": {"kl_in": "loss", "kl_estimator": "k3", "kl": {"name": "fixed", "coef": 0.3}},
    "shaped scores": {"shaping": {"normalize": True, "clip": 0.8, "missing_eos_penalty": 0.5}},
}


@pytest.mark.parametrize("changed", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_step_is_what_the_definitions_say(tmp_path, base, other, reward_run, changed):
    settings = online_settings(
        base,
        reward_run / "model",
        reference=str(other),
        prompts="world:arithmetic?num=4",
        critic={"init": "reward", "optimizer": OPTIMIZER},
        optimizer=OPTIMIZER,
        sampling=SAMPLING,
        group_size=2,
        num_steps=1,
        num_epochs=2,
        num_minibatches=1,
    )
    out = run_stage("online", tmp_path / "run", **settings | changed)
    (logged,) = rows(out)

    rollouts = sampled_again(base)
    assert sorted(r.response for r in rollouts) == sorted(s["response"] for s in rows(out, "samples.jsonl"))
    expected, policy = ppo_step(rollouts, base, other, reward_run / "model", changed)
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    assert logged["policy/clip_fraction"] > 0 or "clip_low" not in changed.get("loss", {})
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    for name, weight in policy.state_dict().items():
        moved = weight - start[name]
        assert float((trained[name] - weight).norm()) < 0.01 * float(moved.norm()) + 1e-6, name


def sampled_again(base):
    chat = Chat(load_tokenizer(base))
    policy = Policy(load_causal(base), pad_id=chat.pad_id, temperature=TEMPERATURE)
    prompts = worlds.load("arithmetic").prompts("train", 4)
    seed = seeds.derive(0, "rollouts", 0)
    return LocalSampler(policy, chat, Sampling(**SAMPLING)).generate(prompts, group_size=2, seed=seed)


def padded(rollouts):
    ids = [[*r.prompt_ids, *r.response_ids] for r in rollouts]
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]), "attention_mask": mask}


def places(rollouts):
    """(sequence, token of the reply, its place in the padded row)."""
    return [(b, t, len(r.prompt_ids) + t) for b, r in enumerate(rollouts) for t in range(len(r.response_ids))]


def token_logprobs(model, rollouts):
    """Of every reply token in turn, with the entropy of the distribution it was drawn from."""
    rows_BTV = (model(**padded(rollouts)).logits / TEMPERATURE).log_softmax(-1)
    logprobs = [rows_BTV[b, place - 1, rollouts[b].response_ids[t]] for b, t, place in places(rollouts)]
    entropies = [-(rows_BTV[b, i - 1].exp() * rows_BTV[b, i - 1]).sum() for b, _, i in places(rollouts)]
    return torch.stack(logprobs), torch.stack(entropies)


def token_values(critic, rollouts):
    values_BT = critic.score(critic.model(**padded(rollouts)).last_hidden_state).squeeze(-1)
    return torch.stack([values_BT[b, place - 1] for b, _, place in places(rollouts)])


def sequence_scores(model, rollouts):
    scores_BT = model.score(model.model(**padded(rollouts)).last_hidden_state).squeeze(-1)
    ends = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
    return [float(scores_BT[b, end]) - model.config.reward_shift for b, end in enumerate(ends)]


def mean(values):
    return sum(values) / len(values)


def standardised(values, *, keep_mean=False, eps=1e-8):
    centre = mean(values)
    deviation = math.sqrt(mean([(v - centre) ** 2 for v in values]) + eps)
    return [(v - centre) / deviation + (centre if keep_mean else 0.0) for v in values]


def ppo_step(rollouts, base, other, reward, changed):
    """The metrics and the policy after two updates on all rollouts."""
    loss_settings = {"aggregation": "token_mean", "clip_low": 0.2, "clip_high": 0.2} | changed.get("loss", {})
    shaping = changed.get("shaping", {})
    kl_coef = changed.get("kl", {}).get("coef", 0.05)
    gae = {"gamma": 1.0, "lam": 0.95} | changed.get("advantage", {})
    kl_in_loss = changed.get("kl_in") == "loss"

    policy = AutoModelForCausalLM.from_pretrained(base).eval()
    reference = AutoModelForCausalLM.from_pretrained(other).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    critic = copy.deepcopy(reward_model)

    with torch.no_grad():
        old = token_logprobs(policy, rollouts)[0].tolist()
        ref = token_logprobs(reference, rollouts)[0].tolist()
        values = token_values(critic, rollouts).tolist()
        raw = sequence_scores(reward_model, rollouts)

    scores = list(raw)
    if shaping:
        scores = standardised(scores, eps=0.0)
        scores = [min(max(s, -shaping["clip"]), shaping["clip"]) for s in scores]
        unfinished = [r.finish_reason == "length" for r in rollouts]
        scores = [s - shaping["missing_eos_penalty"] * u for s, u in zip(scores, unfinished, strict=True)]

    token_rewards = []
    for m, (b, t, _) in enumerate(places(rollouts)):
        token_reward = 0.0 if kl_in_loss else -kl_coef * (old[m] - ref[m])
        if t == len(rollouts[b].response_ids) - 1:
            token_reward += scores[b]
        token_rewards.append(token_reward)
    if changed.get("whiten_rewards"):
        token_rewards = standardised(token_rewards, keep_mean=True)

    advantages = [0.0] * len(old)
    next_value = next_advantage = 0.0
    for m, (b, t, _) in reversed(list(enumerate(places(rollouts)))):
        if t == len(rollouts[b].response_ids) - 1:
            next_value = next_advantage = 0.0
        delta = token_rewards[m] + gae["gamma"] * next_value - values[m]
        advantages[m] = next_advantage = delta + gae["gamma"] * gae["lam"] * next_advantage
        next_value = values[m]
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    if changed.get("advantage", {}).get("whiten", True):
        advantages = standardised(advantages)

    def average(token_losses):
        if loss_settings["aggregation"] == "token_mean":
            return sum(token_losses) / len(token_losses)
        of_sequence = [[] for _ in rollouts]
        for (b, _, _), loss in zip(places(rollouts), token_losses, strict=True):
            of_sequence[b].append(loss)
        return sum(mean(losses) for losses in of_sequence) / len(rollouts)

    logged = []
    optimizers = [adamw(policy), adamw(critic)]
    for _ in range(2):
        logprobs, entropies = token_logprobs(policy, rollouts)
        policy_losses, kl_losses, clipped, approx_kl = [], [], [], []
        for m, advantage in enumerate(advantages):
            ratio = torch.exp(logprobs[m] - old[m])
            too_high = ratio.item() > 1 + loss_settings["clip_high"]
            too_low = ratio.item() < 1 - loss_settings["clip_low"]
            if (too_high and advantage > 0) or (too_low and advantage < 0):
                bound = 1 + loss_settings["clip_high"] if too_high else 1 - loss_settings["clip_low"]
                loss = torch.tensor(-bound * advantage)  # a constant: nothing pulls this token further
            else:
                loss = -ratio * advantage
            if "dual_clip" in loss_settings and advantage < 0:
                loss = torch.minimum(loss, torch.tensor(-loss_settings["dual_clip"] * advantage))
            policy_losses.append(loss)
            clipped.append((too_high and advantage > 0) or (too_low and advantage < 0))
            moved = float(logprobs[m].detach()) - old[m]
            approx_kl.append(math.exp(moved) - 1 - moved)
            d = logprobs[m] - ref[m]
            kl_losses.append(d**2 / 2 if changed.get("kl_estimator") == "k2" else torch.exp(-d) - 1 + d)
        total = average(policy_losses) - changed.get("entropy_coef", 0.0) * average(list(entropies))
        total = total + (kl_coef * average(kl_losses) if kl_in_loss else 0.0)

        new_values = token_values(critic, rollouts)
        value_losses, value_clipped = [], []
        for m, target in enumerate(returns):
            near = new_values[m].clamp(values[m] - 0.2, values[m] + 0.2)
            squares = (new_values[m] - target) ** 2, (near - target) ** 2
            value_losses.append(0.5 * torch.maximum(*squares))
            value_clipped.append(bool(squares[1] > squares[0]))

        for model, optimizer, loss in zip((policy, critic), optimizers, (total, mean(value_losses)), strict=True):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_gradient_norm"])
            optimizer.step()
        logged.append(
            {
                "policy/loss": average(policy_losses).item(),
                "policy/clip_fraction": mean(clipped),
                "policy/approx_kl": mean(approx_kl),
                "policy/entropy": entropies.mean().item(),
                "critic/loss": mean(value_losses).item(),
                "critic/clip_fraction": mean(value_clipped),
            }
            | ({"policy/kl_loss": average(kl_losses).item()} if kl_in_loss else {})
        )

    d = [a - b for a, b in zip(old, ref, strict=True)]
    metrics = {name: mean([update[name] for update in logged]) for name in logged[0]}
    metrics |= {
        "reward/mean": mean(raw),
        "policy/kl": sum(d) / len(rollouts),
        "policy/kl_k3": sum(math.exp(-x) - 1 + x for x in d) / len(rollouts),
        "critic/value_mean": mean(values),
        "critic/return_mean": mean(returns),
    }
    return metrics, policy


def adamw(model):
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=OPTIMIZER["learning_rate"])
