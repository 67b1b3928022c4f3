"""Writes the result of a script with the command, the machine and the commit that gave it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speed import machine

from trimtab.core.files import write_whole
from trimtab.runs.environment import environment
from trimtab.stats import t_interval


def write_result(file: Path, options: argparse.Namespace, **found: Any) -> None:
    """Writes what was found as JSON. Options that are paths say nothing elsewhere, and are left out of the command."""
    told = {"command": command_of(options), "machine": machine(), "commit": environment()["commit"]}
    write_whole(file, json.dumps(told | found, indent=1) + "\n")


def command_of(options: argparse.Namespace) -> str:
    """The command that has these options: `python benchmarks/front.py --seeds 0 1`."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for name, value in vars(options).items():
        values = value if isinstance(value, list) else [value]
        if not any(isinstance(one, Path) for one in values):
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def mean_over_seeds(found: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """The mean of a figure with Student's interval over the seeds; of a single seed its own bounds, if it has any."""
    if len(found) > 1:
        return t_interval([one[name] for one in found]).named(name)
    return {key: found[0][key] for key in (name, f"{name}_low", f"{name}_high") if key in found[0]}
