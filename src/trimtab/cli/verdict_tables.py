"""What verdicts say, as tables on the console."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.cli.tables import add_row, new_table
from trimtab.core.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.evals.verdict_study import MeanScore, VerdictStudy
    from trimtab.stats import Interval


def show_study(study: VerdictStudy, half_width: float, *, title: str = "") -> None:
    """Prints the tables of a study and its notes."""
    from rich.console import Console

    console = Console(width=160, highlight=False)
    if title:
        console.print(printable(title), markup=False)
    _show_rates(console, study, half_width)
    if any(row.first_shown is not None for row in study.win_rates):
        table = new_table("both orders", "reply shown first preferred", "orders disagree")
        for row in study.win_rates:
            if row.first_shown is not None:
                first = f"{percent(row.first_shown)} (n={row.first_shown.count})"
                add_row(table, f"{row.model} against {row.baseline}", first, f"{row.flip_fraction:.0%}")
        console.print(table)
    if study.style_controlled is not None:
        table = new_table("style", "gain in log-odds from a typical difference")
        for name, gain in study.style_controlled.effects:
            add_row(table, name, f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]" if gain.count else "-")
        console.print(table)
    if study.differences:
        table = new_table("of two models", "difference in points", "p", "p (Holm)")
        neighbours = {(a.model, b.model, b.baseline) for a, b in itertools.pairwise(study.win_rates)}
        shown = [pair for pair in study.differences if (pair.model, pair.other, pair.baseline) in neighbours]
        for pair in shown:
            gap = f"{percent(pair.difference, signed=True)} (n={pair.difference.count})"
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
        console.print(f"note: {printable(note)}", markup=False)


def _show_rates(console: Console, study: VerdictStudy, half_width: float) -> None:
    optional: list[tuple[str, dict[Any, Interval]]] = []
    if any(row.weighted is not None for row in study.win_rates):
        weighted = {(row.model, row.baseline): row.weighted or row.rate for row in study.win_rates}
        optional.append(("weighted", weighted))
    if study.length_controlled:
        at_length = {(row.model, row.baseline): row.rate for row in study.length_controlled}
        optional.append(("at equal length", at_length))
    if study.style_controlled is not None:
        at_style = {(row.model, row.baseline): row.rate for row in study.style_controlled.rates}
        optional.append(("at equal style", at_style))
    names = [name for name, _ in optional]
    table = new_table("model", "baseline", "win rate", *names, "won, tied, lost", f"±{half_width:.1%} takes")
    for row in study.win_rates:
        rates = [percent(found[row.model, row.baseline]) for _, found in optional]
        counts = f"{row.num_wins}, {row.num_ties}, {row.num_losses}"
        rate = f"{percent(row.rate)} (n={row.rate.count})"
        add_row(table, row.model, row.baseline, rate, *rates, counts, f"{row.prompts_for_width} prompts")
    console.print(table)


def show_scores(scores: Sequence[MeanScore]) -> None:
    """Prints the mean scores of single replies."""
    from rich.console import Console

    table = new_table("model", "turn", "mean score")
    for row in scores:
        value = f"{row.score.value:.2f} [{row.score.low:.2f}, {row.score.high:.2f}] (n={row.score.count})"
        add_row(table, row.model, "all" if row.turn is None else str(row.turn), value)
    Console(width=160, highlight=False).print(table)


def percent(found: Interval, *, signed: bool = False) -> str:
    """A share or a difference in percent, with its bounds if it has any."""
    value, low, high = (f"{100 * x:{'+' if signed else ''}.1f}" for x in (found.value, found.low, found.high))
    bounds = "" if math.isnan(found.low) else f" [{low}, {high}]"
    return f"{value}{'' if signed else '%'}{bounds}"
