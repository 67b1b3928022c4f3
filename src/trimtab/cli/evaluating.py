"""The command group `trimtab eval`: how good a model is, from judgements or suites."""

from __future__ import annotations

from pathlib import Path

import click

from trimtab.cli.comparing import agreement, replies, verdicts
from trimtab.cli.helpers import FILE
from trimtab.cli.suites import lm_eval, suite_command, tax
from trimtab.cli.tables import add_row, new_table
from trimtab.cli.verdict_tables import percent
from trimtab.core import registry
from trimtab.core.terminal import printable

RESEMBLES = {"constant": "constant: every reply has the same reward", "length": "scorer of length"}


@click.group("eval")
def eval_() -> None:
    """Measure how good a model is, each figure with its interval."""


@eval_.command("rewardbench")
@click.argument("model")
@click.argument("files", nargs=-1, required=True)
@click.option("--out", type=FILE, help="All scores as JSON.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Equal seeds give equal intervals."
)
@click.option("--device", metavar="DEVICE", help='Where the model computes: "cpu", "cuda" or for example "cuda:1".')
def rewardbench(model: str, files: tuple[str, ...], out: Path | None, seed: int, device: str | None) -> None:
    """Score the reward model MODEL on the rows of RewardBench or RewardBench 2.

    FILES hold them as they are published, such as filtered.jsonl or test.parquet. Ties count half, and replies that tie
    for the first place share it.
    """
    from rich.console import Console

    from trimtab.stages.reward_bench import score_bench

    scores, num_too_long = score_bench(model=model, data=files, out=out, seed=seed, device=device)
    table = new_table("", "score", "rows")
    for title, found in [*scores.sections.items(), *scores.subsets.items()]:
        add_row(table, title, percent(found), str(found.count))
    add_row(table, "mean", f"{scores.overall:.1%}", "")
    console = Console(width=140, highlight=False)
    console.print(table)
    if scores.resembles is not None:
        console.print(f"note: the model amounts to a {RESEMBLES[scores.resembles]}")
    for note in scores.notes:
        console.print(f"note: {printable(note)}", markup=False)
    if num_too_long:
        click.echo(f"{num_too_long} rows are left out, because the model cannot read texts so long")
    if out is not None:
        click.echo(f"scores: {out}")


for _command in (verdicts, replies, agreement):
    eval_.add_command(_command)
for _name in registry.modules("suite"):
    eval_.add_command(suite_command(_name))
eval_.add_command(lm_eval)
eval_.add_command(tax)
