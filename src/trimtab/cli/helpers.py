"""What the command table is made of besides its rows: the command of a stage, and the answers to what goes wrong."""

from __future__ import annotations

import functools
import math
import os
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

from trimtab.core import registry
from trimtab.core.errors import EXTRAS, ConfigError, EngineError, Terminated, not_installed
from trimtab.core.settings_help import settings_help, summary_of
from trimtab.core.terminal import printable

FILE = click.Path(dir_okay=False, path_type=Path)
"""A file, which need not be there."""
DIRECTORY = click.Path(file_okay=False, path_type=Path)
"""A directory, which need not be there."""


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """Inside this block SIGTERM ends a command as Ctrl-C does: files are closed, and a message says what is kept."""
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


def missing_extra(missing: ModuleNotFoundError, ctx: click.Context) -> EngineError | None:
    """The error that says which extra to install for a missing module; None if the module belongs to no extra."""
    module = (missing.name or "").partition(".")[0]
    preferred = ("feedback",) if ctx.invoked_subcommand == "feedback" else ()
    extra = next((name for name in (*preferred, *EXTRAS) if module in EXTRAS[name]), None)
    if extra is None:
        return None
    return not_installed(module, extra=extra, needed_by="this command", where=f"trimtab {ctx.invoked_subcommand}")


class StageCommand(click.Command):
    """A command for a stage. Its help is the stage's summary, followed by the settings."""

    def __init__(self, name: str, **options: Any) -> None:
        self.module = registry.modules("stage")[name]
        super().__init__(name, **options | {"help": summary_of(self.module)})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the arguments. For an unknown option such as `--learning-rate 1e-4`, raises an error with the key to
        write."""
        try:
            return super().parse_args(ctx, list(args))
        except click.NoSuchOption as wrong:
            place = next((i for i, word in enumerate(args) if word.partition("=")[0] == wrong.option_name), -1)
            given = args[place].partition("=")[2] or "".join(args[place + 1 : place + 2]) if place >= 0 else ""
            from trimtab.core.settings_check import option_as_override

            raise option_as_override(self.module, wrong.option_name, given) from wrong

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Settings (keys of the run file, or key=value)"):
            formatter.write_dl(list(settings_help(self.module)))


class Number(click.FloatRange):
    """A finite number in a range. That of click lets nan pass, which is neither below nor above a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a text that is none, or none of the range, ends the command with a message."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


_ON_PAPER = {
    "on": click.option(
        "--on",
        metavar="MACHINE",
        help="Plan on paper, for h100, h200, a100 or the machine.json of `trimtab check`: nothing is run or loaded.",
    ),
    "gpus": click.option("--gpus", type=click.IntRange(min=1), help="With --on: how many GPUs."),
    "price": click.option("--price", type=Number(min=0), help="With --on: of one machine for an hour."),
    "assume": click.option(
        "--assume",
        multiple=True,
        metavar="NAME",
        help="With --on: what trimtab does not do yet: bfloat16-frozen, shard-frozen, gather-bfloat16, offload-frozen "
        "or vllm.",
    ),
    "prompt_tokens": click.option("--prompt-tokens", type=click.IntRange(min=0), help="With --on: of each prompt."),
    "reply_tokens": click.option("--reply-tokens", type=click.IntRange(min=1), help="With --on: of each reply."),
}


def on_paper(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of a plan on paper. It gets those that were given as `paper`, by name."""

    @functools.wraps(command)
    def with_paper(**given: Any) -> Any:
        asked = {name: value for name in _ON_PAPER if (value := given.pop(name)) not in (None, ())}
        if asked and "on" not in asked:
            raise ConfigError(
                f"{', '.join('--' + name.replace('_', '-') for name in asked)} without --on",
                where="the command line",
                fix="these belong to a plan on paper: say for which machine, such as --on h100",
            )
        return command(**given, paper=asked)

    for option in reversed(_ON_PAPER.values()):
        with_paper = option(with_paper)
    return with_paper


on_bad_row = click.option(
    "--on-bad-row",
    type=click.Choice(["stop", "drop"]),
    default="stop",
    show_default=True,
    help="What to do with a row that cannot be used: refuse the data, or leave such rows out and count them.",
)
"""The option of commands that read pairs or replies."""


def starter(name: str, command: click.Command) -> str | None:
    """Which of torchrun and srun has started this command several times; None if it is alone. Raises
    ConfigError for a command without the options of an engine, which each process would run for itself."""
    if not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        return None
    from trimtab.engines.joined import find

    if (member := find(os.environ)) is None:
        return None
    if not any(option.name == "workers" for option in command.params):
        raise ConfigError(
            f"trimtab {name} runs in one process, and {member.started_by} has started {member.size}",
            where="the command line",
            fix=f"start it without {member.started_by}",
        )
    return member.started_by


def same_command(starter: str | None) -> str:
    """The command that goes on with what this one began, or how to start all its processes again."""
    if starter is not None:
        return f"start the same {starter} command again{', without --fresh' if '--fresh' in sys.argv else ''}"
    return shlex.join(["trimtab", *(word for word in sys.argv[1:] if word != "--fresh")])


def stage_of(values: dict[str, Any], where: str) -> str:
    """The stage whose settings these are. Raises ConfigError if they fit several stages or none."""
    from trimtab.core.settings_check import nearest_stage

    stages = registry.modules("stage")
    able = nearest_stage(values, stages)
    if len(able) == 1:
        return able[0]
    which = " or ".join(f"--stage {name}" for name in able or stages)
    could = "the settings could be those of several stages" if able else "the settings are those of no stage"
    raise ConfigError(f"a run file of a single stage: {could}", where=where, fix=f"say which: {which}")


@contextmanager
def joined() -> Iterator[None]:
    """Around a command: joins the other processes that torchrun or srun has started for it."""
    from trimtab.engines.joined import together

    with together():
        yield


def tell(out: Path) -> None:
    """Prints the verdict on a pipeline or a run, as its report page shows it."""
    from trimtab.reports import headline
    from trimtab.reports.collect import RunRecord, collect

    record = collect(out)
    if isinstance(record, RunRecord):
        if (verdict := headline.run_verdict(record)) is not None:
            for sentence in (verdict.title, *verdict.sentences):
                click.echo(printable(sentence))
        return
    verdict = headline.pipeline_verdict(record)
    click.echo()
    for sentence in (verdict.title, *verdict.sentences):
        click.echo(printable(sentence))
    took, memory = (record.summary.get(name) for name in ("seconds", "peak_rss_gb"))
    if took is not None and memory is not None:
        click.echo(f"It took {headline.seconds(took)} and at most {memory:.2g} GB of memory.")
