"""The command line: quick, light, and with a readable answer to every mistake."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from trimtab import cli
from trimtab.cli.helpers import same_command, starter
from trimtab.core import config, registry, settings_check
from trimtab.core.errors import EXTRAS, DataError, Interrupted
from trimtab.core.settings_help import registered, settings_help
from trimtab.runs.run import Run
from trimtab.stages.stage import Stage

COMMAND = [sys.executable, "-c", "from trimtab.cli import main; main()"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [*map(str, arguments)], prog_name="trimtab")


@dataclass(frozen=True, kw_only=True)
class Settings:
    num_steps: int = 3
    """How many."""


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stage `probe` in the command table, which notes its settings."""

    def run(settings: Settings, run: Run) -> None:
        module.seen.append((settings, run.directory))
        run.log(1, {"loss/train": 1.0})
        run.finish({"num_steps": settings.num_steps})

    module = types.ModuleType("probe_stage")
    module.seen, module.Settings, module.run = [], Settings, run
    module.STAGE = Stage(settings=Settings, run=lambda settings, opened: module.run(settings, opened))
    monkeypatch.setitem(sys.modules, "probe_stage", module)
    monkeypatch.setitem(registry.modules("stage"), "probe", "probe_stage")
    monkeypatch.setattr(cli.helpers, "summary_of", lambda _module: "A probe.")
    monkeypatch.setattr(settings_check, "check", lambda *_, **__: None)  # it reads the source of this package only
    commands = {**cli.main.commands, "probe": cli.stage_command("probe")}
    monkeypatch.setattr(cli.main, "commands", commands)
    return module


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "probe.toml"
    path.write_text("num_steps = 5\n")
    return path


def test_help_answers_in_less_than_three_tenths_of_a_second():
    def seconds() -> float:  # of the processor, so that other work on the machine does not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Two processes on one core slow each other by more than a third, so one of many undisturbed starts is looked for.
    assert any(seconds() < 0.3 for _ in range(30))


