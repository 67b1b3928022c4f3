"""Rollouts that wait for their step, and how a checkpoint keeps them: every number as it was, to the last bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core.files import write_rows
from trimtab.core.metrics import Total, to_values
from trimtab.core.types import Rollout, from_dict, to_dict
from trimtab.stages.online.rollouts import Group, RolloutBatch

FILE = "rollouts.jsonl"
"""The file of a checkpoint with the groups that were drawn ahead, one in each line; without any there is no file."""


@dataclass(frozen=True)
class Draw:
    """The rollouts that step `number` will train on (counted from 0), drawn and judged."""

    number: int
    version: int
    """The steps whose updates were in the weights that drew them."""
    num_prompts_before: int
    """The prompts that were taken before this draw."""
    rollouts: RolloutBatch


def save_draws(draws: Sequence[Draw], path: Path) -> list[dict[str, Any]]:
    """Writes the groups of all draws into the directory `path`, and returns the rest of them as JSON values."""
    if draws:
        rows = ({"step": d.number + 1, **_plain_group(group)} for d in draws for group in d.rollouts.groups)
        write_rows(path / FILE, rows)
    return [
        {
            "number": draw.number,
            "version": draw.version,
            "num_prompts_before": draw.num_prompts_before,
            "num_groups": len(draw.rollouts.groups),
            "metrics": to_values(draw.rollouts.metrics),
            "replaced_costs": list(draw.rollouts.replaced_costs),
        }
        for draw in draws
    ]


def load_draws(found: Sequence[Mapping[str, Any]], path: Path) -> list[Draw]:
    """The draws of which `save_draws` wrote the groups and returned `found`."""
    if not found:
        return []
    with (path / FILE).open(encoding="utf-8") as file:
        groups = iter([_group(json.loads(line)) for line in file])
    return [
        Draw(
            draw["number"],
            draw["version"],
            draw["num_prompts_before"],
            RolloutBatch(
                [next(groups) for _ in range(draw["num_groups"])],
                # They are complete, and only their values are still asked for.
                {name: Total(value) for name, value in draw["metrics"].items()},
                replaced_costs=draw["replaced_costs"],
            ),
        )
        for draw in found
    ]


def _plain_group(group: Group) -> dict[str, Any]:
    baseline = None if math.isnan(group.baseline) else group.baseline
    rollouts = [to_dict(rollout) for rollout in group.rollouts]
    plain: dict[str, Any] = {"rewards": group.rewards.tolist(), "baseline": baseline, "rollouts": rollouts}
    if group.parts:
        parts = {name: scores.tolist() for name, scores in group.parts.items()}
        plain |= {"parts": parts, "baseline_parts": dict(group.baseline_parts)}
    return plain | ({} if group.paid is None else {"paid": group.paid.tolist()})


def _group(row: Mapping[str, Any]) -> Group:
    baseline = math.nan if row["baseline"] is None else row["baseline"]
    rollouts = [from_dict(Rollout, r) for r in row["rollouts"]]
    parts = {name: torch.tensor(scores) for name, scores in row.get("parts", {}).items()}
    paid = torch.tensor(row["paid"]) if "paid" in row else None
    return Group(rollouts, torch.tensor(row["rewards"]), baseline, parts, row.get("baseline_parts", {}), paid)
