"""The charts of a reward model's card, for the page of its run, and the card as a page of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.reports import charts
from trimtab.reports.card_sentences import card_sentences
from trimtab.reports.charts import AMBER, BLUE, GREY, TEAL, VIOLET
from trimtab.reports.headline import Verdict, interval, number, section, show
from trimtab.reports.page import Panel, Panels, Part, Report, Section, write
from trimtab.stats import Interval

_SLICES = (
    (
        "slices",
        "Accuracy by length of the replies",
        "Right when the chosen reply is longer and wrong when shorter is a taste for length. Pairs in brackets.",
    ),
    ("by_slice", "Accuracy by slice", "A slice far below the others is where not to use the model. Pairs in brackets."),
)


def write_card(card: Mapping[str, Any], path: Path, *, model: str) -> Path:
    """Writes the page of a card and returns the path. Raises EngineError if it cannot be written."""
    page = Report(
        title="Reward card",
        about=f"How far {model} can be trusted.",
        verdict=Verdict("neutral", "The reward model was judged.", tuple(card_sentences(card))),
        sections=[Section(card_parts(card))],
    )
    return write(page, path)


def card_parts(card: Mapping[str, Any]) -> list[Part]:
    """The charts of a card; a figure that it lacks has no chart."""
    panels = []
    if number(card, "accuracy") is not None:
        rows: list[charts.Bar] = [("chance", Interval(0.5, math.nan, math.nan, 0), GREY)]
        named = (
            ("longer_wins", "longer reply", AMBER),
            ("bag_of_words", "bag of words", TEAL),
            ("shuffled_replies", "other prompts", TEAL),
            ("accuracy", "reward model", BLUE),
            ("bayes_accuracy", "limit of the labels", VIOLET),
        )
        for name, shown, colour in named:
            if (share := interval(card, name)) is not None:
                rows.append((shown, share, colour))
        pairs = number(card, "num_pairs")
        count = f" · {show(pairs)} held-out pairs" if pairs is not None else ""
        how = (
            "The model should stand clear of the simple rules, and of itself when it is shown other prompts; the noise "
            "of the votes lets nobody pass the limit."
        )
        panels.append(Panel("Accuracy and baselines", f"share{count}", how, charts.shares(rows)))
    fitted = f"Reliability at temperature {show(number(card, 'temperature'))}"
    for title, values in (("Reliability", card), (fitted, section(card, "calibrated"))):
        if bins := rows_of(values, "reliability", "mean_probability", "accuracy", "count"):
            ece = number(values, "ece")
            unit = f"share · ECE {show(ece)}" if ece is not None else "share"
            how = "On the diagonal a predicted 70% wins 70% of the time. Flatter than it: the model is too sure."
            panels.append(Panel(title, unit, how, charts.reliability(bins)))
    if bins := rows_of(card, "by_margin", "low", "high", "accuracy", "count"):
        how = "Should climb to the right: where the two rewards differ more, the model should be right more often."
        panels.append(Panel("Accuracy by margin", "share over reward", how, charts.by_margin(bins)))
    for key, title, how in _SLICES:
        # the names of slices are those of the data, and stay as they are
        parts = {name.replace("_", " ") if key == "slices" else name: one for name, one in section(card, key).items()}
        shares = [(name, share) for name in parts if (share := interval(parts, name)) is not None]
        if shares:
            rows = [(f"{name} ({share.count})", share, TEAL) for name, share in shares]
            panels.append(Panel(title, "share", how, charts.shares(rows)))
    if bins := rows_of(card, "by_length", "mean_length", "mean_reward", "count"):
        correlation = number(card, "length_spearman")
        unit = "reward over words" + (f" · Spearman {show(correlation)}" if correlation is not None else "")
        how = "A steady climb means that length alone earns reward, which a policy will find."
        panels.append(Panel("Reward by length", unit, how, charts.by_length(bins)))
    return [Panels(panels + _probes(card))]


def _probes(card: Mapping[str, Any]) -> list[Panel]:
    """What the model gives to replies that were changed on purpose."""
    panels = []
    styles, texts = section(card, "styles"), section(card, "degenerate")
    added = [(name, one, BLUE) for name in styles if (one := interval(styles, name)) is not None]
    if added:
        how = "Reward for the style alone: the content is the same. A policy will find whatever lies right of zero."
        panels.append(Panel("What a style adds", "logits", how, charts.dots(added, "reward added", line=0.0)))
    sides = (("above_rejected", "rejected", AMBER), ("above_chosen", "chosen", VIOLET))
    beside = [
        (f"{name.replace('_', ' ')} over {side}", share, colour)
        for name in texts
        for key, side, colour in sides
        if (share := interval(section(texts, name), key)) is not None
    ]
    if beside:
        how = "How often a text without content gets more reward than a real reply. Should be near zero."
        panels.append(Panel("Texts without content", "share", how, charts.dots(beside, "share", low=0, high=1)))
    return panels


def rows_of(values: Mapping[str, Any], name: str, *needed: str) -> list[dict[str, float]]:
    """The rows of the list `name` that have a number under every needed name, with their numbers only."""
    listed = values.get(name)
    rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
    plain = [{key: value for key in row if (value := number(row, key)) is not None} for row in rows]
    return [row for row in plain if row.keys() >= set(needed)]
