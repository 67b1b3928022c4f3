"""What differs between runs: settings, data, models, versions, final figures; and whether that is more than noise.

Two single runs differ by their settings and by chance. Of chance, the draw of the prompts and of the replies can be
measured, if both runs replied to the same prompts: differences are taken prompt by prompt, and prompts are resampled.
What another seed would have given cannot be known from one run each, and steps of one run depend on each other, so a
difference of curves has no interval here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.reports.collect import RunRecord
from trimtab.reports.headline import number, show
from trimtab.runs.loop import SHOWN
from trimtab.stats import Interval, paired_difference

LEAST_PROMPTS = 10
"""With fewer prompts in common, resampling them says too little about the noise."""
_WITHOUT_WEIGHT = ("place", "stage", "resumed_with", "changed_settings")
_NO_JUDGES = ("step", "kl", "length")


@dataclass(frozen=True)
class ScoreDifference:
    """A score of the replies of two runs, compared on the prompts that both replied to."""

    judge: str
    """The name of the score in the samples, such as "gold"."""
    difference: Interval | None
    """Of the means of each prompt, the second run minus the first; None if it cannot be said."""
    why_not: str = ""
    """Why it cannot be said."""

    @property
    def sentence(self) -> str:
        """What the difference says, in words."""
        if self.difference is None:
            return f"{self.judge}: whether the difference is more than noise cannot be said: {self.why_not}."
        found = self.difference
        shown = f"{found.value:+.3g} [{found.low:+.3g}, {found.high:+.3g}] on {found.count} prompts"
        if found.low > 0 or found.high < 0:
            return f"{self.judge}: {shown}: more than the noise of prompts and replies."
        if found.value == found.low == found.high == 0:
            return f"{self.judge}: the same on all {found.count} prompts."
        return f"{self.judge}: {shown}: no more than noise."


def differing(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The key paths at which nested tables differ, each with the value in every table as text; "–" if one has none."""
    flat = [dict(_flat(table)) for table in tables]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, *(one.get(key, "–") for one in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def settings_rows(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """The settings that differ."""
    return differing([{"stage": run.stage, **run.settings} for run in runs])


def input_rows(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """The data and models that differ, by the beginning of their SHA-256."""
    inputs: list[dict[str, Any]] = []
    for run in runs:
        read = {f"data {name}": _digest(one) for name, one in run.data.items()}
        inputs.append(read | {f"model {name}": _digest(one) for name, one in run.models.items()})
    return differing(inputs)


def version_rows(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """What differs of the machine, the libraries and the ways of computing."""
    return differing([{k: v for k, v in run.environment.items() if k not in _WITHOUT_WEIGHT} for run in runs])


def figure_rows(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """The mean of each metric over the last tenth of the steps, as text; those that progress shows come first."""
    names = dict.fromkeys(name for run in runs for name in run.metrics if not name.startswith("time/"))
    order = {name: place for place, name in enumerate(SHOWN)}
    rows = []
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        rows.append((name, *(show(run.metrics[name].mean_of_last()) if name in run.metrics else "–" for run in runs)))
    return [("steps", *(show(run.num_steps) for run in runs)), *rows] if rows else []


def judged(first: RunRecord, second: RunRecord) -> list[ScoreDifference]:
    """Each score that the samples of both runs have, compared on the prompts in common.

    Of a run with several sampled steps the last one counts. A prompt counts once, with the mean of its replies.
    """
    sides = [_last_samples(run) for run in (first, second)]
    names = [name for name in _judges(sides[0]) if name in _judges(sides[1])]
    found = []
    for name in names:
        if name != "gold" and (why := _other_rewards(first, second)):
            found.append(ScoreDifference(name, None, why))
            continue
        means = [_by_prompt(side, name) for side in sides]
        common = [prompt for prompt in means[0] if prompt in means[1]]
        if len(common) < LEAST_PROMPTS:
            why = f"the samples have {len(common)} prompts in common, and it takes {LEAST_PROMPTS}"
            found.append(ScoreDifference(name, None, why))
            continue
        after, before = ([side[prompt] for prompt in common] for side in (means[1], means[0]))
        found.append(ScoreDifference(name, paired_difference(after, before)))
    return found


def noise_sentences(first: RunRecord, second: RunRecord) -> list[str]:
    """Whether two runs differ by more than noise, for each score, and what the answer leaves out."""
    found = judged(first, second)
    if not found:
        return [
            "Whether the figures differ by more than noise cannot be said: the runs have no scored samples of the same "
            "kind, and the steps of one run depend on each other."
        ]
    sentences = [one.sentence for one in found]
    if any(one.difference is not None for one in found):
        sentences.append(
            "Intervals (95%) count the draw of prompts and replies. Another seed of the same settings may differ by as "
            "much: only several seeds of each can tell."
        )
    return sentences


def _other_rewards(first: RunRecord, second: RunRecord) -> str:
    """Why scores other than gold are not on one scale; empty if they are."""
    if first.settings.get("rewards") != second.settings.get("rewards"):
        return "the rewards of the two runs are not the same, so their numbers have no common scale"
    shared = first.models.keys() & second.models.keys()
    if any(_digest(first.models[name]) != _digest(second.models[name]) for name in shared):
        return "a model of the same name is another one in the two runs, so their rewards may have no common scale"
    return ""


def _last_samples(run: RunRecord) -> list[Mapping[str, Any]]:
    steps = [step for row in run.samples if (step := number(row, "step")) is not None]
    return [row for row in run.samples if number(row, "step") == max(steps)] if steps else []


def _judges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the scores in samples, gold first."""
    names = dict.fromkeys(
        name
        for row in rows
        for name in row
        if name not in _NO_JUDGES and not name.startswith("baseline_") and number(row, name) is not None
    )
    return sorted(names, key=lambda name: (name != "gold", name != "reward", name))


def _by_prompt(rows: Sequence[Mapping[str, Any]], judge: str) -> dict[str, float]:
    """The mean score of the replies to each prompt; replies without a score are left out."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if (score := number(row, judge)) is not None:
            scores.setdefault(json.dumps(row.get("prompt"), sort_keys=True), []).append(score)
    return {prompt: math.fsum(values) / len(values) for prompt, values in scores.items()}


def _digest(one: Any) -> str:
    if not isinstance(one, Mapping):
        return "–"
    rows = f" ({show(number(one, 'rows'))} rows)" if "rows" in one else ""
    return f"{str(one.get('sha256', '–'))[:16]}{rows}"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Key paths with their values as text; entries of a list of tables have their number in the path."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        value = {str(place): one for place, one in enumerate(value)}
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _flat(inside, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
