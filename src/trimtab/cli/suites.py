"""The commands `trimtab eval SUITE`, one for each suite of the registry, `eval lm-eval` and `eval tax`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from trimtab.cli.helpers import DIRECTORY, FILE, Number
from trimtab.cli.tables import add_row, new_table
from trimtab.core import registry
from trimtab.core.settings_help import summary_of

_margin = click.option(
    "--margin",
    default=0.03,
    show_default=True,
    type=Number(0, 1, min_open=True, max_open=True),
    help="How much worse than its baseline a model may be.",
)


def suite_command(name: str) -> click.Command:
    """The command that asks a model the questions of one suite."""

    @click.command(name, help=summary_of(registry.modules("suite")[name]))
    @click.argument("model")
    @click.argument("baseline", required=False)
    @click.option(
        "--data",
        metavar="FOLDER",
        help="A folder with the suite's file (docs/suites.md), one file, or a hub data set.  [default: the hub]",
    )
    @click.option("--limit", type=click.IntRange(min=1), help="So many items, drawn by the seed.  [default: all]")
    @click.option(
        "--max-new-tokens", type=click.IntRange(min=1), help="Where a reply is cut off.  [default: the suite's]"
    )
    @click.option("--out", type=FILE, help="The figures and the scores of every item, as JSON.")
    @click.option("--replies", type=FILE, help="The answers, as JSON lines. They may be harmful texts.")
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of items and replies.")
    @click.option("--device", metavar="DEVICE", help='Where models compute: "cpu", "cuda" or for example "cuda:1".')
    @_margin
    def invoke(device: str | None, margin: float, **options: Any) -> None:
        from trimtab.stages.suites import run_suite

        engine = {} if device is None else {"device": device}
        command = shlex.join(["trimtab", *sys.argv[1:]])
        found = run_suite(name, engine=engine, command=command, **options)
        _show(found, margin)
        if options["out"] is not None:
            click.echo(f"figures: {options['out']}")

    return invoke


@click.command("lm-eval")
@click.argument("model")
@click.argument("baseline", required=False)
@click.option("--tasks", metavar="TASK,…", default="", help="Tasks of lm-eval, for example arc_easy,hellaswag.")
@click.option("--limit", type=click.IntRange(min=1), help="The first documents of each task.  [default: all]")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's]")
@click.option("--no-chat-template", is_flag=True, help="Ask in plain text, not under the model's chat template.")
@click.option("--include-path", metavar="DIR", help="Tasks of your own, as YAML files.")
@click.option("--batch-size", default="1", show_default=True, help='A number, or "auto".')
@click.option("--device", metavar="DEVICE", help='Where lm-eval computes, for example "cuda:0".  [default: its choice]')
@click.option("--python", metavar="FILE", help="The interpreter of an environment with lm-eval.  [default: this one]")
@click.option("--files", type=DIRECTORY, help="Keeps lm-eval's own files.")
@click.option("--out", type=DIRECTORY, help="A directory for the results, TASK.json each.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of examples and replies.")
@_margin
def lm_eval(tasks: str, no_chat_template: bool, margin: float, out: Path | None, **options: Any) -> None:
    """Run tasks of lm-eval on MODEL, and on BASELINE, in a process of its own.

    Both may also be folders that lm-eval has written with --log_samples. The two models are compared document by
    document, and each task passes, fails or is inconclusive at the margin, as a suite does.
    """
    from trimtab.stages.lm_eval import run_lm_eval

    named = [name.strip() for name in tasks.split(",") if name.strip()]
    command = shlex.join(["trimtab", *sys.argv[1:]])
    found = run_lm_eval(tasks=named, chat_template=not no_chat_template, out=out, command=command, **options)
    for result in found.values():
        _show(result, margin)
    if out is not None:
        click.echo(f"results: {', '.join(str(out / f'{name}.json') for name in found)}")


@click.command("tax")
@click.argument("files", nargs=-1, required=True, type=FILE)
@_margin
@click.option("--out", type=FILE, help="The verdicts as JSON.")
def tax(files: tuple[Path, ...], margin: float, out: Path | None) -> None:
    """Say whether a model is worse than its baseline, over several suites.

    FILES are results of `trimtab eval SUITE MODEL BASELINE --out FILE`. Each suite passes, fails or is inconclusive at
    the margin, and Holm's correction is for all of them.
    """
    from trimtab.core.files import check_out, json_text, write_out
    from trimtab.evals.suites.results import read_results, verdicts_of

    check_out(out)
    found = verdicts_of(read_results(files), margin=margin)
    _show_verdicts(found)
    if out is not None:
        write_out(out, json_text({"version": 1, "margin": margin, "verdicts": found}))
        click.echo(f"verdicts: {out}")


def _show(found: dict[str, Any], margin: float) -> None:
    from rich.console import Console

    from trimtab.evals.suites.results import verdicts_of

    console = Console(width=160, highlight=False)
    compared = found["baseline"] is not None
    nulls = list(found["metrics"][0]["null"])
    table = new_table(
        found["suite"], "n", "model", *["baseline", "difference"] * compared, *(f"null: {who}" for who in nulls)
    )
    for row in found["metrics"]:
        name = row["name"] if row["about"] else f"  {row['name']}"  # a slice
        num = "-" if row["model"] is None else str(row["model"]["count"])
        others = [_figure(row["baseline"]), _figure(row["difference"], signed=True)] if compared else []
        add_row(table, name, num, _figure(row["model"]), *others, *(_share(row["null"][who]) for who in nulls))
    console.print(table)
    console.print(f"{found['num_items']} of {found['num_available']} items in {found['num_clusters']} clusters")
    for who, prefix in (("model", ""), ("baseline", "baseline_")):
        if found.get(f"{prefix}resembles"):
            console.print(f"the {who} is a null model here: {found[f'{prefix}resembles']}", markup=False)
        if found.get(f"{prefix}truncated_fraction"):
            console.print(f"{found[f'{prefix}truncated_fraction']:.0%} of the replies of the {who} were cut off")
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False)
    if compared and found["metrics"][0]["better"] != "neither" and found["metrics"][0]["difference"] is not None:
        _show_verdicts(verdicts_of([found], margin=margin))


def _show_verdicts(found: Any) -> None:
    from rich.console import Console

    table = new_table("suite", "difference, up is better", "p (Holm) of a pass", "capability tax")
    for one in found:
        gap = one.difference
        text = f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] (n={gap.count})"
        add_row(table, f"{one.suite} {one.metric}", text, f"{one.p_pass:.2g}", one.text)
    Console(width=140, highlight=False).print(table)


def _figure(found: dict[str, Any] | None, *, signed: bool = False) -> str:
    if found is None:
        return "-"
    value, low, high = (found[key] for key in ("value", "low", "high"))
    bounds = "" if low is None else f" [{_share(low, signed)}, {_share(high, signed)}]"
    return f"{_share(value, signed)}{bounds}"


def _share(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if signed else ''}.2f}"
