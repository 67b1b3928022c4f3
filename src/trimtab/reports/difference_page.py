"""The page about two runs or pipelines: what changed from one to the other, and whether it is more than noise."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.core.errors import DataError
from trimtab.reports import charts
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.difference import figure_rows, input_rows, noise_sentences, settings_rows, version_rows
from trimtab.reports.guide import meaning
from trimtab.reports.page import Folded, Panel, Panels, Part, Report, Section, Table, Text

_FOOTER = "Brackets are 95% intervals. This page holds everything it shows, loads nothing and runs no script."
_NUM_OPEN = 6
"""Curves shown before the reader opens the others."""


def difference_page(first: RunRecord | PipelineRecord, second: RunRecord | PipelineRecord) -> Report:
    """The page about two records of one kind. Raises DataError if one is a run and the other a pipeline."""
    names = (first.name, second.name)
    if names[0] == names[1]:
        names = ("A", "B")
    if isinstance(first, RunRecord) and isinstance(second, RunRecord):
        sections = [Section(difference_parts([first, second], names))]
    elif isinstance(first, PipelineRecord) and isinstance(second, PipelineRecord):
        sections = list(_stages(first, second, names))
    else:
        raise DataError(
            f"{first.name} and {second.name} are a run and a pipeline",
            where="the command line",
            fix="give two runs or two pipelines; the stages of a pipeline are runs in its directory",
        )
    about = f"{names[0]} ({first.name}) and {names[1]} ({second.name})" if names == ("A", "B") else " and ".join(names)
    return Report(title="What changed", about=about, sections=sections, footer=_FOOTER)


def _stages(first: PipelineRecord, second: PipelineRecord, names: Sequence[str]) -> list[Section]:
    sides = [{run.name: run for run in record.runs} for record in (first, second)]
    sections = []
    for i, stage in enumerate(dict.fromkeys([*sides[0], *sides[1]])):
        there = [side[stage] for side in sides if stage in side]
        if len(there) == 2:
            parts = difference_parts(there, names)
        else:
            parts = [Text(f"Only {names[0] if stage in sides[0] else names[1]} has this stage.")]
        sections.append(Section(parts, stage, f"stage-{i + 1}"))
    return sections


def difference_parts(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Part]:
    """What differs between runs: of two, whether it is more than noise; tables, and curves over one another."""
    parts: list[Part] = []
    if len(runs) == 2:
        parts += [Text("More than noise?", "heading"), *(Text(said) for said in noise_sentences(*runs))]
    tables = {
        "settings": settings_rows(runs),
        "data and models": input_rows(runs),
        "machine and libraries": version_rows(runs),
    }
    for what, rows in tables.items():
        if rows:
            parts += [Text(f"{what.capitalize()} that differ", "heading"), Table(rows, ("", *names))]
    if same := [what for what, rows in tables.items() if not rows]:
        parts.append(Text(f"The same: {', '.join(same)}."))
    if panels := _curves(runs, names):
        parts += [Text("Curves", "heading"), Panels(panels[:_NUM_OPEN])]
    if len(panels) > _NUM_OPEN:
        parts.append(Folded(f"{len(panels) - _NUM_OPEN} more metrics", [Panels(panels[_NUM_OPEN:])]))
    if rows := figure_rows(runs):
        parts += [Text("Mean of the last tenth of the steps", "heading"), Table(rows, ("", *names))]
    return parts


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Panel]:
    """A panel for each metric that at least two runs have, in the order of the figures."""
    panels = []
    for metric, *_ in figure_rows(runs)[1:]:
        series = {name: run.metrics[metric] for name, run in zip(names, runs, strict=True) if metric in run.metrics}
        if len(series) > 1:
            told = meaning(metric)
            chart = charts.curves(series, told.unit, max_points=max(30, charts.MAX_POINTS // len(series)))
            panels.append(Panel(told.title, told.unit, told.how_to_read, chart))
    return panels
