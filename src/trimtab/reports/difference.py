"""What differs between runs: settings, data, models, versions, final figures; and whether that is more than noise.

Two single runs differ by their settings and by chance. Of chance, the draw of the prompts and of the replies can be
measured, if both runs replied to the same prompts: differences are taken prompt by prompt, with Student's t over the
prompts, since replies to one prompt depend on each other. Several scores are judged together, by Holm's correction.
What another seed would have given cannot be known from one run each, and steps of one run depend on each other, so a
difference of curves has no interval here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.reports.collect import RunRecord
from trimtab.reports.headline import number, show
from trimtab.runs.loop import SHOWN
from trimtab.runs.resume import flat
from trimtab.stats import Interval, holm, paired_test

LEAST_PROMPTS = 10
"""With fewer prompts in common, their spread says too little about the noise."""
ALPHA = 0.05
"""A difference is called more than noise if its p-value, corrected for the number of scores, is at most this."""
_MAKES_SCORES = ("rewards", "reward_model", "combine", "cost", "shaping", "whiten_rewards", "environment")
"""The settings that make the number of a score other than gold, in any stage that has them."""
_WITHOUT_WEIGHT = ("place", "stage", "resumed_with", "changed_settings")
_NO_JUDGES = ("step", "kl", "length")


@dataclass(frozen=True)
class ScoreDifference:
    """A score of the replies of two runs, compared on the prompts that both replied to."""

    judge: str
    """The name of the score in the samples, such as "gold"."""
    difference: Interval | None = None
    """Of the means of each prompt, the second run minus the first, with Student's t interval (nan if all differences
    are equal); None if it cannot be said."""
    p_value: float = math.nan
    """That the difference is 0, corrected for the number of scores."""
    steps: tuple[float, float] = (0, 0)
    """The step of each run whose samples are compared."""
    why_not: str = ""
    """Why it cannot be said."""

    @property
    def sentence(self) -> str:
        """What the difference says, in words."""
        if self.difference is None:
            return f"{self.judge}: whether the difference is more than noise cannot be said: {self.why_not}."
        found = self.difference
        where = f"on {'all ' if self.same else ''}{found.count} prompts, step {{:g}} and step {{:g}}".format(
            *self.steps
        )
        if self.same:
            return f"{self.judge}: the same {where}."
        bounds = "" if math.isnan(found.low) else f" [{found.low:+.3g}, {found.high:+.3g}]"
        told = "more than the noise of prompts and replies" if self.p_value <= ALPHA else "not told from noise"
        return f"{self.judge}: {found.value:+.3g}{bounds} {where}, p = {self.p_value:.2g}: {told}."

    @property
    def same(self) -> bool:
        """Whether the scores are equal on every prompt."""
        return self.difference is not None and self.p_value == 1 and math.isnan(self.difference.low)


def differing(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The key paths at which nested tables differ, each with the value in every table as text; "–" if one has none."""
    sides = [{key: _text(value) for key, value in flat(table)} for table in tables]
    keys = dict.fromkeys(key for side in sides for key in side)
    rows = [(key, *(side.get(key, "–") for side in sides)) for key in keys]
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

    Of a run with several sampled steps the last one counts. A prompt counts once, with the mean of its replies. The
    p-values are corrected for the number of scores that can be compared.
    """
    (before_step, first_rows), (after_step, second_rows) = sides = [_last_samples(run) for run in (first, second)]
    names = [name for name in _judges(first_rows) if name in _judges(second_rows)]
    found = []
    for name in names:
        if why := _other_scale(name, first, second):
            found.append(ScoreDifference(name, why_not=why))
            continue
        means = [_by_prompt(rows, name) for _, rows in sides]
        common = [prompt for prompt in means[0] if prompt in means[1]]
        if len(common) < LEAST_PROMPTS:
            why = f"the samples have {len(common)} prompts in common, and it takes {LEAST_PROMPTS}"
            found.append(ScoreDifference(name, why_not=why))
            continue
        after, before = ([side[prompt] for prompt in common] for side in (means[1], means[0]))
        difference, p_value = paired_test(np.subtract(after, before))
        found.append(ScoreDifference(name, difference, p_value, (before_step, after_step)))
    corrected = iter(holm([one.p_value for one in found if one.difference is not None]))
    return [one if one.difference is None else replace(one, p_value=next(corrected)) for one in found]


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
            "Intervals (95%, Student's t over prompts, each score by itself) count the draw of prompts and replies; p "
            f"is corrected for the number of scores (Holm), and up to {ALPHA:g} it is more than noise. Another seed of "
            "the same settings may differ by as much: only several seeds of each can tell."
        )
    return sentences


def _other_scale(judge: str, first: RunRecord, second: RunRecord) -> str:
    """Why a score of the two runs may not be on one scale; empty if every setting that makes it is the same."""
    runs = (first, second)
    if not all(run.settings for run in runs):
        return "the settings of a run are missing or damaged, so what made its scores is not known"
    golds = [[one for one in _rewards(run) if one.get("name") == "gold"] for run in runs]
    worlds = [run.settings.get("world") for run in runs]
    if judge == "gold" and worlds[0] == worlds[1] and golds[0] == golds[1] and (worlds[0] or golds[0]):
        return ""
    names = ("world", *_MAKES_SCORES) if judge == "gold" else _MAKES_SCORES
    if other := [name for name in names if first.settings.get(name) != second.settings.get(name)]:
        return f"{', '.join(other)} of the two runs are not the same, so their numbers have no common scale"
    named = {text for name in names for text in _texts(first.settings.get(name))}
    for model in sorted(named & (first.models.keys() | second.models.keys())):
        if _digest(first.models.get(model)) != _digest(second.models.get(model)):
            return (
                f"the model {model} is another one in the two runs, or has no digest in one: no common scale is known"
            )
    return ""


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested tables and lists."""
    if isinstance(value, str):
        yield value
    for inside in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _texts(inside)


def _rewards(run: RunRecord) -> list[Mapping[str, Any]]:
    """The rewards in the settings of a run, that of its cost limit among them."""
    rewards, cost = run.settings.get("rewards"), run.settings.get("cost")
    found = [
        *(rewards if isinstance(rewards, list | tuple) else ()),
        cost.get("reward") if isinstance(cost, Mapping) else None,
    ]
    return [one for one in found if isinstance(one, Mapping)]


def _last_samples(run: RunRecord) -> tuple[float, list[Mapping[str, Any]]]:
    """The last sampled step and its samples; (nan, []) if there is none."""
    steps = [step for row in run.samples if (step := number(row, "step")) is not None]
    last = max(steps, default=math.nan)
    return last, [row for row in run.samples if number(row, "step") == last]


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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
