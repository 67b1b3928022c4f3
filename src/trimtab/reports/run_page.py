"""The page about a run or a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.files import writing
from trimtab.reports import charts, headline
from trimtab.reports.alarms import alarms_of
from trimtab.reports.card_page import card_parts, rows_of
from trimtab.reports.collect import PipelineRecord, RunRecord, Series, collect
from trimtab.reports.diagnosis import diagnose_run
from trimtab.reports.diagnosis_page import diagnosis_parts
from trimtab.reports.guard_parts import guard_parts
from trimtab.reports.guide import meaning
from trimtab.reports.headline import interval, number, section, show
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
from trimtab.runs.facts import StageFacts

NUM_SAMPLES = 12
"""Samples shown: a random draw with a fixed seed, so that they are typical and the same each time."""
NUM_OPEN_SAMPLES = 4
"""Samples shown before the reader opens the others."""

_FOOTER = (
    "Brackets are 95% intervals. Lines are moving means, points the values as logged; of a long curve the lowest and "
    "the highest of each stretch are drawn. Rest the pointer on one to read it. This page holds everything it shows, "
    "loads nothing and runs no script."
)


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Writes the page of a run or pipeline directory to `out`, or to report.html in it, and returns the path.

    Raises DataError for any other directory, and EngineError if the page cannot be written.
    """
    page, path = page_of(collect(directory)), out or directory / "report.html"
    with writing("the page", path, kept=f"the run is whole: trimtab report {directory} --out PAGE.html"):
        return write(page, path)


def page_of(record: RunRecord | PipelineRecord) -> Report:
    """The page of a record."""
    return _pipeline(record) if isinstance(record, PipelineRecord) else _single_run(record)


# --- the two kinds of page ---


def _pipeline(record: PipelineRecord) -> Report:
    sections = []
    online = [run for run in record.runs if {"policy/kl", "reward/mean"} <= run.metrics.keys()]
    if online:
        sections.append(Section(_over_kl(online), "Proxy against gold", "goodhart"))
    evaluated = headline.evaluation(record.runs)
    if evaluated is not None and evaluated.samples:
        sections.append(Section(_before_after(evaluated), "Before and after", "samples"))
    for i, run in enumerate(record.runs):
        about: list[Part] = [Text(run.about)] if run.about else []
        parts = about + _run_parts(run, samples=run is not evaluated)
        sections.append(Section(parts, run.name, f"stage-{i + 1}", _chips(run)))
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
        footer=_FOOTER,
    )


def _single_run(run: RunRecord) -> Report:
    over_kl = _over_kl([run]) if {"policy/kl", "reward/mean", "gold/mean"} <= run.metrics.keys() else []
    return Report(
        title=run.name,
        about=run.about,
        chips=_chips(run),
        verdict=headline.run_verdict(run),
        alarms=alarms_of(run),
        sections=[Section(over_kl + _run_parts(run, samples=True))],
        footer=_FOOTER,
    )


def _chips(run: RunRecord) -> list[tuple[str, str]]:
    state = ("finished", "good") if run.finished else ("not finished", "unclear")
    return ([(run.stage, "")] if run.stage != run.name else []) + [state]


# --- one stage ---


def _run_parts(run: RunRecord, *, samples: bool) -> list[Part]:
    own = _SECTIONS[run.stage](run) if run.stage in _SECTIONS else []
    own += diagnosis_parts(diagnose_run(run)) + guard_parts(run)
    return own + curve_parts(run) + (_samples(run) if samples else []) + detail_parts(run)


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


def _over_kl(runs: Sequence[RunRecord]) -> list[Part]:
    names = {name for run in runs for name in run.metrics if name.startswith("gold/")}
    how = (
        "Rightwards is further from the reference. The reward is what training sees, gold what it is meant to stand "
        "for; where reward still climbs and gold turns down, the reward model is being gamed. "
    )
    if not names:
        how = "Rightwards is further from the reference. Without a gold score this shows only what the reward claims."
    across = "√nats across"
    reward = charts.over_kl(runs, "reward/mean", "reward", wide=True)
    panels = [Panel("Reward over √KL", f"units of reward, {across}", how, reward)]
    if "gold/mean" in names:
        how = "A large dot marks the highest smoothed gold; faint points are single steps."
        gold = charts.over_kl(runs, "gold/mean", "gold score (0–1)", wide=True, peak=True)
        panels.append(Panel("Gold score over √KL", f"score 0–1, {across}", how, gold))
    how = "One part of the gold score. The part that falls first is the one that the reward does not see."
    parts = [
        Panel(name.removeprefix("gold/"), "score", how, charts.over_kl(runs, name, "score", peak=True))
        for name in sorted(names - {"gold/mean"})
    ]
    return [Panels(panels), *([Folded("The parts of gold over √KL", [Panels(parts)])] if parts else [])]


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
    return [Panels(panels)]


