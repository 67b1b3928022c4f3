"""Run files are read strictly, refused in one message, and survive being written out again."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core import config
from trimtab.core.config import Choice
from trimtab.core.errors import ConfigError
from trimtab.core.registry import register


@register("flavour", "plain")
@dataclass(frozen=True, kw_only=True)
class Plain:
    strength: float = 1.0


@register("flavour", "clipped")
@dataclass(frozen=True, kw_only=True)
class Clipped:
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if self.clip_low > self.clip_high:
            raise ValueError(f"clip_low = {self.clip_low} is above clip_high = {self.clip_high}")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    max_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Path
    num_steps: int = 10
    note: str = ""
    packed: bool = True
    max_length: int | None = None
    target: float | None = 6.0
    schedule: Literal["constant", "linear"] = "constant"
    stops: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Annotated[Any, Choice("flavour")] = field(default_factory=Clipped)
    rewards: Annotated[tuple[Any, ...], Choice("flavour")] = ()
    guard: Annotated[Any, Choice("flavour")] | None = None
    critic: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=9e-6, max_norm=1.0))
    leash: Annotated[Any, Choice("flavour")] = field(default_factory=lambda: Plain(strength=0.05))


def resolve(values: dict[str, Any]) -> Settings:
    return config.resolve(Settings, {"model": "m", **values}, where="run.toml")


def mistakes(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    return caught.value.problem


def test_what_is_not_given_has_its_default():
    assert resolve({}) == Settings(model=Path("m"))


def test_tables_lists_and_choices_become_their_classes():
    settings = resolve(
        {
            "optimizer": {"learning_rate": 3, "betas": [0, 0.5]},
            "loss": "plain",
            "rewards": ["plain", {"name": "clipped", "clip_high": 0.3}],
            "guard": {"name": "plain", "strength": 2.0},
            "max_length": 5,
        }
    )
    assert settings.optimizer == Optimizer(learning_rate=3.0, betas=(0.0, 0.5))
    assert isinstance(settings.optimizer.learning_rate, float)
    assert settings.loss == Plain()
    assert settings.rewards == (Plain(), Clipped(clip_high=0.3))
    assert settings.guard == Plain(strength=2.0)
    assert settings.max_length == 5


def test_a_choice_without_a_name_sets_fields_of_the_default():
    assert resolve({"loss": {"clip_high": 0.28}}).loss == Clipped(clip_high=0.28)


def test_a_table_that_says_some_keys_leaves_the_others_as_the_field_has_them():
    settings = resolve({"critic": {"warmup_steps": 3}, "leash": {"name": "plain"}})
    assert settings.critic == Optimizer(learning_rate=9e-6, max_norm=1.0, warmup_steps=3)
    assert settings.leash == Plain(strength=0.05)
    assert resolve({"leash": "clipped"}).leash == Clipped()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_steps", "3"),
        ("num_steps", 1.5),
        ("num_steps", 1.0),
        ("num_steps", True),
        ("num_steps", None),
        ("target", True),
        ("target", "6"),
        ("note", 3),
        ("model", 3),
        ("packed", 1),
        ("packed", "true"),
        ("max_length", "5"),
        ("schedule", "cosine"),
        ("stops", "end"),
        ("stops", ["end", 1]),
        ("weights", {"a": "b"}),
        ("weights", [1.0]),
        ("optimizer", 3),
        ("loss", 3),
        ("rewards", "plain"),
        ("note", tomllib.loads("d = 2020-01-01")["d"]),
    ],
)
def test_a_value_of_another_type_is_refused_under_its_key(key: str, value: Any):
    assert mistakes({key: value}).startswith(f"{key}: ")


def test_every_mistake_is_in_the_one_message():
    problem = mistakes(
        {
            "num_step": 3,
            "note": 3,
            "optimizer": {"betas": [0.9], "lerning_rate": 0.1},
            "loss": {"name": "cliped"},
            "rewards": [{"name": "plain", "strength": "x"}, {}],
            "guard": {"name": "clipped", "clip_low": 0.5},
        }
    )
    for part in [
        "num_step: unknown key; did you mean num_steps?",
        "note: should be a valid string, not 3",
        "optimizer.betas: ",
        "optimizer.lerning_rate: unknown key; did you mean optimizer.learning_rate?",
        "loss: no flavour is called 'cliped'; did you mean 'clipped'?",
        "rewards.0.strength: should be a valid number, not 'x'",
        "rewards.1: no name is given; known names: clipped, plain",
        "guard: clip_low = 0.5 is above clip_high = 0.2",
    ]:
        assert part in problem
    assert problem.startswith("8 mistakes:")


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match="model: missing, and it has no default"):
        config.resolve(Settings, {}, where="run.toml")


def test_several_tables_are_refused_together_by_their_paths_in_the_file():
    with pytest.raises(ConfigError) as caught:
        config.resolve_tables(
            {"stages.a": Optimizer, "stages.b": Clipped},
            {"stages.a": {"warmup_step": 1}, "stages.b": {"clip_low": 1}},
            where="pipeline.toml",
        )
    assert "stages.a.warmup_step: unknown key; did you mean stages.a.warmup_steps?" in caught.value.problem
    assert "stages.b: clip_low = 1.0 is above clip_high = 0.2" in caught.value.problem


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("clip_high=0.28", "loss.clip_high"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "optimizer.learning_rate"),
        ("loss.clip_hihg=0.28", "loss.clip_high"),
        ("optimizer.warmup=3", "optimizer.warmup_steps"),
    ],
)
def test_a_wrong_override_is_answered_with_the_full_path_of_the_right_one(override: str, nearest: str):
    assert f"did you mean {nearest}?" in mistakes(config.apply_overrides({}, [override]))


def test_overrides_are_toml_values_or_else_plain_text():
    values = config.apply_overrides(
        {"loss": "clipped", "rewards": [{"name": "plain"}], "optimizer": {"warmup_steps": 1}},
        [
            "loss.clip_high=0.28",
            "rewards.0.strength=2",
            "optimizer.betas=[0.5, 0.6]",
            "model=runs/sft/model",
            "note=2020-01-01",
            'stops=["a=b"]',
            "packed=false",
            "target=none",
        ],
    )
    settings = config.resolve(Settings, values, where="")
    assert settings == Settings(
        model=Path("runs/sft/model"),
        note="2020-01-01",
        stops=("a=b",),
        packed=False,
        target=None,
        optimizer=Optimizer(betas=(0.5, 0.6), warmup_steps=1),
        loss=Clipped(clip_high=0.28),
        rewards=(Plain(strength=2.0),),
    )


def test_an_override_may_add_to_a_list_and_quote_a_key():
    values = config.apply_overrides(
        {"rewards": [{"name": "plain"}]}, ['rewards.1={name = "plain"}', 'stages."v1.0".seed=1', "stages.a-b.seed=2"]
    )
    assert values == {"rewards": [{"name": "plain"}] * 2, "stages": {"v1.0": {"seed": 1}, "a-b": {"seed": 2}}}


def test_overrides_leave_the_values_they_are_given_alone():
    values = {"optimizer": {"warmup_steps": 1}, "rewards": [{"name": "plain"}]}
    config.apply_overrides(values, ["optimizer.warmup_steps=2", "rewards.0.name=clipped"])
    assert values == {"optimizer": {"warmup_steps": 1}, "rewards": [{"name": "plain"}]}


def test_overrides_that_fit_nowhere_are_all_named():
    with pytest.raises(ConfigError) as caught:
        config.apply_overrides({"n": 3, "rewards": ["plain"]}, ["novalue", "=3", "n.a=1", "rewards.1.strength=2"])
    for part in ["'novalue' is not", "'=3' is not", "n is the value 3, not a table", "rewards is a list of 1"]:
        assert part in caught.value.problem


def test_a_run_file_that_is_not_there_is_answered_with_near_ones(tmp_path: Path):
    (tmp_path / "online.toml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*online\.toml"):
        config.load_run_file(tmp_path / "onlin.toml")
    with pytest.raises(ConfigError, match="there is no directory"):
        config.load_run_file(tmp_path / "nowhere" / "online.toml")
    with pytest.raises(ConfigError, match="a run file comes first and settings of the form key=value after it"):
        config.load_run_file("model=runs/base/model")


def test_a_run_file_that_is_not_toml_is_refused_with_the_line(tmp_path: Path):
    (tmp_path / "broken.toml").write_text("a = 1\nb = = 2\n")
    with pytest.raises(ConfigError, match="line 2"):
        config.load_run_file(tmp_path / "broken.toml")


floats = st.floats(allow_nan=False, allow_infinity=False)
flavours = st.one_of(
    st.builds(Plain, strength=floats), st.builds(Clipped, clip_low=st.floats(0, 1), clip_high=st.floats(1, 2))
)
settings_ = st.builds(
    Settings,
    model=st.just(Path("a/b")),
    note=st.text(),
    max_length=st.none() | st.integers(),
    target=st.none() | floats | st.just(math.inf),
    schedule=st.sampled_from(["constant", "linear"]),
    stops=st.lists(st.text(), max_size=3).map(tuple),
    weights=st.dictionaries(st.text(max_size=5), floats, max_size=3),
    optimizer=st.builds(Optimizer, learning_rate=floats, betas=st.tuples(floats, floats)),
    loss=flavours,
    rewards=st.lists(flavours, max_size=3).map(tuple),
    guard=st.none() | flavours,
    critic=st.builds(Optimizer, learning_rate=floats, max_norm=st.none() | floats),
    leash=flavours,
)


@given(settings_)
@hypothesis.settings(max_examples=50)
def test_settings_written_out_as_toml_are_the_same_settings_when_read(settings: Settings):
    text = config.to_toml(config.dump(settings))
    assert config.resolve(Settings, tomllib.loads(text), where="") == settings


toml_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), toml_values, max_size=4))
def test_what_the_toml_writer_writes_the_standard_reader_reads(values: dict[str, Any]):
    assert tomllib.loads(config.to_toml(values)) == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = 1\npacked = True\n", ["line 2: packed = True", "write packed = true"]),
        ("model = runs/base/model\n", ["line 1: model = runs/base/model", 'model = "runs/base/model"']),
        ("limit = None\n", ["line 1: limit = None", '"none"']),
        ("model: runs/base\n", ["line 1: model: runs/base", "write key = value"]),
        ("a = 1\na = 2\n", ["not TOML"]),
        ('a = "open\n', ['line 1: a = "open']),
        ("stops = [1,\n", ["not TOML"]),
    ],
)
def test_a_line_that_is_not_toml_is_quoted_with_what_is_meant(tmp_path: Path, text: str, said: list[str]):
    (tmp_path / "broken.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load_run_file(tmp_path / "broken.toml")
    for words in said:
        assert words in str(caught.value)


def test_a_byte_order_mark_before_a_run_file_is_no_part_of_it(tmp_path: Path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert config.load_run_file(tmp_path / "run.toml") == {"a": 1}


def test_true_as_python_writes_it_is_answered_with_ours():
    assert "write true" in mistakes({"packed": "True"})
