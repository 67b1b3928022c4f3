"""The diagnosis of a run as a section of its page."""

from __future__ import annotations

from trimtab.reports.diagnosis import RunDiagnosis
from trimtab.reports.diagnosis.remedy import as_override
from trimtab.reports.diagnosis.rule import DiagnosisRule, Failure
from trimtab.reports.headline import number, show
from trimtab.reports.page import Folded, Part, ReplyCard, SampleCard, Table, Text


def diagnosis_parts(diagnosis: RunDiagnosis) -> list[Part]:
    """The bill of a run, each failure with its remedy, and folded what was looked at; nothing if no rule reads its
    stage."""
    if not (diagnosis.found or diagnosis.clean or diagnosis.not_looked):
        return []
    parts: list[Part] = [Text("Diagnosis", "heading"), Text(diagnosis.standing)]
    for rule, failure in diagnosis.found:
        parts += _failure(diagnosis, rule, failure)
    looked = [(rule.name, rule.title, "found well") for rule in diagnosis.clean]
    looked += [(rule.name, rule.title, reason.reason) for rule, reason in diagnosis.not_looked]
    return [*parts, Folded("What was looked at, and what could not be", [Table(looked)])]


def _failure(diagnosis: RunDiagnosis, rule: DiagnosisRule, failure: Failure) -> list[Part]:
    rows = [("seen", failure.symptom), *(("perhaps because", cause) for cause in failure.causes)]
    explained = diagnosis.explains(rule)
    if explained is not None:
        rows.append(("remedy", f"mend {explained.name} first: it explains this"))
    else:
        rows += [("remedy", as_override(change)) for change in failure.changes]
        rows += [("advice", failure.advice)] if failure.advice else []
    parts: list[Part] = [Table(rows, (rule.title, ""))]
    if failure.sample is not None:
        scores = [
            (name, show(value), "")
            for name in ("step", "reward", "gold")
            if (value := number(failure.sample, name)) is not None
        ]
        reply = ReplyCard("for example", str(failure.sample.get("response")), scores)
        parts.append(SampleCard([reply], prompt=str(failure.sample.get("prompt", "–"))))
    return parts
