"""One self-contained page about a run or a pipeline: it needs no network and no other file, and runs only its own code.

Model text, prompts, settings and file names are untrusted. They reach the page only through `markup`, and the page's
security policy names the two scripts it may run by their hashes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.files import write_whole, writing
from trimtab.reports import charts, headline
from trimtab.reports.collect import PipelineRecord, RunRecord, Series, collect
from trimtab.reports.frame import Panels, document, folded, grid, settings_table, table
from trimtab.reports.guide import meaning
from trimtab.reports.headline import interval, number, section, show
from trimtab.reports.markup import Html, join, tag
from trimtab.stats import Interval

NUM_SAMPLES = 12
"""Samples shown: a random draw with a fixed seed, so that they are typical and the same each time."""
NUM_OPEN_SAMPLES = 4
"""Samples shown before the reader opens the others."""

_CHARTS = (("loss/train", "loss/validation"), ("optimizer/learning_rate",), ("time/tokens_per_second",))
"""The metrics of the first charts, for a run that does not say which to show first."""


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Writes the page of a run or pipeline directory to `out`, or to report.html in it, and returns the path.

    Raises DataError for any other directory, and EngineError if the page cannot be written.
    """
    page = render(collect(directory))
    # a lone surrogate, which JSON can carry, has no UTF-8 form
    path, text = out or directory / "report.html", page.encode("utf-8", errors="replace").decode()
    with writing("the page", path, kept=f"the run is whole: trimtab report {directory} --out PAGE.html"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return path


def render(record: RunRecord | PipelineRecord) -> str:
    """The page of a record, as HTML text."""
    make = Panels()
    body = _pipeline(record, make) if isinstance(record, PipelineRecord) else _single_run(record, make)
    return document(f"{record.name} · trimtab", body)


# --- the two kinds of page ---


@dataclass(frozen=True)
class _PagePart:
    """A part of a pipeline's page."""

    title: str
    anchor: str
    body: Html
    chips: Html = field(default_factory=lambda: Html(""))


def _pipeline(record: PipelineRecord, make: Panels) -> Html:
    parts = []
    online = [run for run in record.runs if {"policy/kl", "reward/mean"} <= run.metrics.keys()]
    if online:
        parts.append(_PagePart("Proxy against gold", "goodhart", _proxy_against_gold(online, make)))
    evaluated = headline.evaluation(record.runs)
    if evaluated is not None and evaluated.samples:
        parts.append(_PagePart("Before and after", "samples", _before_after(evaluated)))
    for i, run in enumerate(record.runs):
        body = _run_body(run, make, samples=run is not evaluated)
        parts.append(_PagePart(run.name, f"stage-{i + 1}", body, _chips(run)))
    return join(
        tag("header", tag("h1", record.name), tag("p", _pipeline_line(record), class_="soft")),
        tag("nav", [tag("a", part.title, href=f"#{part.anchor}") for part in parts], aria_label="Contents"),
        _verdict(headline.pipeline_verdict(record)),
        _tiles(headline.pipeline_tiles(record)),
        _alarms([*record.problems, *(f"{run.name}: {fact}" for run in record.runs for fact in headline.alarms(run))]),
        [tag("section", tag("h2", part.title, part.chips, id=part.anchor), part.body) for part in parts],
        folded("Settings of the pipeline", settings_table(record.settings)) if record.settings else None,
        _footer(),
    )


def _single_run(run: RunRecord, make: Panels) -> Html:
    verdict = headline.run_verdict(run)
    return join(
        tag("header", tag("h1", run.name, _chips(run)), tag("p", run.about, class_="soft")),
        _verdict(verdict) if verdict is not None else None,
        _alarms(headline.alarms(run)),
        _proxy_against_gold([run], make) if {"policy/kl", "reward/mean", "gold/mean"} <= run.metrics.keys() else None,
        _run_body(run, make, samples=True, says=False),
        _footer(),
    )


def _pipeline_line(record: PipelineRecord) -> str:
    finished = sum(run.finished for run in record.runs)
    state = "finished" if record.finished else f"{finished} of {len(record.runs)} stages finished"
    return f"{' → '.join(run.name for run in record.runs)} · {state}"


def _chips(run: RunRecord) -> Html:
    state = ("finished", "chip good") if run.finished else ("not finished", "chip unclear")
    return join(
        tag("span", run.stage, class_="chip") if run.stage != run.name else None, tag("span", state[0], class_=state[1])
    )


def _verdict(verdict: headline.Verdict) -> Html:
    return tag("div", tag("strong", verdict.title), " ".join(verdict.sentences), class_=f"verdict {verdict.standing}")


def _tiles(tiles: Sequence[headline.Tile]) -> Html | None:
    if not tiles:
        return None
    return tag(
        "div",
        [
            tag(
                "div",
                tag("div", tile.label, class_="label"),
                tag("div", tile.value, class_="value"),
                tag("div", tile.detail, class_="detail"),
                tag("p", tile.how_to_read, class_="how"),
                class_="tile",
            )
            for tile in tiles
        ],
        class_="tiles",
    )


def _alarms(facts: Sequence[str]) -> Html | None:
    if not facts:
        return None
    return tag("div", tag("strong", "To look at"), tag("ul", [tag("li", fact) for fact in facts]), class_="alarms")


def _footer() -> Html:
    return tag(
        "footer",
        "Brackets are 95% intervals. Lines are moving means, points the values as logged. "
        "This page holds everything it shows and loads nothing.",
    )


# --- one stage ---


def _run_body(run: RunRecord, make: Panels, *, samples: bool, says: bool = True) -> Html:
    says_what = run.about if says else ""
    return join(
        tag("p", says_what, class_="soft") if says_what else None,
        _SECTIONS[run.stage](run, make) if run.stage in _SECTIONS else None,
        _curves(run, make),
        _samples(run) if samples else None,
        _details(run),
    )


def _curves(run: RunRecord, make: Panels) -> Html:
    left = {name: series for name, series in run.metrics.items() if len(series)}
    shown = []
    for names in _CHARTS if run.charts is None else run.charts:
        logged = {name: left.pop(name) for name in names if name in left}
        if logged:
            shown.append(_curve_panel(logged, make))
    for owner, title in (("reward", "Parts of the reward"), ("gold", "Parts of the gold score")):
        if run.stage == "online":
            parts = [name for name in left if name.startswith(f"{owner}/") and name != "reward/std"]
            if parts:
                shown.append(_curve_panel({name: left.pop(name) for name in sorted(parts)}, make, title=title))
    times = {name: left.pop(name) for name in list(left) if name.startswith("time/") and name.endswith("_seconds")}
    whole = times.pop("time/step_seconds", None)
    if times:
        how = "Seconds of each step by what they were spent on. The thickest band is where a speed-up would pay."
        figure = charts.stacked({_short(name): series for name, series in times.items()}, "seconds")
        shown.append(make.panel("Where the time goes", "seconds per step", how, figure, size="tall"))
    elif whole is not None:
        shown.append(_curve_panel({"time/step_seconds": whole}, make))
    rest = [_curve_panel({name: left[name]}, make) for name in sorted(left)]
    more = "1 more metric" if len(rest) == 1 else f"{len(rest)} more metrics"
    return join(grid(shown), folded(more, grid(rest)) if rest else None)


def _curve_panel(series: Mapping[str, Series], make: Panels, *, title: str | None = None) -> Html:
    first, last = next(iter(series)), list(series)[-1]
    told = meaning(first)
    if len(series) == 1 and title is None:
        return make.panel(told.title, told.unit, told.how_to_read, charts.curves(series, told.unit))
    both = title or told.title.removesuffix(", training pairs").replace("Training loss", "Loss")
    figure = charts.curves({_short(name): one for name, one in series.items()}, told.unit)
    return make.panel(both, told.unit, meaning(last).how_to_read, figure, size="tall" if title else "")


def _short(name: str) -> str:
    """The short name of a metric in a chart whose title says the rest."""
    quantity = name.rpartition("/")[2].removesuffix("_seconds").replace("_", " ")
    for owner in ("accuracy", "margin"):
        quantity = {owner: "training", f"validation {owner}": "held out"}.get(quantity, quantity)
    return {"train": "training", "validation": "held out"}.get(quantity, quantity)


def _proxy_against_gold(runs: Sequence[RunRecord], make: Panels) -> Html:
    names = {name for run in runs for name in run.metrics if name.startswith("gold/")}
    parts = sorted(name.removeprefix("gold/") for name in names - {"gold/mean"})
    how = (
        "Rightwards is further from the reference. The reward above is what training sees, gold below what it is meant "
        "to stand for; where reward still climbs and gold turns down, the reward model is being gamed. "
        "A star marks the highest smoothed gold; faint points are single steps."
    )
    if not names:
        how = "Rightwards is further from the reference. Without a gold score this shows only what the reward claims."
    panel = make.panel(
        "Reward and gold score over √KL" if names else "Reward over √KL",
        "units of reward above, score 0–1 below, √nats across" if names else "units of reward, √nats across",
        how,
        charts.proxy_against_gold(runs),
        size="wide" if names else "wide low",
        choices=["", *parts] if parts else (),
    )
    return tag("div", panel, class_="charts")


# --- the reward model's card ---


def _reward_card(run: RunRecord, make: Panels) -> Html | None:
    card = run.summary
    panels = []
    if number(card, "accuracy") is not None:
        rows: list[charts.Bar] = [("chance", Interval(0.5, math.nan, math.nan, 0), charts.GREY)]
        named = (
            ("longer_wins", "longer reply", charts.AMBER),
            ("bag_of_words", "bag of words", charts.TEAL),
            ("accuracy", "reward model", charts.BLUE),
            ("bayes_accuracy", "limit of the labels", charts.VIOLET),
        )
        for name, shown, colour in named:
            if (share := interval(card, name)) is not None:
                rows.append((shown, share, colour))
        pairs = number(card, "num_pairs")
        count = f" · {show(pairs)} held-out pairs" if pairs is not None else ""
        how = "The model should stand clear of the simple rules; the noise of the votes lets nobody pass the limit."
        panels.append(make.panel("Accuracy and baselines", f"share{count}", how, charts.shares(rows)))
    if bins := _rows(card, "reliability", "mean_probability", "accuracy", "count"):
        ece = number(card, "ece")
        unit = f"share · ECE {show(ece)}" if ece is not None else "share"
        how = "On the diagonal a predicted 70% wins 70% of the time. Flatter than it: the model is too sure."
        panels.append(make.panel("Reliability", unit, how, charts.reliability(bins)))
    if bins := _rows(card, "by_margin", "low", "high", "accuracy", "count"):
        how = "Should climb to the right: where the two rewards differ more, the model should be right more often."
        panels.append(make.panel("Accuracy by margin", "share over reward", how, charts.by_margin(bins)))
    rows = []
    for name, one in section(card, "slices").items():
        if (share := interval({name: one}, name)) is not None:
            rows.append((f"{name.replace('_', ' ')} ({share.count})", share, charts.TEAL))
    if rows:
        how = "Right when the chosen reply is longer and wrong when shorter is a taste for length. Pairs in brackets."
        panels.append(make.panel("Accuracy by length of the replies", "share", how, charts.shares(rows)))
    if bins := _rows(card, "by_length", "mean_length", "mean_reward", "count"):
        correlation = number(card, "length_spearman")
        unit = "reward over words" + (f" · Spearman {show(correlation)}" if correlation is not None else "")
        how = "A steady climb means that length alone earns reward, which a policy will find."
        panels.append(make.panel("Reward by length", unit, how, charts.by_length(bins)))
    return grid(panels)


def _rows(values: Mapping[str, Any], name: str, *needed: str) -> list[dict[str, float]]:
    """The rows of the list `name` that have a number under every needed name, with their numbers only."""
    listed = values.get(name)
    rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
    plain = [{key: value for key in row if (value := number(row, key)) is not None} for row in rows]
    return [row for row in plain if row.keys() >= set(needed)]


# --- evaluation and samples ---


def _evaluation(run: RunRecord, make: Panels) -> Html:
    ours, theirs = dict(_numbers(section(run.summary, "policy"))), dict(_numbers(section(run.summary, "baseline")))
    names = dict.fromkeys([*ours, *theirs])
    heads = ("", "baseline", "policy") if theirs else ("", "policy")
    sides = [(name, *([theirs.get(name, "–")] if theirs else []), ours.get(name, "–")) for name in names]
    apart = {key: value for key, value in run.summary.items() if key not in ("policy", "baseline", "best_of")}
    between = list(_numbers(apart))
    panels = []
    if points := _rows(section(run.summary, "best_of"), "curve", "n", "gold"):
        how = "Gold of the best of n replies of the baseline, chosen by gold itself: what perfect choice would give."
        panels.append(
            make.panel(
                "Best of n", "gold score 0–1", how, charts.best_of_n(points, {"gold": "gold"}, "gold score (0–1)")
            )
        )
    return join(
        table(heads, sides) if sides else None,
        table((), between) if between else None,
        grid(panels),
    )


def _selection(run: RunRecord, make: Panels) -> Html | None:
    best_of = section(run.summary, "best_of")
    panels = []
    if points := _rows(best_of, "curve", "n", "reward"):
        prompts = show(number(best_of, "num_prompts"))
        how = "What choosing the best of n by the reward gives, for every n from the same replies, without bias."
        figure = charts.best_of_n(points, {"reward": "chosen by reward"}, "reward")
        panels.append(make.panel("Reward of the best of n", f"units of reward · {prompts} prompts", how, figure))
    if points := _rows(best_of, "curve", "n", "gold", "gold_by_gold"):
        how = (
            "Gold of the reply that the reward chose, and of the best there was. The gap is what a better reward buys."
        )
        lines = {"gold_by_gold": "chosen by gold", "gold": "chosen by reward"}
        figure = charts.best_of_n(points, lines, "gold score (0–1)")
        panels.append(make.panel("Gold of the best of n", "score 0–1", how, figure))
    return grid(panels)


def _before_after(run: RunRecord) -> Html:
    if run.stage == "select":
        before, after, which = "First reply", "Best reply", "prompts on file"
    else:
        before, after, which = "Baseline", "Final policy", "held-out prompts on file"
    shown = _drawn(run.samples)
    cards = [
        tag(
            "div",
            tag("div", _text(row.get("prompt")), class_="prompt"),
            tag(
                "div",
                _side(before, row.get("baseline_response"), row, "baseline_") if "baseline_response" in row else None,
                _side(after, row.get("response"), row, ""),
                class_="sides",
            ),
            class_="card sample",
        )
        for row in shown
    ]
    rest = cards[NUM_OPEN_SAMPLES:]
    chosen = f"{len(shown)} of the {len(run.samples)} {which}, drawn at random rather than chosen"
    how = f"{chosen}: expect some failures. Gold is true quality from 0 to 1; reward is what the run's rewards give."
    return join(
        tag("p", how, class_="soft"),
        cards[:NUM_OPEN_SAMPLES],
        folded(f"{len(rest)} more", join(*rest)) if rest else None,
    )


def _side(who: str, response: object, row: Mapping[str, Any], prefix: str) -> Html:
    scores = []
    judges = [key for key in row if key not in ("step", "kl", "length") and not key.startswith("baseline_")]
    for name in judges:
        value, other = number(row, prefix + name), number(row, name if prefix else f"baseline_{name}")
        if value is not None:
            rank = None if prefix or other is None or value == other else "up" if value > other else "down"
            scores.append(tag("span", f"{name} ", tag("b", show(value)), class_=f"score {rank or ''}".rstrip()))
    return tag("div", tag("div", who, scores, class_="who"), _text(response), class_="side")


def _samples(run: RunRecord) -> Html | None:
    """For an evaluation, replies before and after; for other runs, replies of the first and the last sampled step."""
    if not run.samples:
        return None
    if "baseline_response" in run.samples[0]:
        title = "One reply and the best of many" if run.stage == "select" else "Before and after"
        return join(tag("h3", title), _before_after(run))
    steps = [step for row in run.samples if (step := number(row, "step")) is not None]
    if not steps:
        return None
    columns = []
    for step in sorted({min(steps), max(steps)}):
        rows = _drawn([row for row in run.samples if number(row, "step") == step], NUM_OPEN_SAMPLES)
        columns.append([_rollout(row, step) for row in rows])
    pairs = [tag("div", side, class_="sides") for side in itertools.zip_longest(*columns)]
    says = tag("p", "Random replies of the first and the last step sampled.", class_="how")
    return folded("Replies sampled in training", join(says, pairs))


def _rollout(row: Mapping[str, Any], step: float) -> Html:
    scores = [
        tag("span", f"{name} ", tag("b", show(value)), class_="score")
        for name in ("gold", "reward", "kl", "length")
        if (value := number(row, name)) is not None
    ]
    return tag(
        "div",
        tag("div", f"step {show(step)}", scores, class_="who"),
        tag("div", _text(row.get("prompt")), class_="prompt"),
        _text(row.get("response")),
        class_="side card sample",
    )


def _drawn(rows: Sequence[Mapping[str, Any]], num: int = NUM_SAMPLES) -> list[Mapping[str, Any]]:
    """`num` randomly drawn rows in their original order. The draw depends only on the number of rows."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:num]
    return [rows[i] for i in sorted(chosen.tolist())]


def _text(value: object) -> Html:
    return tag("div", "–" if value is None else value, class_="text", dir="auto")


# --- numbers, settings, data, environment ---


def _details(run: RunRecord) -> Html:
    numbers = list(_numbers(run.summary)) if run.stage != "evaluate" else []
    environment = {key: value for key, value in run.environment.items() if key != "stage"}
    known = {source: one if isinstance(one, Mapping) else {} for source, one in run.data.items()}
    sources = [
        (source, show(number(one, "rows")), tag("code", str(one.get("sha256", "–"))[:16]), *_reading(one))
        for source, one in known.items()
    ]
    blocks = [
        ("Summary", table((), numbers) if numbers else None),
        ("Settings", settings_table(run.settings) if run.settings else None),
        ("Data", table(("source", "rows", "SHA-256 (first 16)", "not used", "left out"), sources) if sources else None),
        ("Environment", settings_table(environment) if environment else None),
    ]
    there = [(title, body) for title, body in blocks if body is not None]
    # if nothing was plotted, the summary is all there is to see, so it is not folded
    opened = [body for title, body in there if title == "Summary" and not run.metrics]
    there = [(title, body) for title, body in there if body not in opened]
    names = ", ".join(title if i == 0 else title.lower() for i, (title, _) in enumerate(there))
    rest = [join(tag("h3", title), body) for title, body in there]
    return join(opened, folded(names, rest) if rest else None)


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


_SECTIONS: Mapping[str, Callable[[RunRecord, Panels], Html | None]] = {
    "reward": _reward_card,
    "evaluate": _evaluation,
    "select": _selection,
}
"""The part that the page of a run begins with, for stages that have more to show than charts."""
