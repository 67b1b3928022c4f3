"""Reads what run and pipeline directories hold, also of a run that is unfinished, was cut short or is damaged."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.errors import DataError
from trimtab.stats import Floats

MAX_BYTES = 32 * 1024 * 1024
"""A longer JSON-lines file is read in part: half of this many bytes at its beginning, and half at its end."""

# a metric that only this stage logs, to recognise a directory whose settings are lost
_STAGE_SIGNS = {"online": "policy/kl", "reward": "reward/accuracy", "sft": "loss/train"}
_UNREADABLE = (OSError, ValueError, RecursionError)
"""What reading a damaged file may raise: it is a directory, or another user's; its text is wrong, or too deep."""
_RUN_FILES = ("settings.toml", "metrics.jsonl", "samples.jsonl", "summary.json")


@dataclass(frozen=True)
class Thinned:
    """What a series whose points are means of neighbouring values keeps of these values."""

    known: Floats
    """How many known values each point is the mean of."""
    low: Floats
    """The lowest known value of each point; nan if none is known."""
    high: Floats
    num_unknown: int
    """How many logged values were not finite numbers."""
    last_step: float
    """The last step logged."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged."""

    steps: Floats
    values: Floats
    """nan if the logged value was not a finite number."""
    thinned: Thinned | None = None
    """None if the values are as logged."""

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_unknown(self) -> int:
        """How many logged values were not finite numbers."""
        return int(np.isnan(self.values).sum()) if self.thinned is None else self.thinned.num_unknown

    @property
    def total(self) -> float:
        """The sum of the known values."""
        return float(np.nansum(self.values * self._weights))

    @property
    def last_step(self) -> float:
        """The last step logged, of at least one."""
        return float(self.steps[-1]) if self.thinned is None else self.thinned.last_step

    @property
    def low(self) -> Floats:
        """The lowest known value of each point; nan if none is known."""
        return self.values if self.thinned is None else self.thinned.low

    @property
    def high(self) -> Floats:
        """The highest known value of each point; nan if none is known."""
        return self.values if self.thinned is None else self.thinned.high

    @property
    def _weights(self) -> Floats:
        """How many known values each point stands for."""
        return (~np.isnan(self.values)).astype(float) if self.thinned is None else self.thinned.known

    def mean_of_last(self) -> float:
        """Mean of the last tenth of the known values, at least one value; nan if none is known."""
        return _mean_of_first(self.values[::-1], self._weights[::-1])

    def mean_of_first(self) -> float:
        """Mean of the first tenth of the known values, at least one value; nan if none is known."""
        return _mean_of_first(self.values, self._weights)


def _mean_of_first(values: Floats, weights: Floats) -> float:
    """The mean of the first values of a series whose points stand for so many; of the last point needed, a part."""
    before = np.cumsum(weights) - weights
    taken = np.clip(max(1, int(weights.sum() * 0.1)) - before, 0, weights)
    return float(np.nansum(values * taken) / taken.sum()) if taken.any() else math.nan


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run directory. Whatever is missing is empty; what was wrong with a file is in `problems`."""

    name: str
    stage: str
    directory: Path | None = None
    """Where it lies, as an absolute path; None for a record that was made without files."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    """What is known of each source, for example `{"pairs.jsonl": {"sha256": "…", "rows": 100}}`."""
    models: Mapping[str, Any] = field(default_factory=dict)
    """The digest of each model that the run began with, for example `{"runs/sft/model": {"sha256": "…"}}`."""
    metrics: Mapping[str, Series] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
    guard: tuple[Mapping[str, Any], ...] = ()
    """The checks and the actions of the run's guard."""
    decision: Mapping[str, Any] = field(default_factory=dict)
    """Which checkpoint was chosen and why."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    """Whether there is a summary.json that can be read."""
    problems: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """What the stage did, as the run's own record says; empty if it does not."""
        said = self._facts.get("about")
        return said if isinstance(said, str) else ""

    @property
    def charts(self) -> tuple[tuple[str, ...], ...] | None:
        """The metrics to show first, grouped by chart; None if the run's own record does not say."""
        said = self._facts.get("charts")
        if not isinstance(said, list) or not all(isinstance(names, list) for names in said):
            return None
        return tuple(tuple(map(str, names)) for names in said)

    @property
    def _facts(self) -> Mapping[str, Any]:
        facts = self.environment.get("stage")
        return facts if isinstance(facts, Mapping) else {}

    @property
    def num_steps(self) -> int:
        """The last step logged."""
        return int(max((series.last_step for series in self.metrics.values()), default=0))


