"""What the pages of the live view show. A page is a few named parts, each of which can be replaced while it is open."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

import trimtab.reports
from trimtab.reports.alarms import alarms_of
from trimtab.reports.collect import RunRecord
from trimtab.reports.difference_page import difference_parts
from trimtab.reports.guard_parts import guard_parts
from trimtab.reports.headline import number, section, show
from trimtab.reports.markup import templates
from trimtab.reports.page import Folded, Part, SampleCard
from trimtab.reports.run_page import curve_parts, detail_parts, rollout_card
from trimtab.runs.loop import SHOWN
from trimtab.runs.state import RunStanding, holder_of, is_stepping
from trimtab.ui.library import READ_SECONDS, Found, Library, RunState, pipelines_first

HERE = Path(__file__).parent
REPORTS = Path(trimtab.reports.__file__).parent
NUM_FIGURES = 3
NUM_SAMPLES = 24
NUM_OPEN_SAMPLES = 6
MOST_COMPARED = 12
"""Runs on one page of a comparison; more curves over one another cannot be told apart."""
Fragments = Mapping[str, Markup]
"""The parts of a page as HTML, by the id of their element."""


@dataclass(frozen=True)
class Line:
    """A row of the list: a run, or a pipeline with the state that its stages give it."""

    name: str
    label: str
    state: RunState
    figures: Sequence[tuple[str, str]]
    is_pipeline: bool = False
    inside: bool = False
    """Whether it is a stage of the pipeline above it."""


def age(seconds: float) -> str:
    """How long ago something was, such as "12 s ago" or "3 d ago"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


_TEMPLATES = templates(HERE / "templates", REPORTS / "templates", all_visible=True)
_TEMPLATES.filters["ago"] = lambda since: age(time.time() - since) if since else "–"


def render(template: str, **values: Any) -> Markup:
    """A template with its values. A lone surrogate, which JSON can carry and UTF-8 cannot, becomes a question mark."""
    return Markup(_TEMPLATES.get_template(template).render(**values).encode("utf-8", errors="replace").decode())


# --- the list ---


def list_parts(library: Library) -> Fragments:
    """All runs and pipelines."""
    found = library.find()
    lines = _lines(library, found)
    return {"runs": render("list.html", lines=lines, found=found, root=library.shown, most=MOST_COMPARED)}


def _lines(library: Library, found: Found) -> list[Line]:
    lines = []
    for pipeline, names in pipelines_first(found):
        states = [library.state(name, pipeline) for name in names]
        rows = [
            Line(s.name, Path(s.name).name if pipeline else s.name, s, figures(s.latest), inside=pipeline is not None)
            for s in states
        ]
        if pipeline is not None:
            summary = library.summary(pipeline)
            whole = of_pipeline(pipeline, states, summary is not None, holder_of(library.root / pipeline))
            lines.append(Line(pipeline, pipeline, whole, figures(summary or {}), is_pipeline=True))
        lines += rows
    return lines


def of_pipeline(name: str, states: Sequence[RunState], finished: bool, holder: int | None) -> RunState:
    """The state of a pipeline: running while a process holds it, else that of the first stage that is not finished."""
    whole: RunStanding = "finished" if finished else "stopped"
    standing = next((s.standing for s in states if s.standing != "finished"), whole)
    if holder is not None and standing != "damaged":
        standing = "running"
    return RunState(
        name=name,
        stage="pipeline",
        standing=standing,
        said="" if standing != "stopped" or finished else "between two stages",
        step=sum(s.standing == "finished" for s in states),
        num_steps=None,
        latest={},
        changed=max((s.changed for s in states), default=0.0),
        holder=holder or next((s.holder for s in states if s.holder is not None), None),
    )


