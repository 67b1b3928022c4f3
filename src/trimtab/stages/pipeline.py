"""A pipeline: stages by name in one TOML file. Finished stages are skipped, an interrupted one goes on.

seed = 0
[variables]
rows = "path/to/preferences.jsonl.gz"
[stages.sft]
stage = "sft"
model = "@base"          # the model directory of the stage named base
data = "$rows"           # a variable
[stages.reward]
data = "@compare/train.jsonl"   # a file in the run directory of the stage named compare
[stages.sft_longer]
like = "sft"             # all that the stage named sft says, and this
num_epochs = 3
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab import config
from trimtab.errors import ConfigError
from trimtab.runs.run import Run

STAGES = ("pretrain", "sft", "compare", "reward", "preference", "online", "select", "evaluate")
TOP_LEVEL = ("seed", "variables", "stages")


def run_pipeline(values: Mapping[str, Any], out: Path, *, where: str = "the pipeline file") -> dict[str, Any]:
    """Runs every stage that has not finished, in the order of the file, and returns the summary it writes.

    All mistakes in all stages are reported before the first one starts.
    """
    console = Console(stderr=True, highlight=False)
    values = expand(values, where=where)
    stages = resolve_stages(values, out, where=where)
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / "pipeline.toml", config.to_toml(dict(values)))
    for number, (name, (stage, settings)) in enumerate(stages.items(), start=1):
        title = f"[{number}/{len(stages)}] {name}"
        trackers = getattr(settings, "trackers", ())
        with Run.open(out / name, stage=stage, settings=config.dump(settings), trackers=trackers) as run:
            if run.finished:
                console.print(f"{title}: finished before", style="dim")
                continue
            console.print(title, style="bold")
            started = time.perf_counter()
            importlib.import_module(f"trimtab.stages.{stage}").run(settings, run)
            add_to_summary(run.directory, {"seconds": time.perf_counter() - started})
    summary = summarise(values, {name: stage for name, (stage, _) in stages.items()}, out)
    write_json(out / "summary.json", summary)
    return summary


def expand(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The pipeline with every `like` written out, so that the rounds of a loop say only what differs.

    Tables inside a stage are put together key by key, lists are replaced. Raises ConfigError for a `like` that names no
    stage above it.
    """
    tables = values.get("stages")
    if not isinstance(tables, Mapping):
        return dict(values)
    expanded: dict[str, Any] = {}
    for name, table in tables.items():
        if isinstance(table, Mapping) and "like" in table:
            if (like := table["like"]) not in expanded:
                known = ", ".join(expanded) or "none"
                raise ConfigError(
                    f"stages.{name}.like = {like!r} names no earlier stage",
                    where=where,
                    fix=f"{nearest(str(like), list(expanded))}stages before this one: {known}",
                )
            table = overlay(expanded[like], {key: value for key, value in table.items() if key != "like"})
        expanded[name] = table
    return {**values, "stages": expanded}


