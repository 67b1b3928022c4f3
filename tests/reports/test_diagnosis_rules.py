"""Every rule fires on a series made to show its failure, and none on healthy ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reports.healthy_runs import (
    CARD,
    NOISES,
    ONLINE_SETTINGS,
    online,
    online_columns,
    online_samples,
    ramp,
    record,
    supervised,
    supervised_columns,
)
from trimtab.reports.collect import Series
from trimtab.reports.diagnosis import diagnose_run
from trimtab.reports.diagnosis.rule import RULES
from trimtab.reports.diagnosis.trends import trend

N = 40
RNG = np.random.default_rng(7)


def wiggle(level: float, size: float, num: int = N) -> np.ndarray:
    return level + size * RNG.normal(size=num)


def growing(text: str) -> tuple[dict, ...]:
    """Samples in whose second half every reply is this one."""
    rows = online_samples()
    return tuple(row | ({"response": text} if i >= len(rows) // 2 else {}) for i, row in enumerate(rows))


HACKED = {
    "reward/mean": np.linspace(0, 1.5, N),
    "gold/mean": np.concatenate([np.linspace(0.5, 0.7, 12), np.linspace(0.7, 0.2, N - 12)]),
    "policy/kl": np.linspace(0, 25, N),
}
NAN = np.where(np.arange(N) == 20, np.nan, 0.3)
FLAT_LOSS = wiggle(0.69, 0.02, 80)

ILL = {
    "sampler_mismatch": [
        online({"rollout/logprob_difference": wiggle(1.2, 0.1)}, sampling=ONLINE_SETTINGS["sampling"] | {"top_p": 0.9}),
        online({"rollout/effective_fraction": wiggle(0.2, 0.02)}, engine={"max_staleness": 4}),
        online(
            {"rollout/logprob_difference": wiggle(0.5, 0.1)},
            sampling=ONLINE_SETTINGS["sampling"] | {"precision": "bfloat16"},
        ),
    ],
    "flat_reward": [
        online({"reward/std": np.zeros(N), "reward/mean": np.zeros(N)}),
        online(
            {"optimizer/policy_gradient_norm": np.zeros(N), "reward/mean": wiggle(0.5, 0.05)},
            sampling=ONLINE_SETTINGS["sampling"] | {"temperature": 0.01},
        ),
        online({"reward/mean": wiggle(0.1, 0.05), "gold/mean": wiggle(0.5, 0.02)}),
    ],
    "policy_stays": [
        online({"policy/kl": wiggle(0.01, 0.005), "reward/mean": wiggle(0.1, 0.05)}),
        online({"policy/kl": wiggle(0.01, 0.005), "reward/mean": wiggle(0.1, 0.05), "kl/coef": np.full(N, 20.0)}),
    ],
    "reward_scale": [
        online({"reward/std": wiggle(70, 5), "reward/mean": ramp(N, 0, 60) + wiggle(0, 7)}),
        online({"reward/clipped_fraction": wiggle(0.5, 0.05)}, shaping={"normalize": False, "clip": 0.1}),
        online({"reward/std": wiggle(0.005, 0.0005), "critic/loss": None}),
    ],
    "reward_hacking": [online(HACKED)],
    "kl_explosion": [
        online({"policy/kl": np.linspace(0, 60, N)}),
        online({"policy/clip_fraction": wiggle(0.5, 0.05), "policy/approx_kl": wiggle(0.3, 0.05)}),
    ],
    "entropy_collapse": [
        online({"policy/entropy": ramp(N, 0.5, 0.05) + wiggle(0, 0.01)}),
        online({"policy/entropy": np.full(N, 0.001)}),
    ],
    "mode_collapse": [online({"rollout/distinct_2": ramp(N, 0.23, 0.04) + wiggle(0, 0.01)})],
    "length_growth": [online({"rollout/length_mean": np.linspace(30, 90, N) + wiggle(0, 2), "gold/mean": None})],
    "truncated_replies": [
        online({"rollout/truncated_fraction": wiggle(0.6, 0.05)}),
        online({"rollout/truncated_fraction": np.abs(ramp(N, 0.0, 0.4) + wiggle(0, 0.02))}),
    ],
    "critic_instability": [
        online({"critic/explained_variance": wiggle(-2.0, 0.3), "critic/loss": np.linspace(0.1, 3, N)}),
        online({"critic/explained_variance": wiggle(-0.2, 0.02)}),
    ],
    "over_refusal": [online(samples=growing("I'm sorry, but I can't help with that."))],
    "sycophancy": [online(samples=growing("What a great question! You are absolutely right."))],
    "template_mismatch": [online(samples=growing("Yes.<|im_end|>\n<|im_start|>user\nAnd more?"))],
    "worse_than_baseline": [
        record(
            "evaluate",
            {},
            summary={
                "policy": {"gold": 0.4},
                "gold_difference": {"difference": -0.2, "difference_low": -0.3, "difference_high": -0.1},
            },
            samples=({"gold": 0.1, "baseline_gold": 0.5, "prompt": "p", "response": "r", "baseline_response": "b"},),
        ),
    ],
    "loss_spikes": [
        supervised("sft", {"loss/train": supervised_columns("sft")["loss/train"] + 5.0 * (np.arange(80) % 30 == 29)}),
        supervised("reward", {"loss/train": ramp(80, 0.7, 5.0) + wiggle(0, 0.1, 80)}),
        supervised("sft", {"loss/train": np.concatenate([[0.7, 30.0, 60.0], wiggle(50, 20, 77)])}),
        online({"policy/loss": NAN}),
    ],
    "nothing_learned": [
        supervised("sft", {"loss/train": wiggle(1.0, 0.03, 80)}),
        supervised("preference", {"loss/train": FLAT_LOSS, "policy/margin": wiggle(0, 0.02, 80)}),
    ],
    "reward_model_collapse": [
        supervised("reward", summary={"accuracy": 0.5, "accuracy_low": 0.47, "accuracy_high": 0.53}),
        supervised("reward", summary={"resembles": "constant"}),
        supervised("reward", summary={"accuracy": 0.3, "accuracy_low": 0.27, "accuracy_high": 0.33}),
        supervised(
            "reward",
            {"loss/train": FLAT_LOSS, "reward/margin": wiggle(0, 0.1, 80), "reward/accuracy": wiggle(0.5, 0.05, 80)},
            {"accuracy": None},
        ),
    ],
    "overfitting": [
        supervised("sft", {"loss/validation": np.concatenate([ramp(30, 1, 0.6), np.linspace(0.6, 0.9, 50)])}),
        supervised(
            "reward",
            {"reward/accuracy": np.clip(wiggle(0.95, 0.02, 80), 0, 1), "reward/validation_accuracy": np.full(80, 0.6)},
            num_epochs=8.0,
        ),
    ],
    "miscalibration": [
        supervised("reward", summary={"temperature": 5.0, "ece": 0.25, "calibrated": {"ece": 0.02}}, num_epochs=5.0),
        supervised("reward", summary={"temperature": 0.2, "ece": 0.2}),
    ],
    "chosen_falls": [supervised("preference", {"policy/chosen_logprobs": np.linspace(-50, -150, 80)})],
    "preference_at_chance": [
        supervised("preference", summary={"accuracy": 0.5, "accuracy_low": 0.42, "accuracy_high": 0.58}, num_epochs=3.0)
    ],
}


def found_in(run):
    return [rule.name for rule, _ in diagnose_run(run).found]


def test_every_rule_is_shown_here():
    assert set(ILL) == set(RULES)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, runs in ILL.items() for i in range(len(runs))])
def test_a_rule_fires_on_the_series_made_for_it(name, number):
    run = ILL[name][number]
    assert name in found_in(run)
    failure = next(failure for rule, failure in diagnose_run(run).found if rule.name == name)
    assert failure.symptom.endswith(".")
    assert any(c.isdigit() for c in failure.symptom) or failure.evidence, "a symptom has numbers"
    assert failure.causes
    assert failure.changes or failure.advice
    assert all(change.old != change.new for change in failure.changes)


@pytest.mark.parametrize("noise", NOISES)
def test_healthy_runs_are_rarely_called_ill(noise):
    """400 runs of each noise: 100 of PPO and 100 of each of three stages on fixed data, against all of their rules."""
    alarms: list[tuple[str, list[str]]] = []
    for seed in range(100):
        runs = [
            record(
                "online",
                online_columns(seed=seed, noise=NOISES[noise]),
                settings=ONLINE_SETTINGS,
                samples=online_samples(),
            )
        ]
        runs += [
            record(
                stage,
                supervised_columns(stage, seed=seed, noise=NOISES[noise]),
                summary=CARD if stage == "reward" else {},
            )
            for stage in ("sft", "reward", "preference")
        ]
        alarms += [(run.stage, found_in(run)) for run in runs]
    false = [(stage, found) for stage, found in alarms if found]
    assert len(false) <= {"white": 0, "slow": 4, "heavy": 2}[noise], false


def test_a_flat_noisy_series_moves_no_more_often_than_chance_says():
    def share(noise):
        found = [trend(Series(np.arange(30.0), noise(np.random.default_rng(i), 30))) for i in range(2000)]
        return sum(one.rose or one.fell for one in found)

    counts = {name: share(noise) for name, noise in NOISES.items()}
    assert counts["white"] <= 4
    assert counts["heavy"] <= 8
    assert counts["slow"] <= 450  # the figure in the docstring of CHANCE
