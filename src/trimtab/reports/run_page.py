"""The page about a run or a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trimtab.reports import charts, headline
from trimtab.reports.alarms import alarms_of
from trimtab.reports.before_after import (
    NUM_OPEN_SAMPLES,
    BeforeAfter,
    before_after,
    drawn,
    evaluated_samples,
    sample_parts,
    written,
)
from trimtab.reports.card_page import card_parts, rows_of
from trimtab.reports.collect import PipelineRecord, RunRecord, Series, collect
from trimtab.reports.diagnosis import diagnose_run
from trimtab.reports.diagnosis_page import diagnosis_parts
from trimtab.reports.evidence import (
    NOTHING_ASKED,
    Asked,
    commands,
    cost_parts,
    costs_of,
    data_of,
    data_parts,
    suite_parts,
    suites_of,
)
from trimtab.reports.fits import fits_of
from trimtab.reports.guard_parts import guard_parts
from trimtab.reports.guide import meaning
from trimtab.reports.headline import interval, number, section, show
from trimtab.reports.over_kl import fit_parts, over_kl_parts
from trimtab.reports.page import (
    Folded,
    Panel,
    Panels,
    Part,
    ReplyCard,
    Report,
    SampleCard,
    Section,
    Table,
    Text,
    settings_table,
    write,
)
from trimtab.reports.repeating import Repeating
from trimtab.runs.facts import StageFacts

_FOOTER = (
    "Brackets are 95% intervals. Lines are moving means, points the values as logged; of a long curve the lowest and "
    "the highest of each stretch are drawn. Rest the pointer on one to read it. This page holds everything it shows, "
    "loads nothing and runs no script."
)


def write_report(
    directory: Path, out: Path | None = None, *, suites: Sequence[Path] = (), agreements: Sequence[Path] = ()
) -> Path:
    """Writes the page of a run or pipeline directory, with the results of suites and of studies of votes, to `out`, or
    to report.html in it, and returns the path.

    Raises DataError for any other directory and for a file that holds no such results, and EngineError if the page
    cannot be written.
    """
    page = page_of(collect(directory), Asked.read(suites=suites, agreements=agreements))
    path = out or directory / "report.html"
    return write(page, path, kept=f"the run is whole: trimtab report {directory} --out PAGE.html")


def page_of(record: RunRecord | PipelineRecord, asked: Asked = NOTHING_ASKED) -> Report:
    """The page of a record with what was asked beside it."""
    repeating = Repeating(record, asked.options)
    if isinstance(record, PipelineRecord):
        return _pipeline(record, repeating, asked)
    return _single_run(record, repeating, asked)


# --- the two kinds of page ---


def _pipeline(record: PipelineRecord, repeating: Repeating, asked: Asked) -> Report:
    samples = before_after(record)
    sections = []
    online = [run for run in record.runs if {"policy/kl", "reward/mean"} <= run.metrics.keys()]
    if online:
        again = commands([{"command": repeating.report}])
        sections.append(Section([*over_kl_parts(online), *again], "Proxy against gold", "goodhart"))
    sections += _sections(record, repeating, asked)
    for i, run in enumerate(record.runs):
        about: list[Part] = [Text(run.about)] if run.about else []
        parts = about + _run_parts(run, repeating, samples=samples is None or run is not samples.run)
        sections.append(Section(parts, run.name, f"stage-{i + 1}", _chips(run)))
    sections += _costs(record, repeating)
    if record.settings:
        sections.append(Section([Folded("Settings of the pipeline", [settings_table(record.settings)])]))
    finished = sum(run.finished for run in record.runs)
    state = "finished" if record.finished else f"{finished} of {len(record.runs)} stages finished"
    return Report(
        title=record.name,
        about=f"{' → '.join(run.name for run in record.runs)} · {state}",
        verdict=headline.pipeline_verdict(record),
        tiles=headline.pipeline_tiles(record),
        alarms=[*record.problems, *(f"{run.name}: {fact}" for run in record.runs for fact in alarms_of(run))],
        sections=sections,
        footer=_footer(repeating),
    )


def _single_run(run: RunRecord, repeating: Repeating, asked: Asked) -> Report:
    # without a measure that training does not see, the curve says only what the reward claims
    measured = "gold/mean" in run.metrics or bool(run.decision)
    over_kl = over_kl_parts([run]) if measured and run.metrics.keys() >= {"policy/kl", "reward/mean"} else []
    samples = before_after(run)
    return Report(
        title=run.name,
        about=run.about,
        chips=_chips(run),
        verdict=headline.run_verdict(run),
        alarms=alarms_of(run),
        sections=[
            Section(over_kl + _run_parts(run, repeating, samples=samples is None)),
            *_sections(run, repeating, asked),
            *_costs(run, repeating),
        ],
        footer=_footer(repeating),
    )


def _footer(repeating: Repeating) -> str:
    return f"{_FOOTER} Commands are typed in {repeating.place}; this page again: {repeating.report or '–'}"


def _sections(record: RunRecord | PipelineRecord, repeating: Repeating, asked: Asked) -> list[Section]:
    """What a reader asks for after the figures: replies before and after, suites, data and votes."""
    found = []
    if (samples := before_after(record)) is not None:
        again = commands([{"command": repeating.stage(samples.run)}])
        found.append(Section([*sample_parts(samples), *again], _title(samples), "samples"))
    if asked.suites:
        found.append(Section(suite_parts(suites_of(asked.suites)), "Suites", "suites"))
    if parts := data_parts(data_of(record, repeating, asked.studies)):
        found.append(Section(parts, "Data and votes", "data"))
    return found


def _title(samples: BeforeAfter) -> str:
    return "One reply and the best of many" if samples.run.stage == "select" else "Before and after"


def _costs(record: RunRecord | PipelineRecord, repeating: Repeating) -> list[Section]:
    parts = cost_parts(costs_of(record, repeating))
    return [Section(parts, "What it took", "costs")] if parts else []


def _chips(run: RunRecord) -> list[tuple[str, str]]:
    state = ("finished", "good") if run.finished else ("not finished", "unclear")
    return ([(run.stage, "")] if run.stage != run.name else []) + [state]


# --- one stage ---


def _run_parts(run: RunRecord, repeating: Repeating, *, samples: bool) -> list[Part]:
    again = commands([{"command": repeating.stage(run)}])
    own = _SECTIONS[run.stage](run) if run.stage in _SECTIONS else []
    if bill := diagnosis_parts(diagnose_run(run)):
        own += [*bill, *commands([{"command": repeating.diagnosis(run)}])]
    if watched := guard_parts(run):
        fitted = [] if "policy/kl" in run.metrics else fit_parts({run.name: fits_of(run)})
        own += [*watched, *fitted, *commands([{"command": repeating.decision(run)}])]
    return again + own + curve_parts(run) + (_samples(run) if samples else []) + detail_parts(run)


def curve_parts(run: RunRecord) -> list[Part]:
    """The curves of a run: those that its stage names first, the others folded."""
    left = {name: series for name, series in run.metrics.items() if len(series)}
    shown = []
    for names in StageFacts().charts if run.charts is None else run.charts:
        logged = {name: left.pop(name) for name in names if name in left}
        if logged:
            shown.append(_curve_panel(logged))
    for owner, title in (("reward", "Parts of the reward"), ("gold", "Parts of the gold score")):
        if run.stage == "online":
            parts = [name for name in left if name.startswith(f"{owner}/") and name != "reward/std"]
            if parts:
                shown.append(_curve_panel({name: left.pop(name) for name in sorted(parts)}, title=title))
    times = {name: left.pop(name) for name in list(left) if name.startswith("time/") and name.endswith("_seconds")}
    whole = times.pop("time/step_seconds", None)
    if times:
        how = "Seconds of each step by what they were spent on. The thickest band is where a speed-up would pay."
        chart = charts.stacked({_short(name): series for name, series in times.items()}, "seconds")
        shown.append(Panel("Where the time goes", "seconds per step", how, chart))
    elif whole is not None:
        shown.append(_curve_panel({"time/step_seconds": whole}))
    rest = [_curve_panel({name: left[name]}) for name in sorted(left)]
    more = "1 more metric" if len(rest) == 1 else f"{len(rest)} more metrics"
    return [Panels(shown), *([Folded(more, [Panels(rest)])] if rest else [])]


def _curve_panel(series: Mapping[str, Series], *, title: str | None = None) -> Panel:
    first, last = next(iter(series)), list(series)[-1]
    told = meaning(first)
    if len(series) == 1 and title is None:
        return Panel(told.title, told.unit, told.how_to_read, charts.curves(series, told.unit))
    both = title or told.title.removesuffix(", training pairs").replace("Training loss", "Loss")
    chart = charts.curves({_short(name): one for name, one in series.items()}, told.unit)
    return Panel(both, told.unit, meaning(last).how_to_read, chart)


def _short(name: str) -> str:
    """The short name of a metric in a chart whose title says the rest."""
    quantity = name.rpartition("/")[2].removesuffix("_seconds").replace("_", " ")
    for owner in ("accuracy", "margin"):
        quantity = {owner: "training", f"validation {owner}": "held out"}.get(quantity, quantity)
    return {"train": "training", "validation": "held out"}.get(quantity, quantity)


# --- evaluation and samples ---


def _evaluation(run: RunRecord) -> list[Part]:
    ours, theirs = dict(_numbers(section(run.summary, "policy"))), dict(_numbers(section(run.summary, "baseline")))
    names = dict.fromkeys([*ours, *theirs])
    heads = ("", "baseline", "policy") if theirs else ("", "policy")
    sides = [(name, *([theirs.get(name, "–")] if theirs else []), ours.get(name, "–")) for name in names]
    apart = {key: value for key, value in run.summary.items() if key not in ("policy", "baseline", "best_of")}
    panels = []
    if points := rows_of(section(run.summary, "best_of"), "curve", "n", "gold"):
        how = "Gold of the best of n replies of the baseline, chosen by gold itself: what perfect choice would give."
        chart = charts.best_of_n(points, {"gold": "gold"}, "gold score (0–1)")
        panels.append(Panel("Best of n", "gold score 0–1", how, chart))
    return [Table(sides, heads), Table(list(_numbers(apart))), Panels(panels)]


def _selection(run: RunRecord) -> list[Part]:
    best_of = section(run.summary, "best_of")
    panels = []
    if points := rows_of(best_of, "curve", "n", "reward"):
        prompts = show(number(best_of, "num_prompts"))
        how = "What choosing the best of n by the reward gives, for every n from the same replies, without bias."
        chart = charts.best_of_n(points, {"reward": "chosen by reward"}, "reward")
        panels.append(Panel("Reward of the best of n", f"units of reward · {prompts} prompts", how, chart))
    if points := rows_of(best_of, "curve", "n", "gold", "gold_by_gold"):
        how = (
            "Gold of the reply that the reward chose, and of the best there was. The gap is what a better reward buys."
        )
        lines = {"gold_by_gold": "chosen by gold", "gold": "chosen by reward"}
        chart = charts.best_of_n(points, lines, "gold score (0–1)")
        panels.append(Panel("Gold of the best of n", "score 0–1", how, chart))
    return [Panels(panels), *fit_parts({run.name: fits_of(run)})]


def _samples(run: RunRecord) -> list[Part]:
    """For an evaluation, replies before and after; for other runs, replies of the first and the last sampled step."""
    if not run.samples:
        return []
    if (both := evaluated_samples(run)) is not None:
        return [Text(_title(both), "heading"), *sample_parts(both)]
    steps = [step for row in run.samples if (step := number(row, "step")) is not None]
    if not steps:
        return []
    columns = []
    for step in sorted({min(steps), max(steps)}):
        rows = drawn([row for row in run.samples if number(row, "step") == step], NUM_OPEN_SAMPLES)
        columns.append([rollout_card(row, step) for row in rows])
    pairs = [SampleCard([reply for reply in side if reply is not None]) for side in zip_longest(*columns)]
    says = Text("Random replies of the first and the last step sampled.", "how")
    return [Folded("Replies sampled in training", [says, *pairs])]


def rollout_card(row: Mapping[str, Any], step: float) -> ReplyCard:
    """A sampled reply with its prompt and scores."""
    known = ((name, number(row, name)) for name in ("gold", "reward", "kl", "length"))
    scores = [(name, show(value), "") for name, value in known if value is not None]
    return ReplyCard(f"step {show(step)}", written(row.get("response")), scores, prompt=written(row.get("prompt")))


# --- numbers, settings, data, environment ---


def detail_parts(run: RunRecord) -> list[Part]:
    """Summary, settings, data and environment of a run, folded."""
    numbers = list(_numbers(run.summary)) if run.stage != "evaluate" else []
    environment = {key: value for key, value in run.environment.items() if key != "stage"}
    known = {source: one if isinstance(one, Mapping) else {} for source, one in run.data.items()}
    sources = [
        (source, show(number(one, "rows")), str(one.get("sha256", "–"))[:16], *_reading(one))
        for source, one in known.items()
    ]
    models = [(name, str(section(run.models, name).get("sha256", "–"))[:16]) for name in run.models]
    tables = {
        "Summary": Table(numbers),
        "Settings": settings_table(run.settings),
        "Models that it began with": Table(models, ("model", "SHA-256 (first 16)")),
        "Data": Table(sources, ("source", "rows", "SHA-256 (first 16)", "not used", "left out")),
        "Environment": settings_table(environment),
    }
    there = {title: table for title, table in tables.items() if table.rows}
    # if nothing was plotted, the summary is all there is to see, so it is not folded
    opened = [there.pop("Summary")] if numbers and not run.metrics else []
    names = ", ".join(title if i == 0 else title.lower() for i, title in enumerate(there))
    folded = [part for title, table in there.items() for part in (Text(title, "heading"), table)]
    return [*opened, *([Folded(names, folded)] if folded else [])]


def _reading(one: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of a source that were not used, and how many rows were left out for each kind of mistake."""
    dropped, not_used = one.get("dropped"), one.get("not_used")
    kinds = dropped.items() if isinstance(dropped, Mapping) else ()
    left_out = ", ".join(f"{num} {str(name).replace('_', ' ')}" for name, num in kinds)
    unused = ", ".join(map(str, not_used)) if isinstance(not_used, list) else ""
    return unused or "–", left_out or "–"


def _numbers(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Every number with its bounds and every text, as (name, text). Lists are left out: they have their own charts."""
    for key, value in values.items():
        base = key.removesuffix("_low").removesuffix("_high")
        if base != key and base in values:
            continue
        if isinstance(value, Mapping) and number(values, key) is None:
            yield from _numbers(value, f"{path}{key}.")
        elif (found := interval(values, key)) is not None:
            count = f" (n={found.count})" if found.count else ""
            yield f"{path}{key}", f"{show(found.value)} {headline.bounds(found)}".rstrip() + count
        elif isinstance(value, str | bool):
            yield f"{path}{key}", str(value)


_SECTIONS: Mapping[str, Callable[[RunRecord], list[Part]]] = {
    "reward": lambda run: card_parts(run.summary),
    "evaluate": _evaluation,
    "select": _selection,
}
"""What the page of a run begins with, for stages that have more to show than curves."""
