"""Writes the result of a script with the command, the machine and the commit that gave it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from speed import machine

from trimtab.core.files import write_whole
from trimtab.runs.environment import environment


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
