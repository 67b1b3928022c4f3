"""The page of a pipeline while it runs: how its stages stand, their alarms, their curves, and the newest samples.

A loop is a pipeline whose stages repeat round after round (`like`). A stage that starts from the model of another one
of its kind goes on where that one ended, so the curves of such stages are drawn one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.reports import charts
from trimtab.reports.alarms import alarms_of
from trimtab.reports.collect import RunRecord, Series
from trimtab.reports.guard_parts import guard_parts
from trimtab.reports.guide import meaning
from trimtab.reports.page import Panel, Panels, Part, Text
from trimtab.runs.facts import StageFacts
from trimtab.runs.state import holder_of, is_stepping
from trimtab.ui.library import READ_SECONDS, Library, RunState
from trimtab.ui.pages import Fragments, figures, of_pipeline, render, resume_command, sample_parts, text_of, titled

MOST_SHOWN = 48
"""Stages whose curves, alarms and samples are shown, the last ones; the table has all of them."""
MOST_CURVES = 12
"""Stages in one chart, the last ones; more curves over one another cannot be told apart."""
_CHARTS = 4
"""Charts for each kind of stage; the page of a stage has all."""


@dataclass(frozen=True)
class StageRow:
    """A stage in the table of its pipeline."""

    label: str
    stage: str
    """What it does, such as "preference"."""
    state: RunState | None
    """None if it has not begun."""
    figures: Sequence[tuple[str, str]] = ()


def pipeline_parts(library: Library, name: str, *, csrf: str, stopping: Callable[[str], bool]) -> Fragments:
    """The page of a pipeline. The name is one that `Library.find` gave; `stopping` says whether a run was asked to
    stop."""
    names = library.find().pipelines.get(name, ())
    states = [library.state(run, name) for run in names]
    shown = states[-MOST_SHOWN:]
    until = time.monotonic() + READ_SECONDS
    views = [library.view(state.name) for state in shown]
    records = [view.read(until) for view in views]
    summary = library.summary(name)
    whole = of_pipeline(name, states, summary is not None, holder_of(library.root / name))
    running = next((state for state in states if state.holder is not None), None)
    goes_on = whole.standing in ("stopped", "failed") and bool(records)
    both = list(zip(shown, records, strict=True))
    written = sorted(range(len(both)), key=lambda place: (-shown[place].changed, -place))
    newest = [records[place] for place in written]
    alarms = [
        f"{record.name}: {fact}"
        for state, record in both
        for fact in alarms_of(record, running=state.holder is not None)
    ]
    return {
        "state": render(
            "pipeline.html",
            state=whole,
            rows=_rows(library, name, states),
            figures=figures(summary or {}),
            share_read=min((view.share_read for view in views), default=1.0),
            num_each=max((view.num_each for view in views), default=1),
            shown=len(shown),
            left_out=len(states) - len(shown),
            running=running,
            stopping=running is not None and stopping(running.name),
            stepping=running is not None and is_stepping(library.root / running.name, running.holder),
            command=resume_command(library, shown[-1], records[-1]) if goes_on else None,
            csrf=csrf,
        ),
        "alarms": render("alarms.html", alarms=alarms),
        "curves": titled("Curves", curve_parts(records)),
        "guard": titled("", [part for record in records for part in _guard(record)]),
        "samples": titled("Newest samples", sample_parts(newest)),
        "file": render("file.html", file="pipeline.toml", text=text_of(library.root / name / "pipeline.toml")),
    }


def _rows(library: Library, name: str, states: Sequence[RunState]) -> list[StageRow]:
    """All stages in their order, begun or not."""
    begun = {Path(state.name).name: state for state in states}
    planned = library.stages(name)
    return [
        StageRow(label, begun[label].stage, begun[label], figures(begun[label].latest))
        if label in begun
        else StageRow(label, planned[label], None)
        for label in dict.fromkeys([*planned, *begun])
    ]


def _guard(record: RunRecord) -> list[Part]:
    parts = guard_parts(record)
    return [Text(f"Guard of {record.name}", "heading"), *parts[1:]] if parts else []


def curve_parts(records: Sequence[RunRecord]) -> list[Part]:
    """The main curves of each kind of stage, those of all its stages in one chart."""
    begins, panels = _begins(records), []
    for kind in dict.fromkeys(record.stage for record in records):
        same = [record for record in records if record.stage == kind][-MOST_CURVES:]
        for metric in _main_metrics(same):
            series = {
                record.name: _shifted(record.metrics[metric], begins[record.name])
                for record in same
                if len(record.metrics.get(metric, ()))
            }
            told = meaning(metric)
            after = " Each stage goes on where the one that it starts from ended." if _goes_on(series, begins) else ""
            most = max(30, charts.MAX_POINTS // len(series))
            chart = charts.curves(series, told.unit, max_points=most)
            panels.append(Panel(f"{told.title} · {kind}", told.unit, told.how_to_read + after, chart))
    return [Panels(panels)] if panels else []


def _main_metrics(records: Sequence[RunRecord]) -> list[str]:
    """The first metric of each chart that the pages of these runs show first, as far as one of them has logged it."""
    said = records[-1].charts
    named = [names[0] for names in (StageFacts().charts if said is None else said) if names]
    return [name for name in named if any(len(record.metrics.get(name, ())) for record in records)][:_CHARTS]


def _begins(records: Sequence[RunRecord]) -> dict[str, int]:
    """After how many steps of earlier stages of its kind each run begins: those of the run that made its model."""
    begins: dict[str, int] = {}
    for place, record in enumerate(records):
        start = record.settings.get("model")
        made = Path(start).parts[-2:] if isinstance(start, str) else ()
        earlier = (one for one in records[:place] if one.stage == record.stage and made == (one.name, "model"))
        begins[record.name] = next((begins[one.name] + one.num_steps for one in earlier), 0)
    return begins


def _shifted(series: Series, steps: int) -> Series:
    thinned = series.thinned and replace(series.thinned, last_step=series.thinned.last_step + steps)
    return Series(series.steps + steps, series.values, thinned)


def _goes_on(series: Mapping[str, Series], begins: Mapping[str, int]) -> bool:
    return any(begins[name] for name in series)
