"""What remedies change: learning rates by size, kind and course; rewards and KL coefficients by what pays."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.reports.healthy_runs import online, online_columns, ramp, supervised
from trimtab.reports.diagnosis import diagnose_run
from trimtab.reports.diagnosis.kl_coefficient import kl_coef_holding
from trimtab.reports.diagnosis.learning_rate import (
    CRITIC_RATE,
    RATE,
    below,
    far_above,
    lowered_rate,
    num_weights,
    raised_by_kl,
    raised_rate,
    usual_rates,
    usual_said,
)
from trimtab.reports.diagnosis.sampled_replies import holds_words

BILLIONS = [70_000, 100_000]
"""The shape of one weight of 7 billion numbers."""
RNG = np.random.default_rng(3)
N = 80


def noise(size, num=N):
    return size * RNG.normal(size=num)


def write_weights(directory, *shapes, name="model.safetensors"):
    """A model directory with a file of weights of which there is the header only."""
    directory.mkdir(parents=True, exist_ok=True)
    header = {f"w{i}": {"dtype": "F32", "shape": shape} for i, shape in enumerate(shapes)}
    text = json.dumps(header | {"__metadata__": {"a": "b"}}).encode()
    (directory / name).write_bytes(len(text).to_bytes(8, "little") + text)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def sized(tmp_path):
    """A function that gives a run a model with weights of these shapes."""

    def give(run, *shapes):
        model = write_weights(tmp_path / "-".join(str(math.prod(shape)) for shape in shapes), *shapes)
        return replace(run, settings={**run.settings, "model": str(model)})

    return give


def rated(run, rate):
    return replace(run, settings={**run.settings, "optimizer": {"learning_rate": rate, "warmup_fraction": 0.1}})


def new_rate(changes, path=RATE):
    return next((change.new for change in changes if change.key == path), None)


def failure_of(run, name):
    return next((failure for rule, failure in diagnose_run(run).found if rule.name == name), None)


# --- the size of a model ---


def test_weights_are_counted_in_all_files_of_a_model(tmp_path, sized):
    run = sized(supervised("sft"), [3, 4], [5])
    assert num_weights(run) == 17
    write_weights(tmp_path / "60", [10, 6], name="model-00001-of-00002.safetensors")
    write_weights(tmp_path / "60", [2], name="model-00002-of-00002.safetensors")
    assert num_weights(replace(run, settings={"model": str(tmp_path / "60")})) == 62


def test_the_model_that_a_run_wrote_comes_before_the_one_it_began_with(tmp_path, sized):
    write_weights(tmp_path / "run" / "model", [8])
    assert num_weights(replace(sized(supervised("sft"), [3]), directory=tmp_path / "run")) == 8


def test_a_relative_name_is_relative_to_where_the_command_was_given(tmp_path):
    write_weights(tmp_path / "here" / "m", [7])
    run = replace(supervised("sft", model="m"), environment={"place": {"cwd": str(tmp_path / "here")}})
    assert num_weights(run) == 7


def test_an_adapter_has_the_size_of_its_base(tmp_path):
    base, adapter = write_weights(tmp_path / "base", [9, 9]), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert num_weights(supervised("sft", model=str(adapter))) == 81
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "none/here"}))
    assert math.isnan(num_weights(supervised("sft", model=str(adapter))))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b'\x0f\0\0\0\0\0\0\0{"a":{"shape":3', b"\x05\0\0\0\0\0\0\0{}"],
)
def test_damaged_weights_and_hub_names_have_no_size(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert math.isnan(num_weights(supervised("sft", model=str(tmp_path))))
    assert math.isnan(num_weights(supervised("sft", model="some/model")))
    assert math.isnan(num_weights(supervised("sft", model=3)))
    assert usual_rates(supervised("sft", model="some/model")) is None
    assert usual_said(supervised("sft")) == ""


# --- learning rates ---


def test_the_usual_range_depends_on_the_kind_the_size_and_an_adapter(sized):
    large = {stage: usual_rates(sized(supervised(stage), BILLIONS)) for stage in ("sft", "preference")}
    assert (large["sft"].low, large["sft"].high) == pytest.approx((3e-6, 3e-5))
    assert (large["preference"].low, large["preference"].high) == pytest.approx((1e-6, 1e-5))
    # a thousandth of the weights, at the power of minus a third
    small = usual_rates(sized(supervised("preference"), [7_000, 1_000]))
    assert small.high == pytest.approx(1e-4)
    adapter = usual_rates(sized(supervised("preference", adapter={"rank": 8}), BILLIONS))
    assert (adapter.low, adapter.high) == pytest.approx((1e-5, 1e-4))
    critic = usual_rates(sized(online(), BILLIONS), CRITIC_RATE)
    assert critic.high == pytest.approx(3e-5)
    assert small.said == "Usual for a model of 7 million weights are rates of 1e-05 to 0.0001."
    assert "an adapter on a model of 7,000 million" in adapter.said


@pytest.mark.parametrize(
    ("rate", "raised", "lowered"),
    [
        (1e-9, 3.2e-6, 1e-10),  # to the middle of 1e-6 to 1e-5
        (9e-7, 3.2e-6, 9e-8),
        (2e-6, 6e-6, 2e-7),  # by a step
        (2e-5, 6e-5, 2e-6),
        (1.0, 3.0, 1e-5),  # to the end
    ],
)
def test_rates_go_to_the_usual_range_or_by_a_step(sized, rate, raised, lowered):
    run = rated(sized(supervised("preference"), BILLIONS), rate)
    assert new_rate(raised_rate(run)) == pytest.approx(raised, rel=0.05)
    assert new_rate(lowered_rate(run, 0.1)) == pytest.approx(lowered, rel=0.05)
    assert below(run) == (rate < 1e-6)
    assert far_above(run) == (rate > 3e-5)


def test_without_a_size_rates_go_by_factors():
    run = rated(supervised("sft"), 1e-9)
    assert new_rate(raised_rate(run)) == 1e-8
    assert new_rate(lowered_rate(run, 0.3)) == 3e-10
    assert not below(run)
    assert not far_above(rated(run, 1e9))
    assert raised_rate(supervised("sft", optimizer={})) == ()
    assert lowered_rate(supervised("sft", optimizer={}), 0.3) == ()


def test_a_rate_that_moved_the_policy_too_little_is_raised_by_the_root_of_the_ratio(sized):
    def after(kl, rate, size=BILLIONS):
        stays = online({"policy/kl_k3": np.full(40, kl)})
        return new_rate(raised_by_kl(rated(sized(stays, size) if size else stays, rate)))

    assert after(0.01, 5e-7) == pytest.approx(5e-6)  # a hundredth of a nat: ten times the rate
    assert after(1e-8, 5e-7) == pytest.approx(1e-5)  # not beyond the usual range
    assert after(1e-8, 2e-5) == pytest.approx(6e-5)  # or a step, where it lies there already
    assert after(0.5, 5e-7) == pytest.approx(1.5e-6)
    assert after(0.0, 5e-7) == pytest.approx(3.2e-6, rel=0.05)  # it did not move at all
    assert after(1e-8, 1e-7, None) == pytest.approx(1e-6)


def test_a_rate_applied_again_and_again_comes_to_the_upper_end(sized):
    run, seen = rated(sized(supervised("preference"), BILLIONS), 1e-9), []
    for _ in range(3):
        run = rated(run, new_rate(raised_rate(run)))
        seen.append(run.settings["optimizer"]["learning_rate"])
    assert seen == sorted(seen)
    assert 5e-6 < seen[1] < seen[2] < 1e-4


def test_a_policy_that_jumps_takes_the_usual_rate(sized):
    jumps = online({"policy/clip_fraction": 0.5 + noise(0.05, 40), "policy/approx_kl": 0.3 + noise(0.02, 40)})
    assert new_rate(failure_of(rated(sized(jumps, BILLIONS), 1e-3), "kl_explosion").changes) == pytest.approx(1e-5)
    found = failure_of(rated(sized(jumps, BILLIONS), 1e-5), "kl_explosion")
    assert new_rate(found.changes) == pytest.approx(3e-6)
    assert found.advice == (
        "Take smaller steps. Usual for a model of 7,000 million weights are rates of 1e-06 to 1e-05."
    )
    apart = failure_of(online({"policy/kl": np.linspace(0, 60, 40)}), "kl_explosion")
    assert apart.advice == "Hold the policy nearer to its reference."


def test_entropy_that_collapsed_at_a_rate_far_above_the_usual_takes_a_usual_one(sized):
    certain = sized(online({"policy/entropy": ramp(40, 0.5, 0.05) + noise(0.01, 40)}), BILLIONS)
    assert new_rate(failure_of(rated(certain, 1e-3), "entropy_collapse").changes) == pytest.approx(1e-5)
    assert new_rate(failure_of(rated(certain, 5e-6), "entropy_collapse").changes) is None


WORSE, STAYS = ramp(40, 0.3, -2.0) + noise(0.1, 40), -0.2 + noise(0.01, 40)


@pytest.mark.parametrize(
    ("explained", "rate", "new"), [(WORSE, 1e-2, 3e-5), (WORSE, 1e-5, 1e-6), (STAYS, 1e-9, 9.5e-6), (STAYS, 1e-2, 3e-5)]
)
def test_a_critic_takes_the_usual_rate(sized, explained, rate, new):
    critic = {"init": "reward", "optimizer": {"learning_rate": rate}}
    run = sized(online({"critic/explained_variance": explained}, critic=critic), BILLIONS)
    assert new_rate(failure_of(run, "critic_instability").changes, CRITIC_RATE) == pytest.approx(new, rel=0.05)


# --- a reward model whose loss stays at log 2 ---

CHANCE = {"accuracy": 0.5, "accuracy_low": 0.47, "accuracy_high": 0.53}
STILL = {"reward/margin": noise(0.02), "reward/accuracy": 0.5 + noise(0.05)}
AT_LOG_2 = {"loss/train": math.log(2) + noise(0.01)} | STILL
THROWN = {"loss/train": np.r_[0.7, 0.7, 0.75, 2.0, 3.0, 1.5, 0.9, math.log(2) + noise(0.01, N - 7)]} | STILL
LEFT = {"loss/train": np.r_[0.9, 0.88, 0.9, 0.8, 0.75, 0.7, math.log(2) + noise(0.01, N - 6)]} | STILL


def collapse(run):
    return failure_of(run, "reward_model_collapse")


@pytest.mark.parametrize("columns", [AT_LOG_2, THROWN, LEFT], ids=["stays", "thrown", "left"])
@pytest.mark.parametrize(("rate", "new"), [(1e-2, 3e-5), (1e-9, 9.5e-6)])
def test_a_rate_outside_of_its_range_decides_the_direction(sized, columns, rate, new):
    run = rated(sized(supervised("reward", columns, CHANCE), BILLIONS), rate)
    assert new_rate(collapse(run).changes) == pytest.approx(new, rel=0.05)
    if found := failure_of(run, "nothing_learned"):
        assert new_rate(found.changes) == new_rate(collapse(run).changes)


def test_without_a_range_the_loss_decides_the_direction():
    def direction(columns):
        found = collapse(rated(supervised("reward", columns, CHANCE), 1e-4))
        return new_rate(found.changes), found.causes[0]

    rate, cause = direction(THROWN)
    assert rate == 1e-5
    assert "so large" in cause
    rate, cause = direction(AT_LOG_2)
    assert rate == 1e-3
    assert "too small" in cause
    rate, cause = direction(LEFT)  # it learned that nothing tells the pairs apart
    assert rate is None
    assert "labels are noise" in cause


def test_a_usual_rate_that_taught_nothing_in_few_updates_gets_more_of_them(sized):
    flat = sized(supervised("preference", {"loss/train": 0.5 + noise(0.01), "policy/margin": noise(0.02)}), BILLIONS)

    def changes(rate, run=flat):
        return {one.key: one.new for one in failure_of(rated(run, rate), "nothing_learned").changes}

    assert changes(1e-9) == {RATE: 3.2e-6}
    assert changes(2e-6) == {RATE: 6e-6, "num_epochs": 3.0}
    assert changes(9e-6) == {RATE: 1e-5, "num_epochs": 3.0}  # 80 updates
    assert changes(2e-5) == {"num_epochs": 3.0}
    assert changes(None) == {}, "the record of the rate is lost"
    limited = replace(flat, settings={**flat.settings, "max_steps": 80})
    assert changes(2e-5, limited) == {"num_epochs": 3.0, "max_steps": 240}
    long = {name: replace(one, steps=one.steps * 2) for name, one in flat.metrics.items()}
    assert changes(9e-6, replace(flat, metrics=long)) == {RATE: 2.7e-5}


def test_what_was_learned_at_once_was_learned():
    fast = {"loss/train": np.r_[1.0, 1.0, 0.9, 0.7, 0.5 + noise(0.01, N - 4)], "loss/validation": None}
    assert failure_of(supervised("sft", fast), "nothing_learned") is None
    assert failure_of(supervised("sft", {"loss/train": 0.5 + noise(0.01)}), "nothing_learned") is not None


def test_passes_end_where_training_pairs_began_to_be_known_better():
    seen = np.r_[np.linspace(0.5, 0.6, 40), np.linspace(0.6, 0.98, 40)]
    columns = {"reward/accuracy": seen, "reward/validation_accuracy": np.full(N, 0.6)}
    few = {"accuracy": 0.6, "accuracy_low": 0.57, "accuracy_high": 0.63}
    changes = failure_of(supervised("reward", columns, few, num_epochs=10.0), "overfitting").changes
    assert [change.key for change in changes] == ["max_steps"]
    assert 48 <= changes[0].new <= 64  # 0.675 is passed at step 48; means are those of 16 steps
    once = failure_of(supervised("reward", columns, few), "overfitting").changes
    assert [change.key for change in once] == ["optimizer.learning_rate", "optimizer.warmup_fraction"]


# --- rewards that pay for the failure ---


def paid(phrase, *, before=2, after=20, num=20, extra=1.0):
    """Samples of which so many of the first and of the last hold a phrase, which earns so much more."""
    return tuple(
        {
            "step": step,
            "prompt": f"p{i}",
            "response": phrase if i < holding else f"reply {i} of step {step}",
            "reward": 0.25 + extra * (i < holding),
            "finish_reason": "stop",
        }
        for step, holding in ((1, before), (6, (before + after) // 2), (11, after))
        for i in range(num)
    )


def test_the_kl_coefficient_that_holds_a_phrase_is_that_of_the_best_policy():
    run = online(samples=paid("sorry, no"))
    coef = kl_coef_holding(run, lambda reply: "sorry" in reply, most=0.25)
    # the first replies hold it at 2.5 of 21; times exp(reward / coefficient), and normalised, that is a quarter
    share = 2.5 / 21
    tilted = share * math.exp(1.0 / coef)
    assert tilted / (tilted + 1 - share) == pytest.approx(0.25)
    # charged in the loss against divided rewards, the coefficient is divided as well
    columns = online_columns() | {"reward/std": np.full(40, 4.0)}
    divided = online(columns, paid("sorry, no"), kl_in="loss", advantage={"name": "grpo", "scale": "group"})
    assert kl_coef_holding(divided, lambda reply: "sorry" in reply, most=0.25) == pytest.approx(coef / 4)


def test_what_pays_nothing_or_is_frequent_has_no_such_coefficient():
    def coef(samples, most=0.25):
        return kl_coef_holding(online(samples=samples), lambda reply: "sorry" in reply, most=most)

    assert math.isnan(coef(paid("sorry", extra=-1.0)))
    assert math.isnan(coef(paid("sorry", before=10)))
    assert math.isnan(coef(paid("other")))
    assert math.isnan(coef(()))


@pytest.mark.parametrize(
    ("rule", "text"), [("over_refusal", "We can not help with that."), ("sycophancy", "You are so amazing.")]
)
def test_a_paid_phrase_is_held_back_by_what_it_pays(rule, text):
    coefs = []
    for extra in (1.0, 2.0):
        run = online(samples=paid(text, before=0, extra=extra), kl={"name": "fixed", "coef": 0.0})
        (change,) = failure_of(run, rule).changes
        coefs.append(change.new)
    assert coefs == pytest.approx([0.65, 1.3], rel=0.05)  # 1 / (log odds of 0.1 - log odds of 0.5 / 21), to two digits
    again = online(samples=paid(text, before=0), kl={"name": "fixed", "coef": 0.6})
    assert failure_of(again, rule).changes[0].new == 1.2, "at least twice the old one"
    unpaid = online(samples=paid(text, before=0, extra=0.0), kl={"name": "fixed", "coef": 0.6})
    assert failure_of(unpaid, rule).changes[0].new == 2.4


def test_a_controller_that_adapts_gets_a_nearer_target_for_a_paid_phrase():
    adaptive = {"name": "adaptive", "coef": 0.1, "target": 50.0, "horizon": 10000.0}
    run = online({"policy/kl": np.full(40, 8.0)}, paid("We can not help with that.", before=0), kl=adaptive)
    assert failure_of(run, "over_refusal").changes[0].new == 2.0


def test_words_that_all_replies_share_are_held_back_by_what_they_pay():
    text = "Hello and thanks for writing to us, our team reads this."
    run = online({"gold/mean": None}, paid(text, before=0, extra=3.0), kl={"name": "fixed", "coef": 0.0})
    changes = {change.key: change.new for change in failure_of(run, "mode_collapse").changes}
    # 3 / (log odds of 0.4 - log odds of 0.5 / 21), more than the slope of the reward at 7.5 nats
    assert changes["kl.coef"] == pytest.approx(0.91, rel=0.02)
    assert holds_words("Well. Hello and thanks!", "hello and")
    assert not holds_words("Hello, Andrew.", "hello , and")


LONGER = {"rollout/length_mean": np.linspace(30, 90, 40), "gold/mean": None}


def test_a_reward_that_asks_for_length_is_cut_to_the_first_lengths():
    asks = [{"name": "model", "path": "r"}, {"name": "length", "min_tokens": 60, "max_tokens": 90, "per_token": 0.001}]
    found = failure_of(online(LONGER, rewards=asks), "length_growth")
    changes = {change.key: (change.old, change.new) for change in found.changes}
    assert found.causes[0] == "the reward `length` asks for such replies"
    start = float(np.median(LONGER["rollout/length_mean"][:8]))
    assert changes["rewards.1.min_tokens"] == (60, math.floor(start / 1.3))
    assert changes["rewards.1.max_tokens"] == (90, math.ceil(start * 1.3))
    assert changes["rewards.1.per_token"][1] > 0.001
    # what holds them to it already is joined by a second charge
    held = [asks[0], {"name": "length", "min_tokens": 0, "max_tokens": 40, "per_token": 0.01}]
    assert [change.key for change in failure_of(online(LONGER, rewards=held), "length_growth").changes] == ["rewards.2"]
    assert failure_of(online(LONGER, rewards=[3, "length"]), "length_growth").changes == ()
