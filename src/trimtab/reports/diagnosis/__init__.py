"""What went wrong in a run, by the rules of the field: symptom, cause, and a remedy as changes of its run file.

`diagnose` reads what `reports.collect` found in a directory, so it works on runs that are unfinished, short or damaged,
and says what it could not look at. Thresholds are constants beside their rules, each with its reason. A rule compares
medians of the beginning and the end of a series (`trends`), never two single steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Importing a module of rules registers them; the order of these imports is the order of reports: what comes first
# explains much of what comes later.
from trimtab.reports.diagnosis import training_rules  # noqa: F401  isort: skip
from trimtab.reports.diagnosis import signal_rules  # noqa: F401  isort: skip
from trimtab.reports.diagnosis import policy_rules  # noqa: F401  isort: skip
from trimtab.reports.diagnosis import text_rules  # noqa: F401  isort: skip
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.diagnosis.rule import RULES, DiagnosisRule, Failure, NotLooked, SettingChange


@dataclass(frozen=True, kw_only=True)
class RunDiagnosis:
    """What the rules say of one run."""

    run: RunRecord
    found: tuple[tuple[DiagnosisRule, Failure], ...]
    clean: tuple[DiagnosisRule, ...]
    """The rules that looked and found nothing."""
    not_looked: tuple[tuple[DiagnosisRule, NotLooked], ...]
    prefix: tuple[str, ...] = ()
    """The keys that lead to the table of this run in the run file: `("stages", NAME)` in a pipeline."""

    def explains(self, rule: DiagnosisRule) -> DiagnosisRule | None:
        """The first rule found whose failure explains that of `rule`; None if it stands for itself."""
        return next((other for other, _ in self.found if other.name in rule.follows), None)

    @property
    def changes(self) -> tuple[SettingChange, ...]:
        """The remedies of the failures that no other explains. Of two changes of one setting the first holds."""
        first: dict[tuple[str, ...], SettingChange] = {}
        for rule, failure in self.found:
            for change in failure.changes if self.explains(rule) is None else ():
                first.setdefault(change.path, change)
        return tuple(one.below(self.prefix) for one in first.values())

    @property
    def standing(self) -> str:
        """The bill in one sentence: healthy, ill, or what keeps it from being judged."""
        run, num = self.run, len(self.clean)
        state = "" if run.finished else f" It is not finished: {run.num_steps} steps are logged."
        if self.found:
            return f"{len(self.found)} of {len(self.found) + num} things looked at are wrong.{state}"
        if not self.clean:
            return f"Nothing could be looked at.{state}"
        return f"Nothing is wrong in the {num} things looked at.{state}"

    @property
    def as_json(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        return {
            "run": self.run.name,
            "stage": self.run.stage,
            "finished": self.run.finished,
            "num_steps": self.run.num_steps,
            "problems": list(self.run.problems),
            "standing": self.standing,
            "failures": [self._failure_as_json(rule, failure) for rule, failure in self.found],
            "changes": [one.as_json for one in self.changes],
            "clean": [rule.name for rule in self.clean],
            "not_looked": {rule.name: reason.reason for rule, reason in self.not_looked},
        }

    def _failure_as_json(self, rule: DiagnosisRule, failure: Failure) -> dict[str, Any]:
        cause = self.explains(rule)
        return {
            "rule": rule.name,
            "title": rule.title,
            "symptom": failure.symptom,
            "causes": list(failure.causes),
            "explained_by": None if cause is None else cause.name,
            "changes": [one.below(self.prefix).as_json for one in failure.changes],
            "advice": failure.advice,
            "evidence": dict(failure.evidence),
            "sample": None if failure.sample is None else dict(failure.sample),
        }


def diagnose(record: RunRecord | PipelineRecord) -> tuple[RunDiagnosis, ...]:
    """The diagnosis of a run, or of each run of a pipeline in the order of its stages."""
    if isinstance(record, PipelineRecord):
        return tuple(diagnose_run(run, prefix=("stages", run.name)) for run in record.runs)
    return (diagnose_run(record),)


def diagnose_run(run: RunRecord, *, prefix: tuple[str, ...] = ()) -> RunDiagnosis:
    """What the rules for the stage of a run say of it."""
    found, clean, not_looked = [], [], []
    for rule in RULES.values():
        if run.stage not in rule.stages:
            continue
        outcome = rule.look(run)
        if isinstance(outcome, Failure):
            found.append((rule, outcome))
        elif isinstance(outcome, NotLooked):
            not_looked.append((rule, outcome))
        else:
            clean.append(rule)
    return RunDiagnosis(run=run, found=tuple(found), clean=tuple(clean), not_looked=tuple(not_looked), prefix=prefix)
