"""Estimates what a run will take, by a rehearsal: each stage runs a few steps in a scratch directory.

The rehearsal is the run itself cut short, with its own data, models and batch sizes, so what it takes is measured and
not modelled. Memory is the peak of a process of its own. Time is what the stage took apart from its steps, plus the
time of a step for each planned step.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimtab.core.errors import EngineError
from trimtab.core.process import bound_module, peak_rss_gb, peaks_rss_gb
from trimtab.engines.launchers import refuse_other_machines
from trimtab.rewards.combined import judges_and_measure
from trimtab.stages import preflight
from trimtab.stages.pipeline import expand, resolve_stages, run_pipeline
from trimtab.stages.rehearsal import rehearsing
from trimtab.stages.stage import FEW_STEPS, share_of_prompts


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The time and memory that one stage will take."""

    name: str
    stage: str
    num_steps: int | None
    """Steps planned; None for a stage that has none."""
    seconds_per_step: float | None
    seconds: float
    """Time of the stage from its start to its end."""
    peak_rss_gb: float
    """Most memory of the process, and of its workers together, up to the end of this stage: the sum of the peaks."""
    peak_rss_gb_each: list[float]
    """The peak of each process, the controller first."""
    tokens_per_second: float | None
    laps: dict[str, float]
    """Seconds of each phase of a step, if the stage measures them."""
    weights_gb: dict[str, float]
    """GB of each model in memory: its weights, and for a trained model its gradients and AdamW's two moments too."""
    num_checks: int = 0
    """Checks of the guard."""
    seconds_per_check: float = 0.0
    """Time of a check, replies, scores and measure."""


