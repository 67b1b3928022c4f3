"""The command table. A stage is imported only when it is run, and help never imports a heavy library."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

import trimtab
from trimtab.cli.choosing import choose
from trimtab.cli.debiasing import debias
from trimtab.cli.diagnosing import doctor
from trimtab.cli.evaluating import eval_
from trimtab.cli.helpers import (
    DIRECTORY,
    FILE,
    StageCommand,
    joined,
    missing_extra,
    on_bad_row,
    on_paper,
    same_command,
    sigterm_raised,
    stage_of,
    starter,
    tell,
)
from trimtab.cli.watching import report, ui, write_report
from trimtab.core import registry
from trimtab.core.errors import ConfigError, Interrupted, Terminated, TrimtabError
from trimtab.core.files import disk_problem, unwritable, writing
from trimtab.core.terminal import visible
from trimtab.feedback.command_line import add_to

if TYPE_CHECKING:
    from trimtab.data.show import RecordKind
    from trimtab.runs.run import Run
    from trimtab.stages.export import Dtype
    from trimtab.stages.stage import Stage


class Commands(click.Group):
    """A command group that turns mistakes into messages and exit codes. Only bugs give a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with sigterm_raised():
                return super().invoke(ctx)
        except TrimtabError as error:
            click.echo(visible(f"error: {error}", newline="\n"), err=True)
            ctx.exit(2)
        except ModuleNotFoundError as missing:
            if (wanting := missing_extra(missing, ctx)) is None:
                raise
            click.echo(f"error: {wanting}", err=True)
            ctx.exit(2)
        except Interrupted as stop:
            click.echo(f"{stop}\nto go on: {same_command(ctx.meta.get('starter'))}", err=True)
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
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            ctx.meta["starter"] = starter(name, command)  # before the command takes it from the environment
        return name, command, rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the table, which is the order in which they are used."""
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(trimtab.__version__, prog_name="trimtab")
def main() -> None:
    """The whole RLHF loop: from human judgements to an aligned model, and the evidence that it is aligned.

    Stages read a TOML run file; any setting can be overridden with key=value, and `trimtab STAGE --help` lists them.
    An interrupted command, run again, goes on where it stopped.
    """


_run_file = click.argument("run_file", type=click.Path(path_type=Path))
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Equal seeds give equal results."
)
_model = click.option("--model", required=True, help="A model directory or Hub id.")
_device = click.option(
    "--device", metavar="DEVICE", help='Where models compute: "cpu", "cuda" or for example "cuda:1" (engine.device).'
)
_ENGINE = (
    _device,
    click.option("--sampler", help='Who draws replies: "local", "process" or "vllm" (engine.sampler.name).'),
    click.option("--workers", type=click.IntRange(min=1), help="Processes that compute together (engine.workers)."),
    click.option(
        "--ray", metavar="ADDRESS", help='The Ray cluster of the workers: "auto", "local" or HOST:PORT (engine.ray).'
    ),
)
_temperature = click.option("--temperature", default=1.0, show_default=True, help="0 takes the likeliest token.")
_max_new_tokens = click.option("--max-new-tokens", default=256, show_default=True, help="Where a reply is cut off.")


def _engine(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options that stand for settings of `engine`. Started several times by torchrun or srun, it is
    run once, and the others compute for it."""
    once = joined()(command)  # a context as a decorator: no frame of this package between a command and its stage
    for option in reversed(_ENGINE):
        once = option(once)
    return once


def _directory(help_line: str, *, default: str | None = None, required: bool = False) -> Callable[[Any], Any]:
    return click.option("--out", type=DIRECTORY, default=default, required=required, show_default=True, help=help_line)


# --- the whole loop ---


@main.command()
@_overrides
@_directory("The directory of the pipeline.", default="runs/quickstart")
@click.option("--seed", type=click.IntRange(min=0), help="Another seed than the file's.")
@_engine
def quickstart(overrides: tuple[str, ...], out: Path, seed: int | None, **engine: Any) -> None:
    """Run the whole loop on the help-desk world, on a laptop CPU."""
    chosen = overrides if seed is None else (*overrides, f"seed={seed}")
    _run_pipeline(examples_dir() / "quickstart" / "pipeline.toml", _on(chosen, **engine), out)


@main.command("run")
@_run_file
@_overrides
@_directory("The directory of the pipeline.  [default: runs/<name of the file>]")
@_engine
def run_(run_file: Path, overrides: tuple[str, ...], out: Path | None, **engine: Any) -> None:
    """Run a pipeline of stages.

    Finished stages are skipped and an interrupted one goes on.
    """
    _run_pipeline(run_file, _on(overrides, **engine), out or Path("runs") / run_file.stem)