@pytest.mark.parametrize("arguments", [["--help"], ["online", "--help"], ["data", "show", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]):
    code = f"""
import sys
from trimtab.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "transformers", "datasets", "pydantic", "rich", "jinja2", "numpy", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_command_has_a_line_of_help():
    for name, command in cli.main.commands.items():
        assert command.get_short_help_str(), name
        assert name in invoke("--help").output


@pytest.mark.parametrize("name", registry.modules("stage"))
def test_the_help_of_a_stage_lists_every_setting_with_its_default(name: str):
    module = registry.modules("stage")[name]
    listed = {line.replace(",", " ").replace(":", " ").split()[0]: line for line, _ in settings_help(module)}
    settings = registry.descriptor("stage", name).settings
    assert set(config._key_paths(settings, {}, "")) <= set(listed)
    for field in config._fields(settings):
        if isinstance(field.default, int | float | str | None):
            assert listed[field.name].endswith(f" = {field.default!r}")
    assert all(doc for _, doc in settings_help(module))


@pytest.mark.parametrize("kind", registry._HOMES)
def test_the_names_found_in_the_source_are_those_registered(kind: str):
    # Other tests register classes of their own; the package's are what counts here.
    known = {n for n in registry.names(kind) if registry.find(kind, n, where="").__module__.startswith("trimtab.")}
    assert set(registered(kind)) == known


def test_a_stage_gets_the_settings_of_file_and_overrides(stage: types.ModuleType, run_file: Path, tmp_path: Path):
    result = invoke("probe", run_file, "num_steps=7", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert stage.seen == [(Settings(num_steps=7), tmp_path / "out")]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {"num_steps": 7}
    assert f"report: {tmp_path / 'out' / 'report.html'}" in result.output
    assert (tmp_path / "out" / "report.html").exists()


def test_a_run_directory_is_named_after_the_file_unless_told(
    stage: types.ModuleType, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert invoke("probe", run_file).exit_code == 0
    assert stage.seen[0][1] == Path("runs/probe")


def test_a_finished_run_is_left_alone_and_fresh_begins_it_again(
    stage: types.ModuleType, run_file: Path, tmp_path: Path
):
    invoke("probe", run_file, "--out", tmp_path / "out")
    assert "is finished" in invoke("probe", run_file, "--out", tmp_path / "out").output
    assert len(stage.seen) == 1
    assert invoke("probe", run_file, "num_steps=9", "--out", tmp_path / "out").exit_code == 2
    assert invoke("probe", run_file, "num_steps=9", "--out", tmp_path / "out", "--fresh").exit_code == 0
    assert [settings.num_steps for settings, _ in stage.seen] == [5, 9]


def test_the_settings_of_a_run_can_be_run_again(stage: types.ModuleType, run_file: Path, tmp_path: Path):
    invoke("probe", run_file, "num_steps=7", "--out", tmp_path / "out")
    again = invoke("probe", tmp_path / "out" / "settings.toml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert stage.seen[1][0] == stage.seen[0][0]
    other = invoke("sft", tmp_path / "out" / "settings.toml")
    assert other.exit_code == 2
    assert "use trimtab probe" in other.stderr


def test_a_mistake_is_a_message_on_stderr_and_exit_code_2(stage: types.ModuleType, run_file: Path):
    result = invoke("probe", run_file, "num_step=3")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "num_step: unknown key; did you mean num_steps?" in result.stderr
    assert f"{run_file} num_step=3" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_run_file_is_answered_with_near_ones(stage: types.ModuleType, run_file: Path):
    result = invoke("probe", run_file.with_name("prob.toml"))
    assert result.exit_code == 2
    assert f"did you mean {run_file}?" in result.stderr


def test_a_misspelt_command_is_answered_with_the_nearest():
    result = invoke("onlin", "run.toml")
    assert result.exit_code == 2
    assert "did you mean 'online'?" in result.stderr


def test_an_error_of_a_stage_is_a_message_too(stage: types.ModuleType, run_file: Path, tmp_path: Path):
    def run(settings: Settings, run: Run) -> None:
        raise DataError("a row without a prompt", where="a.jsonl, row 3", fix="add it")

    stage.run = run
    result = invoke("probe", run_file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "error: a row without a prompt\n  where: a.jsonl, row 3\n  fix:   add it\n"


def test_an_interrupted_stage_says_the_command_that_goes_on(
    stage: types.ModuleType, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(settings: Settings, run: Run) -> None:
        raise Interrupted("stopped at step 3")

    stage.run = run
    monkeypatch.setattr(sys, "argv", ["trimtab", "probe", "a run.toml", "--fresh", "--out", "x"])
    result = invoke("probe", run_file, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "stopped at step 3\nto go on: trimtab probe 'a run.toml' --out x\n"


SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
SRUN |= {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2"}


@pytest.mark.parametrize(
    "words",
    [
        *("generate --model m --prompt a", "score --model m --data d", "card m d", "chat --model m"),
        *("export --model m --out o", "average o m m", "world helpdesk --rows 1 --out o", "report o"),
        *("data show d --model m", "eval verdicts v", "feedback serve p.toml"),
    ],
)
def test_a_command_of_one_process_is_refused_in_several(words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    result = invoke(*words.split())
    assert result.exit_code == 2
    assert f"trimtab {words.split()[0]} runs in one process, and srun has started 4" in result.stderr
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert "runs in one process" not in invoke(words.split()[0], "--help").output


def test_commands_that_several_processes_run_say_who_started_them(monkeypatch: pytest.MonkeyPatch):
    commands = ("quickstart", "run", "plan", "check", "online", "evaluate")
    assert [starter(name, cli.main.commands[name]) for name in commands] == [None] * len(commands)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert [starter(name, cli.main.commands[name]) for name in commands] == ["srun"] * len(commands)


def test_what_torchrun_or_srun_started_is_started_by_it_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["trimtab", "online", "a.toml", "--fresh"])
    assert same_command(None) == "trimtab online a.toml"
    assert same_command("srun") == "start the same srun command again, without --fresh"
    monkeypatch.setattr(sys, "argv", ["trimtab", "online", "a.toml"])
    assert same_command("torchrun") == "start the same torchrun command again"


def test_the_shipped_examples_are_found():
    assert (cli.examples_dir() / "quickstart" / "pipeline.toml").is_file()


def test_world_writes_sets_that_data_of_any_tool_can_be(tmp_path: Path):
    result = invoke("world", "arithmetic", "--rows", 20, "--out", tmp_path, "--seed", 3)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "train" / "demonstrations.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert all("messages" in json.loads(line) for line in lines)
    assert invoke("world", "arithmetics", "--rows", 20, "--out", tmp_path).exit_code == 2


def test_report_refuses_what_is_no_run(tmp_path: Path):
    result = invoke("report", tmp_path)
    assert result.exit_code == 2
    assert isinstance(cli.main, click.Group)


@pytest.mark.parametrize("command", [["chat", "--model", "x"], ["quickstart", "--out", "out"]])
def test_without_torch_a_command_that_trains_says_what_to_install(command: list[str], tmp_path: Path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import trimtab.cli; trimtab.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'trimtab[train]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("tokenizers", "train", ["chat", "--model", "x"]),
        ("datasets", "train", ["data", "show", "hub:a/b", "--model", "x"]),
        ("peft", "train", ["probe"]),
        ("pyarrow", "feedback", ["feedback", "serve", "p.toml"]),
        ("bitsandbytes", "quantized", ["probe"]),
    ],
)
def test_a_missing_library_is_answered_with_the_command_that_installs_it(module: str, extra: str, command: list[str]):
    @click.group(cls=cli.Commands)
    def group() -> None: ...

    @group.command(command[0], context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def fail(words: tuple[str, ...]) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    result = CliRunner().invoke(group, command)
    assert result.exit_code == 2
    assert f"needs {module}, which is not installed" in result.stderr
    assert f"pip install 'trimtab[{extra}]'" in result.stderr
    assert f"pip install '{Path(__file__).parents[1]}[{extra}]'" in result.stderr


def test_every_extra_brings_the_modules_that_are_asked_for():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        named = {re.match(r"[\w-]+", line)[0].replace("-", "_").removesuffix("_py") for line in extras[extra]}
        assert set(modules) == named, extra


def test_a_module_that_no_extra_brings_is_a_bug_and_travels_on():
    @click.group(cls=cli.Commands)
    def group() -> None: ...

    @group.command()
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'nonesuch'", name="nonesuch")

    assert isinstance(CliRunner().invoke(group, ["fail"]).exception, ModuleNotFoundError)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_without_checkpoints_that_is_stopped_says_what_is_kept(
    stage: types.ModuleType, run_file: Path, tmp_path: Path, sent: signal.Signals
):
    def run(settings: Settings, run: Run) -> None:
        os.kill(os.getpid(), sent)
        time.sleep(10)

    stage.run = run
    # A shell starts what it puts into the background with SIGINT ignored; these tests may have been started so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = invoke("probe", run_file, "--out", tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 128 + sent
    assert f"stopped at once; nothing of {tmp_path / 'out'} was saved yet: this stage begins again" in result.stderr
    assert "to go on: trimtab" in result.stderr
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stage_tells_its_figures_at_the_end(stage: types.ModuleType, run_file: Path, tmp_path: Path):
    result = invoke("probe", run_file, "--out", tmp_path / "out")
    assert "Training loss is 1." in result.output


def test_a_pipeline_given_to_a_stage_is_sent_to_run(stage: types.ModuleType, run_file: Path):
    run_file.write_text("[stages.a]\nstage = 'sft'\n")
    assert f"use trimtab run {run_file}" in invoke("probe", run_file).stderr


def test_the_page_of_a_run_goes_where_it_is_asked(stage: types.ModuleType, run_file: Path, tmp_path: Path):
    invoke("probe", run_file, "--out", tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    assert invoke("report", tmp_path / "out", "--out", tmp_path / "pages" / "p.html").exit_code == 0
    assert (tmp_path / "pages" / "p.html").exists()
    assert not (tmp_path / "out" / "report.html").exists()
