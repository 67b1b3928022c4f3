"""A diagnosis as lines of text, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from trimtab.core.terminal import printable
from trimtab.reports.collect import finite
from trimtab.reports.diagnosis import RunDiagnosis
from trimtab.reports.diagnosis.remedy import as_override
from trimtab.reports.diagnosis.rule import DiagnosisRule, Failure
from trimtab.reports.headline import show

WIDTH = 110
SHOWN_REPLY = 200
"""Characters of a sample that are shown."""


def lines_of(diagnosis: RunDiagnosis) -> Iterator[str]:
    """The diagnosis of a run, line by line: its bill, each failure, and what was and was not looked at."""
    run = diagnosis.run
    yield f"{printable(run.name)} ({run.stage}): {diagnosis.standing}"
    for problem in run.problems:
        yield from _wrapped("note", problem)
    for number, (rule, failure) in enumerate(diagnosis.found, start=1):
        yield ""
        yield f"  {number}. {rule.title} ({rule.name})"
        yield from _failure(diagnosis, rule, failure)
    yield ""
    if diagnosis.clean:
        yield from _wrapped("looked at and found well", ", ".join(rule.name for rule in diagnosis.clean))
    for rule, reason in diagnosis.not_looked:
        yield from _wrapped("not looked at", f"{rule.name}: {reason.reason}")


def _failure(diagnosis: RunDiagnosis, rule: DiagnosisRule, failure: Failure) -> Iterator[str]:
    yield from _wrapped("seen", failure.symptom, depth=5)
    if failure.sample is not None:
        step, reward = finite(failure.sample.get("step")), finite(failure.sample.get("reward"))
        reply = printable(str(failure.sample.get("response")))
        yield from _wrapped("for example", f"step {show(step)}, reward {show(reward)}: {_cut(reply)!r}", depth=5)
    for cause in failure.causes:
        yield from _wrapped("perhaps because", cause, depth=5)
    if (cause_rule := diagnosis.explains(rule)) is not None:
        yield from _wrapped("remedy", f"mend {cause_rule.name} first: it explains this", depth=5)
        return
    for change in failure.changes:
        was = "unset" if change.old is None else repr(change.old)
        yield from _wrapped("remedy", f"{as_override(change.below(diagnosis.prefix))}  (was {was})", depth=5)
    yield from _wrapped("advice", failure.advice, depth=5)


def _wrapped(label: str, text: str, *, depth: int = 2) -> Iterator[str]:
    indent = " " * depth
    yield from textwrap.wrap(
        f"{label}: {printable(text)}",
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_REPLY else f"{text[:SHOWN_REPLY]}…"
