"""One self-contained page about a run or a pipeline: no network, no other file, nothing executed that it did not bring.

Model text, prompts, settings and file names are untrusted. They reach the page only through `markup`, and the page's
security policy names the two scripts it may run by their hashes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import plotly.offline

from trimtab.evals.stats import Interval
from trimtab.reports import charts, headline
from trimtab.reports.collect import PipelineRecord, RunRecord, Series, collect
from trimtab.reports.guide import meaning
from trimtab.reports.headline import interval, number, section, show
from trimtab.reports.markup import Html, join, script_hash, script_json, tag

NUM_SAMPLES = 12
"""Samples shown: a random draw with a fixed seed, so that they are typical and the same each time."""
NUM_OPEN_SAMPLES = 4
"""How many of them are shown before a reader asks for more."""

# One chart each, in this order, where logged; the rest is folded away below them.
_MAIN_METRICS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "pretrain": (("loss/train", "loss/validation"), ("optimizer/learning_rate",), ("time/tokens_per_second",)),
    "reward": (
        ("loss/train", "loss/validation"),
        ("reward/accuracy", "reward/validation_accuracy"),
        ("reward/margin", "reward/validation_margin"),
    ),
    "online": (
        ("reward/mean",),
        ("gold/mean",),
        ("policy/kl",),
        ("rollout/length_mean",),
        ("policy/entropy",),
        ("policy/loss",),
        ("policy/clip_fraction",),
        ("critic/loss",),
        ("critic/explained_variance",),
    ),
}
_STAGE_SAYS: Mapping[str, str] = {
    "pretrain": "A language model learned from plain text, to have something to align.",
    "sft": "Supervised fine-tuning: imitate demonstrations. Its result is the reference of everything after it.",
    "compare": "Replies were sampled in pairs and judged by annotators.",
    "reward": "A reward model learned from comparisons which of two replies people prefer.",
    "online": "Reinforcement learning: sample replies, score them with the reward model, move towards the better ones.",
    "evaluate": "The final policy and its baseline answered the same held-out prompts.",
}


def write_report(directory: Path) -> Path:
    """The report.html it writes into a run or pipeline directory. Raises DataError for any other directory."""
    page = render(collect(directory))
    path = directory / "report.html"
    writing = directory / ".writing-report.html"
    # a lone surrogate, which JSON can carry, has no UTF-8 form
    writing.write_bytes(page.encode("utf-8", errors="replace"))
    writing.replace(path)
    return path


def render(record: RunRecord | PipelineRecord) -> str:
    """The page."""
    page = _Page()
    body = _pipeline(record, page) if isinstance(record, PipelineRecord) else _single_run(record, page)
    plotly_js = plotly.offline.get_plotlyjs()
    page_js = _asset("page.js")
    policy = (
        f"default-src 'none'; script-src {script_hash(plotly_js)} {script_hash(page_js)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{record.name} · trimtab"),
        tag("style", Html(_asset("page.css"))),
    )
    # text first: the large script is the last thing the browser reads
    scripts = join(tag("script", Html(plotly_js)), tag("script", Html(page_js)))
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', body), scripts), lang='en')}\n"


@dataclass
class _Page:
    """Numbers the figures of one page."""

    num_figures: int = 0

    def panel(
        self,
        title: str,
        unit: str,
        how_to_read: str,
        figure: charts.Figure,
        *,
        size: str = "",
        choices: Sequence[str] = (),
    ) -> Html:
        """A chart with its title, unit and how to read it; `choices` are the parts its buttons show."""
        self.num_figures += 1
        name = f"figure-{self.num_figures}"
        buttons = [
            tag("button", choice or "total", type="button", data_part=choice, aria_pressed="false" if i else "true")
            for i, choice in enumerate(choices)
        ]
        return tag(
            "figure",
            tag("figcaption", tag("span", title, class_="title"), " ", tag("span", unit, class_="unit")),
            tag("div", tag("span", "Gold:", class_="soft"), buttons, class_="choices") if buttons else None,
            tag("div", class_="chart", data_figure=name, role="img", aria_label=title),
            tag("script", script_json(figure), type="application/json", id=name),
            tag("p", how_to_read, class_="how"),
            class_=f"card panel {size}".rstrip(),
        )


@dataclass(frozen=True)
class _Part:
    """A part of a pipeline's page."""

    title: str
    anchor: str
    body: Html
    chips: Html = field(default_factory=lambda: Html(""))


# --- the two kinds of page ---


