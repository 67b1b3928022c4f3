"""Nothing absurd is accepted: every number that a run file may set has a range, and is refused outside of it."""

from __future__ import annotations

import math

import pytest

from trimtab.core import bounds, config, registry, settings_check
from trimtab.core.bounds import RANGES, Range, out_of_range
from trimtab.core.errors import ConfigError
from trimtab.core.settings_help import settings_help

SFT = {"model": "m", "data": "d.jsonl"}
ONLINE = {"model": "m", "prompts": "p.jsonl", "rewards": ["gold"]}


def numbers() -> dict[str, str]:
    """Key path to type, of every number of every stage and of every class that a run file can name."""
    found = {}
    for module in registry.modules("stage").values():
        for line, _ in settings_help(module):
            key, _, rest = line.partition(": ")
            kind = rest.partition(" = ")[0].partition(",")[0]
            if kind.removesuffix(" | None") in ("int", "float"):
                found[key] = kind
    return found


@pytest.mark.parametrize("key", sorted(numbers()))
def test_every_number_has_a_range(key: str):
    names = [key.rpartition(".")[2], ".".join(key.split(".")[-2:])]
    assert any(name in RANGES for name in names), f"{key}: say in trimtab.core.bounds what it may be"


def test_every_range_is_that_of_a_number():
    known = {part for key in numbers() for part in (key.rpartition(".")[2], ".".join(key.split(".")[-2:]))}
    assert set(RANGES) - known == {"base_bits"}  # one of three values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limit", -5),
        ("limit", 0),
        ("token_budget", 0),
        ("num_epochs", 0),
        ("num_epochs", 1e308),
        ("batch_size", 0),
        ("checkpoint_every", 0),
        ("max_steps", 0),
        ("max_tokens", -1),
        ("held_out", 1.0),
        ("validate_every", -1),
        ("seed", -1),
        ("optimizer.weight_decay", -1),
        ("optimizer.beta1", 2),
        ("optimizer.beta2", 1),
        ("optimizer.eps", -1e-8),
        ("optimizer.learning_rate", math.nan),
        ("optimizer.learning_rate", math.inf),
        ("optimizer.learning_rate", 5),
        ("optimizer.eps", 1e300),
        ("seed", 10**400),
        ("max_tokens", 2**63),
        ("adapter.rank", 0),
        ("adapter.rank", 100_000),
    ],
)
def test_an_absurd_number_is_refused_in_a_run_file_of_sft(key: str, value: float):
    problems = settings_check.mistakes("trimtab.stages.sft", nested(SFT, key, value), "")
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}: {key.rpartition('.')[2]} = ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("entropy_coef", -1),
        ("stop_kl", -1),
        ("sampling.max_prompt_tokens", 0),
        ("kl.coef", -0.1),
        ("critic.warmup_steps", -1),
        ("pretraining_mix.batch_size", 0),
        ("shaping.clip", 0),
        ("advantage.gamma", 1.5),
        ("episodes.max_turns", 0),
        ("sample_every", -1),
        ("sampling.temperature", 1e-30),
        ("sampling.temperature", 1e30),
    ],
)
def test_an_absurd_number_is_refused_in_a_run_file_of_online(key: str, value: float):
    values = nested(ONLINE | {"rewards": [{"name": "gold", "world": "arithmetic"}]}, key, value)
    if key.startswith("pretraining_mix"):
        values["pretraining_mix"]["data"] = "d.jsonl"
    problems = settings_check.mistakes("trimtab.stages.online", values, "")
    assert [problem.partition(":")[0] for problem in problems] == [key]


def nested(values: dict, key: str, value: float) -> dict:
    head, _, rest = key.partition(".")
    return values | {head: nested({}, rest, value) if rest else value}


def test_settings_made_in_python_are_checked_when_they_are_written_down():
    from trimtab.stages.sft import SFTSettings

    for wrong in ({"batch_size": "8"}, {"batch_size": 0}, {"num_epochs": -1.0}, {"train_on": "everything"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            config.dump(SFTSettings(**SFT, **wrong))
    assert config.dump(SFTSettings(**SFT))["batch_size"] == 32


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(0, 1, high_open=True), [0, 0.5], [-0.1, 1, math.nan, math.inf]),
        (Range(0, low_open=True), [1e-9, 10], [0, -1, math.inf]),
        (Range(0, low_open=True, infinite=True), [1, math.inf], [0, -math.inf, math.nan]),
    ],
)
def test_a_range_holds_what_lies_in_it(allowed: Range, inside: list[float], outside: list[float]):
    assert all(map(allowed.holds, inside))
    assert not any(map(allowed.holds, outside))


def test_what_is_no_number_has_no_range():
    assert out_of_range("batch_size", None) == out_of_range("limit", True) == out_of_range("limit", "5") == ""
    assert bounds.RANGES["gamma"] != bounds.RANGES["advantage.gamma"]


def test_settings_out_of_range_are_refused_when_they_are_made_in_python():
    from trimtab.math.advantages import GAE
    from trimtab.math.losses.policy import PPO

    with pytest.raises(ValueError, match=r"dual_clip = 1; it must be above 1"):
        PPO(dual_clip=1)
    with pytest.raises(ValueError, match=r"gamma = 1\.5; it must be at least 0 and at most 1"):
        GAE(gamma=1.5)
    assert PPO(dual_clip=None).dual_clip is None
