"""The command table. A stage is imported only when it is chosen, and nothing heavy is ever imported for help."""

from __future__ import annotations

import difflib
import importlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

import trimtab
from trimtab.errors import (
    EXTRAS,
    ConfigError,
    EngineError,
    Interrupted,
    Terminated,
    TrimtabError,
    not_installed,
)
from trimtab.feedback.command_line import add_to
from trimtab.files import disk_problem, unwritable
from trimtab.settings_help import settings_help

STAGES = {
    "pretrain": ("trimtab.stages.pretrain", "Train a small language model from nothing, on plain text."),
    "sft": ("trimtab.stages.sft", "Teach a model to reply, from demonstrations."),
    "compare": ("trimtab.stages.compare", "Sample replies and have a world's annotators compare them."),
    "reward": ("trimtab.stages.reward", "Train a reward model on preference pairs."),
    "preference": (
        "trimtab.stages.preference",
        "Train a policy on preferences without a reward model: DPO and its family.",
    ),
    "online": ("trimtab.stages.online", "Train a policy against a reward, with PPO."),
    "select": ("trimtab.stages.select", "Sample many replies and keep the best: best-of-N, rejection sampling, pairs."),
    "evaluate": ("trimtab.stages.evaluate", "Measure a policy against a baseline, with intervals."),
}
"""Each stage command: the module with its `Settings` and `run`, and its line of help."""


class _Commands(click.Group):
    """Turns mistakes into messages and exit codes; tracebacks are for bugs."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _sigterm_raised():
                return super().invoke(ctx)
        except TrimtabError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except ModuleNotFoundError as missing:
            if (wanting := _not_installed(missing, ctx)) is None:
                raise
            click.echo(f"error: {wanting}", err=True)
            ctx.exit(2)
        except Interrupted as stop:
            click.echo(f"{stop}\nto go on: {_same_command()}", err=True)
            ctx.exit(128 + stop.signal_number)
        except KeyboardInterrupt as stop:
            click.echo("stopped at once; what was not saved yet is done again by the same command", err=True)
            ctx.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))
        except Exception as error:
            if not (problem := disk_problem(error)):
                raise
            refused = unwritable("what this command writes", problem, Path.cwd(), "what was saved before is as it was")
            click.echo(f"error: {refused}", err=True)
            ctx.exit(2)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(self.commands)}"
            raise ConfigError(f"no command {args[0]!r}", where="the command line", fix=hint)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The order of the table, which is the order of the work."""
        return list(self.commands)


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Within, SIGTERM ends a command as Ctrl-C does, so that what is open is closed and what is kept is said."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _not_installed(missing: ModuleNotFoundError, ctx: click.Context) -> EngineError | None:
    """What to install for a library of an extra; None if the module belongs to none."""
    module = (missing.name or "").partition(".")[0]
    preferred = ("feedback",) if ctx.invoked_subcommand == "feedback" else ()
    extra = next((name for name in (*preferred, *EXTRAS) if module in EXTRAS[name]), None)
    if extra is None:
        return None
    return not_installed(module, extra=extra, needed_by="this command", where=f"trimtab {ctx.invoked_subcommand}")


