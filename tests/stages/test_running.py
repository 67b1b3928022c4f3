"""The Python of docs/running.md runs as it is written, and so do the settings of its run file."""

import re
import shutil
import tomllib
from pathlib import Path

import trimtab
from tests.stages.commands import summary
from trimtab.core import registry, settings_check
from trimtab.runs.resume import HOW

GROWS = [key for name in registry.modules("stage") for key in registry.descriptor("stage", name).grows]
PAGE = (Path(trimtab.__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_python_block_trains(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "runs" / "base" / "model")
    exec(block("python"), {})
    assert summary(tmp_path / "runs" / "from_python")["num_steps"] == 8


def test_the_run_file_is_one_of_evaluate():
    settings_check.check(
        {"": (registry.modules("stage")["evaluate"], tomllib.loads(block("toml")))}, where="docs/running.md"
    )


def test_the_page_names_what_may_change():
    for key in HOW - {"engine"} | set(GROWS):
        assert f"`{key}`" in PAGE, key
