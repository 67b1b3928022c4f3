"""The page about a campaign's agreement: how far annotators agree, who leans to a side, which items divide them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.reports import charts
from trimtab.reports.charts import AMBER, BLUE, LIME, ROSE, TEAL, VIOLET
from trimtab.reports.headline import Verdict
from trimtab.reports.page import Folded, Panel, Panels, Part, Report, Section, Table, Text
from trimtab.stats import Interval
from trimtab.votes.agreement import Agreement
from trimtab.votes.annotators import AnnotatorCard
from trimtab.votes.study import Study

MAX_ROWS = 40
"""Annotators, pairs and slices drawn in one chart; tables hold more."""
_BRACKETS = "Brackets are 95% intervals; those of coefficients from a bootstrap over items, or rankings and prompts."
_MEANS = {
    "raw agreement": "Two annotators drawn from an item's chose alike so often. Chance is in it.",
    "one against": "What one person scores against the others: the figure to compare a judge or reward model with.",
    "Krippendorff": "1 is perfect, 0 is chance. Any number of annotators, votes may be missing.",
    "Fleiss": "1 is perfect, 0 is chance. Items with equally many votes.",
    "Cohen": "1 is perfect, 0 is chance. Two annotators, each with habits of their own.",
    "Gwet": "1 is perfect. Does not collapse where one choice is common.",
}


def page_of(study: Study, *, title: str) -> Report:
    """The page of a study."""
    sections = [
        Section([_coefficients(study.coefficients), _agreement_charts(study)], "Agreement"),
        Section([_annotator_charts(study), _annotators(study.annotators)], "Annotators"),
    ]
    if study.contested:
        rows = [
            (found.item, ", ".join(f"{n} × {name}" for name, n in found.votes), f"{found.entropy:.2f}")
            for found in study.contested
        ]
        sections.append(Section([Table(rows, ("item", "votes", "entropy (nats)"))], "Most contested items"))
    if study.ladder is not None:
        sections.append(Section(_ladder(study), "Ratings of the models"))
    if study.pairs:
        sections.append(Section(_pairs(study), "Pairs of annotators"))
    if study.notes:
        sections.append(Section([Text(note) for note in study.notes]))
    return Report(
        title=title,
        about=counted(study),
        verdict=Verdict("neutral", headline(study), tuple(sentences(study))),
        alarms=[f"{card.name}: {flag}" for card in study.annotators for flag in card.flags],
        sections=sections,
        footer=_BRACKETS,
    )


def counted(study: Study) -> str:
    """The size of a study as text, such as 1,188 votes by 8 annotators on 400 items."""

    def several(num: int, noun: str) -> str:
        return f"{num:,} {noun}{'' if num == 1 else 's'}"

    votes, people = several(study.num_votes, "vote"), several(study.num_annotators, "annotator")
    return f"{votes} by {people} on {several(study.num_items, 'item')}"


def headline(study: Study) -> str:
    """The agreement in one sentence."""
    raw, alpha = study.coefficients[0], _named(study, "Krippendorff's alpha (nominal)")
    if raw.undefined:
        return f"Agreement is undefined: {raw.undefined}."
    beyond = f"alpha {alpha.text}" if alpha is not None and not alpha.undefined else "beyond chance it is undefined"
    return f"Two annotators choose alike on {raw.interval.value:.0%} of items; {beyond}."


def sentences(study: Study) -> list[str]:
    """What follows from the agreement, in sentences."""
    found = []
    alone = _named(study, "one against the majority of the others")
    if alone is not None and not alone.undefined:
        found.append(
            f"One annotator agrees with the majority of the others on {alone.interval.value:.0%}: "
            "a judge or reward model that reaches this agrees as well as a person does."
        )
    if study.noise is not None and not study.noise.undefined:
        p = study.noise.interval.value
        found.append(
            f"If all were equally good and erred independently, one vote would be right with chance {p:.2f} and a "
            f"label smoothing of {1 - p:.2f} would fit; a reference line, not a ceiling."
        )
    found.append("Between 60% and 80% raw agreement is what published preference campaigns report.")
    return found


def _named(study: Study, name: str) -> Agreement | None:
    return next((found for found in study.coefficients if found.name == name), None)


def _coefficients(coefficients: Sequence[Agreement]) -> Table:
    rows = []
    for found in coefficients:
        means = next((text for start, text in _MEANS.items() if found.name.startswith(start)), "")
        rows.append((found.name, found.text, " ".join(filter(None, [means, found.note]))))
    return Table(rows, ("", "value [95% interval] (items)", "how to read it"))


def _agreement_charts(study: Study) -> Panels:
    panels = []
    known = [found for found in study.coefficients if not found.undefined]
    if known:
        rows = [
            (found.name, found.interval, TEAL if found.name.startswith(("raw", "one against")) else BLUE)
            for found in known
        ]
        how = "Dots with 95% intervals. Raw agreement (green) holds chance; coefficients (blue) are 0 at chance."
        panels.append(Panel("Coefficients", "1 is perfect", how, charts.dots(rows, "coefficient", line=0.0)))
    if study.split:
        share, count = zip(*study.split, strict=True)
        how = "Items by how large a share of their votes agree. Many at the left: replies too alike, or unclear rules."
        chart = charts.columns(share, count, "share of votes for the favourite", "items")
        panels.append(Panel("How divided items are", "items with two votes or more", how, chart))
    parts = [(name, raw.interval, AMBER) for name, raw, _ in study.slices if not raw.undefined][:MAX_ROWS]
    if parts:
        how = "Raw agreement by slice, with its interval. A slice that lags has unclear guidelines or harder items."
        panels.append(Panel("Slices", "raw agreement", how, charts.dots(parts, "raw agreement", line=0.5)))
    return Panels(panels)


def _annotator_charts(study: Study) -> Panels:
    cards = study.annotators[:MAX_ROWS]
    panels = []

    def rows(values: Sequence[Interval], colour: str) -> list[charts.Bar]:
        return [
            (card.name, value, colour) for card, value in zip(cards, values, strict=True) if not math.isnan(value.value)
        ]

    if agree := rows([card.agreement for card in cards], TEAL):
        mean = float(np.mean([value.value for _, value, _ in agree]))
        how = "How often each is with the majority of the others; the line is the mean of annotators."
        panels.append(Panel("With the others", "share of votes", how, charts.dots(agree, "share", line=mean)))
    if left := rows([card.left_bias for card in cards], VIOLET):
        how = (
            "Lean to the left of the screen, the others' opinion of the item held equal. 0 is none, 0.2 means 55% left."
        )
        panels.append(Panel("Position", "log-odds", how, charts.dots(left, "lean to the left", line=0.0)))
    seconds = [Interval(card.median_seconds, math.nan, math.nan, card.num_votes) for card in cards]
    if speed := rows(seconds, AMBER):
        how = "Median time of a vote. Much faster than the rest deserves a look at the votes themselves."
        panels.append(Panel("Speed", "seconds", how, charts.dots(speed, "median seconds")))
    if study.skills:
        colours = {"one_coin": BLUE, "dawid_skene": LIME, "mace": ROSE}
        names = {card.name for card in cards}
        skills = [
            (skill.annotator, Interval(skill.value, math.nan, math.nan, 0), colours[skill.method])
            for skill in study.skills
            if skill.annotator in names
        ]
        how = (
            "Chance that an answer is right: one coin (blue), Dawid and Skene (green); MACE (red): that it is no guess."
        )
        panels.append(Panel("Skill", "chance", how, charts.dots(skills, "skill")))
    return Panels(panels)


def _annotators(cards: Sequence[AnnotatorCard]) -> Table:
    head = ("", "votes", "with the others", "left", "lean", "ties", "seconds", "hasty", "repeats alike", "longest run")
    rows = [
        (
            card.name,
            f"{card.num_votes:,}",
            _estimate(card.agreement),
            _estimate(card.left),
            _estimate(card.left_bias, "+.2f"),
            _estimate(card.ties),
            f"{card.median_seconds:.1f}" if not math.isnan(card.median_seconds) else "–",
            _estimate(card.hasty),
            _estimate(card.consistency),
            card.longest_run,
        )
        for card in cards
    ]
    return Table(rows, head)


def _ladder(study: Study) -> list[Part]:
    assert study.ladder is not None
    rated = [(player.name, player.elo, BLUE) for player in study.ladder.players if not player.undefined]
    how = "Bradley-Terry ratings, 1000 the mean: 100 points more win 64% of decided games. Overlapping is undecided."
    cells = [
        (
            player.name,
            player.rank or "–",
            player.text,
            f"{player.elo.count:,}",
            player.component + 1,
        )
        for player in study.ladder.players
    ]
    style = [
        (name, f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] log-odds for a usual difference")
        for name, gain in study.ladder.style
    ]
    ladder = [Panel("Ladder", "Elo", how, charts.dots(rated[:MAX_ROWS], "rating", line=1000.0))] if rated else []
    return [
        Panels(ladder),
        Table(cells, ("model", "rank", "rating [95% interval]", "games", "group")),
        Table(style, ("style", "what it gains")),
    ]


def _pairs(study: Study) -> list[Part]:
    names = [card.name for card in study.annotators[:MAX_ROWS]]
    place = {name: i for i, name in enumerate(names)}
    values = np.full((len(names), len(names)), math.nan)
    for pair in study.pairs:
        if pair.first in place and pair.second in place:
            i, j = place[pair.first], place[pair.second]
            values[i, j] = values[j, i] = pair.agreement.value
    how = "How often each two agree on the items both judged. A pale row is one annotator against all."
    rows = [
        (f"{pair.first} and {pair.second}", f"{pair.agreement.count:,}", _estimate(pair.agreement), pair.kappa.text)
        for pair in study.pairs[: 10 * MAX_ROWS]
    ]
    left_out = len(study.pairs) - len(rows)
    square = Panel("Who agrees with whom", "share of shared items", how, charts.matrix(names, values.tolist()))
    table: list[Part] = [Table(rows, ("", "items", "agreement", "Cohen's kappa"))]
    remark: list[Part] = [Text(f"{left_out} pairs with fewer items are not shown.")] if left_out else []
    return [Panels([square] if len(names) > 2 else []), Folded(f"{len(study.pairs)} pairs", table + remark)]


def _estimate(estimate: Interval, form: str = ".0%") -> str:
    """An estimate with its bounds, if they are known, as text, such as 71% [68%, 74%]."""
    if math.isnan(estimate.value):
        return "–"
    bounds = "" if math.isnan(estimate.low) else f" [{estimate.low:{form}}, {estimate.high:{form}}]"
    return f"{estimate.value:{form}}{bounds}"