def plan(values: Mapping[str, Any], *, where: str) -> list[StagePlan]:
    """Rehearses the pipeline in a process of its own. A mistake in the file or in the run raises its error."""
    refuse_other_machines()
    place = Path("runs/plan")
    preflight.check(resolve_stages(values, place, where=where), place, where=where)
    with tempfile.TemporaryDirectory(prefix="trimtab-plan-") as scratch:
        file = Path(scratch) / "values.json"
        file.write_text(json.dumps(values), encoding="utf-8")
        command = [*bound_module(sys.executable, "trimtab.stages.plan"), str(file), scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word"]
            raise EngineError(
                f"the rehearsal ended with: {said[-1]}",
                where=where,
                fix="the run itself would end the same way; start it to see more",
            )
        return [StagePlan(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def cut_short(stage: str, table: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """The table of a stage with a few steps, or a few prompts, instead of all; `settings` are those it resolves to."""
    table = dict(table) | ({"trackers": []} if "trackers" in table else {})
    return table | dict(preflight.describe(stage).few(table, settings))


def share_sampled(settings: Any, directory: Path) -> float:
    """The share that a stage's rehearsal in `directory` made of the data that the whole stage makes."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    planned = summary.get("num_planned_steps")
    return float(summary["num_steps"] / planned) if planned else share_of_prompts(settings)


def rehearse(values: dict[str, Any], scratch: Path) -> None:
    """Runs the pipeline cut short, printing a StagePlan as a line of JSON after each stage."""
    values = expand(values, where="the plan")
    whole = resolve_stages(values, scratch / "run", where="the plan")
    tables = {name: cut_short(table["stage"], table, whole[name][1]) for name, table in values["stages"].items()}
    for number, name in enumerate(tables, start=1):
        upto = dict(list(tables.items())[:number])
        stage, settings = whole[name]
        with rehearsing(getattr(settings, "num_steps", None) or getattr(settings, "max_steps", None)):
            run_pipeline({**values, "stages": upto}, scratch / "run", where="the plan")
        # A rehearsed stage samples less data than the whole stage will.
        shares = [
            share_sampled(other, scratch / "run" / source)
            for source, (kind, other) in whole.items()
            if preflight.describe(kind).makes is None
            and str(getattr(settings, "data", "")).startswith(str(scratch / "run" / source) + "/")
        ]
        found = estimate(name, stage, settings, scratch / "run" / name, share_of_data=shares[0] if shares else 1.0)
        print(json.dumps(asdict(found)), flush=True)


def estimate(name: str, stage: str, settings: Any, directory: Path, *, share_of_data: float) -> StagePlan:
    """The plan of the whole stage, from its rehearsal in `directory`, which had this share of the data."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    metrics = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    seconds = summary["seconds"]
    num_steps = per_step = tokens = None
    num_checks, per_check = 0, 0.0
    timed = rows
    if rows:
        planned = getattr(settings, "num_steps", None) or summary["num_planned_steps"] / share_of_data
        num_steps = min(math.ceil(planned), getattr(settings, "max_steps", None) or math.ceil(planned))
        if num_steps > len(rows) == FEW_STEPS:
            timed = rows[:-1]  # the last step is the largest of the run
        checks = [row.get("time/guard_seconds", 0.0) for row in rows]
        steps = [row["time/step_seconds"] - check for row, check in zip(timed, checks, strict=False)]
        per_step, per_check = statistics.median(steps[1:] or steps), max(checks)
        seconds += per_step * num_steps - sum(row["time/step_seconds"] for row in rows)
        seconds += per_step * preflight.describe(stage).further_steps(settings, num_steps)
        if (guard := getattr(settings, "guard", None)) is not None:
            num_checks = guard.num_checks(num_steps)
            seconds += per_check * (num_checks - 1)  # the one before the first step is in the rehearsal's own time
        speeds = [row["time/tokens_per_second"] for row in timed if "time/tokens_per_second" in row]
        tokens = speeds[-1] if speeds else None
    else:
        seconds /= share_of_prompts(settings)
    laps = {
        k[5:-8]: v for row in timed[-1:] for k, v in row.items() if k.startswith("time/") and k.endswith("_seconds")
    }
    laps.pop("step", None)
    return StagePlan(
        name=name,
        stage=stage,
        num_steps=num_steps,
        seconds_per_step=per_step,
        seconds=seconds,
        peak_rss_gb=peak_rss_gb(),
        peak_rss_gb_each=peaks_rss_gb(),
        tokens_per_second=tokens,
        laps=laps,
        weights_gb=weights(stage, settings, directory),
        num_checks=num_checks,
        seconds_per_check=per_check,
    )


def weights(stage: str, settings: Any, directory: Path) -> dict[str, float]:
    """GB of each model that the stage holds, by the files it is loaded from. A trained model counts four times: weight,
    gradient and two moments."""
    adapter, critic = (getattr(settings, name, None) for name in ("adapter", "critic"))
    trained = preflight.describe(stage).trains
    times = 1 if adapter else 4
    # A model that is trained from scratch is as large as the one that was written.
    start = getattr(settings, "model", directory / "model")
    sizes = {trained or "policy": file_gb(start) * (times if trained else 1)}
    if critic is not None and adapter is None and settings.advantage.needs_critic:
        sizes["reference"] = file_gb(settings.reference or settings.model)
        if settings.has_own_critic:
            sizes["critic"] = file_gb(settings.critic_start()) * times
        if (start_of_cost := settings.cost_critic_start) is not None:
            sizes["cost critic"] = file_gb(start_of_cost) * times
    if critic is None and adapter is None and getattr(settings, "guard", None) is not None:
        sizes["reference"] = file_gb(settings.reference or settings.model)
    for role in ("baseline", "reward_model"):
        if (path := getattr(settings, role, None)) is not None:
            sizes[role.replace("_", " ")] = file_gb(path)
    for number, reward in enumerate(r for r in judges_and_measure(settings).values() if hasattr(r, "path")):
        sizes[f"reward {number + 1}"] = file_gb(reward.path)
    if adapter is not None:
        sizes["adapter"] = 4 * file_gb(directory / "model")
    return {name: size for name, size in sizes.items() if size}


def file_gb(directory: str | Path | None) -> float:
    """GB of the weights in a model directory, at four bytes per entry; 0 if there are none."""
    from safetensors import safe_open

    num = 0
    for file in sorted(Path(directory).glob("*.safetensors")) if directory is not None else ():
        with safe_open(file, "pt") as tensors:
            num += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return num * 4 / 2**30


def show(plans: list[StagePlan], console: Console) -> None:
    """Prints the plan as a table, and the phases of a step."""
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "steps", "s a step", "tokens/s", "time", "memory", "weights, gradients and moments (GB)"):
        table.add_column(title, justify="left" if title.startswith(("stage", "weights")) else "right")
    for p in plans:
        table.add_row(
            p.name,
            "" if p.num_steps is None else str(p.num_steps),
            "" if p.seconds_per_step is None else f"{p.seconds_per_step:.2f}",
            "" if p.tokens_per_second is None else f"{p.tokens_per_second:,.0f}",
            duration(p.seconds),
            f"{p.peak_rss_gb:.2f} GB",
            ", ".join(f"{name} {size:.2f}" for name, size in p.weights_gb.items()),
        )
    console.print(table)
    for p in plans:
        if p.laps:
            parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in p.laps.items())
            console.print(f"a step of {p.name}: {parts}")
        if p.num_checks:
            checks = f"{p.num_checks} checks, {p.seconds_per_check:.2f} s each, which the time and the memory hold"
            console.print(f"the guard of {p.name}: {checks}")
    for p in plans:
        if len(p.peak_rss_gb_each) > 1:
            controller, *workers = (f"{gb:.2f}" for gb in p.peak_rss_gb_each)
            console.print(f"memory of {p.name}: controller {controller} GB, workers {', '.join(workers)} GB")
    total, peak = sum(p.seconds for p in plans), max(p.peak_rss_gb for p in plans)
    console.print(f"in all {duration(total)} and at most {peak:.2f} GB, on {os.cpu_count()} cores as busy as now")


def duration(seconds: float) -> str:
    """A time in the unit that suits it: "45 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


if __name__ == "__main__":
    rehearse(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