def _pipeline(record: PipelineRecord, page: _Page) -> Html:
    parts = []
    online = [run for run in record.runs if {"policy/kl", "reward/mean"} <= run.metrics.keys()]
    if online:
        parts.append(_Part("Proxy against gold", "goodhart", _proxy_against_gold(online, page)))
    evaluated = headline.evaluation(record.runs)
    if evaluated is not None and evaluated.samples:
        parts.append(_Part("Before and after", "samples", _before_after(evaluated)))
    for i, run in enumerate(record.runs):
        body = _run_body(run, page, samples=run is not evaluated)
        parts.append(_Part(run.name, f"stage-{i + 1}", body, _chips(run)))
    return join(
        tag("header", tag("h1", record.name), tag("p", _pipeline_line(record), class_="soft")),
        tag("nav", [tag("a", part.title, href=f"#{part.anchor}") for part in parts], aria_label="Contents"),
        _verdict(headline.pipeline_verdict(record)),
        _tiles(headline.pipeline_tiles(record)),
        _alarms([*record.problems, *(f"{run.name}: {fact}" for run in record.runs for fact in headline.alarms(run))]),
        [tag("section", tag("h2", part.title, part.chips, id=part.anchor), part.body) for part in parts],
        _folded("Settings of the pipeline", _settings_table(record.settings)) if record.settings else None,
        _footer(),
    )


