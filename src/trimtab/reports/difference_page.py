"""The page about two runs or pipelines: what changed from one to the other, and whether it is more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.core.errors import DataError
from trimtab.reports import charts
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.difference import figure_rows, input_rows, noise_sentences, settings_rows, version_rows
from trimtab.reports.guide import meaning
from trimtab.reports.page import Folded, Panel, Panels, Part, Report, Section, Table, Text

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
    problems = [
        Text(f"{name}: {said}")
        for name, record in zip(names, (first, second), strict=True)
        if isinstance(record, PipelineRecord)
        for said in (*([] if record.finished else ["the pipeline is not finished"]), *record.problems)
    ]
    if problems:
        sections.insert(0, Section([*problems]))
    about = f"{names[0]} ({first.name}) and {names[1]} ({second.name})" if names == ("A", "B") else " and ".join(names)
    return Report(title="What changed", about=about, sections=sections)


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


def difference_parts(runs: Sequence[RunRecord], names: Sequence[str], noise: Sequence[str] | None = None) -> list[Part]:
    """What differs between runs: of two, whether it is more than noise; tables, and curves over one another.

    `noise` is what to say of the noise if the records do not hold all samples.
    """
    parts: list[Part] = []
    for name, run in zip(names, runs, strict=True):
        state = [] if run.finished else [f"not finished: {run.num_steps} steps are logged"]
        parts += [Text(f"{name}: {said}") for said in (*state, *run.problems)]
    if len(runs) == 2:
        said = noise_sentences(*runs) if noise is None else noise
        parts += [Text("More than noise?", "heading"), *(Text(sentence) for sentence in said)]
    tables: dict[str, tuple[list[tuple[str, ...]], list[list[Mapping[str, Any]]]]] = {
        "settings": (settings_rows(runs), [[run.settings] for run in runs]),
        "data and models": (input_rows(runs), [[run.data, run.models] for run in runs]),
        "machine and libraries": (version_rows(runs), [[run.environment] for run in runs]),
    }
    for what, (rows, _) in tables.items():
        if rows:
            parts += [Text(f"{what.capitalize()} that differ", "heading"), Table(rows, ("", *names))]
    # a record that is missing in one run is not the same as that of another, though no row may differ
    known = {what: all(any(kinds) for kinds in held) for what, (_, held) in tables.items()}
    if same := [what for what, (rows, _) in tables.items() if not rows and known[what]]:
        parts.append(Text(f"The same: {', '.join(same)}."))
    if unknown := [what for what, is_known in known.items() if not is_known]:
        parts.append(Text(f"Not recorded in every run, so not known to be the same: {', '.join(unknown)}."))
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