@dataclass(frozen=True, kw_only=True)
class PipelineRecord:
    """A pipeline directory: its runs in the order of its stages."""

    name: str
    runs: tuple[RunRecord, ...]
    directory: Path | None = None
    """Where it lies, as an absolute path; None for a record that was made without files."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    problems: tuple[str, ...] = ()


def collect(directory: Path) -> RunRecord | PipelineRecord:
    """The run or pipeline in a directory. Raises DataError if there is neither."""
    if (directory / "pipeline.toml").exists():
        return _pipeline(directory)
    if any((directory / name).exists() for name in _RUN_FILES):
        return _run(directory)
    raise DataError(
        f"{directory} holds neither a run nor a pipeline",
        where=str(directory),
        fix="give a directory that a stage or `trimtab run` wrote: it holds settings.toml or pipeline.toml",
    )


def _pipeline(directory: Path) -> PipelineRecord:
    problems: list[str] = []
    settings = read_toml(directory / "pipeline.toml", problems)
    stages = settings.get("stages")
    names = list(stages) if isinstance(stages, Mapping) else []
    # a stage is a name, never a path that leads out of the pipeline
    present = {path.name: path for path in directory.iterdir() if path.is_dir()}
    # without a readable pipeline.toml every run below it counts
    if not names:
        names = sorted(name for name, path in present.items() if any((path / file).exists() for file in _RUN_FILES))
    summary = read_object(directory / "summary.json", problems)
    return PipelineRecord(
        name=directory.resolve().name,
        directory=Path(os.path.abspath(directory)),
        runs=tuple(_run(present[name], _named_stage(stages, name)) for name in names if name in present),
        settings=settings,
        summary=summary or {},
        finished=summary is not None,
        problems=tuple(problems),
    )


def _named_stage(stages: Any, name: str) -> str | None:
    table = stages.get(name) if isinstance(stages, Mapping) else None
    stage = table.get("stage") if isinstance(table, Mapping) else None
    return stage if isinstance(stage, str) else None


def _run(directory: Path, stage: str | None = None) -> RunRecord:
    problems: list[str] = []
    settings = read_toml(directory / "settings.toml", problems)
    metrics = series_of(list(_json_lines(directory / "metrics.jsonl", problems)))
    samples = tuple(_json_lines(directory / "samples.jsonl", problems))
    summary = read_object(directory / "summary.json", problems)
    if isinstance(settings.get("stage"), str):
        stage = settings["stage"]
    if stage is None:
        guesses = (name for name, metric in _STAGE_SIGNS.items() if metric in metrics)
        stage = next(guesses, "evaluate" if samples and "baseline_response" in samples[0] else "run")
    return RunRecord(
        name=directory.resolve().name,
        stage=stage,
        directory=Path(os.path.abspath(directory)),
        settings={key: value for key, value in settings.items() if key != "stage"},
        environment=read_object(directory / "environment.json", problems) or {},
        data=read_object(directory / "data.json", problems) or {},
        models=read_object(directory / "models.json", problems) or {},
        metrics=metrics,
        samples=samples,
        guard=tuple(_json_lines(directory / "guard.jsonl", problems)),
        decision=read_object(directory / "decision.json", problems) or {},
        summary=summary or {},
        finished=summary is not None,
        problems=tuple(problems),
    )


def series_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Each metric in rows of metrics.jsonl as a series. Rows without a step are left out, and values that are no
    numbers."""
    columns: dict[str, tuple[list[Any], list[Any]]] = {}
    for row in rows:
        if math.isnan(finite(step := row.get("step"))):
            continue
        for name, value in row.items():
            # a value that was not finite is logged as null
            if value is None or isinstance(value, int | float):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    columns.pop("step", None)
    return {name: Series(_vector(steps), _vector(values)) for name, (steps, values) in columns.items()}


def _vector(values: Sequence[Any]) -> Floats:
    """Numbers as an array, with nan for everything that is no finite number."""
    try:
        if bool not in set(map(type, values)):
            row = np.array(values, float)  # None becomes nan
            row[~np.isfinite(row)] = np.nan
            return row
    except OverflowError:  # an integer that no float can hold
        pass
    return np.array([finite(value) for value in values])


def finite(value: Any) -> float:
    """The value as a finite number; nan for everything else, infinities included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def read_toml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The tables of a TOML file; empty if there is none, or if it is damaged, which is added to `problems`."""
    try:
        return tomllib.loads(path.read_bytes().decode(errors="replace"))
    except FileNotFoundError:
        return {}
    except _UNREADABLE:
        problems.append(f"{path.name} is not readable TOML and was left out")
        return {}


def read_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none, or if it is damaged, which is added to `problems`."""
    try:
        value = json.loads(path.read_bytes().decode(errors="replace"))
    except FileNotFoundError:
        return None
    except _UNREADABLE:
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name} is not a readable JSON object and was left out")
        return None
    return value


def _json_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows that can be read. A last line without a line end is still being written, so it is no problem."""
    lines = _lines(path, problems)
    num_damaged = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        elif number < len(lines):
            num_damaged += 1
    if num_damaged:
        problems.append(f"{num_damaged} damaged lines of {path.name} were left out")


def _lines(path: Path, problems: list[str]) -> list[str]:
    try:
        if path.exists() and not path.is_file():
            raise IsADirectoryError(0, "it is no file")
        file = path.open("rb")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    with file:
        size = path.stat().st_size
        content = file.read(MAX_BYTES // 2)
        if size > MAX_BYTES:
            problems.append(f"{path.name} has {size // 2**20} MB; only its beginning and end were read")
            file.seek(size - MAX_BYTES // 2)
            # the lines that the gap cuts through are dropped
            content = content.rpartition(b"\n")[0] + b"\n" + file.read().partition(b"\n")[2]
        else:
            content += file.read()
    return content.decode(errors="replace").split("\n")