def overlay(below: Any, above: Any) -> Any:
    """`above` where it says something, `below` elsewhere; tables key by key, except where they name another class."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "name" in above and above["name"] != below.get("name"):
        return above
    return {**below, **{key: overlay(below.get(key), value) for key, value in above.items()}}


def resolve_stages(values: Mapping[str, Any], out: Path, *, where: str) -> dict[str, tuple[str, Any]]:
    """Name to (stage, its settings). Raises one ConfigError with every mistake."""
    values = expand(values, where=where)
    tables = values.get("stages")
    if not isinstance(tables, Mapping) or not tables:
        raise ConfigError(
            "a pipeline without stages", where=where, fix='add tables such as [stages.sft] with stage = "sft"'
        )
    unknown = set(values) - set(TOP_LEVEL)
    if unknown:
        raise ConfigError(
            f"unknown keys: {', '.join(sorted(unknown))}",
            where=where,
            fix=f"{nearest(sorted(unknown)[0], TOP_LEVEL)}a pipeline has seed, [variables] and [stages.NAME] tables",
        )
    classes, resolved = {}, {}
    earlier: set[str] = set()
    for name, table in tables.items():
        stage = table.get("stage") if isinstance(table, Mapping) else None
        if stage not in STAGES:
            hint = nearest(str(stage), STAGES)
            raise ConfigError(
                f"stages.{name}.stage is {stage!r}", where=where, fix=f"{hint}stages are: {', '.join(STAGES)}"
            )
        settings = {key: value for key, value in table.items() if key != "stage"}
        if "seed" in values:
            settings.setdefault("seed", values["seed"])
        key = f"stages.{name}"
        resolved[key] = substitute(settings, key, values.get("variables", {}), earlier, out, where)
        classes[key] = importlib.import_module(f"trimtab.stages.{stage}").Settings
        earlier.add(name)
    settings_of = config.resolve_tables(classes, resolved, where=where)
    return {name: (table["stage"], settings_of[f"stages.{name}"]) for name, table in tables.items()}


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known name closest to a wrong one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def substitute(value: Any, key: str, variables: Mapping[str, Any], earlier: set[str], out: Path, where: str) -> Any:
    """`value` with "@stage" and "@stage/file" as paths and "$variable" as its value, at any depth."""
    if isinstance(value, Mapping):
        return {k: substitute(v, f"{key}.{k}", variables, earlier, out, where) for k, v in value.items()}
    if isinstance(value, list):
        return [substitute(v, f"{key}.{i}", variables, earlier, out, where) for i, v in enumerate(value)]
    if isinstance(value, str) and value.startswith("@"):
        name, _, file = value[1:].partition("/")
        if name not in earlier:
            known = ", ".join(sorted(earlier)) or "none"
            raise ConfigError(
                f"{key} = {value!r} names no earlier stage", where=where, fix=f"stages before this one: {known}"
            )
        return str(out / name / (file or "model"))
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in variables:
            known = ", ".join(sorted(variables)) or "none"
            raise ConfigError(f"{key} = {value!r} names no variable", where=where, fix=f"variables: {known}")
        return variables[value[1:]]
    return value


def summarise(values: Mapping[str, Any], stages: Mapping[str, str], out: Path) -> dict[str, Any]:
    """The summary of all stages, with what a reader asks for first under `reward_model` and `policy`."""
    summaries = {name: json.loads((out / name / "summary.json").read_text(encoding="utf-8")) for name in stages}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary: dict[str, Any] = {
        "seed": values.get("seed"),
        "seconds": sum(s.get("seconds", 0.0) for s in summaries.values()),
        "peak_rss_gb": peak / (2**30 if sys.platform == "darwin" else 2**20),
        "num_cpus": os.cpu_count(),
        "stages": {name: {"stage": stage, "seconds": summaries[name].get("seconds")} for name, stage in stages.items()},
    }
    for name, stage in stages.items():
        if stage == "reward":
            summary["reward_model"] = summaries[name]
        if stage == "evaluate":
            summary["policy"] = policy_summary(summaries[name])
    return summary


def policy_summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluate stage by which a policy is judged."""
    policy, baseline = evaluation["policy"], evaluation["baseline"]
    judge = "gold" if "gold" in policy else "reward"
    numbers = {
        f"{judge}_sft": baseline[judge],
        f"{judge}_final": policy[judge],
        f"{judge}_final_low": policy[f"{judge}_low"],
        f"{judge}_final_high": policy[f"{judge}_high"],
        "kl": evaluation["kl"]["kl_exact"],
        "kl_sampled": evaluation["kl"]["kl_sampled"],
    }
    rate = evaluation[f"win_rate_by_{judge}"]
    numbers |= {f"{name}_vs_sft": value for name, value in rate.items()}
    for point in evaluation.get("best_of", {}).get("curve", ()):
        numbers[f"gold_best_of_{point['n']}"] = point["gold"]
    return numbers


def add_to_summary(directory: Path, values: Mapping[str, Any]) -> None:
    """Adds `values` to a finished stage's summary.json."""
    path = directory / "summary.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | dict(values))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The value as a JSON file."""
    write_aside(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_aside(path: Path, text: str) -> None:
    """Writes aside and renames, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".writing")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
