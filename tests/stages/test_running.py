"""The Python of docs/running.md runs as it is written, and so do the settings of its run file."""

import re
import shutil
import tomllib
from pathlib import Path

import trimtab
from tests.stages.commands import summary
from trimtab.core import config, registry, settings_check
from trimtab.runs.resume import HOW

GROWS = [key for name in registry.modules("stage") for key in registry.descriptor("stage", name).grows]
PAGE = (Path(trimtab.__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_python_block_trains(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "runs" / "base" / "model")
    (block,) = blocks("python")
    exec(block, {})
    assert summary(tmp_path / "runs" / "from_python")["num_steps"] == 8


def test_the_run_files_are_valid():
    """One is whole and for evaluate; the others are what a run file of online may hold besides."""
    rest = {"model": "m", "prompts": "p", "rewards": [{"name": "gold", "world": "arithmetic"}]}
    for text in blocks("toml"):
        values = tomllib.loads(text)
        stage, values = ("evaluate", values) if "model" in values else ("online", rest | values)
        settings_check.check({"": (registry.modules("stage")[stage], values)}, where="docs/running.md")
        config.resolve(registry.descriptor("stage", stage).settings, values, where="docs/running.md")


def test_the_page_names_what_may_change():
    for key in HOW - {"engine"} | set(GROWS):
        assert f"`{key}`" in PAGE, key