def _before_after(run: RunRecord) -> list[Part]:
    if run.stage == "select":
        before, after, which = "First reply", "Best reply", "prompts on file"
    else:
        before, after, which = "Baseline", "Final policy", "held-out prompts on file"
    shown = _drawn(run.samples)
    cards = []
    for row in shown:
        replies = [_side(before, row, "baseline_")] if "baseline_response" in row else []
        cards.append(SampleCard([*replies, _side(after, row, "")], prompt=_written(row.get("prompt"))))
    rest = cards[NUM_OPEN_SAMPLES:]
    chosen = f"{len(shown)} of the {len(run.samples)} {which}, drawn at random rather than chosen"
    how = f"{chosen}: expect some failures. Gold is true quality from 0 to 1; reward is what the run's rewards give."
    return [Text(how), *cards[:NUM_OPEN_SAMPLES], *([Folded(f"{len(rest)} more", rest)] if rest else [])]


def _side(who: str, row: Mapping[str, Any], prefix: str) -> ReplyCard:
    scores = []
    judges = [key for key in row if key not in ("step", "kl", "length") and not key.startswith("baseline_")]
    for name in judges:
        value, other = number(row, prefix + name), number(row, name if prefix else f"baseline_{name}")
        if value is not None:
            change = "" if prefix or other is None or value == other else "up" if value > other else "down"
            scores.append((name, show(value), change))
    return ReplyCard(who, _written(row.get(f"{prefix}response")), scores)


def _samples(run: RunRecord) -> list[Part]:
    """For an evaluation, replies before and after; for other runs, replies of the first and the last sampled step."""
    if not run.samples:
        return []
    if "baseline_response" in run.samples[0]:
        title = "One reply and the best of many" if run.stage == "select" else "Before and after"
        return [Text(title, "heading"), *_before_after(run)]
    steps = [step for row in run.samples if (step := number(row, "step")) is not None]
    if not steps:
        return []
    columns = []
    for step in sorted({min(steps), max(steps)}):
        rows = _drawn([row for row in run.samples if number(row, "step") == step], NUM_OPEN_SAMPLES)
        columns.append([rollout_card(row, step) for row in rows])
    pairs = [SampleCard([reply for reply in side if reply is not None]) for side in zip_longest(*columns)]
    says = Text("Random replies of the first and the last step sampled.", "how")
    return [Folded("Replies sampled in training", [says, *pairs])]


def rollout_card(row: Mapping[str, Any], step: float) -> ReplyCard:
    """A sampled reply with its prompt and scores."""
    known = ((name, number(row, name)) for name in ("gold", "reward", "kl", "length"))
    scores = [(name, show(value), "") for name, value in known if value is not None]
    return ReplyCard(f"step {show(step)}", _written(row.get("response")), scores, prompt=_written(row.get("prompt")))


def _drawn(rows: Sequence[Mapping[str, Any]], num: int = NUM_SAMPLES) -> list[Mapping[str, Any]]:
    """`num` randomly drawn rows in their original order. The draw depends only on the number of rows."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:num]
    return [rows[i] for i in sorted(chosen.tolist())]


def _written(value: object) -> str:
    return "–" if value is None else str(value)


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
    tables = {
        "Summary": Table(numbers),
        "Settings": settings_table(run.settings),
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
    dropped = one.get("dropped")
    kinds = dropped.items() if isinstance(dropped, Mapping) else ()
    left_out = ", ".join(f"{num} {str(name).replace('_', ' ')}" for name, num in kinds)
    return ", ".join(map(str, one.get("not_used") or ())) or "–", left_out or "–"


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
