"""The part of a run's page about its guard: what it did, and which checkpoint it chose on what evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.reports.collect import RunRecord
from trimtab.reports.headline import bounds, interval, number, section, show
from trimtab.reports.page import Folded, Part, Table, Text

NUM_ROWS = 200
"""Rows of a table at most; a longer record is shown from its end."""


def guard_parts(run: RunRecord) -> list[Part]:
    """The actions, the choice and the measured checkpoints; nothing for a run without a guard or a choice."""
    parts: list[Part] = []
    if run.guard:
        actions = [row for row in run.guard if row.get("event") != "check"]
        told = [(f"step {show(number(row, 'step'))}", str(row.get("event")), str(row.get("why"))) for row in actions]
        num = len(run.guard) - len(actions)
        parts += [Text("Guard", "heading"), Text(f"{num} checks, {len(actions)} actions.")]
        parts += [Table(told[-NUM_ROWS:], ("", "action", "why"))] if told else []
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
