"""Series of runs, made by hand: healthy ones with noise of several kinds, to which a test adds one failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.reports.collect import RunRecord, Series

Noise = Callable[[np.random.Generator, int], np.ndarray]


def white(rng: np.random.Generator, num: int) -> np.ndarray:
    return rng.normal(size=num)


def slow(rng: np.random.Generator, num: int) -> np.ndarray:
    """Neighbours that correlate by 0.8, with a deviation of 1."""
    values = [rng.normal()]
    for _ in range(num - 1):
        values.append(0.8 * values[-1] + 0.6 * rng.normal())
    return np.array(values)


def heavy(rng: np.random.Generator, num: int) -> np.ndarray:
    """Student's t with three degrees of freedom, scaled to a deviation of 1."""
    return rng.standard_t(3, size=num) * 3**-0.5


NOISES: dict[str, Noise] = {"white": white, "slow": slow, "heavy": heavy}


def record(stage: str, columns: dict[str, Any], **known: Any) -> RunRecord:
    """A finished run with these metrics, one value a step."""
    metrics = {name: Series(np.arange(1.0, len(v) + 1), np.asarray(v, dtype=float)) for name, v in columns.items()}
    return RunRecord(name="run", stage=stage, metrics=metrics, finished=True, **known)


def ramp(num: int, start: float, end: float) -> np.ndarray:
    """From one level to another, fast at first."""
    return end + (start - end) * np.exp(-4 * np.linspace(0, 1, num))


ONLINE_SETTINGS: dict[str, Any] = {
    "rewards": [{"name": "model", "path": "reward/model", "weight": 1.0}],
    "advantage": {"name": "gae"},
    "loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2},
    "kl": {"name": "fixed", "coef": 0.05},
    "kl_in": "reward",
    "shaping": {"normalize": False, "scale_only": False, "missing_eos_penalty": 0.0},
    "critic": {"init": "reward", "warmup_steps": 0, "optimizer": {"learning_rate": 1e-5}},
    "optimizer": {"learning_rate": 3e-6, "warmup_fraction": 0.0},
    "sampling": {"max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "precision": "float32"},
    "engine": {"max_staleness": 0},
    "precision": "float32",
    "entropy_coef": 0.0,
    "prompts_per_step": 16,
    "group_size": 4,
    "num_steps": 40,
}


def online_columns(num: int = 40, *, seed: int = 0, noise: Noise = white) -> dict[str, np.ndarray]:
    """PPO that learns: reward and gold rise, KL grows to 4 nats, entropy and variety fall a little."""
    rng = np.random.default_rng(seed)

    def n(size: float) -> np.ndarray:
        return size * noise(rng, num)

    return {
        "reward/mean": ramp(num, 0.0, 0.7) + n(0.08),
        "reward/std": np.abs(ramp(num, 0.8, 0.5) + n(0.06)),
        "gold/mean": ramp(num, 0.5, 0.78) + n(0.02),
        "policy/kl": np.abs(ramp(num, 0.0, 4.0) + n(0.3)),
        "kl/coef": np.full(num, 0.05),
        "policy/entropy": np.abs(ramp(num, 0.52, 0.38) + n(0.02)),
        "policy/loss": n(0.01),
        "policy/clip_fraction": np.abs(0.03 + n(0.01)),
        "policy/approx_kl": np.abs(0.008 + n(0.003)),
        "critic/loss": np.abs(ramp(num, 0.3, 0.05) + n(0.02)),
        "critic/explained_variance": ramp(num, -0.5, 0.4) + n(0.06),
        "critic/clip_fraction": np.abs(0.03 + n(0.01)),
        "rollout/length_mean": 30.0 + n(1.5),
        "rollout/truncated_fraction": np.abs(n(0.008)),
        "rollout/distinct_2": np.abs(ramp(num, 0.23, 0.19) + n(0.01)),
        "rollout/logprob_difference": np.abs(6e-6 + n(2e-6)),
        "optimizer/policy_gradient_norm": np.abs(0.5 + n(0.1)),
    }


def online_samples(num_steps: int = 8, each: int = 6, *, text: str = "We will refund it.") -> tuple[dict, ...]:
    return tuple(
        {"step": 5 * i + 1, "prompt": "Refund?", "response": text, "reward": 0.5, "finish_reason": "stop"}
        for i in range(num_steps)
        for _ in range(each)
    )


def online(
    columns: dict[str, Any] | None = None, samples: tuple[dict, ...] | None = None, **settings: Any
) -> RunRecord:
    """The healthy run with other columns and settings; a column of None is left out."""
    merged = {name: value for name, value in (online_columns() | (columns or {})).items() if value is not None}
    shown = online_samples() if samples is None else samples
    return record("online", merged, settings=ONLINE_SETTINGS | settings, samples=shown)


SUPERVISED_SETTINGS: dict[str, Any] = {
    "num_epochs": 1.0,
    "optimizer": {"learning_rate": 1e-5, "warmup_fraction": 0.03},
    "loss": {"name": "dpo", "beta": 0.1, "nll_coef": 0.0},
}
CARD = {
    "accuracy": 0.7,
    "accuracy_low": 0.68,
    "accuracy_high": 0.72,
    "temperature": 1.1,
    "ece": 0.03,
    "resembles": None,
}


def supervised_columns(stage: str, num: int = 80, *, seed: int = 0, noise: Noise = white) -> dict[str, np.ndarray]:
    """A loss that falls, and for pairs a margin and an accuracy that rise; held-out pairs nearly as good."""
    rng = np.random.default_rng(seed)

    def n(size: float) -> np.ndarray:
        return size * noise(rng, num)

    if stage in ("sft", "pretrain"):
        return {"loss/train": ramp(num, 1.0, 0.5) + n(0.03), "loss/validation": ramp(num, 1.0, 0.52) + n(0.002)}
    owner = "reward" if stage == "reward" else "policy"
    columns = {
        "loss/train": ramp(num, 0.69, 0.55) + n(0.03),
        "loss/validation": ramp(num, 0.69, 0.57) + n(0.002),
        f"{owner}/margin": ramp(num, 0.0, 0.7) + n(0.1),
        f"{owner}/accuracy": np.clip(ramp(num, 0.5, 0.75) + n(0.06), 0, 1),
        f"{owner}/validation_accuracy": ramp(num, 0.5, 0.7),
    }
    if stage == "preference":
        columns["policy/chosen_logprobs"] = -50 + n(3)
    return columns


def supervised(
    stage: str, columns: dict[str, Any] | None = None, summary: dict | None = None, **settings: Any
) -> RunRecord:
    merged = {k: v for k, v in (supervised_columns(stage) | (columns or {})).items() if v is not None}
    card = (
        {} if stage in ("sft", "pretrain") else CARD if stage == "reward" else {"accuracy": 0.7, "accuracy_low": 0.65}
    )
    return record(stage, merged, settings=SUPERVISED_SETTINGS | settings, summary=card | (summary or {}))
