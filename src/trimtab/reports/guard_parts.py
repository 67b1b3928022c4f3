"""The part of a run's page about its guard: what it did, and which checkpoint it chose on what evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.reports.collect import RunRecord
from trimtab.reports.headline import bounds, interval, number, section, show
from trimtab.reports.page import Folded, Part, Table, Text

NUM_ROWS = 200
"""Rows of a table at most; a longer record is shown from its end."""
_MOST_STEPS = 12
_NO_SIGNALS = ("measure", "measure_low", "measure_high", "signals", "unjudged", "best_step")
"""What the guard logs besides its signals."""


def guard_signals(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Each cheap signal of the guard: its mean over the first and the last tenth of the checks, and the steps of the
    checks in which it had fired."""
    found: dict[str, dict[str, Any]] = {}
    for name, series in run.metrics.items():
        owner, _, signal = name.partition("/")
        if owner == "guard" and signal not in _NO_SIGNALS and len(series):
            found[signal] = {"first": series.mean_of_first(), "last": series.mean_of_last(), "fired_at": []}
    for row in run.guard:
        fired, step = row.get("fired"), number(row, "step")
        for signal in fired if isinstance(fired, list) and step is not None else ():
            if isinstance(signal, str):
                found.setdefault(signal, {"first": None, "last": None, "fired_at": []})["fired_at"].append(step)
    return found


def _signal_parts(run: RunRecord) -> list[Part]:
    rows = [
        (name.replace("_", " "), show(one["first"]), show(one["last"]), _steps(one["fired_at"]))
        for name, one in guard_signals(run).items()
    ]
    head = ("", "at the start", "at the end", "fired at step")
    return [Folded(f"{len(rows)} cheap signals of the replies", [Table(rows, head)])] if rows else []


def _steps(steps: Sequence[float]) -> str:
    shown = ", ".join(show(step) for step in steps[:_MOST_STEPS])
    return f"{shown}, … ({len(steps)} checks)" if len(steps) > _MOST_STEPS else shown or "–"


def guard_parts(run: RunRecord) -> list[Part]:
    """The actions, the signals, the choice and the measured checkpoints; nothing for a run without a guard or a
    choice."""
    parts: list[Part] = []
    if run.guard:
        actions = [row for row in run.guard if row.get("event") != "check"]
        told = [(f"step {show(number(row, 'step'))}", str(row.get("event")), str(row.get("why"))) for row in actions]
        num = len(run.guard) - len(actions)
        parts += [Text("Guard", "heading"), Text(f"{num} checks, {len(actions)} actions.")]
        parts += [Table(told[-NUM_ROWS:], ("", "action", "why"))] if told else []
        parts += _signal_parts(run)
    if run.decision:
        parts += [] if run.guard else [Text("Choice of a checkpoint", "heading")]
        parts += [Text(_said(run.decision)), *_checkpoints(run.decision)]
    return parts


def _said(decision: Mapping[str, Any]) -> str:
    last = section(section(decision, "chosen_against"), "last")
    gain = interval(last, "gain")
    beside = ""
    if gain is not None and number(last, "step") != number(decision, "chosen_step"):
        step = show(number(last, "step"))
        beside = f" It is above the last one, step {step}, by {show(gain.value)} {bounds(gain)}, paired by prompt."
    value = interval(section(decision, "chosen"), "measure")
    if value is not None:
        beside = f" Its measure is {show(value.value)} {bounds(value)}.{beside} These intervals count the choice."
    prompts = show(number(section(decision, "prompts"), "num"))
    return (
        f"Chosen is step {show(number(decision, 'chosen_step'))}, measured on {prompts} prompts; the rule: "
        f"{decision.get('rule')}.{beside} The model of this run: {decision.get('model_is')}."
    )


def _checkpoints(decision: Mapping[str, Any]) -> list[Part]:
    found = decision.get("checkpoints")
    measured = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
    rows = []
    for row in measured[-NUM_ROWS:]:
        value = interval(row, "measure")
        text = "–" if value is None else f"{show(value.value)} {bounds(value)}"
        rows.append((f"step {show(number(row, 'step'))}", text, show(number(row, "kl")), show(number(row, "reward"))))
    head = ("", "measure, 95% interval", "KL in nats", "reward")
    return [Folded(f"{len(measured)} measured checkpoints", [Table(rows, head)])] if rows else []
