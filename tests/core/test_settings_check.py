"""A mistake in a run file is answered before torch is imported, in the words of `config.resolve`."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.test_foreign_keys import REQUIRED
from trimtab.core import config, registry, settings_check
from trimtab.core.errors import ConfigError

WRONG = [
    ("sft", {"num_epoch": 1, "batch_size": "many", "optimizer": {"learning_rat": 1}}),
    ("sft", {"optimizer": 3, "adapter": {"rang": 2}, "shuffle": "yes"}),
    ("online", {"advantage": "grop", "loss": {"clip_hihg": 1}, "rewards": ["lenght", {"name": "length"}, 3]}),
    ("online", {"critic": {"init": "x", "optimizer": {"beta1": "a"}}, "kl": {"name": "adaptive", "coeff": 1}}),
    ("preference", {"loss": {"name": "kto", "clip": 1}, "trackers": "wandb"}),
    ("evaluate", {"sampling": {"stop": "end", "top_k": 1.5}, "on_bad_row": "keep"}),
    ("reward", {"loss": {"label_smoothing": "a"}, "precision": "fp16"}),
    ("online", {"foo": 1, "loss": {"name": ["ppo"]}}),
]


@pytest.mark.parametrize(("stage", "changed"), WRONG)
def test_mistakes_are_those_that_the_stage_itself_would_find(stage: str, changed: dict):
    module = registry.modules("stage")[stage]
    values = REQUIRED[stage] | changed
    with pytest.raises(ConfigError) as early:
        settings_check.check({"": (module, values)}, where="run.toml")
    with pytest.raises(ConfigError) as late:
        config.resolve(registry.descriptor("stage", stage).settings, values, where="run.toml")
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("stage", REQUIRED)
def test_what_may_be_set_is_not_refused(stage: str):
    values = REQUIRED[stage] | ({"sampling": {"top_p": 0.9}} if stage in ("online", "select", "evaluate") else {})
    settings_check.check({"": (registry.modules("stage")[stage], values)}, where="run.toml")
    settings = config.resolve(registry.descriptor("stage", stage).settings, values, where="run.toml")
    dumped = config.dump(settings)
    settings_check.check({"": (registry.modules("stage")[stage], dumped)}, where="run.toml")


def test_a_class_of_the_users_own_is_left_to_the_stage():
    values = REQUIRED["online"] | {"rewards": [{"name": "mine.py:Brief", "anything": 1}], "loss": "mine.py:Loss"}
    settings_check.check({"": (registry.modules("stage")["online"], values)}, where="run.toml")


def test_a_typo_is_answered_without_torch_and_in_less_than_a_second_of_processor_time(tmp_path: Path):
    (tmp_path / "sft.toml").write_text('model = "m"\ndata = "d.jsonl"\n')
    code = """
import sys
from trimtab.cli import main
try:
    main(["sft", "sft.toml", "lr=1"])
except SystemExit as stop:
    assert stop.code == 2, stop.code
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "did you mean optimizer.learning_rate?" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rate", "1e-4"], "write optimizer.learning_rate=1e-4, without dashes"),
        (["--lr=1e-4"], "write optimizer.learning_rate=1e-4, without dashes"),
        (["--num_epochs", "2"], "write num_epochs=2, without dashes"),
        (["--bf16"], "write precision="),
        (["--nonsense", "2"], "settings are written key=value"),
    ],
)
def test_an_option_that_is_a_setting_is_answered_with_the_key(words: list[str], said: str, tmp_path: Path):
    from tests.stages.commands import trimtab

    result = trimtab("sft", tmp_path / "sft.toml", *words)
    assert result.exit_code == 2
    assert said in result.output
