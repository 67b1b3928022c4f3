"""What a rule of the diagnosis is, what it finds, and the table in which the rules are registered.

A rule reads one run and says whether it shows one failure of the field. For example, the rule `truncated_replies` needs
the metric `rollout/truncated_fraction`, and finds the failure if the median of its last values is above 5%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.core import config
from trimtab.reports.collect import RunRecord, finite
from trimtab.reports.diagnosis.trends import MIN_POINTS, Trend, known, trend
from trimtab.reports.headline import show


@dataclass(frozen=True)
class SettingChange:
    """One setting of a run file with its new value, for example `kl.coef` from 0.0 to 0.1."""

    path: tuple[str, ...]
    """The keys that lead to it, for example `("kl", "coef")`; in a list, the number after its last adds to it."""
    old: Any
    """None if the run's record does not hold the setting."""
    new: Any

    @property
    def key(self) -> str:
        """The path as an override names it, for example `kl.coef`."""
        return ".".join(map(config.toml_key, self.path))

    def below(self, prefix: tuple[str, ...]) -> SettingChange:
        """The same change in a run file that has the table of this run at the path `prefix`."""
        return SettingChange((*prefix, *self.path), self.old, self.new)

    @property
    def as_json(self) -> dict[str, Any]:
        """The change as JSON values."""
        return {"key": self.key, "old": self.old, "new": self.new}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure that a rule found: what is seen, why it probably happened, and what to change."""

    symptom: str
    """One sentence with the numbers and steps it rests on."""
    causes: tuple[str, ...]
    """The likely causes, most likely first."""
    changes: tuple[SettingChange, ...] = ()
    """The remedy as changes of the run file; empty if no setting mends it, and then `advice` says what does."""
    advice: str = ""
    """What the remedy does, or what to do where no setting helps."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """The numbers of the symptom by name, as JSON values."""
    sample: Mapping[str, Any] | None = None
    """A row of samples.jsonl that shows the failure."""


@dataclass(frozen=True)
class NotLooked:
    """A rule that could not look, and why."""

    reason: str


RuleOutcome = Failure | NotLooked | None
"""What a rule says of a run; None if it looked and found nothing."""


@dataclass(frozen=True, kw_only=True)
class DiagnosisRule:
    """One failure of the field and how it is recognised."""

    name: str
    title: str
    stages: tuple[str, ...]
    """The stages whose runs it reads."""
    needs: tuple[str, ...]
    """The metrics without which it cannot look."""
    min_points: int
    """The fewest known values that each of them must have."""
    follows: tuple[str, ...]
    """The rules whose failures explain this one: beside them its remedy waits, since mending them may mend it too."""
    check: Callable[[RunRecord], RuleOutcome]

    def look(self, run: RunRecord) -> RuleOutcome:
        """What the rule says of a run, after it was made sure that the series it needs are there."""
        for name in self.needs:
            series = run.metrics.get(name)
            if series is None:
                return NotLooked(f"{name} is not logged")
            if (num := len(known(series))) < self.min_points:
                return NotLooked(f"{name} has {num} values, and {self.min_points} are needed")
        return self.check(run)


RULES: dict[str, DiagnosisRule] = {}
"""Every rule by name. Their order is that of the report: what comes first explains much of what comes later."""


def rule(
    name: str,
    title: str,
    *,
    stages: Sequence[str],
    needs: Sequence[str] = (),
    min_points: int = MIN_POINTS,
    follows: Sequence[str] = (),
) -> Callable[[Callable[[RunRecord], RuleOutcome]], Callable[[RunRecord], RuleOutcome]]:
    """Registers a function that checks a run as a rule."""

    def add(check: Callable[[RunRecord], RuleOutcome]) -> Callable[[RunRecord], RuleOutcome]:
        assert name not in RULES, f"two rules named {name}"
        RULES[name] = DiagnosisRule(
            name=name,
            title=title,
            stages=tuple(stages),
            needs=tuple(needs),
            min_points=min_points,
            follows=tuple(follows),
            check=check,
        )
        return check

    return add


# --- what rules read and write ---


def trend_of(run: RunRecord, name: str) -> Trend | None:
    """The trend of a metric; None if fewer than `MIN_POINTS` of its values are known."""
    series = run.metrics.get(name)
    return None if series is None or len(known(series)) < MIN_POINTS else trend(series)


def ends_at(run: RunRecord, name: str) -> float:
    """The median of a metric at the end of the run; nan if it is unknown, since nan passes no bound."""
    found = trend_of(run, name)
    return math.nan if found is None else found.end


def setting(run: RunRecord, path: str) -> Any:
    """The setting at a key path such as `optimizer.learning_rate`; None if the record does not hold it."""
    value: Any = run.settings
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def number_setting(run: RunRecord, path: str) -> float:
    """The same as a number; nan if it is none."""
    return finite(setting(run, path))


def changed(run: RunRecord, **new: Any) -> tuple[SettingChange, ...]:
    """Changes of settings, named with two underscores for a dot (`kl__coef=0.1`); what keeps its value
    is left out, and what has none."""
    paths = {name.replace("__", "."): value for name, value in new.items()}
    return tuple(
        change_to(run, path, value)
        for path, value in paths.items()
        if value is not None and setting(run, path) != value
    )


def change_to(run: RunRecord, path: str, new: Any) -> SettingChange:
    """The change of the setting at a key path such as `optimizer.learning_rate` to a new value."""
    return SettingChange(tuple(path.split(".")), setting(run, path), new)


def scaled(run: RunRecord, path: str, factor: float) -> tuple[SettingChange, ...]:
    """The change of a number by a factor, with two digits; empty if the record does not hold it."""
    old = number_setting(run, path)
    if math.isnan(old) or old == 0:
        return ()
    return (change_to(run, path, two_digits(old * factor)),)


def scaled_whole(run: RunRecord, path: str, factor: int) -> tuple[SettingChange, ...]:
    """The change of a whole number by a factor; empty if the record does not hold it."""
    old = setting(run, path)
    return (change_to(run, path, old * factor),) if isinstance(old, int) and old > 0 else ()


def two_digits(value: float) -> float:
    """The value with two significant digits."""
    return float(f"{value:.2g}")


def moved(found: Trend) -> str:
    """A trend in words, such as "from 31.2 (steps 1 to 6) to 64 (steps 25 to 30)"."""
    return f"from {show(found.start)} ({_steps(found.first_steps)}) to {show(found.end)} ({_steps(found.last_steps)})"


def at_the_end(found: Trend) -> str:
    """The end of a trend in words, such as "0.4 (median of steps 25 to 30)"."""
    return f"{show(found.end)} (median of {_steps(found.last_steps)})"


def numbers_of(name: str, found: Trend) -> dict[str, Any]:
    """A trend as JSON values under the name of its metric."""
    return {
        name: {
            "start": found.start,
            "end": found.end,
            "error": found.error,
            "first_steps": list(found.first_steps),
            "last_steps": list(found.last_steps),
        }
    }


def last_sample(run: RunRecord) -> Mapping[str, Any] | None:
    """The last sampled reply; None if none was written."""
    return next((row for row in reversed(run.samples) if isinstance(row.get("response"), str)), None)


def _steps(bounds: tuple[int, int]) -> str:
    return f"steps {bounds[0]} to {bounds[1]}"
