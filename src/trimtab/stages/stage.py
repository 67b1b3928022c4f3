"""The descriptor of a stage: one object that command line, pipeline, plan and pages read.

A stage is a file with a dataclass of settings, a function `run(settings, run)` and, at its end,

    STAGE = Stage(settings=SFTSettings, run=run, makes="policy", writes=("metrics.jsonl",), grows=("num_steps",))

and a line in the registry's table that gives it a name. The first line of the file is its line of help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.runs.facts import StageFacts
from trimtab.runs.run import Run

ModelKind = Literal["policy", "reward model", "any"]
EPOCHS_GROW = ("max_steps", "num_epochs")
"""The settings by which a stage that trains in epochs may become longer."""
FEW_STEPS = 4
"""The number of steps in a rehearsal. The last is the largest of the run, and is not timed (`rehearsal.py`)."""
FEW_PROMPTS = 192
"""The number of prompts in a rehearsal that has no steps."""


def _few_steps(table: Mapping[str, Any], _settings: Any) -> dict[str, Any]:
    return {"max_steps": min(FEW_STEPS, table.get("max_steps") or FEW_STEPS)}


@dataclass(frozen=True, kw_only=True)
class Stage(StageFacts):
    """A stage: its settings, what it does, and what the rest of the package has to know of it."""

    settings: type
    """The dataclass of its settings."""
    run: Callable[[Any, Run], None]
    """Does the work, given the settings and the open run, and finishes the run."""
    makes: ModelKind | None = None
    """The kind of model it writes, which later stages load as "@name"; None if it writes no model."""
    model: ModelKind = "policy"
    """The kind of model that its setting `model` names."""
    trains: str = ""
    """The model it trains, as the plan calls it, such as "policy"; "" if nothing is trained."""
    data: Callable[[Any], tuple[type, ...]] = lambda _settings: ()
    """The kinds of record, any one of them, that its settings `data` and `held_out_data` name; () if any text will
    do."""
    least_prompts: Callable[[Any], int] = lambda _settings: 1
    """The number of different prompts that it needs at least."""
    few: Callable[[Mapping[str, Any], Any], Mapping[str, Any]] = _few_steps
    """The keys that cut a table of settings short for a rehearsal, given the table and the settings it resolves to."""
    further_steps: Callable[[Any, int], float] = lambda _settings, _num_steps: 0.0
    """Work outside the steps that grows with their number, counted in steps."""


def few_prompts(*keys: str) -> Callable[[Mapping[str, Any], Any], Mapping[str, Any]]:
    """The `few` of a stage whose rehearsal takes the same share of each of these numbers of prompts."""

    def few(_table: Mapping[str, Any], settings: Any) -> dict[str, Any]:
        return {key: math.ceil(share_of_prompts(settings) * getattr(settings, key)) for key in keys}

    return few


def share_of_prompts(settings: Any) -> float:
    """The share of `num_prompts` that is rehearsed."""
    return float(min(1.0, FEW_PROMPTS / settings.num_prompts))