@main.command()
@_run_file
@_overrides
@click.option(
    "--stage",
    type=click.Choice(list(registry.modules("stage"))),
    help="The stage of a run file that is not a pipeline.",
)
@on_paper
@_engine
def plan(run_file: Path, overrides: tuple[str, ...], stage: str | None, paper: dict[str, Any], **engine: Any) -> None:
    """Say what a run will take: time, memory and steps.

    Rehearses a few steps of every stage in a scratch directory, with the run's own data, models and batch sizes. With
    --on it is planned on paper, for a machine that is not at hand, from the config.json of its models.
    """
    from rich.console import Console

    values, where = _read(run_file, _on(overrides, **engine))
    if "stages" in values and stage:
        raise ConfigError(f"--stage {stage} for a pipeline", where=str(run_file), fix="leave it out: all are planned")
    if "stages" not in values:
        stage = stage or values.get("stage") or stage_of(values, where)
        values = {"stages": {str(stage): {**values, "stage": stage}}}
    if paper:
        from trimtab.stages import paper as on

        on.show(*on.plan_on_paper(values, on.OnPaper(**paper), where=where), Console(width=120))
    else:
        from trimtab.stages import plan as planning

        planning.show(planning.plan(values, where=where), Console(width=120))


def _on(overrides: tuple[str, ...], **engine: Any) -> tuple[str, ...]:
    """The overrides with those that the options of `_ENGINE` stand for."""
    keys = {"sampler": "sampler.name"}
    return (*overrides, *(f"engine.{keys.get(key, key)}={value}" for key, value in engine.items() if value is not None))


@main.command()
@_overrides
@_engine
@_directory("Where runs will be written.", default="runs")
def check(overrides: tuple[str, ...], out: Path, **engine: Any) -> None:
    """Check this machine: rates, and whether all ways of computing agree.

    Takes half a minute and downloads nothing. Exit code 1 if something is wrong. Overrides are settings of the engine,
    such as engine.sampler.python=vllm/bin/python.
    """
    from trimtab.core import config
    from trimtab.engines.check import show
    from trimtab.engines.launchers import with_workers

    sys.exit(show(with_workers(config.apply_overrides({}, _on(overrides, **engine))), out))


