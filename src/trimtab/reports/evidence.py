"""What a dossier says besides its runs: the data and the votes, the suites that were asked, and what all of it took.

Each is JSON values, from which the parts of the page are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.errors import DataError
from trimtab.core.files import read_json
from trimtab.evals.suites.results import read_results
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.headline import bounds, interval, number, percent, seconds, section, show, with_bounds
from trimtab.reports.page import Command, Folded, Part, Table, Text
from trimtab.reports.repeating import Repeating
from trimtab.stats import Interval

LEFT_OUT = ("items", "engine")
"""What a dossier leaves out of the results of a suite: the scores of single items, and how they were computed."""
_RAW = "raw agreement"
"""The coefficient that says how often two annotators of an item choose alike."""
_DIGITS = 16
"""Letters of a hash that the page shows."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked beside the runs, and the files that it was read from."""

    suites: Sequence[Mapping[str, Any]] = ()
    """Results of `trimtab eval SUITE MODEL BASELINE --out FILE`."""
    studies: Sequence[Mapping[str, Any]] = ()
    """Figures of `trimtab feedback agreement`, by their files under "file"."""
    options: Sequence[tuple[str, Path]] = ()
    """The options of `trimtab report` that name the files, such as ("--suite", Path("hhh.json"))."""

    @classmethod
    def read(cls, *, suites: Sequence[Path] = (), agreements: Sequence[Path] = ()) -> Asked:
        """What the files hold. Raises DataError for a file that holds something else."""
        return cls(
            suites=read_results(suites, for_tax=False),
            studies=[_study(path) for path in agreements],
            options=[*(("--suite", path) for path in suites), *(("--agreement", path) for path in agreements)],
        )


NOTHING_ASKED = Asked()


def _study(path: Path) -> dict[str, Any]:
    """The figures of a study of votes. Raises DataError for anything else."""
    fix = "give the figures (NAME-agreement.json) that `trimtab feedback agreement` writes beside its page"
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), fix=fix)
    found = read_json(path, fix=fix)
    if not isinstance(found.get("coefficients"), list) or "num_votes" not in found:
        raise DataError("these are no figures of votes", where=str(path), fix=fix)
    return found | {"file": str(path)}


def runs_of(record: RunRecord | PipelineRecord) -> Sequence[RunRecord]:
    """The runs of a pipeline in the order of its stages, or the one run."""
    return record.runs if isinstance(record, PipelineRecord) else (record,)


# --- data and votes ---


