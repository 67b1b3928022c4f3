"""The first steps of every shipped run file, as metrics: a change that should not alter numbers gives the same file.

    python benchmarks/first_steps.py --out before.json      on the commit before
    python benchmarks/first_steps.py --out after.json --against before.json

Each run file is cut short as `trimtab plan` does and run in a scratch folder. What needs the hub takes a local file:
--set hh=PATH for the run files of examples/hh, --set gsm8k=PATH for those of examples/gsm8k; without it they are left
out by name. Metrics under `time/` are left out. The script runs on commits whose stages have other names too, so it
imports as little as it can.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DATA = ROOT / "docs" / "evidence" / "data" / "first_steps.json"
# Run files of a single stage say in their name or folder which one it is.
SINGLE = {"hh/dpo": "preference", "gsm8k/grpo": "online", "gsm8k/evaluate": "evaluate", "feedback/reward": "reward"}
MADE_ELSEWHERE = re.compile(r"runs/.*model|Qwen/.*")
"""Models that another run file makes, or that the hub has; a tiny one of `STARTS` stands for each."""
STARTS = {
    "base": {
        "stage": "pretrain",
        "data": "world:helpdesk",
        "num_documents": 64,
        "vocab_size": 512,
        "architecture": {"max_positions": 1024},
    },
    "compare": {
        "stage": "compare",
        "model": "@base",
        "world": "helpdesk",
        "num_prompts": 16,
        "num_held_out_prompts": 8,
        "sampling": {"max_new_tokens": 16},
    },
    "reward": {
        "stage": "reward",
        "model": "@base",
        "data": "@compare/train.jsonl",
        "held_out_data": "@compare/held_out.jsonl",
    },
}


def values_of(file: Path, local: dict[str, str]) -> dict[str, Any] | None:
    """The values of a run file as a pipeline; None if it needs a file that was not given."""
    name = str(file.relative_to(EXAMPLES).with_suffix(""))
    values = tomllib.loads(file.read_text(encoding="utf-8"))
    if "stages" not in values:
        stage = values.pop("stage", SINGLE.get(name, "online"))
        values = {"stages": {stage: {**values, "stage": stage}}}
    text = json.dumps(values)
    if "feedback:" in text:
        return None
    if "hub:" in text:
        given = local.get(name.partition("/")[0])
        if given is None:
            return None
        values = replaced(values, given)
    return values


def replaced(value: Any, given: str) -> Any:
    """The values with the local file where the hub was named."""
    if isinstance(value, dict):
        return {key: replaced(inner, given) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, given) for inner in value]
    return given if isinstance(value, str) and value.startswith("hub:") else value


def first_steps(values: dict[str, Any], scratch: Path, start: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of metrics.jsonl of each stage, and the numbers of its summary, without times."""
    from trimtab.stages.pipeline import expand, resolve_stages, run_pipeline
    from trimtab.stages.plan import cut_short

    values = expand(standing_in(values, start), where="the run file")
    whole = resolve_stages(values, scratch, where="the run file")
    tables = {name: cut_short(table["stage"], table, whole[name][1]) for name, table in values["stages"].items()}
    with contextlib.redirect_stderr(io.StringIO()):
        run_pipeline({**values, "stages": tables}, scratch, where="the run file")
    found = {}
    for name in tables:
        metrics = scratch / name / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        summary = json.loads((scratch / name / "summary.json").read_text())
        summary.pop("seconds", None)
        found[name] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows] + [summary]
    return found


def standing_in(values: Any, start: Path) -> Any:
    """The values with the tiny model where a run file names one that another run file makes."""
    if isinstance(values, dict):
        room = {"max_prompt_tokens": 800} if "max_prompt_tokens" in values else {}  # its tokens are short
        return {key: standing_in(inner, start) for key, inner in (values | room).items()}
    if isinstance(values, str) and MADE_ELSEWHERE.fullmatch(values):
        return str(start / ("reward" if "reward" in values else "base") / "model")
    return values


def comparison(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How many run files, stages and rows were compared, and of each value that is not the same to the bit: in how many
    places, and by how much at most."""
    differing: dict[str, list[float]] = {}

    def walk(x: Any, y: Any, name: str) -> None:
        if isinstance(x, dict) and isinstance(y, dict):
            for key in x.keys() | y.keys():
                walk(x.get(key), y.get(key), key)
        elif isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            for one, other in zip(x, y, strict=True):
                walk(one, other, name)
        elif x != y:
            both = isinstance(x, int | float) and isinstance(y, int | float)
            differing.setdefault(name, []).append(abs(x - y) if both else math.inf)

    walk(before, after, "run files")
    stages = [rows for stages in after.values() for rows in stages.values()]
    return {
        "run_files": len(after),
        "stages": len(stages),
        "rows_of_metrics": sum(len(rows) - 1 for rows in stages),
        "differing": {name: {"places": len(by), "largest": max(by)} for name, by in differing.items()},
    }


def main() -> None:
    """Runs them all, writes the metrics and says what differs from another commit's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="what another commit wrote")
    parser.add_argument("--only", default="", help="only the run files whose names hold this")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=PATH", help="a local file for hh or gsm8k")
    options = parser.parse_args()
    local = dict(given.split("=", 1) for given in options.set)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        first_steps({"stages": STARTS}, start, start)
        for file in sorted(EXAMPLES.rglob("*.toml")):
            name = str(file.relative_to(EXAMPLES))
            if options.only not in name:
                continue
            if file.name == "project.toml" or (values := values_of(file, local)) is None:
                print(f"{name}: left out", flush=True)
                continue
            with tempfile.TemporaryDirectory() as scratch:
                found[name] = first_steps(values, Path(scratch) / "run", start)
            print(f"{name}: {', '.join(f'{stage} {len(rows)}' for stage, rows in found[name].items())}", flush=True)
    options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.against is not None:
        said = comparison(json.loads(options.against.read_text(encoding="utf-8")), found)
        DATA.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(json.dumps(said))


if __name__ == "__main__":
    main()
