"""A pipeline: stages by name in one TOML file. Finished stages are skipped, an interrupted one goes on.

seed = 0
engine.device = "cuda"   # how every stage is computed
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

import os
import re
import signal
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.core import config, registry, settings_check
from trimtab.core.errors import ConfigError, DataError, Interrupted, Terminated, TrimtabError, nearest
from trimtab.core.files import read_json, write_json, write_whole, writing
from trimtab.core.process import peaks_rss_gb
from trimtab.core.terminal import warn
from trimtab.data.sources import files_hash
from trimtab.rewards.combined import judges_and_measure
from trimtab.rewards.python_callable import PythonCallable, file_digest
from trimtab.runs.models import local_digest
from trimtab.runs.resume import flat
from trimtab.runs.run import Run, holding, holds_run
from trimtab.stages import preflight

TOP_LEVEL = ("seed", "engine", "variables", "stages")
RESERVED = ("pipeline.toml", "summary.json", "report.html", "report.json")


def run_pipeline(values: Mapping[str, Any], out: Path, *, where: str = "the pipeline file") -> dict[str, Any]:
    """Runs every stage that has not finished, in the order of the file, and returns the summary it writes.

    All mistakes in all stages are reported before the first one starts.
    """
    console = Console(stderr=True, highlight=False)
    values = expand(values, where=where)
    stages = resolve_stages(values, out, where=where)
    text = config.to_toml(dict(values))
    refuse_other_contents(out, list(stages), text, where=where)
    preflight.check(stages, out, where=where)
    refuse_stale(stages, out)
    with writing("the pipeline's directory", out):
        out.mkdir(parents=True, exist_ok=True)
    with holding(out):
        with writing("the pipeline's directory", out):
            write_whole(out / "pipeline.toml", text)
        for number, (name, (stage, settings)) in enumerate(stages.items(), start=1):
            title = f"[{number}/{len(stages)}] {name}"
            with _without_fresh(out / name), open_run(out / name, stage, settings) as run:
                if run.finished:
                    refuse_remade(name, stages, out)
                    console.print(f"{title}: finished before", style="dim")
                    continue
                console.print(title, style="bold")
                run_stage(stage, settings, run)
        summary = summarise(values, {name: stage for name, (stage, _) in stages.items()}, out)
        write_json(out / "summary.json", summary)
    return summary


@contextmanager
def _without_fresh(directory: Path) -> Iterator[None]:
    """Errors inside advise to remove the directory of the stage instead of --fresh, which a pipeline does not have."""
    try:
        yield
    except TrimtabError as error:
        fix = re.sub(r"begin again (there )?with --fresh", f"remove {directory} so that it begins again", error.fix)
        if fix == error.fix:
            raise
        raise type(error)(error.problem, where=error.where, fix=fix) from error


def open_run(directory: str | Path, stage: str, settings: Any, *, resume: bool = True) -> Run:
    """The run of a stage in a directory, with the facts of the stage's descriptor; see `Run.open`. A run that goes on
    with a function of the user's that was changed meanwhile says so and records it. A finished run stays finished if it
    cannot become longer because what it read has changed."""
    if resume and preflight.would_grow(Path(directory), stage, settings):
        for path in changed_since(Path(directory), settings):
            raise DataError(
                f"{path} is not what this run began with",
                where=str(directory),
                fix="restore it, or begin again with --fresh or another --out",
            )
    run = Run.open(
        directory,
        stage=stage,
        settings=config.dump(settings),
        facts=registry.descriptor("stage", stage),
        resume=resume,
        models=[use.path for use in preflight.models_of(stage, settings)],
        trackers=getattr(settings, "trackers", ()),
    )
    if not run.finished:
        for key, reward in judges_and_measure(settings).items():
            if isinstance(reward, PythonCallable):
                noted = f"{reward.function} ({file_digest(reward.function)})"
                run.note_path(f"function of {key}", noted, effect="what was learnt before was judged by that one")
    return run


def run_stage(stage: str, settings: Any, run: Run) -> None:
    """Runs one stage to its end and notes how long it took and the memory so far. Raises Interrupted for Ctrl-C, with
    what is kept."""
    started = time.perf_counter()
    try:
        registry.descriptor("stage", stage).run(settings, run)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        kept = f"stopped at once; {run.kept()}, and finished stages stay"
        raise Interrupted(kept, signal_number=number) from stop
    seconds = time.perf_counter() - started
    add_to_summary(run.directory, {"seconds": seconds, "peak_rss_gb_each": peaks_rss_gb()})


def refuse_other_contents(out: Path, names: Sequence[str], text: str, *, where: str) -> None:
    """Raises ConfigError if the directory holds a run of one stage, a pipeline with other stages or something else,
    because it would be overwritten. A pipeline to which stages were added goes on. `text` is that of pipeline.toml."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", where="the pipeline's directory", fix="give another directory with --out")
    fix = "give another directory with --out"
    if holds_run(out):
        raise ConfigError(f"{out} holds the run of a single stage", where=str(out / "settings.toml"), fix=fix)
    file = out / "pipeline.toml"
    there = stages_of(file)
    begun = [name for name in {**dict.fromkeys(there), **dict.fromkeys(names)} if holds_run(out / name)]
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.exists() else []
    if others and not begun and (others != [file.name] or file.read_text(encoding="utf-8", errors="replace") != text):
        raise ConfigError(f"{out} holds {', '.join(others[:3])} and no pipeline that began", where=where, fix=fix)
    if gone := [name for name in begun if name not in names]:
        raise ConfigError(
            f"{out} holds another pipeline, whose stages {', '.join(gone)} are not in this one", where=where, fix=fix
        )


