"""Fabricated directories of the shape that stages write, so that the page can be tested without training anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from trimtab.core import registry
from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.evals.probes import make_probes, read_probes
from trimtab.evals.reward_card import reward_card

ITEMS = ("kettle", "lamp", "camera", "tent", "guitar", "router", "bike", "clock")
GOLD_PARTS = ("decision", "brevity", "honesty", "tone", "no_echo")


def write_run(
    directory: Path,
    *,
    stage: str,
    metrics: list[dict] | None = None,
    samples: list[dict] | None = None,
    summary: dict | None = None,
    settings: str = "",
) -> Path:
    """A run directory; `settings` are TOML lines after the stage."""
    directory.mkdir(parents=True)
    (directory / "settings.toml").write_text(f'stage = "{stage}"\nseed = 0\n{settings}')
    facts = {"stage": registry.descriptor("stage", stage).recorded} if stage in registry.modules("stage") else {}
    environment = {"python": "3.11.9", "torch": "2.13.0", "trimtab": "0.1.0", "threads": {"OMP_NUM_THREADS": "1"}}
    (directory / "environment.json").write_text(json.dumps(environment | facts))
    data = {"world:helpdesk?split=train&num=2000": {"sha256": "9f86d081884c7d659a2feaa0c55ad015" * 2, "rows": 2000}}
    (directory / "data.json").write_text(json.dumps(data))
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        if rows is not None:
            (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def supervised_metrics(num_steps: int, start: float, end: float) -> list[dict]:
    generator = np.random.default_rng(0)
    rows = []
    for i in range(1, num_steps + 1):
        level = end + (start - end) * np.exp(-4 * i / num_steps)
        row = {
            "step": i,
            "loss/train": level + 0.08 * generator.normal(),
            "optimizer/sft_gradient_norm": 1.5 * np.exp(-i / num_steps) + 0.2 * generator.random(),
            "optimizer/sft_learning_rate": 1e-3 * min(1, i / 20) * (0.5 + 0.5 * np.cos(np.pi * i / num_steps)),
            "time/step_seconds": 0.12 + 0.02 * generator.random(),
            "time/tokens_per_second": 9000 + 600 * generator.normal(),
        }
        if i % 25 == 0:
            row["loss/validation"] = level + 0.1
        rows.append(row)
    return rows


def reward_metrics(num_steps: int) -> list[dict]:
    generator = np.random.default_rng(1)
    rows = []
    for i in range(1, num_steps + 1):
        learned = 1 - np.exp(-4 * i / num_steps)
        row = {
            "step": i,
            "loss/train": 0.69 - 0.13 * learned + 0.03 * generator.normal(),
            "reward/accuracy": 0.5 + 0.21 * learned + 0.04 * generator.normal(),
            "reward/margin": 1.1 * learned + 0.1 * generator.normal(),
            "optimizer/reward_gradient_norm": 0.8 + 0.2 * generator.random(),
            "time/step_seconds": 0.2,
        }
        if i % 20 == 0:
            row |= {"reward/validation_accuracy": 0.5 + 0.2 * learned, "loss/validation": 0.69 - 0.12 * learned}
        rows.append(row)
    return rows


def online_metrics(num_steps: int, *, leash: bool, seed: int = 0) -> list[dict]:
    """With the leash gold levels out; without, it falls while the reward goes on rising."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(1, num_steps + 1):
        t = i / num_steps
        distance = (1.8 if leash else 5.5) * (1 - np.exp(-3 * t))
        kl = distance**2 * (1 + 0.06 * generator.normal())
        reward = 0.2 + 0.9 * distance - 0.06 * distance**2
        gold = 0.55 + 0.22 * distance - 0.058 * distance**2 + 0.012 * generator.normal()
        row = {
            "step": i,
            "reward/mean": reward + 0.06 * generator.normal(),
            "reward/std": 0.8 - 0.3 * t + 0.03 * generator.normal(),
            "reward/preference": reward + 0.1,
            "reward/end_token": -0.1,
            "gold/mean": gold,
            "policy/kl": kl,
            "policy/kl_k3": kl * 1.05,
            "policy/entropy": 1.1 * np.exp(-(0.5 if leash else 1.6) * t) + 0.02 * generator.normal(),
            "policy/clip_fraction": 0.08 + 0.05 * t + 0.01 * generator.normal(),
            "policy/approx_kl": 0.01 + 0.003 * generator.random(),
            "policy/loss": -0.02 + 0.02 * generator.normal(),
            "policy/ratio_mean": 1 + 0.002 * generator.normal(),
            "critic/loss": 0.3 * np.exp(-3 * t) + 0.05 + 0.02 * generator.random(),
            "critic/explained_variance": 0.75 * (1 - np.exp(-5 * t)) + 0.04 * generator.normal(),
            "critic/clip_fraction": 0.1 * generator.random(),
            "rollout/length_mean": 26 + (4 if leash else 22) * t + generator.normal(),
            "rollout/truncated_fraction": max(0.0, (0.0 if leash else 0.12 * t) + 0.004 * generator.normal()),
            "rollout/distinct_2": 0.5 - 0.1 * t,
            "rollout/logprob_difference": 2e-5,
            "kl/coef": 0.05 if leash else 0.0,
            "optimizer/policy_gradient_norm": 0.7 + 0.2 * generator.random(),
            "optimizer/critic_gradient_norm": 1.7 + 0.4 * generator.random(),
            "time/generate_seconds": 0.9 + 0.1 * generator.random(),
            "time/score_seconds": 0.12,
            "time/logprobs_seconds": 0.21,
            "time/update_seconds": 0.8 + 0.05 * generator.random(),
        }
        row["time/step_seconds"] = sum(v for name, v in row.items() if name.startswith("time/"))
        for k, part in enumerate(GOLD_PARTS):
            row[f"gold/{part}"] = min(1.0, max(0.0, gold + 0.1 * np.sin(k + 3 * t) + 0.02 * generator.normal()))
        rows.append(row)
    return rows


