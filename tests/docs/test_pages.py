"""Every command and block of README and docs is one that works as written in a clone."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from trimtab import cli
from trimtab.core import config
from trimtab.stages.pipeline import resolve_stages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
SFT = {"model": "m", "data": "world:helpdesk?num=8"}
GOLD = {"rewards": [{"name": "gold", "world": "helpdesk"}]}
# The stage whose settings a page's blocks are, with what a block leaves to the reader.
STAGE_OF = {
    "algorithms/objectives.md": ("online", {"group_size": 4, "advantage": "grpo"}),
    "algorithms/online.md": ("online", GOLD | {"group_size": 4}),
    "algorithms/preference.md": ("preference", {}),
    "algorithms/reward-models.md": ("reward", {}),
    "algorithms/selection.md": ("select", GOLD | {"num_replies": 4}),
    "algorithms/tools.md": ("online", GOLD | {"group_size": 4, "advantage": "grpo"}),
    "extending.md": ("online", GOLD | {"group_size": 4, "advantage": "grpo"}),
    "rewards.md": ("online", {"group_size": 4, "advantage": "grpo"}),
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(str(path.relative_to(ROOT)).removeprefix("docs/"), line, match[1], match[2]))
    return found


def commands() -> list:
    """Every command that a page shows behind "$", and every trimtab command in the head of a run file."""
    found = []
    for block in blocks():
        lines = block.text.splitlines() if block.language == "console" else []
        found += [(str(block), line[2:]) for line in lines if line.startswith("$ ")]
    for path in EXAMPLES:
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"# +(trimtab .*?)(?:   .*)?$", line):
                found.append((str(path.relative_to(ROOT)), match[1]))
    simple = [(where, part) for where, line in found for part in re.split(r"&&", line)]
    return [pytest.param(part.strip(), id=f"{where}: {part.strip()[:60]}") for where, part in simple]


def of(language: str) -> list:
    return [pytest.param(block, id=str(block)) for block in blocks() if block.language == language]


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_that_this_checkout_has(command, tmp_path):
    words = shlex.split(command, comments=True)
    while "=" in words[0] or words[0] == "sudo":
        words = words[1:]
    program, *arguments = words
    if program == "trimtab":
        check_trimtab(arguments, tmp_path)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", MAKEFILE, re.MULTILINE)
        for variable in (a.partition("=")[0] for a in arguments[1:]):
            assert f"$({variable})" in MAKEFILE
    elif program == "pytest":
        paths = [a for a in arguments if a.startswith("tests")]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
    elif program == "python":
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        for flag in (a for a in arguments[1:] if a.startswith("--")):
            assert f'"{flag}"' in script
    elif program == "pip":
        named = {e for a in arguments for e in re.findall(r"\.\[([\w,]+)\]", a)}
        assert named, "a clone is installed by '.[EXTRA]': no index has the package"
        assert named <= EXTRAS.keys()
    else:
        assert program == ".", f"who runs {program}?"
        assert arguments == [".venv/bin/activate"]


def check_trimtab(arguments: list[str], tmp_path: Path) -> None:
    """Parses the command as click does, without running it, and resolves the settings of a shipped run file."""
    command: click.Command = cli.main
    context = click.Context(cli.main, info_name="trimtab")
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None, f"no command {name}"
        command = found
        context = click.Context(command, info_name=name, parent=context)
    parsed = command.make_context(context.info_name, list(arguments), parent=context.parent).params
    file = parsed.get("run_file")
    if file is None or not str(file).startswith("examples/"):
        return
    values = config.apply_overrides(config.load_run_file(ROOT / file), parsed["overrides"])
    if "stages" not in values:
        values = {"stages": {"shown": values | {"stage": context.info_name}}}
    resolve_stages(values, tmp_path, where=str(file))


@pytest.mark.parametrize("block", of("toml"))
def test_a_block_of_settings_is_valid(block, tmp_path):
    values = tomllib.loads(block.text)
    if match := re.search(r"trimtab (sft|reward|online|preference|select|steps) \S+\.toml", block.text):
        stage, filled = match[1], {}
    elif block.page in STAGE_OF:
        stage, filled = STAGE_OF[block.page]
    else:
        pytest.skip("the settings of the annotation app; tests/feedback reads them")
    if "stages" in values:
        earlier = {"sft": {"stage": "sft"} | SFT, "reward": {"stage": "reward"} | SFT}
        resolve_stages({"stages": earlier | values["stages"]}, tmp_path, where=str(block))
        return
    known = {"model": "m", "prompts" if stage in ("online", "select") else "data": "world:helpdesk?num=8"}
    resolve_stages({"stages": {"shown": {"stage": stage} | known | filled | values}}, tmp_path, where=str(block))


@pytest.mark.parametrize("block", of("python"))
def test_a_block_of_python_is_python(block):
    ast.parse(block.text)


@pytest.mark.parametrize("block", of("json"))
def test_a_block_of_json_is_json_lines(block):
    for line in filter(None, block.text.splitlines()):
        json.loads(line)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_in_backticks_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_readme_says_how_to_call_trimtab_after_make_install():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ". .venv/bin/activate" in readme
    assert ".venv/bin/trimtab" in readme
