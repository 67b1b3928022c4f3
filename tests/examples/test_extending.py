"""Every file of examples/extending runs by its name, and computes what its paper says."""

from __future__ import annotations

import json
import math
import re
import tomllib
from types import SimpleNamespace

import pytest
import torch

from tests.stages.commands import FAST, rows, run_stage, trimtab, write_run_file
from tests.stages.test_online_invariance import CHANGES, compare, family_update
from tests.tiny import write_model_directory
from trimtab import cli
from trimtab.core import config, registry
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.math.advantages import Episodes
from trimtab.stages.online import OnlineSettings

EXTENDING = cli.examples_dir() / "extending"
PAGE = cli.examples_dir().parent / "docs" / "extending.md"
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def example(kind, name):
    return registry.find(kind, f"{EXTENDING}/{name}", where="an example")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("extending") / "base")


def settings_of(base, **changed):
    return {
        "model": str(base),
        "prompts": "world:arithmetic?num=8",
        "rewards": [{"name": "gold", "world": "arithmetic"}],
        "advantage": "grpo",
        "group_size": 2,
        "prompts_per_step": 4,
        "num_steps": 2,
        "num_epochs": 2,
        "sampling": {"max_new_tokens": 12},
        "optimizer": FAST,
        "sample_every": 1,
    } | changed


@pytest.mark.parametrize(
    ("changed", "logged"),
    [
        ({"loss": {"name": "examples/extending/spo_loss.py:SPO", "epsilon": 0.1}}, "policy/clip_fraction"),
        ({"advantage": "examples/extending/my_advantage.py:OptimalBaseline"}, "policy/loss"),
        (
            {"rewards": [{"name": "examples/extending/my_reward.py:CosineAnswer", "max_tokens": 12}]},
            "reward/cosine_right",
        ),
        ({"environment": "examples/extending/my_environment.py:SecondLook"}, "rollout/turns_mean"),
    ],
    ids=["loss", "advantage", "reward", "environment"],
)
def test_each_runs_for_two_steps_by_its_file_name(tmp_path, base, monkeypatch, changed, logged):
    monkeypatch.chdir(EXTENDING.parents[1])
    found = rows(run_stage("online", tmp_path / "run", **settings_of(base, **changed)))
    assert len(found) == 2
    assert all(math.isfinite(row[logged]) for row in found)
    saved = (tmp_path / "run" / "settings.toml").read_text()
    assert "examples/extending/" in saved  # and so it can be run again


