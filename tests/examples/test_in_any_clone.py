"""What is shipped runs in any clone: nothing names a file that a reader does not have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import cli
from trimtab.core import config

ROOT = Path(__file__).parents[2]
RUN_FILES = sorted(cli.examples_dir().rglob("*.toml"))
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.stem != "hostile_code"]
SOURCES = {"data", "prompts", "held_out_data", "demonstrations", "rows"}


def values_of(table, key=""):
    """Every (key, text) of a run file."""
    if isinstance(table, dict):
        for name, value in table.items():
            yield from values_of(value, name)
    elif isinstance(table, list):
        for value in table:
            yield from values_of(value, key)
    elif isinstance(table, str):
        yield key, table


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda path: str(path.relative_to(cli.examples_dir())))
def test_data_of_an_example_come_from_a_world_the_hub_or_an_earlier_stage(file):
    for key, value in values_of(config.load_run_file(file)):
        assert ".." not in Path(value).parts, f"{key} = {value!r} lies outside of the clone"
        if key in SOURCES:
            assert re.match(r"(world:|hub:|feedback:|@|\$|runs/)|[\w-]+/[\w.-]+$", value) or (ROOT / value).exists()


@pytest.mark.parametrize("name", ["hh/pipeline.toml", "hh/dpo.toml", "gsm8k/pipeline.toml", "gsm8k/grpo.toml"])
def test_an_example_that_downloads_says_which_file_to_copy_where_there_is_no_network(name):
    text = (cli.examples_dir() / name).read_text(encoding="utf-8")
    assert "hub:" in text
    assert re.search(r"(variables\.rows|data|prompts)=path/to/\w+", text)
    assert "without a network" in text


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_explains_itself(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