def stages_of(file: Path) -> Sequence[str]:
    """The names of the stages of the pipeline that this file began; none if it is missing or damaged, since then it is
    written anew from the file that the command was given."""
    try:
        stages = tomllib.loads(file.read_text(encoding="utf-8")).get("stages", {})
    except (FileNotFoundError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return []
    return list(stages) if isinstance(stages, Mapping) else []


def refuse_stale(stages: Mapping[str, tuple[str, Any]], out: Path) -> None:
    """Raises ConfigError if a stage would become longer although a later stage has already used its result."""
    for name, (stage, settings) in stages.items():
        if preflight.would_grow(out / name, stage, settings) and (used_by := began_with(name, stages, out)):
            raise ConfigError(
                f"{name} is to be made longer, but {', '.join(used_by)} began with it as it is",
                where=str(out / name),
                fix=f"remove {', '.join(str(out / later) for later in used_by)}, or give another directory with --out",
            )


def refuse_remade(name: str, stages: Mapping[str, tuple[str, Any]], out: Path) -> None:
    """Raises DataError if a finished stage has read a model or file of an earlier stage that was made anew since. Says
    so on stderr if it was a file or model from elsewhere."""
    for path in changed_since(out / name, stages[name][1]):
        if not path.startswith(str(out) + os.sep):
            warn(f"{name} was finished before {path} was changed: it is as it was made from the earlier one")
            continue
        stale = ", ".join(str(out / later) for later in (name, *began_with(name, stages, out)))
        raise DataError(
            f"{name} was finished before with another {path} than there is now",
            where=str(out / name),
            fix=f"remove {stale}, so that what was made from the earlier one is made again, or give another directory "
            "with --out",
        )


def changed_since(directory: Path, settings: Any) -> Iterator[str]:
    """The models and files in the settings of a run that are there and are others than the run has read."""
    beside = directory.parent
    read = dict.fromkeys(value for _, value in flat(config.dump(settings)) if isinstance(value, str))
    for record, digest_of in (("models.json", local_digest), ("data.json", files_hash)):
        file = directory / record
        seen = read_json(file, fix="remove it: what the stage has read is not known then") if file.exists() else {}
        hashes = {
            known: entry["sha256"] for known, entry in seen.items() if isinstance(entry, dict) and "sha256" in entry
        }
        for path in read:
            # The runs may have been moved, or named in another way, since this one has read its files.
            inside = path.startswith(str(beside) + os.sep)
            names = (path, os.sep + os.path.relpath(path, beside)) if inside else (path,)
            before = next((hashes[known] for known in hashes if known == path or known.endswith(names[1:])), None)
            now = digest_of(path) if before is not None else None
            if now is not None and now != before:
                yield path


def began_with(name: str, stages: Mapping[str, tuple[str, Any]], out: Path) -> list[str]:
    """The later stages that have begun and that use the result of a stage, also by way of others."""
    using = [name]
    for later, (_, settings) in stages.items():
        text = config.to_toml(config.dump(settings))
        if any(f"{out / one}{os.sep}" in text for one in using):
            using.append(later)
    return [later for later in using[1:] if (out / later / "settings.toml").exists()]


def expand(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The pipeline with every `like` written out. With `like`, the rounds of a loop have to say only what differs.

    Tables inside a stage are put together key by key, lists are replaced. Raises ConfigError for a `like` that names no
    stage above it.
    """
    tables = values.get("stages")
    if not isinstance(tables, Mapping):
        return dict(values)
    expanded: dict[str, Any] = {}
    for name, table in tables.items():
        if isinstance(table, Mapping) and "like" in table:
            if not isinstance(like := table["like"], str) or like not in expanded:
                known = ", ".join(expanded) or "none"
                raise ConfigError(
                    f"stages.{name}.like = {like!r} names no earlier stage",
                    where=where,
                    fix=f"{nearest(str(like), expanded)}stages before this one: {known}",
                )
            table = overlay(expanded[like], {key: value for key, value in table.items() if key != "like"})
        expanded[name] = table
    return {**values, "stages": expanded}


def overlay(below: Any, above: Any) -> Any:
    """`below` with the values of `above` on top; tables key by key, unless `above` names another class."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "name" in above and above["name"] != below.get("name"):
        return above
    return {**below, **{key: overlay(below.get(key), value) for key, value in above.items()}}


def resolve_stages(values: Mapping[str, Any], out: Path, *, where: str) -> dict[str, tuple[str, Any]]:
    """The stages by name, each as (stage, its settings). Raises one ConfigError with every mistake."""
    values = expand(values, where=where)
    tables = values.get("stages")
    if "stages" not in values and isinstance(stage := values.get("stage"), str):
        raise ConfigError(f"a run file of the stage {stage!r}", where=where, fix=f"use trimtab {stage}")
    if not isinstance(tables, Mapping) or not tables:
        raise ConfigError(
            "a pipeline without stages", where=where, fix='add tables such as [stages.sft] with stage = "sft"'
        )
    unknown = set(values) - set(TOP_LEVEL)
    if unknown:
        near = nearest(sorted(unknown)[0], TOP_LEVEL)
        near = next((f"did you mean stages.{name}? " for name in sorted(unknown) if name in tables), near)
        raise ConfigError(
            f"unknown keys: {', '.join(sorted(unknown))}",
            where=where,
            fix=f"{near}a pipeline has seed, [engine], [variables] and [stages.NAME] tables",
        )
    if not isinstance(variables := values.get("variables", {}), Mapping):
        raise ConfigError(
            f"variables is {variables!r}",
            where=where,
            fix='it is a table, such as [variables] with data = "data.jsonl"',
        )
    known = registry.modules("stage")
    say_unused(variables, [tables, values.get("engine")])
    resolved: dict[str, Any] = {}
    earlier: set[str] = set()
    for name, table in tables.items():
        refuse_misnamed(name, tables, known, where=where)
        settings = {key: value for key, value in table.items() if key != "stage"}
        if "seed" in values:
            settings.setdefault("seed", values["seed"])
        if "engine" in values:
            shared, own = values["engine"], settings.get("engine", {})
            settings["engine"] = overlay(shared, own) if isinstance(shared, Mapping) else shared  # refused below
        key = f"stages.{name}"
        resolved[key] = substitute(settings, key, variables, earlier, out, where)
        earlier.add(name)
    kinds = {f"stages.{name}": table["stage"] for name, table in tables.items()}
    # This comes before the stages are imported, which takes seconds: a mistake is to be reported at once.
    settings_check.check({key: (known[kinds[key]], table) for key, table in resolved.items()}, where=where)
    classes = {key: registry.descriptor("stage", kind).settings for key, kind in kinds.items()}
    settings_of = config.resolve_tables(classes, resolved, where=where)
    return {name: (table["stage"], settings_of[f"stages.{name}"]) for name, table in tables.items()}


def refuse_misnamed(name: str, tables: Mapping[str, Any], known: Collection[str], *, where: str) -> None:
    """Raises ConfigError if the name of a stage cannot be that of a directory, or if its table names no stage."""
    table = tables[name]
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name) or name in RESERVED:
        raise ConfigError(
            f"a stage called {name!r}",
            where=where,
            fix="a stage is a directory of the pipeline: name it with letters, digits, _ and - only",
        )
    if isinstance(table, Mapping) and "stage" not in table:
        others = [other for other in tables if other != name]
        raise ConfigError(
            f"stages.{name} does not say which stage it is",
            where=where,
            fix=f'{nearest(name, others)}Else add stage = "…" to it; stages are: {", ".join(known)}',
        )
    stage = table["stage"] if isinstance(table, Mapping) else None
    if not isinstance(stage, str) or stage not in known:
        hint = nearest(str(stage), known)
        raise ConfigError(f"stages.{name}.stage is {stage!r}", where=where, fix=f"{hint}stages are: {', '.join(known)}")


def say_unused(variables: Mapping[str, Any], values: Any) -> None:
    """Says on stderr which variables no value names: one that is misspelt on the command line would change nothing."""
    named = {text[1:] for text in _texts(values) if text.startswith("$")}
    for name in sorted(set(variables) - named):
        meant = nearest(name, named) or f"a stage uses it as ${name}"
        warn(f"no stage uses variables.{name}; {meant.rstrip()}")


def _texts(value: Any) -> Iterator[str]:
    """The texts in nested tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


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
    again = "remove it: the same command finishes the stage again from its last checkpoint"
    summaries = {name: read_json(out / name / "summary.json", fix=again) for name in stages}
    # Of the stages, and not of this process, which may have found some of them finished.
    memory: list[float] = max((found.get("peak_rss_gb_each", []) for found in summaries.values()), key=sum)
    summary: dict[str, Any] = {
        "seed": values.get("seed"),
        "seconds": sum(s.get("seconds", 0.0) for s in summaries.values()),
        "peak_rss_gb": sum(memory),
        "peak_rss_gb_each": memory,
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
    policy, baseline = evaluation["policy"], evaluation.get("baseline", {})
    judge = next(name for name in ("gold", "reward", *evaluation["judges"]) if name in evaluation["judges"])
    found = {
        f"{judge}_sft": baseline.get(judge),
        f"{judge}_final": policy.get(judge),
        f"{judge}_final_low": policy.get(f"{judge}_low"),
        f"{judge}_final_high": policy.get(f"{judge}_high"),
        "kl": evaluation.get("kl", {}).get("kl_exact"),
        "kl_sampled": evaluation.get("kl", {}).get("kl_sampled"),
    }
    numbers: dict[str, Any] = {"judge": judge} | {name: value for name, value in found.items() if value is not None}
    numbers |= {f"{name}_vs_sft": value for name, value in evaluation.get(f"win_rate_by_{judge}", {}).items()}
    for point in evaluation.get("best_of", {}).get("curve", ()):
        numbers[f"gold_best_of_{point['n']}"] = point["gold"]
    return numbers


def add_to_summary(directory: Path, values: Mapping[str, Any]) -> None:
    """Adds `values` to a finished stage's summary.json."""
    path = directory / "summary.json"
    again = "remove it: the stage is finished again from its last checkpoint"
    write_json(path, read_json(path, fix=again) | dict(values))