def _read(run_file: Path, overrides: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The values of a run file with the overrides applied, and the text that names their origin in messages."""
    from trimtab.core import config
    from trimtab.engines.launchers import with_workers

    values = config.apply_overrides(config.load_run_file(run_file), overrides)
    return with_workers(values), " ".join([str(run_file), *overrides])


def _run_pipeline(run_file: Path, overrides: tuple[str, ...], out: Path) -> None:
    from trimtab.stages.pipeline import run_pipeline

    values, where = _read(run_file, overrides)
    run_pipeline(values, out, where=where)
    tell(out)
    write_report(out)


def examples_dir() -> Path:
    """The directory of the shipped run files: inside the package if it was installed, beside it in a checkout."""
    package = Path(trimtab.__file__).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parents[1] / "examples"


# --- the stages ---


def stage_command(name: str) -> click.Command:
    """The command that runs the stage with this name from a run file."""

    @click.command(name, cls=StageCommand)
    @_run_file
    @_overrides
    @_directory("The run directory.  [default: runs/<name of the file>]")
    @click.option("--fresh", is_flag=True, help="Empty the run directory first, instead of going on there.")
    @_engine
    def invoke(run_file: Path, overrides: tuple[str, ...], out: Path | None, fresh: bool, **engine: Any) -> None:
        directory = out or Path("runs") / run_file.stem
        with _opened(name, run_file, _on(overrides, **engine), directory, fresh) as (stage, settings, run):
            if run.finished:
                click.echo(f"{directory} is finished; --fresh begins it again")
            else:
                stage.run(settings, run)
        tell(directory)
        write_report(directory)

    return invoke


@contextmanager
def _opened(
    name: str, run_file: Path, overrides: tuple[str, ...], out: Path, fresh: bool
) -> Iterator[tuple[Stage, Any, Run]]:
    """Gives a stage, its settings and the run that is open in `out`, after all checks that can be made beforehand."""
    from trimtab.core import config, settings_check

    values, where = _read(run_file, overrides)
    if (meant := values.pop("stage", name)) != name:  # settings.toml of a run directory names its stage
        raise ConfigError(f"a run file of the stage {meant!r}", where=str(run_file), fix=f"use trimtab {meant}")
    if "stages" in values:
        raise ConfigError("a run file of a pipeline", where=str(run_file), fix=f"use trimtab run {run_file}")
    # This check comes before the libraries of the stage are imported, which takes seconds.
    settings_check.check({"": (registry.modules("stage")[name], values)}, where=where)
    from trimtab.stages import preflight
    from trimtab.stages.pipeline import open_run

    stage = preflight.describe(name)
    settings: Any = config.resolve(stage.settings, values, where=where)
    if fresh or not (out / "summary.json").exists() or preflight.would_grow(out, name, settings):
        preflight.check_stage(name, settings, where=where)
    with open_run(out, name, settings, resume=not fresh) as run:
        try:
            yield stage, settings, run
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            raise Interrupted(f"stopped at once; {run.kept()}", signal_number=number) from stop


for _name in registry.modules("stage"):
    main.add_command(stage_command(_name))


# --- the use of a model ---


@main.command()
@_model
@click.option("--data", help="Prompts: a file, a Hub data set or a world.")
@click.option("--prompt", help="One prompt, as text.")
@click.option("--out", type=FILE, help="JSON lines to write, instead of printing.")
@_max_new_tokens
@_temperature
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens of this total.")
@click.option("--top-k", default=0, show_default=True, help="Sample from this many likeliest tokens; 0 is all.")
@click.option(
    "--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Replies for each prompt."
)
@click.option(
    "--layout",
    type=click.Choice(["fastchat", "arena_hard"]),
    help="Write the answers as MT-Bench (FastChat) or Arena-Hard read them, under the name of the file; all turns of a "
    "question are asked.",
)
@on_bad_row
@_seed
@_device
def generate(**options: Any) -> None:
    """Sample replies of a model to prompts."""
    from trimtab.stages.use import generate_file

    generate_file(**options)


@main.command()
@_model
@click.option("--data", required=True, help="Replies (a file of `trimtab generate`, a data set), or preference pairs.")
@click.option("--out", type=FILE, help="JSON lines to write; pairs need none.")
@on_bad_row
@_device
def score(**options: Any) -> None:
    """Score replies with a reward model, or judge it on preference pairs.

    Replies are written with their rewards. For pairs, the reward card is printed: how often the model orders them as
    labelled.
    """
    from trimtab.stages.use import score_file

    score_file(**options)


@main.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True, metavar="DATA...")
@_directory("Where reward_card.json and its page go; without it, the card is only told.")
@click.option("--slice", "slice_by", metavar="FACT", help="The fact of the prompts whose values make the slices.")
@on_bad_row
@_device
def card(**options: Any) -> None:
    """Tell how far a reward model can be trusted, from preference pairs.

    Accuracy beside simple rules, calibration, what a style adds to the reward, and texts without content.
    """
    from trimtab.stages import card as judging

    for sentence in judging.card(**options):
        click.echo(sentence)


@main.command()
@_model
@_temperature
@_max_new_tokens
@_seed
@_device
def chat(**options: Any) -> None:
    """Talk to a model."""
    from trimtab.stages import use

    use.chat(**options)


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
def export(model: str, out: Path, dtype: Dtype) -> None:
    """Write a checkpoint as a whole model, an adapter merged."""
    from trimtab.stages import export as exporting

    click.echo(exporting.export(model=model, out=out, dtype=dtype))


@main.command()
@click.argument("out", type=DIRECTORY)
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@click.option("--weight", "weights", multiple=True, type=float, help="One for each model, in order.  [default: equal]")
@click.option("--data", help="Pairs that no member was trained on; needed for reward models.")
@on_bad_row
@click.option("--rank", type=click.IntRange(min=1), help="Rank of averaged adapters.  [default: the sum, exact]")
@click.option(
    "--tolerance", default=0.01, show_default=True, help="How far the accuracy may sink below that of the members."
)
@click.option("--force", is_flag=True, help="Write the average even if it sinks further.")
def average(**options: Any) -> None:
    """Average the weights of models that began as one.

    Reward models (WARM) are judged by pairs on the way from each member to the average.
    """
    from trimtab.stages import average as averaging

    for sentence in averaging.average(**options):
        click.echo(sentence)


main.add_command(debias)
main.add_command(eval_)
main.add_command(choose)


# --- human judgements ---


@main.group()
@click.pass_context
def feedback(ctx: click.Context) -> None:
    """Collect human judgements and know what they are worth."""
    ctx.obj = generate.callback  # a project samples replies with it


add_to(feedback)


# --- data and reports ---


@main.command()
@click.argument("name")
@click.option("--rows", required=True, type=click.IntRange(min=1), help="Rows of each training set.")
@_directory("Where the sets are written.", required=True)
@_seed
def world(name: str, rows: int, out: Path, seed: int) -> None:
    """Write the data sets of a world as JSON lines."""
    from trimtab import worlds

    with writing(str(out), out):
        counts = worlds.write_sets(worlds.load(name), rows, out, seed)
    for file, count in counts.items():
        click.echo(f"{out / file}: {count} rows")


@main.group()
def data() -> None:
    """Look at data as a model will see it."""


@data.command()
@click.argument("source")
@click.option("--model", help="A model directory or Hub id, whose tokens are shown.  [default: rows as text]")
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
def show(
    source: str, model: str | None, kind: RecordKind, rows: int, train_on: Literal["last", "all"], whole: bool
) -> None:
    """Show rows as tokens, with the trained ones marked; without --model, rows as text."""
    from rich.console import Console

    from trimtab.data import show as showing

    showing.show(source, model, kind=kind, rows=rows, train_on=train_on, whole=whole, console=Console())


main.add_command(report)
main.add_command(ui)
main.add_command(doctor)