@pytest.mark.parametrize("file", sorted(EXTENDING.glob("*.py")), ids=lambda path: path.name)
def test_each_shows_the_line_that_runs_it(tmp_path, base, monkeypatch, file):
    (line,) = re.findall(r"^trimtab online run\.toml (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    monkeypatch.chdir(EXTENDING.parents[1])
    overrides = [a or b for a, b in re.findall(r"'([^']*)'|(\S+)", line)]
    overrides = [re.sub("=128$", "=40", text) for text in overrides]  # the same in less time
    run_file = write_run_file(tmp_path / "run.toml", settings_of(base, num_steps=1))
    result = trimtab("online", run_file, *overrides, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_run_file_on_the_page_is_read(base, monkeypatch, block):
    monkeypatch.chdir(EXTENDING.parents[1])
    values = settings_of(base) | tomllib.loads(block)
    config.resolve(OnlineSettings, values, where="docs/extending.md")


def test_the_page_shows_the_examples_as_they_are():
    shown = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    for file in sorted(EXTENDING.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        assert source[source.index("@dataclass") :].strip() in shown, file.name


def test_a_policy_gradient_variant_takes_fewer_than_forty_lines():
    assert len((EXTENDING / "spo_loss.py").read_text(encoding="utf-8").splitlines()) < 40


def test_spo_is_the_surrogate_less_a_quadratic_price():
    spo = example("policy_loss", "spo_loss.py:SPO")(epsilon=0.2)
    ratio, advantages = torch.tensor([1.5, 0.5, 1.1]), torch.tensor([1.0, -2.0, -1.0])
    batch = SimpleNamespace(old_logprobs=torch.zeros(3), advantages=advantages)
    losses, beyond = spo.token_losses(ratio.log(), batch)
    # by hand: r A - |A| (r - 1)^2 / 0.4: 1.5 - 0.625, -1 - 1.25, -1.1 - 0.025
    torch.testing.assert_close(losses, -torch.tensor([0.875, -2.25, -1.125]))
    assert beyond.tolist() == [True, True, False]


@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_spo_has_no_gradient_exactly_where_the_ratio_has_gone_epsilon_far(advantage):
    spo = example("policy_loss", "spo_loss.py:SPO")(epsilon=0.3)
    ratio = torch.tensor([1 + math.copysign(0.3, advantage)])
    logprobs = ratio.log().requires_grad_()
    batch = SimpleNamespace(old_logprobs=torch.zeros(1), advantages=torch.tensor([advantage]))
    spo.token_losses(logprobs, batch)[0].sum().backward()
    assert float(logprobs.grad) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_spo_gives_the_same_update_for_any_split_order_and_form(changed):
    compare(family_update, example("policy_loss", "spo_loss.py:SPO")(), changed)


def test_the_optimal_baseline_weighs_returns_by_length():
    sequence_ids = torch.tensor([0, 1, 1, 1, 2, 2, 3])
    rewards = torch.tensor([4.0, 0.0, 1.0, 0.0, 0.5, 0.5, 7.0])
    nothing = torch.full((7,), torch.nan)
    episodes = Episodes(rewards, nothing, sequence_ids, torch.tensor([0, 0, 1, 1]), torch.full((4,), torch.nan))
    found = example("advantage", "my_advantage.py:OptimalBaseline")()(episodes)
    # first group: returns 4 and 1 of lengths 1 and 3, so (4 + 3) / 4; second: 1 and 7 of lengths 2 and 1, so 3
    torch.testing.assert_close(found, torch.tensor([2.25, -0.75, -0.75, -0.75, -2.0, -2.0, 4.0]))


@pytest.mark.parametrize(
    ("reply", "length", "finish", "value"),
    [
        ("#### 42", 0, "stop", 2.0),
        ("#### 42", 10, "stop", 1.5),
        ("#### 42", 20, "stop", 1.0),
        ("#### 41", 0, "stop", -10.0),
        ("#### 41", 10, "stop", -5.0),
        ("no idea", 20, "stop", 0.0),
        ("#### 42", 5, "stop", 1.5 + math.sqrt(0.125)),
        ("#### 42", 20, "length", -10.0),
    ],
)
def test_the_cosine_reward_follows_its_curve(reply, length, finish, value):
    prompt = Prompt(messages=(Message("user", "40 + 2?"),), facts={"answer": 42})
    ids = (5,) * length
    rollout = Rollout(
        prompt=prompt, response=reply, prompt_ids=(1,), response_ids=ids, logprobs=(0.0,) * length, finish_reason=finish
    )
    scores, _ = example("reward", "my_reward.py:CosineAnswer")(max_tokens=20).score([rollout])
    assert float(scores[0]) == pytest.approx(value)


def test_the_second_look_asks_once_and_trains_both_replies(tmp_path, base, monkeypatch):
    environment = example("environment", "my_environment.py:SecondLook")()
    state = environment.reset(Prompt(messages=(Message("user", "?"),)), seed=0)
    first = environment.step(state, "one")
    assert (first.text, first.new_turn, first.done) == (environment.request, True, False)
    assert environment.step(state, "two").events == {"changed_replies": 1}
    other = environment.reset(Prompt(messages=(Message("user", "?"),)), seed=0)
    environment.step(other, "same")
    last = environment.step(other, "same")
    assert last.done
    assert json.loads(json.dumps(last.events)) == {"changed_replies": 0}