def _single_run(run: RunRecord, page: _Page) -> Html:
    verdict = headline.run_verdict(run)
    return join(
        tag("header", tag("h1", run.name, _chips(run)), tag("p", _STAGE_SAYS.get(run.stage, ""), class_="soft")),
        _verdict(verdict) if verdict is not None else None,
        _alarms(headline.alarms(run)),
        _proxy_against_gold([run], page) if {"policy/kl", "reward/mean", "gold/mean"} <= run.metrics.keys() else None,
        _run_body(run, page, samples=True, says=False),
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


def _run_body(run: RunRecord, page: _Page, *, samples: bool, says: bool = True) -> Html:
    says_what = _STAGE_SAYS.get(run.stage) if says else None
    return join(
        tag("p", says_what, class_="soft") if says_what else None,
        _reward_card(run, page) if run.stage == "reward" else None,
        _evaluation(run, page) if run.stage == "evaluate" else None,
        _curves(run, page),
        _samples(run) if samples else None,
        _details(run),
    )


def _curves(run: RunRecord, page: _Page) -> Html:
    left = {name: series for name, series in run.metrics.items() if len(series)}
    shown = []
    for names in _MAIN_METRICS.get(run.stage, _MAIN_METRICS["pretrain"]):
        logged = {name: left.pop(name) for name in names if name in left}
        if logged:
            shown.append(_curve_panel(logged, page))
    for owner, title in (("reward", "Parts of the reward"), ("gold", "Parts of the gold score")):
        if run.stage == "online":
            parts = [name for name in left if name.startswith(f"{owner}/") and name != "reward/std"]
            if parts:
                shown.append(_curve_panel({name: left.pop(name) for name in sorted(parts)}, page, title=title))
    times = {name: left[name] for name in left if name.startswith("time/") and name.endswith("_seconds")}
    times = {name: series for name, series in times.items() if name != "time/step_seconds" or len(times) == 1}
    if times:
        for name in [*times, "time/step_seconds"]:
            left.pop(name, None)
        how = "Seconds of each step by what they were spent on. The thickest band is where a speed-up would pay."
        figure = charts.stacked({_short(name): series for name, series in times.items()}, "seconds")
        shown.append(page.panel("Where the time goes", "seconds per step", how, figure))
    rest = [_curve_panel({name: left[name]}, page) for name in sorted(left)]
    return join(
        tag("div", shown, class_="charts") if shown else None,
        _folded(f"{len(rest)} more metrics", tag("div", rest, class_="charts")) if rest else None,
    )


def _curve_panel(series: Mapping[str, Series], page: _Page, *, title: str | None = None) -> Html:
    first = next(iter(series))
    told = meaning(first)
    if len(series) == 1:
        return page.panel(title or told.title, told.unit, told.how_to_read, charts.curves(series, told.unit))
    how = meaning(list(series)[-1]).how_to_read
    both = title or told.title.removesuffix(", training pairs").replace("Training loss", "Loss")
    figure = charts.curves({_short(name): one for name, one in series.items()}, told.unit)
    return page.panel(both, told.unit, how, figure)


def _short(name: str) -> str:
    """A metric's name inside a chart of its kind."""
    quantity = name.rpartition("/")[2].removesuffix("_seconds").replace("_", " ")
    for owner in ("accuracy", "margin"):
        quantity = {owner: "training", f"validation {owner}": "held out"}.get(quantity, quantity)
    return {"train": "training", "validation": "held out"}.get(quantity, quantity)


def _proxy_against_gold(runs: Sequence[RunRecord], page: _Page) -> Html:
    names = {name for run in runs for name in run.metrics if name.startswith("gold/")}
    parts = sorted(name.removeprefix("gold/") for name in names - {"gold/mean"})
    how = (
        "Rightwards is further from the reference. The reward above is what training sees, gold below what it is meant "
        "to stand for; where reward still climbs and gold turns down, the reward model is being gamed. "
        "A star marks the highest smoothed gold; faint points are single steps."
    )
    if not names:
        how = "Rightwards is further from the reference. Without a gold score this shows only what the reward claims."
    panel = page.panel(
        "Reward and gold score over √KL",
        "reward-model units above, score 0–1 below, √nats across" if names else "reward-model units, √nats across",
        how,
        charts.proxy_against_gold(runs),
        size="wide" if names else "wide low",
        choices=["", *parts] if parts else (),
    )
    return tag("div", panel, class_="charts")


# --- the reward model's card ---


def _reward_card(run: RunRecord, page: _Page) -> Html | None:
    card = run.summary
    panels = []
    accuracy = interval(card, "accuracy")
    if accuracy is not None:
        rows: list[charts.Bar] = [("chance", Interval(0.5, math.nan, math.nan, 0), charts.GREY)]
        baselines = (
            ("longer_wins", "longer reply", charts.AMBER),
            ("bag_of_words", "bag of words", charts.TEAL),
            ("accuracy", "reward model", charts.BLUE),
            ("bayes_accuracy", "limit of the labels", charts.VIOLET),
        )
        for name, shown, colour in baselines:
            if (share := interval(card, name)) is not None:
                rows.append((shown, share, colour))
        pairs = number(card, "num_pairs")
        count = f" · {show(pairs)} held-out pairs" if pairs is not None else ""
        how = "The model should stand clear of the simple rules; the noise of the votes lets nobody pass the limit."
        panels.append(page.panel("Accuracy and baselines", f"share{count}", how, charts.shares(rows)))
    if bins := _rows(card, "reliability", "mean_probability", "accuracy", "count"):
        ece = number(card, "ece")
        unit = f"share · ECE {show(ece)}" if ece is not None else "share"
        how = "On the diagonal a predicted 70% wins 70% of the time. Flatter than it: the model is too sure."
        panels.append(page.panel("Reliability", unit, how, charts.reliability(bins)))
    if bins := _rows(card, "by_margin", "low", "high", "accuracy", "count"):
        how = "Should climb to the right: where the two rewards differ more, the model should be right more often."
        panels.append(page.panel("Accuracy by margin", "share over reward", how, charts.by_margin(bins)))
    slices = section(card, "slices")
    rows = []
    for name in slices:
        one = section(slices, name)
        share = interval({"share": {**one, "value": one.get("accuracy")}}, "share")
        if share is not None:
            rows.append((f"{name.replace('_', ' ')} ({share.count})", share, charts.TEAL))
    if rows:
        how = "Right when the chosen reply is longer and wrong when shorter is a taste for length. Pairs in brackets."
        panels.append(page.panel("Accuracy by length of the replies", "share", how, charts.shares(rows)))
    if bins := _rows(card, "by_length", "mean_length", "mean_reward", "count"):
        correlation = number(card, "length_spearman")
        unit = "reward over words" + (f" · Spearman {show(correlation)}" if correlation is not None else "")
        how = "A steady climb means that length alone earns reward, which a policy will find."
        panels.append(page.panel("Reward by length", unit, how, charts.by_length(bins)))
    return tag("div", panels, class_="charts") if panels else None


def _rows(values: Mapping[str, Any], name: str, *needed: str) -> list[dict[str, float]]:
    """The rows of a list that hold a number under every needed name."""
    listed = values.get(name)
    rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
    return [dict(row) for row in rows if all(number(row, key) is not None for key in needed)]


# --- evaluation and samples ---


def _evaluation(run: RunRecord, page: _Page) -> Html:
    policy, baseline = section(run.summary, "policy"), section(run.summary, "baseline")
    ours, theirs = dict(_numbers(policy)), dict(_numbers(baseline))
    table = None
    if ours or theirs:
        rows = [(name, theirs.get(name, "–"), ours.get(name, "–")) for name in dict.fromkeys([*ours, *theirs])]
        table = _table(("", "baseline", "policy"), rows)
    points = _rows(run.summary, "best_of_n", "n", "gold")
    panel = None
    if points:
        how = "Picking by reward among n replies. Where gold turns down the reward model is being gamed."
        panel = page.panel("Best of n", "gold score 0–1, reward", how, charts.best_of_n(points))
    return join(table, tag("div", panel, class_="charts") if panel else None)


def _before_after(run: RunRecord) -> Html:
    shown = _drawn(run.samples)
    cards = [
        tag(
            "div",
            tag("div", _text(row.get("prompt")), class_="prompt"),
            tag(
                "div",
                _side("Baseline", row.get("baseline_response"), row, "baseline_"),
                _side("Final policy", row.get("response"), row, ""),
                class_="sides",
            ),
            class_="card sample",
        )
        for row in shown
    ]
    rest = cards[NUM_OPEN_SAMPLES:]
    chosen = f"{len(shown)} of {len(run.samples)} held-out prompts, drawn at random rather than chosen"
    how = f"{chosen}: expect some failures. Gold is true quality from 0 to 1; reward is in reward-model units."
    return join(
        tag("p", how, class_="soft"),
        cards[:NUM_OPEN_SAMPLES],
        _folded(f"{len(rest)} more", join(*rest)) if rest else None,
    )


def _side(who: str, response: object, row: Mapping[str, Any], prefix: str) -> Html:
    scores = []
    for name in ("gold", "reward"):
        value, other = number(row, prefix + name), number(row, name if prefix else f"baseline_{name}")
        if value is not None:
            rank = None if prefix or other is None or value == other else "up" if value > other else "down"
            scores.append(tag("span", f"{name} ", tag("b", show(value)), class_=f"score {rank or ''}".rstrip()))
    return tag("div", tag("div", who, scores, class_="who"), _text(response), class_="side")


def _samples(run: RunRecord) -> Html | None:
    """Before and after for an evaluation; else replies of the first and of the last step sampled."""
    if not run.samples:
        return None
    if "baseline_response" in run.samples[0]:
        return join(tag("h3", "Before and after"), _before_after(run))
    steps = [step for row in run.samples if (step := number(row, "step")) is not None]
    if not steps:
        return None
    ends = sorted({min(steps), max(steps)})
    columns = []
    for step in ends:
        rows = _drawn([row for row in run.samples if number(row, "step") == step], NUM_OPEN_SAMPLES)
        columns.append([_rollout(row, step) for row in rows])
    pairs = [tag("div", side, class_="sides") for side in itertools.zip_longest(*columns)]
    body = tag("div", tag("p", "Random replies of the first and the last step sampled.", class_="how"), pairs)
    return _folded("Replies sampled in training", body)


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
    """`num` rows by chance, in their order; the draw depends on the number of rows only."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:num]
    return [rows[i] for i in sorted(chosen.tolist())]


def _text(value: object) -> Html:
    return tag("div", "–" if value is None else value, class_="text", dir="auto")


# --- settings, data, environment ---


def _details(run: RunRecord) -> Html:
    numbers = [(name, text) for name, text in _numbers(run.summary) if run.stage not in ("evaluate",)]
    sources = [
        (source, show(number(_as_mapping(known), "rows")), tag("code", str(_as_mapping(known).get("sha256", "–"))[:16]))
        for source, known in run.data.items()
    ]
    blocks = [
        ("Summary", _table((), numbers) if numbers else None),
        ("Settings", _settings_table(run.settings) if run.settings else None),
        ("Data", _table(("source", "rows", "SHA-256 (first 16)"), sources) if sources else None),
        ("Environment", _settings_table(run.environment) if run.environment else None),
    ]
    there = [(title, body) for title, body in blocks if body is not None]
    if not there:
        return Html("")
    names = ", ".join(title.lower() if i else title for i, (title, _) in enumerate(there))
    return _folded(names, join(*(join(tag("h3", title), body) for title, body in there)))


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _folded(title: str, body: Html) -> Html:
    return tag("details", tag("summary", title), body)


def _settings_table(values: Mapping[str, Any]) -> Html:
    return _table((), [(name, tag("code", _plain(value))) for name, value in _flat(values)])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    cells = [tag("tr", [tag("td", cell, class_=None if i else "key") for i, cell in enumerate(row)]) for row in rows]
    top = tag("tr", [tag("th", cell) for cell in head]) if head else None
    return tag("div", tag("table", top, cells), class_="scroll")


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _numbers(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Every number as (name, text), its bounds beside it; lists, which have charts of their own, are left out."""
    for key, value in values.items():
        base = key.removesuffix("_low").removesuffix("_high")
        if base != key and base in values:
            continue
        if isinstance(value, Mapping) and "value" not in value:
            yield from _numbers(value, f"{path}{key}.")
        elif (found := interval(values, key)) is not None:
            count = f" (n={found.count})" if found.count else ""
            yield f"{path}{key}", f"{show(found.value)} {headline.bounds(found)}".rstrip() + count
        elif isinstance(value, str | bool):
            yield f"{path}{key}", str(value)


def _asset(name: str) -> str:
    return resources.files("trimtab.reports").joinpath(name).read_text(encoding="utf-8")
