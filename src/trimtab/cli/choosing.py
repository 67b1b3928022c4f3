"""The command `trimtab choose`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from trimtab.cli.helpers import DIRECTORY, FILE
from trimtab.core.errors import ConfigError


@click.command()
@click.argument("run", type=DIRECTORY)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--prompts", metavar="SOURCE", help="Prompts that the run did not train on.  [default: the guard's]")
@click.option("--gold", metavar="WORLD", help="Measure by the gold score of this world.")
@click.option("--reward-model", metavar="DIRECTORY", help="Measure by this reward model.")
@click.option("--out", type=FILE, help="The decision as JSON.  [default: decision.json in the run]")
@click.option("--export", type=DIRECTORY, help="Write the chosen model here: a new directory.")
@click.option("--device", metavar="DEVICE", help="Where models compute (engine.device).")
def choose(
    run: Path,
    overrides: tuple[str, ...],
    prompts: str | None,
    gold: str | None,
    reward_model: str | None,
    out: Path | None,
    export: Path | None,
    device: str | None,
) -> None:
    """Choose among the checkpoints of a run, by a measure that it did not train on.

    Each kept checkpoint answers the same prompts; that with the highest lower bound is chosen. Keys are measure,
    num_prompts, replies_per_prompt, sampling, token_budget and seed, such as measure='["exact_answer"]'. A run with a
    guard is measured as its guard did, if nothing else is said.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from trimtab.core import config
    from trimtab.stages import choose as choosing

    values: dict[str, Any] = config.apply_overrides({}, (*overrides, *([f"engine.device={device}"] if device else [])))
    given = [{"name": "gold", "world": gold}] if gold else []
    given += [{"name": "model", "path": reward_model}] if reward_model else []
    where, command = " ".join(["trimtab choose", *overrides]), shlex.join(["trimtab", *sys.argv[1:]])
    options = {"measure": given, "prompts": prompts}
    for key, value in options.items():
        if value and key in values:
            raise ConfigError(
                f"{key} is given twice, as an option and as {key}=…",
                where=where,
                fix="give one of them; measures of several parts are added up in measure='[…, …]'",
            )
    values |= {key: value for key, value in options.items() if value}
    found = choosing.choose(run, values, where=where, out=out, export=export, command=command)
    table = Table("step", "measure, 95% interval", "KL in nats", "reward", "", box=SIMPLE)
    for row in choosing.rows(found):
        table.add_row(*row)
    Console(width=100, highlight=False).print(table)
    click.echo(f"decision: {found.decision}")
    if export is not None:
        click.echo(f"model: {export}")