class _StageCommand(click.Command):
    """A command whose help ends with the settings of its stage."""

    module: str

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Answers `--learning-rate 1e-4` with the key to write."""
        try:
            return super().parse_args(ctx, list(args))
        except click.NoSuchOption as wrong:
            place = next((i for i, word in enumerate(args) if word.partition("=")[0] == wrong.option_name), -1)
            given = args[place].partition("=")[2] or "".join(args[place + 1 : place + 2]) if place >= 0 else ""
            check = importlib.import_module("trimtab.settings_check")
            raise check.option_as_override(self.module, wrong.option_name, given) from wrong

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Settings (keys of the run file, or key=value)"):
            formatter.write_dl(list(settings_help(self.module)))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(trimtab.__version__, prog_name="trimtab")
def main() -> None:
    """The whole RLHF loop: from human judgements to an aligned model, and the evidence that it is aligned.

    Stages read a TOML run file; any setting can be overridden with key=value, and `trimtab STAGE --help` lists them.
    An interrupted command, run again, goes on where it stopped.
    """


_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_seed = click.option("--seed", default=0, show_default=True, help="Equal seeds give equal results.")
_model = click.option("--model", required=True, help="A model directory or Hub id.")
_temperature = click.option("--temperature", default=1.0, show_default=True, help="0 takes the likeliest token.")
_max_new_tokens = click.option("--max-new-tokens", default=256, show_default=True, help="Where a reply is cut off.")


def _directory(help_line: str, *, default: str | None = None, required: bool = False) -> Callable[[Any], Any]:
    where = click.Path(file_okay=False, path_type=Path)
    return click.option("--out", type=where, default=default, required=required, show_default=True, help=help_line)


# --- the whole loop ---


@main.command()
@_overrides
@_directory("The directory of the pipeline.", default="runs/quickstart")
@click.option("--seed", type=int, help="Another seed than the file's.")
def quickstart(overrides: tuple[str, ...], out: Path, seed: int | None) -> None:
    """Run the whole loop on the help-desk world, on a laptop CPU."""
    chosen = overrides if seed is None else (*overrides, f"seed={seed}")
    _run_pipeline(examples_dir() / "quickstart" / "pipeline.toml", chosen, out)


@main.command("run")
@click.argument("run_file", type=click.Path(path_type=Path))
@_overrides
@_directory("The directory of the pipeline.  [default: runs/<name of the file>]")
def run_(run_file: Path, overrides: tuple[str, ...], out: Path | None) -> None:
    """Run a pipeline of stages.

    Finished stages are skipped and an interrupted one goes on.
    """
    _run_pipeline(run_file, overrides, out or Path("runs") / run_file.stem)


@main.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@_overrides
@click.option("--stage", type=click.Choice(list(STAGES)), help="The stage of a run file that is not a pipeline.")
def plan(run_file: Path, overrides: tuple[str, ...], stage: str | None) -> None:
    """Say what a run will take: time, memory and steps.

    Rehearses a few steps of every stage in a scratch directory, with the run's own data, models and batch sizes.
    """
    config = importlib.import_module("trimtab.config")
    console = importlib.import_module("rich.console")
    values = config.apply_overrides(config.load_run_file(run_file), overrides)
    where = " ".join([str(run_file), *overrides])
    if "stages" not in values:
        stage = stage or values.get("stage") or _stage_of(values, where)
        values = {"stages": {stage: {**values, "stage": stage}}}
    planning = importlib.import_module("trimtab.stages.plan")
    planning.show(planning.plan(values, where=where), console.Console(width=120))


def _stage_of(values: dict[str, Any], where: str) -> str:
    """The stage whose settings these are. Raises ConfigError where they could be those of several or of none."""
    check = importlib.import_module("trimtab.settings_check")
    able = check.nearest_stage(values, {name: module for name, (module, _) in STAGES.items()})
    if len(able) == 1:
        return str(able[0])
    which = " or ".join(f"--stage {name}" for name in able or STAGES)
    could = "the settings could be those of several stages" if able else "the settings are those of no stage"
    raise ConfigError(f"a run file of a single stage: {could}", where=where, fix=f"say which: {which}")


def _run_pipeline(run_file: Path, overrides: tuple[str, ...], out: Path) -> None:
    config = importlib.import_module("trimtab.config")
    values = config.apply_overrides(config.load_run_file(run_file), overrides)
    where = " ".join([str(run_file), *overrides])
    importlib.import_module("trimtab.stages.pipeline").run_pipeline(values, out, where=where)
    _tell(out)
    _write_report(out)


def _tell(out: Path) -> None:
    """The verdict on a pipeline or a run, as its page has it."""
    headline = importlib.import_module("trimtab.reports.headline")
    collecting = importlib.import_module("trimtab.reports.collect")
    record = collecting.collect(out)
    if isinstance(record, collecting.RunRecord):
        verdict = headline.run_verdict(record)
        if verdict is not None:
            for sentence in (verdict.title, *verdict.sentences):
                click.echo(sentence)
        return
    verdict = headline.pipeline_verdict(record)
    click.echo()
    for sentence in (verdict.title, *verdict.sentences):
        click.echo(sentence)
    took, memory = (record.summary.get(name) for name in ("seconds", "peak_rss_gb"))
    if took is not None and memory is not None:
        click.echo(f"It took {headline.seconds(took)} and at most {memory:.2g} GB of memory.")


def examples_dir() -> Path:
    """The shipped run files: inside the package where it was installed, beside it in a checkout."""
    package = Path(trimtab.__file__).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parents[1] / "examples"


# --- the stages ---


def stage_command(name: str, module: str, help_line: str) -> click.Command:
    """The command that runs one stage from a run file."""

    def invoke(run_file: Path, overrides: tuple[str, ...], out: Path | None, fresh: bool) -> None:
        _run_stage(name, module, run_file, overrides, out or Path("runs") / run_file.stem, fresh)

    command = _StageCommand(
        name,
        callback=invoke,
        help=help_line,
        params=[
            click.Argument(["run_file"], type=click.Path(path_type=Path)),
            click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]..."),
            click.Option(
                ["--out"],
                type=click.Path(file_okay=False, path_type=Path),
                help="The run directory.  [default: runs/<name of the file>]",
            ),
            click.Option(["--fresh"], is_flag=True, help="Empty the run directory first, instead of going on there."),
        ],
    )
    command.module = module
    return command


def _run_stage(name: str, module: str, run_file: Path, overrides: tuple[str, ...], out: Path, fresh: bool) -> None:
    config = importlib.import_module("trimtab.config")
    values = config.apply_overrides(config.load_run_file(run_file), overrides)
    where = " ".join([str(run_file), *overrides])
    if (meant := values.pop("stage", name)) != name:  # settings.toml of a run directory says its stage
        raise ConfigError(f"a run file of the stage {meant!r}", where=str(run_file), fix=f"use trimtab {meant}")
    if "stages" in values:
        raise ConfigError("a run file of a pipeline", where=str(run_file), fix=f"use trimtab run {run_file}")
    if module.startswith("trimtab."):  # before its libraries, which take seconds to import
        importlib.import_module("trimtab.settings_check").check({"": (module, values)}, where=where)
    stage = importlib.import_module(module)
    settings = config.resolve(stage.Settings, values, where=where)
    if module.startswith("trimtab.") and (fresh or not (out / "summary.json").exists()):
        importlib.import_module("trimtab.stages.preflight").check_stage(name, settings, where=where)
    runs = importlib.import_module("trimtab.runs.run")
    trackers = getattr(settings, "trackers", ())
    with runs.Run.open(out, stage=name, settings=config.dump(settings), resume=not fresh, trackers=trackers) as run:
        if run.finished:
            click.echo(f"{out} is finished; --fresh begins it again")
        else:
            _run_open(stage, settings, run)
    _tell(out)
    _write_report(out)


def _run_open(stage: Any, settings: Any, run: Any) -> None:
    try:
        stage.run(settings, run)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise Interrupted(f"stopped at once; {run.kept()}", signal_number=number) from stop


for _name, (_module, _help) in STAGES.items():
    main.add_command(stage_command(_name, _module, _help))


# --- the use of a model ---


@main.command()
@_model
@click.option("--data", help="Prompts: a file, a Hub data set or a world.")
@click.option("--prompt", help="One prompt, as text.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines to write, instead of printing."
)
@_max_new_tokens
@_temperature
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens of this total.")
@click.option("--top-k", default=0, show_default=True, help="Sample from this many likeliest tokens; 0 is all.")
@click.option("--num-samples", default=1, show_default=True, help="Replies for each prompt.")
@_seed
def generate(**options: Any) -> None:
    """Sample replies of a model to prompts."""
    importlib.import_module("trimtab.stages.use").generate_file(**options)


@main.command()
@_model
@click.option("--data", required=True, help="Replies (a file of `trimtab generate`, a data set), or preference pairs.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines to write; pairs need none.")
def score(**options: Any) -> None:
    """Score replies with a reward model, or judge it on preference pairs.

    Replies are written with their rewards. Of pairs, the card is printed: how often the model orders them as labelled.
    """
    importlib.import_module("trimtab.stages.use").score_file(**options)


@main.command()
@_model
@_temperature
@_max_new_tokens
@_seed
def chat(**options: Any) -> None:
    """Talk to a model."""
    importlib.import_module("trimtab.stages.use").chat(**options)


@main.command()
@_model
@_directory("Where the whole model is written: a new directory.", required=True)
@click.option(
    "--dtype",
    type=click.Choice(["as stored", "float32", "bfloat16", "float16"]),
    default="as stored",
    show_default=True,
    help="Of the weights; as stored is that of the model or base.",
)
def export(model: str, out: Path, dtype: str) -> None:
    """Write a checkpoint as a whole model, an adapter merged."""
    click.echo(importlib.import_module("trimtab.stages.export").export(model=model, out=out, dtype=dtype))


# --- human judgements ---


@main.group()
def feedback() -> None:
    """Collect human judgements and know what they are worth."""


add_to(feedback)


@feedback.command()
@click.argument("source")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The page.  [NAME-agreement.html]")
@click.option("--columns", default="", help="Columns of another table: item=doc+system,annotator=worker,choice=label.")
@click.option("--annotator-columns", default="", help="Columns with one annotator's choices each, in a table of items.")
@click.option("--missing", default="", help="Choices that are no judgement, with commas between them.")
@click.option("--order", default="", help="Categories from low to high, where they have an order.")
@click.option("--as-given", is_flag=True, help="A always means the same, such as a model: keep sides as they are.")
@_seed
def agreement(source: str, **options: Any) -> None:
    """Say how far annotators agree, and write a page about it.

    SOURCE is a feedback project, or a table of votes with the columns item, annotator, choice and, where known,
    shown_left, seconds, slice, strength, model_a, model_b (JSON lines, CSV or Parquet), or comparisons.
    """
    importlib.import_module("trimtab.feedback.commands").agreement(source, **options)


@feedback.command()
@click.option("--items", default=2000, show_default=True, help="Different pairs to be judged.")
@click.option("--overlap", default=1.0, show_default=True, help="Votes for each item on average.")
@click.option("--minutes", default=1.0, show_default=True, help="Working time of one judgement.")
@click.option("--wage", default=20.0, show_default=True, help="Pay for an hour, in your currency.")
@click.option("--price", type=float, help="Pay for one judgement, instead of a wage.")
@click.option("--fee", default=0.2, show_default=True, help="Share that a platform adds.")
@click.option("--gold", default=0.05, show_default=True, help="Share of further judgements with a known answer.")
@click.option("--repeats", default=0.03, show_default=True, help="Share of further judgements asked again.")
@click.option("--adjudication", default=0.0, show_default=True, help="Share of further judgements to settle disputes.")
@click.option("--annotators", default=5, show_default=True, help="People at work.")
@click.option("--hours-per-day", default=4.0, show_default=True, help="Of judging, for each of them.")
@click.option("--agreement", default=0.7, show_default=True, help="How often two of them are expected to agree.")
@click.option("--half-width", default=0.03, show_default=True, help="Wanted half of a 95% interval.")
@click.option("--votes-per-item", default=2, show_default=True, help="Of the items that agreement is measured on.")
@click.option("--pilot", default="", help="Reward models so far, ITEMS:ACCURACY,…, to extrapolate.")
def cost(half_width: float, votes_per_item: int, pilot: str, **plan: Any) -> None:
    """Plan a campaign: what it costs and what it can show."""
    campaign = importlib.import_module("trimtab.feedback.campaign").Campaign(**plan)
    importlib.import_module("trimtab.feedback.commands").cost(
        campaign, half_width=half_width, votes_per_item=votes_per_item, pilot=pilot
    )


# --- data and reports ---


@main.command()
@click.argument("name")
@click.option("--rows", required=True, type=click.IntRange(min=1), help="Rows of each training set.")
@_directory("Where the sets are written.", required=True)
@_seed
def world(name: str, rows: int, out: Path, seed: int) -> None:
    """Write the data sets of a world as JSON lines."""
    worlds = importlib.import_module("trimtab.worlds")
    for file, count in worlds.write_sets(worlds.load(name), rows, out, seed).items():
        click.echo(f"{out / file}: {count} rows")


@main.group()
def data() -> None:
    """Look at data as a model will be given it."""


@data.command()
@click.argument("source")
@_model
@click.option(
    "--kind",
    type=click.Choice(["auto", "sft", "preference", "prompt"]),
    default="auto",
    show_default=True,
    help="What to read the rows as.",
)
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=1), help="Rows to show.")
@click.option(
    "--train-on",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Which assistant turns of a demonstration are trained, as in the sft stage.",
)
@click.option("--all", "whole", is_flag=True, help="Count and measure every row, not only the first thousand.")
def show(source: str, model: str, kind: str, rows: int, train_on: str, whole: bool) -> None:
    """Show rows as tokens, those trained on marked."""
    console = importlib.import_module("rich.console").Console()
    importlib.import_module("trimtab.data.show").show(
        source, model, kind=kind, rows=rows, train_on=train_on, whole=whole, console=console
    )


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="The page.  [default: report.html in the directory]"
)
def report(directory: Path, out: Path | None) -> None:
    """Write the page of a run or a pipeline."""
    _write_report(directory, out)


def _write_report(directory: Path, out: Path | None = None) -> None:
    path = importlib.import_module("trimtab.reports.html").write_report(directory, out)
    click.echo(f"report: {path}")


def _same_command() -> str:
    return shlex.join(["trimtab", *(word for word in sys.argv[1:] if word != "--fresh")])