def data_of(
    record: RunRecord | PipelineRecord, repeating: Repeating, studies: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Every source that a run read, and what is known of the votes."""
    runs = runs_of(record)
    sources = [
        {
            "run": run.name,
            "source": source,
            "rows": number(known, "rows"),
            "sha256": str(known["sha256"]) if known.get("sha256") else None,
            "not_used": [str(name) for name in _listed(known.get("not_used"))],
            "dropped": dict(section(known, "dropped")),
            "command": repeating.data(run, source),
        }
        for run in runs
        for source, known in ((name, section(run.data, name)) for name in run.data)
    ]
    votes = [row for run in runs for row in _votes(run, repeating)]
    return {"sources": sources, "votes": votes + [_studied(one) for one in studies]}


def _studied(study: Mapping[str, Any]) -> dict[str, Any]:
    """The agreement of people, and the accuracy of one vote, which is the most that a judge can reach against single
    votes if they err independently."""
    raw = next((one for one in _listed(study["coefficients"]) if section({"_": one}, "_").get("name") == _RAW), None)
    return {
        "run": None,
        "of": study["file"],
        "num_pairs": number(study, "num_items"),
        "agreement": _bounded(interval({"_": section({"_": raw}, "_").get("interval")}, "_")),
        "noise_limit": _bounded(interval({"_": section(study, "noise").get("interval")}, "_")),
        "command": study.get("command") if isinstance(study.get("command"), str) else None,
    }


def _bounded(found: Interval | None) -> dict[str, float] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _votes(run: RunRecord, repeating: Repeating) -> Iterator[dict[str, Any]]:
    """How far annotators agree, and the accuracy that their noise allows at most, of each set of pairs."""
    for name in ("train", "held_out"):
        agreement, limit = (interval(run.summary, f"{name}_{what}") for what in ("agreement", "bayes_accuracy"))
        if agreement is not None or limit is not None:
            yield {
                "run": run.name,
                "of": f"{name}.jsonl",
                "num_pairs": number(run.summary, f"num_{name}_pairs"),
                "agreement": _bounded(agreement),
                "noise_limit": _bounded(limit),
                "command": repeating.stage(run),
            }
    if run.stage == "reward" and (limit := interval(run.summary, "bayes_accuracy")) is not None:
        held_out = run.settings.get("held_out_data") or "held-out pairs"
        yield {
            "run": run.name,
            "of": str(held_out),
            "num_pairs": number(run.summary, "num_pairs"),
            "agreement": None,
            "noise_limit": _bounded(limit),
            "command": repeating.stage(run),
        }
    for source in run.data:
        if (command := repeating.votes(source)) is not None:
            yield {
                "run": run.name,
                "of": source,
                "num_pairs": number(section(run.data, source), "rows"),
                "agreement": None,
                "noise_limit": None,
                "command": command,
            }


def data_parts(found: Mapping[str, Any]) -> list[Part]:
    """The sources and the votes as tables, each with the commands that repeat them."""
    parts: list[Part] = []
    if found["sources"]:
        rows = [
            (
                one["source"],
                one["run"],
                show(one["rows"]),
                (one["sha256"] or "–")[:_DIGITS],
                ", ".join(one["not_used"]) or "–",
                ", ".join(f"{num} {str(kind).replace('_', ' ')}" for kind, num in one["dropped"].items()) or "–",
            )
            for one in found["sources"]
        ]
        head = ("source", "run", "rows", f"SHA-256 (first {_DIGITS})", "not used", "left out")
        parts += [Table(rows, head), *commands(found["sources"])]
    if found["votes"]:
        shares = ("agreement", "noise_limit")
        cast = [
            (
                one["of"],
                one["run"] or "–",
                show(one["num_pairs"]),
                *(_share(one[share]) for share in shares),
            )
            for one in found["votes"]
        ]
        how = (
            "Agreement is how often two annotators of a pair choose alike. The noise limit is the share of pairs that "
            "the best judge could order as they did. How far the people of a project agree is here if --agreement "
            "names the figures that its own command writes."
        )
        titles = ("votes of", "run", "pairs", "agreement", "noise limit")
        parts += [Text("Votes", "heading"), Table(cast, titles), Text(how, "how"), *commands(found["votes"])]
    return parts


def _share(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else with_bounds(Interval(**found, count=0), percent)


# --- suites ---


def suites_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results of suites, without the scores of single items."""
    return [{name: value for name, value in one.items() if name not in LEFT_OUT} for one in results]


def suite_parts(found: Sequence[Mapping[str, Any]]) -> list[Part]:
    """A table for each suite: its figures of both models with intervals, their difference, and the null models."""
    parts: list[Part] = []
    for one in found:
        metrics = [row for row in _listed(one.get("metrics")) if isinstance(row, Mapping)]
        nulls = list(dict.fromkeys(who for row in metrics for who in section(row, "null")))
        rows = [
            (
                str(row.get("name")),
                *(_figure(row, side) for side in ("model", "baseline", "difference")),
                *(show(number(section(row, "null"), who)) for who in nulls),
            )
            for row in metrics
        ]
        about = f"{one.get('model')} beside {one.get('baseline')}, on {show(number(one, 'num_items'))} items."
        head = ("", "model", "baseline", "difference", *(f"null: {who}" for who in nulls))
        parts += [Text(str(one.get("suite")), "heading"), Text(about), Table(rows, head), *commands([one])]
    return parts


def _figure(row: Mapping[str, Any], side: str) -> str:
    found = interval(row, side)
    if found is None:
        return "–"
    count = f" (n={found.count})" if found.count else ""
    return f"{found.value:.3g} {bounds(found)}".rstrip() + count


# --- costs ---


def costs_of(record: RunRecord | PipelineRecord, repeating: Repeating) -> dict[str, Any]:
    """The time and the memory of every run, and of all of them."""
    runs = [_cost(run, record) for run in runs_of(record)]
    known = [one["seconds"] for one in runs if one["seconds"] is not None]
    whole = number(record.summary, "seconds")
    return {
        "seconds": whole if whole is not None else sum(known) if known else None,
        "peak_rss_gb": number(record.summary, "peak_rss_gb"),
        "num_cpus": number(record.summary, "num_cpus"),
        "runs": runs,
        "command": repeating.whole,
    }


def _cost(run: RunRecord, record: RunRecord | PipelineRecord) -> dict[str, Any]:
    """The seconds of a run: of the whole stage as the pipeline took them, else of its steps."""
    stages = section(record.summary, "stages") if isinstance(record, PipelineRecord) else {}
    whole = number(section(stages, run.name), "seconds")
    whole = number(run.summary, "seconds") if whole is None else whole
    steps, speeds = (run.metrics.get(name) for name in ("time/step_seconds", "time/tokens_per_second"))
    of_steps = steps.total if steps is not None else None
    tokens = None
    if steps is not None and speeds is not None and np.array_equal(steps.steps, speeds.steps):
        tokens = float(np.nansum(steps.values * speeds.values))
    engine = section(run.settings, "engine")
    return {
        "run": run.name,
        "stage": run.stage,
        "seconds": of_steps if whole is None else whole,
        "seconds_of_steps": of_steps,
        "num_steps": run.num_steps or None,
        "tokens": tokens,
        "device": engine.get("device"),
        "workers": number(engine, "workers"),
        "cpu": run.environment.get("cpu"),
    }


def cost_parts(found: Mapping[str, Any]) -> list[Part]:
    """The costs as a table."""
    rows = [
        (
            one["run"],
            *("–" if one[time] is None else seconds(one[time]) for time in ("seconds", "seconds_of_steps")),
            show(one["num_steps"]),
            show(one["tokens"]),
            " ".join(str(one[what]) for what in ("device", "cpu") if one[what]) or "–",
        )
        for one in found["runs"]
        if one["seconds"] is not None
    ]
    if not rows:
        return []
    memory = found["peak_rss_gb"]
    total = [] if found["seconds"] is None else [f"{seconds(found['seconds'])} in all"]
    total += [] if memory is None else [f"at most {memory:.2g} GB of memory"]
    total += [] if found["num_cpus"] is None else [f"on {show(found['num_cpus'])} processors"]
    head = ("", "time", "of steps", "steps", "tokens read", "where")
    told: list[Part] = [Text(f"{', '.join(total)}.")] if total else []
    return [*told, Table(rows, head), *commands([found])]


def commands(found: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The commands of some figures, each once; several are folded."""
    known = dict.fromkeys(one.get("command") for one in found)
    parts = [Command(command) for command in known if isinstance(command, str) and command]
    return [Folded(f"{len(parts)} commands that repeat these figures", parts)] if len(parts) > 1 else [*parts]
