"""Every rule fires on a series made to show its failure, and none on healthy ones."""

from __future__ import annotations

from dataclasses import replace

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


def opening_alike(num_prompts: int) -> tuple[dict, ...]:
    """Samples in whose second half every reply, to so many prompts, begins with the same words."""
    rows = growing("Hello and thanks for writing to us. Hello, your team reads this. We will refund it.")
    return tuple(row | {"prompt": f"Refund {i % num_prompts}?"} for i, row in enumerate(rows))


HACKED = {
    "reward/mean": np.linspace(0, 1.5, N),
    "gold/mean": np.concatenate([np.linspace(0.5, 0.7, 12), np.linspace(0.7, 0.2, N - 12)]),
    "policy/kl": np.linspace(0, 25, N),
}
NAN = np.where(np.arange(N) == N - 1, np.nan, 0.3)

GUARDED = {
    f"guard/measure{end}": np.where(np.arange(N) % 8 == 7, np.linspace(0.8, 0.2, N) + half, np.nan)
    for end, half in (("", 0.0), ("_low", -0.07), ("_high", 0.07))
}
"""What a guard logs that measures five times: 64 prompts, a standard error of 0.036."""
DECISION = {
    "checkpoints": [
        {"step": step, "kl": kl, "reward": r, "measure": m, "measure_low": m - 0.07, "measure_high": m + 0.07}
        for step, kl, r, m in ((0, 0.0, 0.0, 0.8), (20, 12.0, 0.7, 0.5), (40, 25.0, 1.5, 0.2))
    ]
}
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
    ],
    "reward_stays": [online({"reward/mean": wiggle(0.1, 0.05), "gold/mean": wiggle(0.5, 0.02)})],
    "policy_stays": [
        online({"policy/kl": wiggle(0.01, 0.005), "reward/mean": wiggle(0.1, 0.05)}),
        online({"policy/kl": wiggle(0.01, 0.005), "reward/mean": wiggle(0.1, 0.05), "kl/coef": np.full(N, 20.0)}),
        online(
            {"policy/kl": np.tile([0.4, 0.6], 20), "reward/mean": np.tile([0.1, 0.2], 20), "kl/coef": np.full(N, 50.0)}
        ),
    ],
    "reward_scale": [
        online({"reward/std": wiggle(70, 5), "reward/mean": ramp(N, 0, 60) + wiggle(0, 7)}),
        online({"reward/clipped_fraction": wiggle(0.5, 0.05)}, shaping={"normalize": False, "clip": 0.1}),
        online({"reward/std": wiggle(0.005, 0.0005), "critic/loss": None}),
    ],
    "reward_hacking": [
        online(HACKED),
        online(HACKED | {"gold/mean": None} | GUARDED),
        replace(online(HACKED | {"gold/mean": None}), decision=DECISION),
    ],
    "kl_explosion": [
        online({"policy/kl": np.linspace(0, 60, N)}),
        online({"policy/clip_fraction": wiggle(0.5, 0.05), "policy/approx_kl": wiggle(0.3, 0.05)}),
        online({"policy/kl": np.r_[0.0, np.full(N - 1, 400.0)]}),
    ],
    "entropy_collapse": [
        online({"policy/entropy": ramp(N, 0.5, 0.05) + wiggle(0, 0.01)}),
        online({"policy/entropy": np.full(N, 0.001)}),
    ],
    "mode_collapse": [
        online({"rollout/distinct_2": ramp(N, 0.23, 0.04) + wiggle(0, 0.01)}),
        online({"gold/mean": None}, samples=opening_alike(8)),
    ],
    "length_growth": [online({"rollout/length_mean": np.linspace(30, 90, N) + wiggle(0, 2), "gold/mean": None})],
    "truncated_replies": [
        online({"rollout/truncated_fraction": wiggle(0.6, 0.05)}),
        online({"rollout/truncated_fraction": np.abs(ramp(N, 0.0, 0.4) + wiggle(0, 0.02))}),
    ],
    "critic_instability": [
        online({"critic/explained_variance": wiggle(-2.0, 0.3), "critic/loss": np.linspace(0.1, 3, N)}),
        online({"critic/explained_variance": wiggle(-0.2, 0.02)}),
        online({"critic/explained_variance": np.where(np.arange(N) < 5, -2.0, 0.01)}),  # a constant in the end
    ],
    "over_refusal": [
        online(samples=growing("I'm sorry, but I can't help with that.")),
        online(samples=growing("We can not help with the card.")),
    ],
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


def failures_of(run):
    return {rule.name: failure for rule, failure in diagnose_run(run).found}


