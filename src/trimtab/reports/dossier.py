"""The dossier of a run or a pipeline: what its page shows, as one JSON document.

It holds what was trained on with hashes, what the reward model is worth, the reward against a measure that training
does not see, the checkpoint that was chosen, what looks wrong, suites that were asked afterwards, and all settings.
`dossier.schema.json` is its JSON schema. Replies are not in it, but for those that show a failure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.files import json_text, write_out, writing
from trimtab.evals.suites.results import read_results
from trimtab.reports import headline
from trimtab.reports.alarms import alarms_of
from trimtab.reports.collect import PipelineRecord, RunRecord, collect
from trimtab.reports.diagnosis import diagnose
from trimtab.reports.quality import measured_quality

VERSION = 1
"""The version of the schema, raised when a reader of the file would have to change."""
MAX_POINTS = 400
"""Points of a longer course of quality are drawn evenly from it, the last one among them."""


def write_dossier(directory: Path, out: Path, *, suites: Sequence[Path] = ()) -> Path:
    """Writes the dossier of a run or pipeline directory with the results of suites, and returns its path.

    Raises DataError for any other directory and for a file that holds no results of a suite, and EngineError if it
    cannot be written.
    """
    found = dossier_of(collect(directory), suites=read_results(suites))
    text = json_text(json.loads(json.dumps(found, default=str)))  # a settings file may hold dates
    with writing("the dossier", out, kept=f"the run is whole: trimtab report {directory} --json FILE"):
        # a lone surrogate, which JSON can carry and UTF-8 cannot, becomes a question mark as on the page
        write_out(out, text.encode("utf-8", errors="replace").decode())
    return out


def dossier_of(record: RunRecord | PipelineRecord, *, suites: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The dossier of a record, as JSON values."""
    whole = isinstance(record, PipelineRecord)
    runs = record.runs if isinstance(record, PipelineRecord) else (record,)
    verdict = headline.pipeline_verdict(record) if isinstance(record, PipelineRecord) else headline.run_verdict(record)
    return {
        "version": VERSION,
        "name": record.name,
        "kind": "pipeline" if whole else "run",
        "finished": record.finished,
        "problems": list(record.problems),
        "verdict": None if verdict is None else vars(verdict),
        "pipeline": {"settings": record.settings, "summary": record.summary} if whole else None,
        "runs": [_run(run) | {"diagnosis": found.as_json} for run, found in zip(runs, diagnose(record), strict=True)],
        "suites": [{name: one[name] for name in one.keys() - {"items", "engine"}} for one in suites],
    }


def _run(run: RunRecord) -> dict[str, Any]:
    actions = [row for row in run.guard if row.get("event") != "check"]
    return {
        "name": run.name,
        "stage": run.stage,
        "about": run.about,
        "finished": run.finished,
        "num_steps": run.num_steps,
        "num_samples": len(run.samples),
        "alarms": list(alarms_of(run)),
        "settings": run.settings,
        "environment": run.environment,
        "data": run.data,
        "models": run.models,
        "metrics": {
            name: {"first": series.mean_of_first(), "last": series.mean_of_last(), "last_step": series.last_step}
            for name, series in run.metrics.items()
            if len(series)
        },
        "summary": run.summary,
        "quality": _quality(run),
        "guard": {"num_checks": len(run.guard) - len(actions), "actions": actions} if run.guard else None,
        "decision": run.decision or None,
    }


def _quality(run: RunRecord) -> dict[str, Any] | None:
    """The independent measure over the run; None if nothing was measured."""
    measured = measured_quality(run)
    if measured is None:
        return None
    num = len(measured.steps)
    places = [-(-num * i // MAX_POINTS) - 1 for i in range(1, MAX_POINTS + 1)] if num > MAX_POINTS else range(num)
    points = []
    for i in places:
        kl, reward, quality = measured.points[i]
        error = None if measured.errors is None else measured.errors[i]
        points.append({"step": measured.steps[i], "kl": kl, "reward": reward, "quality": quality, "error": error})
    found = measured.summary
    return {
        "name": measured.name,
        "points": points,
        "peak": found.peak_gold,
        "peak_step": measured.steps[found.peak_index],
        "peak_kl": found.peak_kl,
        "final": found.final_gold,
        "fall_fraction": found.fall_fraction,
        "fell": measured.fell,
        "was_gamed": measured.was_gamed,
    }
