"""The command group `trimtab eval`: how good a model is, from judgements or suites."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.helpers import Number
from trimtab.cli.suites import lm_eval, suite_command, tax
from trimtab.cli.tables import add_row, new_table
from trimtab.core import registry
from trimtab.core.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.evals.verdict_study import VerdictStudy
    from trimtab.stats import Interval


RESEMBLES = {"constant": "constant: every reply has the same reward", "length": "scorer of length"}


@click.group("eval")
def eval_() -> None:
    """Measure how good a model is, each figure with its interval."""


@eval_.command("verdicts")
@click.argument("files", nargs=-1, required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The whole study as JSON.")
@click.option(
    "--length-control", is_flag=True, help="Also win rates at equal length, by the regression of AlpacaEval 2."
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="MODEL",
    help="With --length-control: a model that is its baseline told to be brief or verbose.",
)
@click.option(
    "--half-width",
    default=0.03,
    show_default=True,
    type=Number(min=0, max=0.5, min_open=True),
    help="Of the wanted interval: the study says how many prompts it takes.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Equal seeds give equal intervals."
)
def verdicts(
    files: tuple[str, ...],
    out: Path | None,
    length_control: bool,
    variants: tuple[str, ...],
    half_width: float,
    seed: int,
) -> None:
    """Win rates of models from files of verdicts.

    A row has prompt, model, baseline and verdict (1 if the model's reply is better, 0 if the baseline's is), and if
    known length, baseline_length, shown_first (model or baseline) and judge. AlpacaEval's annotations are read too.
    """
    from trimtab.core.files import check_out, json_text, write_out
    from trimtab.evals.verdict_study import study_verdicts
    from trimtab.evals.verdicts import read_verdicts

    if variants and not length_control:
        raise ConfigError(
            "--variant without --length-control",
            where="the command line",
            fix="add --length-control: variants of a baseline only serve there",
        )
    if out is not None:
        check_out(out)
    read = read_verdicts(files)
    settings: dict[str, Any] = {
        "length_control": length_control,
        "variants": variants,
        "half_width": half_width,
        "seed": seed,
    }
    study = study_verdicts(read.verdicts, **settings)
    _show(study, half_width)
    if read.num_missing:
        click.echo(f"{read.num_missing} rows without a verdict are left out")
    if read.num_repeated:
        click.echo(f"{read.num_repeated} rows that repeat another exactly are left out")
    if out is not None:
        counts = {"num_missing": read.num_missing, "num_repeated": read.num_repeated}
        origin = {"sha256": read.sha256, "settings": settings, "num_verdicts": len(read.verdicts), **counts}
        write_out(out, json_text({**origin, "study": study}))
        click.echo(f"study: {out}")


@eval_.command("rewardbench")
@click.argument("model")
@click.argument("files", nargs=-1, required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="All scores as JSON.")
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
        add_row(table, title, _percent(found), str(found.count))
    add_row(table, "mean", f"{scores.overall:.1%}", "")
    console = Console(width=140, highlight=False)
    console.print(table)
    if scores.resembles is not None:
        console.print(f"note: the model amounts to a {RESEMBLES[scores.resembles]}")
    for note in scores.notes:
        console.print(f"note: {note}", markup=False)
    if num_too_long:
        click.echo(f"{num_too_long} rows are left out, because the model cannot read texts so long")
    if out is not None:
        click.echo(f"scores: {out}")


def _show(study: VerdictStudy, half_width: float) -> None:
    from rich.console import Console

    console = Console(width=140, highlight=False)
    controlled = {(row.model, row.baseline): row for row in study.length_controlled}
    table = new_table(
        "model",
        "baseline",
        "win rate",
        *["at equal length"] * bool(controlled),
        "won, tied, lost",
        f"±{half_width:.1%} takes",
    )
    for row in study.win_rates:
        at_equal = [_percent(controlled[row.model, row.baseline].rate)] if controlled else []
        counts = f"{row.num_wins}, {row.num_ties}, {row.num_losses}"
        rate = f"{_percent(row.rate)} (n={row.rate.count})"
        add_row(table, row.model, row.baseline, rate, *at_equal, counts, f"{row.prompts_for_width} prompts")
    console.print(table)
    if any(row.first_shown is not None for row in study.win_rates):
        table = new_table("both orders", "reply shown first preferred", "orders disagree")
        for row in study.win_rates:
            if row.first_shown is not None:
                first = f"{_percent(row.first_shown)} (n={row.first_shown.count})"
                add_row(table, f"{row.model} against {row.baseline}", first, f"{row.flip_fraction:.0%}")
        console.print(table)
    if study.differences:
        table = new_table("of two models", "difference in points", "p", "p (Holm)")
        neighbours = {(a.model, b.model, b.baseline) for a, b in itertools.pairwise(study.win_rates)}
        shown = [pair for pair in study.differences if (pair.model, pair.other, pair.baseline) in neighbours]
        for pair in shown:
            gap = f"{_percent(pair.difference, signed=True)} (n={pair.difference.count})"
            names = f"{pair.model} and {pair.other} against {pair.baseline}"
            add_row(table, names, gap, f"{pair.p_value:.2g}", f"{pair.p_holm:.2g}")
        console.print(table)
        if len(shown) < len(study.differences):
            console.print(f"Shown are neighbours in win rate; --out has all {len(study.differences)} pairs.")
    if study.ladder is not None:
        table = new_table("ladder", "rank", "rating", *["component"] * (study.ladder.num_components > 1))
        for player in study.ladder.players:
            component = [str(player.component)] * (study.ladder.num_components > 1)
            add_row(table, player.name, str(player.rank or "-"), player.text, *component)
        console.print(table)
    for note in study.notes:
        console.print(f"note: {note}", markup=False)


def _percent(found: Interval, *, signed: bool = False) -> str:
    value, low, high = (f"{100 * x:{'+' if signed else ''}.1f}" for x in (found.value, found.low, found.high))
    bounds = "" if math.isnan(found.low) else f" [{low}, {high}]"
    return f"{value}{'' if signed else '%'}{bounds}"


for _name in registry.modules("suite"):
    eval_.add_command(suite_command(_name))
eval_.add_command(lm_eval)
eval_.add_command(tax)