def reasons_of(run):
    return {rule.name: reason.reason for rule, reason in diagnose_run(run).not_looked}


def roots_of(run):
    found = diagnose_run(run)
    return [rule.name for rule, _ in found.found if found.explains(rule) is None]


# --- an independent measure ---


@pytest.mark.parametrize("number", [1, 2])
def test_the_measure_of_a_guard_stands_for_gold(number):
    found = failures_of(ILL["reward_hacking"][number])["reward_hacking"]
    assert found.symptom.startswith("The guard's measure peaked at 0.")
    # the first check is after step 8; decision.json has the model of step 0 too
    assert found.evidence["peak_step"] == (8 if number == 1 else 0)
    assert ("stop at step 8" in found.advice) == (number == 1)


def test_a_guard_with_wide_intervals_shows_no_fall():
    wide = {
        name: values + {"low": -0.4, "high": 0.4}.get(name.rpartition("_")[2], 0.0) for name, values in GUARDED.items()
    }
    assert "reward_hacking" not in found_in(online(HACKED | {"gold/mean": None} | wide))
    few = {name: np.where(np.arange(N) < 32, np.nan, values) for name, values in GUARDED.items()}
    assert "[guard] measures" in reasons_of(online(HACKED | {"gold/mean": None} | few))["reward_hacking"]


def test_longer_replies_are_well_if_the_guard_says_so():
    longer = {"rollout/length_mean": np.linspace(30, 90, N), "gold/mean": None}
    rising = {name: values + np.linspace(0, 1.2, N) for name, values in GUARDED.items()}
    assert "while the guard's measure did not rise" in failures_of(online(longer | GUARDED))["length_growth"].symptom
    assert "length_growth" not in found_in(online(longer | rising))


def test_replies_that_share_words_are_well_if_gold_rises_or_they_answer_one_prompt():
    assert "mode_collapse" not in found_in(online(samples=opening_alike(8)))
    assert "mode_collapse" not in found_in(online({"gold/mean": None}, samples=opening_alike(2)))
    found = failures_of(ILL["mode_collapse"][1])["mode_collapse"]
    assert "team reads this" in found.symptom
    assert "12 of 12 of the last replies, and in 0 of 12 of the first." in found.symptom
    assert "Distinct bigrams" not in found.symptom


# --- what a failure follows from, and its remedy ---


def test_a_destroyed_policy_is_not_answered_by_more_samples():
    run = online(
        {
            "policy/kl": np.linspace(30, 300, N),
            "policy/clip_fraction": wiggle(0.6, 0.02),
            "reward/mean": wiggle(-1.0, 0.02),
        },
        optimizer={"learning_rate": 1e-2, "warmup_fraction": 0.0},
    )
    assert {"kl_explosion", "reward_stays"} <= set(found_in(run))
    assert "reward_stays" not in roots_of(run)
    changes = {change.key: change.new for change in diagnose_run(run).changes}
    assert changes["optimizer.learning_rate"] == 0.003
    assert "prompts_per_step" not in changes


def test_rewards_too_large_for_the_kl_coefficient_are_divided_before_it_is_raised():
    huge = online({"reward/std": wiggle(70, 5), "policy/kl": np.linspace(0, 60, N), "gold/mean": None})
    assert {"reward_scale", "kl_explosion"} <= set(found_in(huge))
    assert [(one.key, one.new) for one in diagnose_run(huge).changes] == [("shaping.normalize", True)]