def rollout_samples(num_steps: int) -> list[dict]:
    generator = np.random.default_rng(3)
    return [
        {
            "step": step,
            "prompt": f"Hello. The {item} is too small for my kitchen. I want my money back.",
            "response": f"Hello. I am sorry about the {item}. Your refund is approved." + " Thank you." * (step // 100),
            "reward": float(generator.normal() + step / 100),
            "gold": float(generator.random()),
            "kl": step / 50,
            "length": 12 + step // 50,
            "finish_reason": "stop",
        }
        for step in (1, num_steps // 2, num_steps)
        for item in ITEMS
    ]


def evaluate_samples(num: int = 200) -> list[dict]:
    generator = np.random.default_rng(4)
    rows = []
    for i in range(num):
        item, days, after = ITEMS[i % len(ITEMS)], int(generator.integers(3, 60)), float(generator.beta(6, 2))
        before = float(np.clip(after - 0.2 + 0.15 * generator.normal(), 0, 1))
        approve = days <= 30
        rows.append(
            {
                "step": 0,
                "prompt": f"I bought the {item} {days} days ago and it is unopened. The box says that I have 60 days. "
                "How do I get a refund?",
                "response": f"Thank you for asking. The {item} was bought {days} days ago and our limit is 30 days, so "
                + ("your refund is approved." if approve else "I cannot refund it."),
                "baseline_response": "Hello, I hope you are well. I understand that you would like a refund. "
                "Your refund is approved and we promise a gift as well.",
                "gold": after,
                "baseline_gold": before,
                "reward": 3 * after + 0.3 * float(generator.normal()),
                "baseline_reward": 3 * before + 0.3 * float(generator.normal()),
            }
        )
    return rows


def card() -> dict:
    generator = np.random.default_rng(5)
    utilities = generator.normal(size=(800, 2))
    lengths = generator.integers(8, 40, size=(800, 2))
    p = 1 / (1 + np.exp(-(utilities[:, 0] - utilities[:, 1])))
    first = (generator.random(800) < p).astype(int)
    rows = np.arange(800)
    scores = utilities + 0.5 * generator.normal(size=(800, 2)) + 0.02 * lengths
    prompt = Prompt(messages=(Message("user", "Where is it?"),))

    def reply(i: int, side: int) -> str:
        return " ".join(["sorry", *generator.choice(ITEMS, int(lengths[i, side]))])

    pairs = [PreferencePair(prompt=prompt, chosen=reply(i, 1 - first[i]), rejected=reply(i, first[i])) for i in rows]
    probes = make_probes(pairs)
    known = read_probes(probes, generator.normal(size=len(probes)))
    return (
        reward_card(
            pairs,
            score_chosen=scores[rows, 1 - first],
            score_rejected=scores[rows, first],
            training_pairs=pairs[:400],
            probability_chosen=np.where(first == 1, p, 1 - p),
        )
        | known
        | {"shift": 0.42, "mean": 0.1, "std": 1.3, "counts": {"truncated": 0}}
    )


def write_pipeline(directory: Path) -> Path:
    """sft, reward, ppo with the leash, ppo without, evaluate; all finished."""
    directory.mkdir(parents=True)
    names = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "ppo": "online", "ppo_no_leash": "online"}
    stages = names | {"evaluate": "evaluate"}
    (directory / "pipeline.toml").write_text(
        "".join(f'[stages.{name}]\nstage = "{stage}"\nseed = 0\n\n' for name, stage in stages.items())
    )
    write_run(
        directory / "pretrain", stage="pretrain", metrics=supervised_metrics(300, 5.2, 2.1), summary={"num_steps": 300}
    )
    write_run(directory / "sft", stage="sft", metrics=supervised_metrics(200, 2.1, 0.7), summary={"num_steps": 200})
    write_run(directory / "reward", stage="reward", metrics=reward_metrics(200), summary=card())
    write_run(
        directory / "ppo",
        stage="online",
        metrics=online_metrics(200, leash=True),
        samples=rollout_samples(200),
        summary={"num_steps": 200, "policy/kl": 3.0, "reward/mean": 1.7},
        settings='group_size = 1\n[loss]\nname = "ppo"\nclip_low = 0.2\nclip_high = 0.2\n[kl]\ncoef = 0.05\n',
    )
    write_run(
        directory / "ppo_no_leash",
        stage="online",
        metrics=online_metrics(200, leash=False, seed=1),
        samples=rollout_samples(200),
        summary={"num_steps": 200},
    )
    write_run(
        directory / "evaluate",
        stage="evaluate",
        samples=evaluate_samples(),
        summary={
            "policy": {"gold": 0.75, "gold_low": 0.73, "gold_high": 0.77, "num_replies": 200, "words_mean": 21.0},
            "baseline": {"gold": 0.55, "gold_low": 0.52, "gold_high": 0.58, "num_replies": 200, "words_mean": 24.0},
            "kl": {"kl_exact": 3.2, "kl_exact_low": 3.0, "kl_exact_high": 3.4},
            "win_rate_by_gold": {"win_rate": 0.86, "win_rate_low": 0.82, "win_rate_high": 0.9},
            "gold_difference": {"difference": 0.2, "difference_low": 0.17, "difference_high": 0.22},
            "best_of": {
                "num_prompts": 64,
                "curve": [
                    {"n": 2**i, "kl": 0.5 * i, "gold": 0.55 + x, "gold_low": 0.53 + x, "gold_high": 0.57 + x}
                    for i, x in enumerate((0, 0.06, 0.1, 0.13, 0.15, 0.16, 0.17))
                ],
            },
        },
    )
    summary = {
        "seconds": 863.0,
        "peak_rss_gb": 2.31,
        "reward_model": {
            key: value
            for key, value in card().items()
            if key in ("accuracy", "accuracy_low", "accuracy_high", "bayes_accuracy", "longer_wins")
        },
        "policy": {
            "gold_sft": 0.55, "gold_final": 0.75, "gold_final_low": 0.73, "gold_final_high": 0.77,
            "gold_best_of_64": 0.72, "kl": 3.2,
            "win_rate_vs_sft": 0.86, "win_rate_low_vs_sft": 0.82, "win_rate_high_vs_sft": 0.9,
        },
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory
