"""The commands of `trimtab eval` that compare replies: from verdicts, from the replies themselves, and with people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.helpers import FILE, Number, on_bad_row
from trimtab.core.errors import ConfigError
from trimtab.core.terminal import printable

if TYPE_CHECKING:
    from trimtab.data.layouts import OnBadRow
    from trimtab.evals.comparers import Comparer, ComparerAgreement
    from trimtab.evals.verdict_files import VerdictFiles, VerdictRows
    from trimtab.evals.verdict_study import VerdictStudy
    from trimtab.evals.verdicts import PairVerdict

_half_width = click.option(
    "--half-width",
    default=0.03,
    show_default=True,
    type=Number(min=0, max=0.5, min_open=True),
    help="Of the wanted interval: the study says how many prompts it takes.",
)
_length_control = click.option(
    "--length-control", is_flag=True, help="Also win rates at equal length, by the regression of AlpacaEval 2."
)
_style_control = click.option(
    "--style-control",
    is_flag=True,
    help="Also win rates at equal style (length, headers, lists, bold), as Chatbot Arena has them.",
)
_seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Equal seeds give equal intervals."
)
_by: dict[str, Any] = {
    "multiple": True,
    "metavar": "COMPARER",
    "help": "Who compares: length, world:NAME (its gold), a reward by its name such as exact_answer, a reward model, a "
    "file of verdicts with the texts of the replies, or a project of judgements (project.toml). Several may be given.",
}
_verdicts_out = click.option(
    "--verdicts",
    "verdicts_out",
    type=FILE,
    help="The verdicts themselves, as JSON lines that `trimtab eval verdicts` reads.",
)
_device = click.option("--device", metavar="DEVICE", help="Where a reward model computes, such as cpu or cuda.")


def verdict_rows(source: str, *, baseline: str | None) -> VerdictRows:
    """The verdicts of a file, or the votes of a project ("project.toml" or "feedback:project.toml")."""
    project = source.removeprefix("feedback:")
    if project != source or Path(source).suffix == ".toml":
        from trimtab.feedback.vote_verdicts import project_verdicts

        return project_verdicts(project)
    from trimtab.evals.verdict_files import read_file

    return read_file(source, baseline=baseline)


@click.command("verdicts")
@click.argument("files", nargs=-1, required=True)
@click.option("--out", type=FILE, help="The whole study as JSON.")
@click.option(
    "--baseline", metavar="MODEL", help="The model that the others are compared with, if the files do not say it."
)
@click.option(
    "--answers",
    multiple=True,
    metavar="FILE",
    help="Model answers of MT-Bench or Arena-Hard, a file or folder: the replies of the verdicts.",
)
@_verdicts_out
@_length_control
@_style_control
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="MODEL",
    help="With --length-control: a model that is its baseline told to be brief or verbose.",
)
@_half_width
@_seed
def verdicts(
    files: tuple[str, ...],
    out: Path | None,
    baseline: str | None,
    answers: tuple[str, ...],
    verdicts_out: Path | None,
    **settings: Any,
) -> None:
    """Win rates of models from files of verdicts.

    A row has prompt, model, baseline and verdict (1 if the model's reply is better, 0 if the baseline's is), and if
    known length, baseline_length, reply, baseline_reply, shown_first (model or baseline) and judge. AlpacaEval's
    annotations, the judgements of MT-Bench (FastChat) and Arena-Hard, votes of people and a project of judgements
    (project.toml) are read too.
    """
    from trimtab.evals.answers import read_answers
    from trimtab.evals.verdict_files import collect
    from trimtab.evals.verdict_study import mean_scores

    _check(settings, out, verdicts_out)
    known = read_answers(answers) if answers else None
    read = collect([verdict_rows(file, baseline=baseline) for file in files], baseline=baseline, answers=known)
    study, scores = _study(read.verdicts, settings), mean_scores(read.scores)
    _show(study, settings)
    if scores:
        from trimtab.cli.verdict_tables import show_scores

        show_scores(scores)
    _tell_left_out(read)
    if verdicts_out is not None:
        _write_verdicts(verdicts_out, read.verdicts)
    if out is not None:
        counts = {name: getattr(read, name) for name in _COUNTS} | {"not_read": read.not_read}
        origin = {
            "sha256": read.sha256 | (dict(known.sha256) if known is not None else {}),
            "settings": settings | {"baseline": baseline, "answers": answers},
            "num_verdicts": len(read.verdicts),
        }
        _write(out, {**origin, **counts, "study": study, "scores": scores})


_COUNTS = {
    "num_missing": "judgements without a verdict are left out",
    "num_repeated": "rows that repeat another exactly are left out",
    "num_unpaired": "scores without one of the baseline on the same question and turn are in no win rate",
    "num_unanswered": "verdicts have no reply among the answers",
}


def _tell_left_out(read: VerdictFiles) -> None:
    for name, text in _COUNTS.items():
        if num := getattr(read, name):
            click.echo(f"{num} {text}")
    if read.not_read:
        click.echo(f"columns that are not read: {printable(', '.join(read.not_read))}")


@click.command("replies")
@click.argument("models", nargs=-1, required=True, metavar="REPLIES...")
@click.option("--baseline", required=True, metavar="REPLIES", help="The replies that the others are compared with.")
@click.option("--by", required=True, **_by)
@click.option("--out", type=FILE, help="The study of each comparer as JSON.")
@_verdicts_out
@_length_control
@_style_control
@_half_width
@_seed
@_device
def replies(
    models: tuple[str, ...],
    baseline: str,
    by: tuple[str, ...],
    out: Path | None,
    verdicts_out: Path | None,
    device: str | None,
    **settings: Any,
) -> None:
    """Win rates of files of replies against another, by any comparer.

    REPLIES are files that `trimtab generate` wrote, or of prompts with completions in any layout. The same prompts are
    compared. Each file is a model, under the name of the file.
    """
    from trimtab.stages.comparing import compare_replies

    settings |= {"variants": ()}
    _check(settings, out, verdicts_out)
    names = _names((*models, baseline))
    found = compare_replies(
        {names[model]: model for model in models},
        (names[baseline], baseline),
        lambda: [_comparer(one, device) for one in dict.fromkeys(by)],
    )
    for model, num in found.num_unpaired.items():
        if num:
            click.echo(f"{model}: {num} replies have no partner among those to the same prompts")
    studies = {}
    for comparer, given in found.verdicts.items():
        studies[comparer] = _study(given, settings)
        _show(studies[comparer], settings, title=f"by {comparer}")
        for model, num in found.num_unjudged[comparer].items():
            if num:
                click.echo(f"{comparer} cannot judge {num} pairs of {model}")
    if verdicts_out is not None:
        _write_verdicts(verdicts_out, [one for given in found.verdicts.values() for one in given])
    if out is not None:
        counts = {"num_unpaired": found.num_unpaired, "num_unjudged": found.num_unjudged}
        origin = {"models": models, "baseline": baseline, "sha256": found.sha256, "settings": settings}
        _write(out, {**origin, **counts, "studies": studies})


@click.command("agreement")
@click.argument("pairs", metavar="PAIRS")
@click.option("--by", **_by)
@click.option("--out", type=FILE, help="The figures as JSON.")
@on_bad_row
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sides of each pair.")
@_device
def agreement(
    pairs: str,
    by: tuple[str, ...],
    out: Path | None,
    on_bad_row: OnBadRow,
    seed: int,
    device: str | None,
) -> None:
    """How often comparers prefer the reply that people prefer.

    PAIRS are preference pairs or votes in any layout, such as the human majority of MT-Bench. The length of a reply and
    a bag of words, learned from the other half of the prompts, stand beside the comparers: they know nothing else.
    """
    from trimtab.core.files import check_out
    from trimtab.core.types import PreferencePair
    from trimtab.data.layouts import load
    from trimtab.evals.comparers import LENGTH, agreement_of_words
    from trimtab.evals.comparers import agreement as agreement_with

    check_out(out)
    read = load(PreferencePair, pairs, on_bad_row=on_bad_row)
    given = read.records
    num_even = sum(pair.label == 0.5 for pair in given)
    if num_even == len(given):
        raise ConfigError(
            f"none of {len(given)} pairs has a right side", where=pairs, fix="give pairs that people decided"
        )
    comparers = [LENGTH, *(_comparer(one, device) for one in by if one != LENGTH.name)]
    found = [agreement_with(given, comparer, seed=seed) for comparer in comparers]
    if (words := agreement_of_words(given)) is not None:
        found.insert(1, words)
    _show_agreement(found)
    if num_even:
        click.echo(f"{num_even} pairs with an even label have no right side and are left out")
    if read.num_dropped:
        click.echo(read.left_out)
    if out is not None:
        origin = {"pairs": pairs, "sha256": read.sha256, "num_even": num_even, "seed": seed}
        origin |= {"num_dropped": read.num_dropped}
        _write(out, {**origin, "agreement": found}, "figures")


def _show_agreement(found: Sequence[ComparerAgreement]) -> None:
    from rich.console import Console

    from trimtab.cli.tables import add_row, new_table
    from trimtab.cli.verdict_tables import percent

    table = new_table("comparer", "agrees with people", "pairs", "ties", "not judged")
    for row in found:
        rate = percent(row.rate) if row.rate.count else "-"
        add_row(table, row.comparer, rate, str(row.rate.count), str(row.num_ties), str(row.num_unjudged))
    Console(width=140, highlight=False).print(table)


def _comparer(by: str, device: str | None) -> Comparer:
    """The comparer that `--by` names."""
    if by.startswith("feedback:") or Path(by).is_file():
        from trimtab.evals.comparers import RecordedComparer
        from trimtab.evals.verdict_files import collect

        rows = verdict_rows(by, baseline=None)
        return RecordedComparer(by, collect([rows], baseline=None, answers=None).verdicts)
    from trimtab.stages.comparing import scored_comparer

    return scored_comparer(by, device=device)


def _names(files: Sequence[str]) -> dict[str, str]:
    """A name for each file: that of the file without its ending, or the whole path where two would be called alike."""
    short = {file: Path(file.removesuffix(".gz")).stem for file in files}
    return {file: name if list(short.values()).count(name) == 1 else file for file, name in short.items()}


def _check(settings: dict[str, Any], *outs: Path | None) -> None:
    """Refuses what cannot be computed or written, before anything is read."""
    from trimtab.core.files import check_out

    if settings["variants"] and not settings["length_control"]:
        raise ConfigError(
            "--variant without --length-control",
            where="the command line",
            fix="add --length-control: variants of a baseline only serve there",
        )
    check_out(*outs)


def _study(given: Sequence[PairVerdict], settings: dict[str, Any]) -> VerdictStudy:
    from trimtab.evals.verdict_study import study_verdicts

    return study_verdicts(given, **settings)


def _show(study: VerdictStudy, settings: dict[str, Any], title: str = "") -> None:
    from trimtab.cli.verdict_tables import show_study

    show_study(study, settings["half_width"], title=title)


def _write_verdicts(out: Path, given: Sequence[PairVerdict]) -> None:
    from trimtab.core.files import json_lines, write_out
    from trimtab.evals.verdicts import verdict_row

    write_out(out, json_lines(map(verdict_row, given)))
    click.echo(f"verdicts: {out}")


def _write(out: Path, found: dict[str, Any], what: str = "study") -> None:
    from trimtab.core.files import json_text, write_out

    write_out(out, json_text(found))
    click.echo(f"{what}: {out}")