def test_replies_that_became_alike_in_an_explosion_do_not_explain_it():
    gone = {
        "policy/kl": np.linspace(0, 300, N),
        "optimizer/policy_gradient_norm": np.where(np.arange(N) < N // 2, 0.5, 0.0),
        "reward/mean": wiggle(-1.0, 0.02),
    }
    assert "flat_reward" not in found_in(online(gone))
    assert "kl_explosion" in roots_of(online(gone))
    # without a gradient from the start, or with replies that were certain then, it is the other way round
    for never in ({"optimizer/policy_gradient_norm": np.zeros(N)}, {"policy/entropy": np.full(N, 0.005)}):
        assert "flat_reward" in roots_of(online(gone | never))
        assert "kl_explosion" not in roots_of(online(gone | never))
    assert "flat_reward" in roots_of(online(gone | {"policy/kl": np.linspace(0, 3, N)}))


def test_a_policy_that_is_gone_at_once_takes_smaller_steps():
    changes = {one.key for one in failures_of(ILL["kl_explosion"][2])["kl_explosion"].changes}
    assert changes == {"kl.coef", "optimizer.learning_rate"}
    far_from_the_start = online({"policy/kl": np.linspace(40, 60, N)})  # another reference than the first policy
    changes = {one.key for one in failures_of(far_from_the_start)["kl_explosion"].changes}
    assert changes == {"kl.coef"}


@pytest.mark.parametrize(
    ("number", "cause", "epochs"), [(0, "learned by heart", 1.0), (1, "stopped early", 2.0)], ids=["over", "under"]
)
def test_overconfidence_asks_for_fewer_passes_and_underconfidence_for_more(number, cause, epochs):
    found = failures_of(ILL["miscalibration"][number])["miscalibration"]
    assert cause in found.causes[0]
    assert [(change.key, change.new) for change in found.changes] == [("num_epochs", epochs)]


def test_swapped_labels_are_named():
    found = failures_of(ILL["reward_model_collapse"][2])["reward_model_collapse"]
    assert found.causes[0] == "chosen and rejected are swapped, in the training or in the held-out pairs"
    assert not any("swapped, in" in cause for cause in failures_of(ILL["reward_model_collapse"][0]).popitem()[1].causes)


def test_few_held_out_pairs_call_no_model_ill():
    few = {"accuracy": 0.7, "accuracy_low": 0.48, "accuracy_high": 0.86}  # 14 of 20
    for stage, rule in (("reward", "reward_model_collapse"), ("preference", "preference_at_chance")):
        run = supervised(stage, summary=few)
        assert rule not in found_in(run)
        assert reasons_of(run)[rule].startswith("too few held-out pairs: 70% [48%, 86%]")


def test_training_pairs_tell_where_held_out_ones_are_too_few():
    few = {"accuracy": 0.57, "accuracy_low": 0.49, "accuracy_high": 0.64}
    lost = {"reward/accuracy": np.full(80, 0.5), "reward/margin": np.zeros(80)}
    found = failures_of(supervised("reward", lost, few))["reward_model_collapse"]
    assert "0.5 (median of steps 65 to 80) of training pairs" in found.symptom


def test_a_critic_that_was_thrown_about_at_first_gets_a_smaller_rate():
    late = {"critic/explained_variance": wiggle(-0.02, 0.01), "critic/loss": ramp(N, 40.0, 0.1)}
    for start, rate in ((0.6, 1e-6), (0.05, 1e-4)):
        found = failures_of(online(late | {"critic/clip_fraction": ramp(N, start, 0.0)}))["critic_instability"]
        assert next(one.new for one in found.changes if one.key == "critic.optimizer.learning_rate") == rate


def test_the_accuracy_on_few_held_out_pairs_is_no_overfitting():
    apart = {"reward/accuracy": np.full(80, 0.72), "reward/validation_accuracy": np.full(80, 0.55)}
    few = {"accuracy": 0.55, "accuracy_low": 0.34, "accuracy_high": 0.74}
    assert "overfitting" not in found_in(supervised("reward", apart, few))
    assert "overfitting" in found_in(supervised("reward", apart, {"accuracy_high": 0.72}))


def test_a_held_out_loss_that_rises_at_once_asks_for_smaller_steps():
    rising = {"loss/validation": np.linspace(0.6, 0.9, 80)}
    first = failures_of(supervised("sft", rising))["overfitting"]
    assert {change.key for change in first.changes} == {"optimizer.learning_rate", "optimizer.warmup_fraction"}
    # 80 passes of one step each: the first step has seen all data
    assert [
        (one.key, one.new) for one in failures_of(supervised("sft", rising, num_epochs=80.0))["overfitting"].changes
    ] == [("max_steps", 1)]


# --- losses ---


def test_one_step_without_a_loss_is_well():
    holes = [np.where(np.isin(np.arange(N), steps), np.nan, 0.3) for steps in ([20], [20, 30], [N - 1])]
    assert ["loss_spikes" in found_in(online({"policy/loss": one})) for one in holes] == [False, True, True]


def test_spikes_may_stand_at_fractions_of_steps():
    loss = supervised_columns("sft")["loss/train"] + 5.0 * (np.arange(80) % 30 == 29)
    run = supervised("sft")
    found = failures_of(replace(run, metrics=run.metrics | {"loss/train": Series(np.arange(80) + 1.5, loss)}))
    assert found["loss_spikes"].evidence["steps"] == [30.5, 60.5]


# --- replies ---


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("over_refusal", "I\u2019m sorry."),
        ("over_refusal", "I can\u02bct help you."),
        ("sycophancy", "You\u2018re right."),
        ("sycophancy", "You are such a truly wonderful customer."),
    ],
)
def test_ways_of_saying_it_are_read(rule, text):
    assert rule in found_in(online(samples=growing(text)))
