"""Replies of two models to the same prompts: the one that training began with, and the one that it ended with.

An evaluation has both. Without one, the samples of training are looked through for prompts that the first and the last
sampled step have in common: what the first step draws is drawn before any update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.reports import headline
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.headline import number, section, show
from trimtab.reports.page import Folded, Part, ReplyCard, SampleCard, Text

NUM_SAMPLES = 12
"""Samples shown: a random draw with a fixed seed, so that they are typical and the same each time."""
NUM_OPEN_SAMPLES = 4
"""Samples shown before the reader opens the others."""
MOST_CHARACTERS = 4000
"""Of a text so many are shown; of a longer one, how many there are."""
_NO_SCORES = ("step", "kl", "length")


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """Replies to the same prompts. A row has `prompt`, `response` and its scores, and the same of the model before
    under names that begin with "baseline_"."""

    run: RunRecord
    """The run whose samples they are."""
    before: str
    """What the model before is called, for example "Baseline"."""
    after: str
    which: str
    """Which replies these are, for example "held-out prompts on file"."""
    rows: Sequence[Mapping[str, Any]]
    models: tuple[str | None, str | None]
    """The directories or hub ids of the models before and after; None if they are not known."""
    runs: Sequence[RunRecord] = ()
    """The runs of the record, one of which may have made a model."""

    @property
    def shown(self) -> list[Mapping[str, Any]]:
        """The rows that are drawn to be shown."""
        return drawn(self.rows)

    @property
    def as_json(self) -> dict[str, Any]:
        """The rows drawn, as JSON values."""
        return {
            "run": self.run.name,
            "before": self._model(0, self.before),
            "after": self._model(1, self.after),
            "num_available": len(self.rows),
            "rows": [
                {"prompt": written(row.get("prompt")), "before": _side(row, "baseline_"), "after": _side(row, "")}
                for row in self.shown
            ],
        }

    def _model(self, place: int, called: str) -> dict[str, Any]:
        name = self.models[place]
        digest = section(self.run.models, name or "").get("sha256")
        known = {"called": called, "model": name, "sha256": digest if isinstance(digest, str) else None}
        return known | {"checkpoint": self.checkpoint(place)}

    def checkpoint(self, place: int) -> str | None:
        """Which checkpoint of its run a model is, as the decision of that run says, such as "the chosen checkpoint"."""
        made = Path(self.models[place] or "").parts[-2:]
        said = next((run.decision.get("model_is") for run in self.runs if made == (run.name, "model")), None)
        return said if isinstance(said, str) else None


def before_after(record: RunRecord | PipelineRecord) -> BeforeAfter | None:
    """The replies of both models; None if no prompt was answered by both."""
    if isinstance(record, RunRecord):
        return evaluated_samples(record) or _trained_samples(record)
    evaluated = headline.evaluation(record.runs)
    if evaluated is not None and (found := evaluated_samples(evaluated)) is not None:
        return replace(found, runs=record.runs)
    return next((found for run in reversed(record.runs) if (found := _trained_samples(run)) is not None), None)


def evaluated_samples(run: RunRecord) -> BeforeAfter | None:
    """The replies that an evaluation, or a selection, has written; None if it names no other model."""
    rows = [row for row in run.samples if "baseline_response" in row]
    if not rows:
        return None
    chosen = run.stage == "select"
    return BeforeAfter(
        run=run,
        before="First reply" if chosen else "Baseline",
        after="Best reply" if chosen else "Final policy",
        which="prompts on file" if chosen else "held-out prompts on file",
        rows=rows,
        models=(_setting(run, "model" if chosen else "baseline"), _setting(run, "model")),
    )


def _trained_samples(run: RunRecord) -> BeforeAfter | None:
    """The replies that training drew for the same prompts in its first and its last sampled step."""
    steps = [step for row in run.samples if (step := number(row, "step")) is not None and "response" in row]
    if not steps or min(steps) == max(steps):
        return None
    first, last = ({str(row.get("prompt")): row for row in run.samples if number(row, "step") == step}
                   for step in (min(steps), max(steps)))  # fmt: skip
    rows = [
        {**last[prompt], **{f"baseline_{name}": value for name, value in first[prompt].items() if name != "prompt"}}
        for prompt in first
        if prompt in last
    ]
    if not rows:
        return None
    return BeforeAfter(
        run=run,
        before=f"Step {show(min(steps))}",
        after=f"Step {show(max(steps))}",
        which="prompts that both steps have sampled",
        rows=rows,
        models=(_setting(run, "model") if min(steps) == 1 else None, None),
    )


def _setting(run: RunRecord, name: str) -> str | None:
    value = run.settings.get(name)
    return value if isinstance(value, str) else None


def _side(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {"text": written(row.get(f"{prefix}response")), "scores": _scores(row, prefix)}


def _scores(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    judges = [key for key in row if key not in _NO_SCORES and not key.startswith("baseline_")]
    found = {name: number(row, prefix + name) for name in judges}
    return {name: value for name, value in found.items() if value is not None}


def sample_parts(found: BeforeAfter) -> list[Part]:
    """The drawn rows as cards, the first of them open."""
    cards = []
    for row in found.shown:
        ours, theirs = _scores(row, ""), _scores(row, "baseline_")
        replies = [_card(found.before, row, "baseline_", theirs, {}), _card(found.after, row, "", ours, theirs)]
        cards.append(SampleCard(replies, prompt=written(row.get("prompt"))))
    rest = cards[NUM_OPEN_SAMPLES:]
    chosen = f"{len(cards)} of the {len(found.rows)} {found.which}, drawn at random rather than chosen"
    how = f"{chosen}: expect some failures. Gold is true quality from 0 to 1; reward is what the run's rewards give."
    sides = [
        f"{who}: {model}{f' ({found.checkpoint(place)})' if found.checkpoint(place) else ''}"
        for place, (who, model) in enumerate(zip((found.before, found.after), found.models, strict=True))
        if model is not None
    ]
    return [
        Text(how),
        *([Text(f"{'. '.join(sides)}.")] if sides else []),
        *cards[:NUM_OPEN_SAMPLES],
        *([Folded(f"{len(rest)} more", rest)] if rest else []),
    ]


def _card(
    who: str, row: Mapping[str, Any], prefix: str, scores: Mapping[str, float], other: Mapping[str, float]
) -> ReplyCard:
    told = [(name, show(value), _change(value, other.get(name))) for name, value in scores.items()]
    return ReplyCard(who, written(row.get(f"{prefix}response")), told)


def _change(value: float, other: float | None) -> str:
    return "" if other is None or value == other else "up" if value > other else "down"


def drawn(rows: Sequence[Mapping[str, Any]], num: int = NUM_SAMPLES) -> list[Mapping[str, Any]]:
    """`num` randomly drawn rows in their original order. The draw depends only on the number of rows."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:num]
    return [rows[i] for i in sorted(chosen.tolist())]


def written(value: object) -> str:
    """A text of a sample, cut if it is very long; a dash for none."""
    text = "–" if value is None else str(value)
    cut = len(text) - MOST_CHARACTERS
    return text if cut <= 0 else f"{text[:MOST_CHARACTERS]}… ({cut:,} further characters)"