def figures(latest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main figures of a row of metrics or of a summary, as names and numbers."""
    found = {word: show(value) for name, word in SHOWN.items() if (value := number(latest, name)) is not None}
    policy, baseline = section(latest, "policy"), section(latest, "baseline")
    for judge in ("gold", "reward"):
        for after, before in ((judge, baseline.get(judge)), (f"{judge}_final", policy.get(f"{judge}_sft"))):
            if (value := number(policy, after)) is not None:
                start = number({"before": before}, "before")
                found[judge] = f"{show(start)} → {show(value)}" if start is not None else show(value)
    if (accuracy := number(latest, "accuracy")) is not None:
        found["accuracy"] = show(accuracy)
    return list(found.items())[:NUM_FIGURES]


# --- one run ---


def run_parts(library: Library, name: str, *, csrf: str, stopping: bool) -> Fragments:
    """The page of a run. The name is one that `Library.find` gave."""
    found = library.find()
    state = library.state(name, found.runs.get(name))
    view = library.view(name)
    record = view.read()
    return {
        "state": render(
            "state.html",
            state=state,
            record=record,
            share_read=view.share_read,
            num_each=view.num_each,
            figures=figures(state.latest),
            command=resume_command(library, state, record) if state.standing in ("stopped", "failed") else None,
            csrf=csrf,
            stopping=stopping,
            stepping=is_stepping(library.root / name, state.holder),
        ),
        "alarms": render("alarms.html", alarms=alarms_of(record, running=state.holder is not None)),
        "curves": titled("Curves", curve_parts(record)),
        "guard": titled("", guard_parts(record)),
        "samples": titled("Newest samples", sample_parts([record])),
        "file": render("file.html", file="settings.toml", text=text_of(library.root / name / "settings.toml")),
        "details": titled("", detail_parts(record)),
    }


def titled(title: str, parts: Sequence[Part]) -> Markup:
    """Parts under a title, which is left out if there are none."""
    return render("section.html", title=title if parts else "", parts=parts)


def sample_parts(records: Sequence[RunRecord]) -> list[Part]:
    """The newest samples of runs, those of the first run before those of the others and the newest first, two beside
    each other; of several runs each says whose it is."""
    rows = [(record.name, row) for record in records for row in reversed(record.samples) if "response" in row]
    cards = [(run, rollout_card(row, number(row, "step") or 0)) for run, row in rows[:NUM_SAMPLES]]
    told = [card if len(records) == 1 else replace(card, who=f"{run}, {card.who}") for run, card in cards]
    pairs = [SampleCard(told[i : i + 2]) for i in range(0, len(told), 2)]
    rest = pairs[NUM_OPEN_SAMPLES // 2 :]
    return [*pairs[: NUM_OPEN_SAMPLES // 2], *([Folded("More samples", rest)] if rest else [])]


def text_of(path: Path, most: int = 100_000) -> str:
    """The beginning of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(most).decode(errors="replace")
    except OSError:
        return ""


def resume_command(library: Library, state: RunState, record: RunRecord) -> str:
    """The command that goes on with a run or, for a stage of a pipeline, with the pipeline.

    It begins with the directory of the command that began the run, since paths of the settings may be relative to it.
    """
    out = library.root / (state.pipeline or state.name)
    words = ["run", out / "pipeline.toml"] if state.pipeline else [state.stage, out / "settings.toml"]
    command = shlex.join(["trimtab", *map(str, words), "--out", str(out)])
    place = section(record.environment, "place").get("cwd")
    return f"cd {shlex.quote(place)} && {command}" if isinstance(place, str) else command


# --- several runs ---


def comparison_parts(library: Library, names: Sequence[str]) -> Fragments:
    """Runs beside one another: what differs, and their curves."""
    until = time.monotonic() + READ_SECONDS
    views = [library.view(name) for name in names]
    records = [view.read(until) for view in views]
    share = min((view.share_read for view in views), default=1.0)
    noise = None
    if not all(view.has_all_samples for view in views):
        command = shlex.join(["trimtab", "report", "diff", *(str(library.root / name) for name in names)])
        noise = [f"This page keeps the newest samples only, so it does not say. {command} reads all of them."]
    parts = difference_parts(records, _labels(names), noise) if len(records) > 1 else []
    num_each = max((view.num_each for view in views), default=1)
    return {
        "state": render("compared.html", names=names, share_read=share, num_each=num_each),
        "comparison": titled("", parts),
    }


def _labels(names: Sequence[str]) -> list[str]:
    """The names without the directories that all of them begin with."""
    parents = [os.path.dirname(name) for name in names]
    common = os.path.commonpath(parents) if all(parents) else ""
    return [os.path.relpath(name, common) if common else name for name in names]
