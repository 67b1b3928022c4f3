"""The dossier of a run or a pipeline: what its page shows, as one JSON document.

It holds what was trained on with hashes, how far the votes agree, what the reward model is worth, the reward against a
measure that training does not see with the curves fitted to both, the checkpoint that was chosen, what looks wrong,
suites that were asked afterwards, replies to the same prompts before and after, what all of it took, all settings, and
the command that repeats each of these. `dossier.schema.json` is its JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.core.files import json_text, write_out
from trimtab.reports import headline
from trimtab.reports.alarms import alarms_of
from trimtab.reports.before_after import before_after
from trimtab.reports.collect import PipelineRecord, RunRecord, collect
from trimtab.reports.diagnosis import RunDiagnosis, diagnose
from trimtab.reports.evidence import NOTHING_ASKED, Asked, costs_of, data_of, suites_of
from trimtab.reports.fits import fits_of
from trimtab.reports.guard_parts import guard_signals
from trimtab.reports.quality import measured_quality
from trimtab.reports.repeating import Repeating

VERSION = 2
"""The version of the schema, raised when a reader of the file would have to change."""
MAX_POINTS = 400
"""Points of a longer course of quality are drawn evenly from it, the last one among them."""


def write_dossier(directory: Path, out: Path, *, suites: Sequence[Path] = (), agreements: Sequence[Path] = ()) -> Path:
    """Writes the dossier of a run or pipeline directory with the results of suites and of studies of votes, and returns
    its path.

    Raises DataError for any other directory and for a file that holds no such results, and EngineError if it cannot be
    written.
    """
    found = dossier_of(collect(directory), Asked.read(suites=suites, agreements=agreements))
    text = json_text(json.loads(json.dumps(found, default=str)))  # a settings file may hold dates
    write_out(out, text, kept=f"the run is whole: trimtab report {directory} --json FILE")
    return out


def dossier_of(record: RunRecord | PipelineRecord, asked: Asked = NOTHING_ASKED) -> dict[str, Any]:
    """The dossier of a record with what was asked beside it, as JSON values."""
    whole = isinstance(record, PipelineRecord)
    repeating = Repeating(record, asked.options)
    samples = before_after(record)
    verdict = headline.pipeline_verdict(record) if isinstance(record, PipelineRecord) else headline.run_verdict(record)
    return {
        "version": VERSION,
        "name": record.name,
        "kind": "pipeline" if whole else "run",
        "finished": record.finished,
        "problems": list(record.problems),
        "place": str(repeating.place),
        "command": repeating.report,
        "verdict": None if verdict is None else vars(verdict) | {"command": repeating.report},
        "pipeline": _pipeline(record, repeating) if isinstance(record, PipelineRecord) else None,
        "data": data_of(record, repeating, asked.studies),
        "runs": [_run(one, repeating) for one in diagnose(record)],
        "suites": suites_of(asked.suites),
        "samples": None if samples is None else samples.as_json | {"command": repeating.stage(samples.run)},
        "costs": costs_of(record, repeating),
    }


def _pipeline(record: PipelineRecord, repeating: Repeating) -> dict[str, Any]:
    return {"settings": record.settings, "summary": record.summary, "command": repeating.whole}


def _run(diagnosis: RunDiagnosis, repeating: Repeating) -> dict[str, Any]:
    run = diagnosis.run
    actions = [row for row in run.guard if row.get("event") != "check"]
    return {
        "name": run.name,
        "stage": run.stage,
        "about": run.about,
        "command": repeating.stage(run),
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
        "quality": _quality(run, repeating),
        "fits": [one.as_json | {"command": repeating.report} for one in fits_of(run)],
        "guard": {
            "num_checks": len(run.guard) - len(actions),
            "actions": actions,
            "signals": guard_signals(run),
            "command": repeating.stage(run),
        }
        if run.guard
        else None,
        "decision": run.decision or None,
        "decision_command": repeating.decision(run),
        "diagnosis": diagnosis.as_json | {"command": repeating.diagnosis(run)},
    }


def _quality(run: RunRecord, repeating: Repeating) -> dict[str, Any] | None:
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
        "command": repeating.stage(run),
    }
