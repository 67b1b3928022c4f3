"""All runs below a directory, and what is known of each. Reading a file again costs only the bytes that are new."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.reports.collect import RunRecord, read_object, read_toml, series_of
from trimtab.runs.run import holds_run
from trimtab.runs.state import STATE, RunStanding, holder_of, read_state
from trimtab.ui.tail import Tail, last_row
from trimtab.ui.thin import ThinnedSeries

MOST_DIRECTORIES = 20_000
"""Directories that are looked into for runs; a page says if there are more."""
MOST_DEPTH = 6
MOST_VIEWS = 150
"""Runs whose series and samples are kept in memory, one or two MB each. The one that was read first goes first."""
SAMPLE_BYTES = 512 * 1024
"""Of samples.jsonl no more than this is read at the first look."""
MOST_SAMPLES = 300
"""Newest samples of a run that are kept."""
READ_SECONDS = 0.1
"""How long one page reads. A run that takes longer is shown as far as it is read, which the page says."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run as the list shows it."""

    name: str
    """Its directory, as seen from the directory of all runs; "." for that itself."""
    stage: str
    standing: RunStanding
    said: str
    """How it ended, in its own words, or what is damaged; empty if there is nothing to say."""
    step: int
    num_steps: int | None
    """How many steps it is to have; None if that is not known."""
    latest: Mapping[str, Any]
    """The last row of metrics.jsonl, and once finished the summary."""
    changed: float
    """When it last wrote something, in seconds since 1970."""
    holder: int | None
    """The process that writes it, if that is one of this machine."""
    pipeline: str | None = None
    """The directory of the pipeline whose stage it is."""


@dataclass(frozen=True)
class Found:
    """The directories with runs below a directory."""

    runs: Mapping[str, str | None]
    """The name of each run, with that of its pipeline."""
    pipelines: Mapping[str, tuple[str, ...]]
    """The name of each pipeline, with those of its runs."""
    complete: bool
    """False if there were too many directories to look into all."""
    num_left_out: int
    """Directories that are left out because their names are not UTF-8, which no address can hold."""
    num_links: int
    """Links that lead to directories elsewhere, which are not followed."""


class Library:
    """All runs below `root`."""

    def __init__(self, root: Path) -> None:
        self.shown = str(root)
        """The directory as its user names it."""
        self.root = root.resolve()
        self._views: OrderedDict[str, RunView] = OrderedDict()
        self._files = FileCache()
        self._lock = threading.Lock()

    def find(self) -> Found:
        """Looks for runs. Links are not followed, hidden directories and what is inside a run are not looked into."""
        runs: dict[str, str | None] = {}
        pipelines: dict[str, tuple[str, ...]] = {}
        left = [(self.root, 0)]
        num_looked_into = num_left_out = num_links = 0
        while left and num_looked_into < MOST_DIRECTORIES:
            directory, depth = left.pop()
            num_looked_into += 1
            names, below, links, num_odd = _inside(directory)
            num_left_out += num_odd
            num_links += sum(not Path(os.path.realpath(link)).is_relative_to(self.root) for link in links)
            here = self._name(directory)
            if {"settings.toml", "environment.json"} <= names or "metrics.jsonl" in names:
                runs.setdefault(here, None)
            elif "pipeline.toml" in names and (stages := [path for path in below if _is_run(path)]):
                pipelines[here] = tuple(self._name(path) for path in self._in_order(directory, stages))
                runs |= dict.fromkeys(pipelines[here], here)
            elif depth < MOST_DEPTH:
                left += [(path, depth + 1) for path in below]
        return Found(runs, pipelines, not left, num_left_out, num_links)

    def stages(self, pipeline: str) -> dict[str, str]:
        """The stages of a pipeline in their order, begun or not, each with what it does, such as {"dpo_1":
        "preference"}."""
        return self._stages(self.root / pipeline)

    def _stages(self, pipeline: Path) -> dict[str, str]:
        stages = self._files.get(pipeline / "pipeline.toml", read_toml)[0].get("stages")
        tables = stages if isinstance(stages, Mapping) else {}
        return {name: str(one.get("stage", "")) if isinstance(one, Mapping) else "" for name, one in tables.items()}

    def _in_order(self, pipeline: Path, runs: list[Path]) -> list[Path]:
        """The runs of a pipeline in the order of its stages."""
        order = list(self._stages(pipeline))
        return sorted(runs, key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))

    def _name(self, directory: Path) -> str:
        return directory.relative_to(self.root).as_posix()

    def state(self, name: str, pipeline: str | None = None) -> RunState:
        """How a run stands, from the end of its metrics and its small files."""
        directory = self.root / name
        settings, wrong_settings = self._files.get(directory / "settings.toml", read_toml)
        summary, wrong_summary = self._files.get(directory / "summary.json", read_object)
        latest, wrong_metrics = self._files.get(directory / "metrics.jsonl", last_row)
        view = self._views.get(name)
        ending = read_state(directory)
        holder = holder_of(directory)
        problems = [*wrong_settings, *wrong_summary, *wrong_metrics]
        problems += [said for said in (view.problems if view is not None else []) if said not in problems]
        if not settings and not wrong_settings:
            problems.append("settings.toml is missing")
        if settings and not _is(holds_run, directory):
            problems.append("environment.json is missing")
        standing, said = _standing(problems, summary, holder, ending)
        times = (_changed(directory / file) for file in ("metrics.jsonl", "summary.json", "settings.toml", STATE))
        lengths = (ending.get("num_steps"), settings.get("num_steps"), settings.get("max_steps"))
        step = latest.get("step")
        return RunState(
            name=name,
            stage=str(settings.get("stage", "run")),
            standing=standing,
            said=said,
            step=step if isinstance(step, int) else 0,
            num_steps=next((num for num in lengths if isinstance(num, int)), None),
            latest={**(latest or {}), **(summary or {})},
            changed=max(times),
            holder=holder,
            pipeline=pipeline,
        )

    def summary(self, name: str) -> Mapping[str, Any] | None:
        """What a finished run or pipeline has written at its end; None if it has not."""
        found: Mapping[str, Any] | None = self._files.get(self.root / name / "summary.json", read_object)[0]
        return found

    def view(self, name: str) -> RunView:
        """What is kept of a run. The name is one that `find` gave."""
        with self._lock:
            view = self._views.pop(name, None) or RunView(self.root / name, self._files)
            self._views[name] = view
            while len(self._views) > MOST_VIEWS:
                self._views.popitem(last=False)
        return view


def _standing(
    problems: list[str], summary: Mapping[str, Any] | None, holder: int | None, ending: Mapping[str, Any]
) -> tuple[RunStanding, str]:
    said = str(ending.get("said", ""))
    if problems:
        return "damaged", "; ".join(problems)
    if holder is not None:
        return "running", ""
    if summary is not None:
        return "finished", ""
    if ending.get("ended") == "stopped":
        return "stopped", said
    return "failed", said or "its process ended without a word: it was killed, or lost with its machine"


class RunView:
    """The series and newest samples of one run, and its other files."""

    def __init__(self, directory: Path, files: FileCache) -> None:
        self.directory = directory
        self._files = files
        self._metrics = Tail(directory / "metrics.jsonl")
        self._samples = Tail(directory / "samples.jsonl", last_bytes=SAMPLE_BYTES)
        self._series: dict[str, ThinnedSeries] = {}
        self._guard = Tail(directory / "guard.jsonl")
        self._newest: deque[dict[str, Any]] = deque(maxlen=MOST_SAMPLES)
        self._num_samples = 0
        self._guard_rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def read(self, until: float | None = None) -> RunRecord:
        """The run as far as it is read by `until`, a time of `time.monotonic`; without it, within READ_SECONDS. The
        series are thinned, and of the samples only the newest are there."""
        with self._lock:
            self._read_new(time.monotonic() + READ_SECONDS if until is None else until)
            series = {name: one.series for name, one in self._series.items()}
            samples = tuple(self._newest)
            guard = tuple(self._guard_rows)
            problems = self.problems
            damaged = {tail.path.name: tail.num_damaged for tail in self._tails}
        problems += [f"{num} damaged lines of {name} were left out" for name, num in damaged.items() if num]
        settings, wrong = self._files.get(self.directory / "settings.toml", read_toml)
        tables: dict[str, Any] = {}
        problems += wrong
        for name in ("environment", "data", "models", "decision", "summary"):
            tables[name], wrong = self._files.get(self.directory / f"{name}.json", read_object)
            problems += wrong
        return RunRecord(
            name=self.directory.name,
            directory=self.directory,
            stage=str(settings.get("stage", "run")),
            settings={key: value for key, value in settings.items() if key != "stage"},
            environment=tables["environment"] or {},
            data=tables["data"] or {},
            models=tables["models"] or {},
            metrics=series,
            samples=samples,
            guard=guard,
            decision=tables["decision"] or {},
            summary=tables["summary"] or {},
            finished=tables["summary"] is not None,
            problems=tuple(problems),
        )

    @property
    def _tails(self) -> tuple[Tail, ...]:
        return self._metrics, self._samples, self._guard

    @property
    def problems(self) -> list[str]:
        """Why files that grow are not read, or not further."""
        return [tail.problem for tail in self._tails if tail.problem]

    @property
    def has_all_samples(self) -> bool:
        """Whether every sample of the run is kept."""
        tail = self._samples
        return self._num_samples <= MOST_SAMPLES and not (tail.skipped or tail.problem) and tail.share_read == 1

    @property
    def share_read(self) -> float:
        """How much of metrics.jsonl is read, in [0, 1]."""
        return self._metrics.share_read

    @property
    def num_each(self) -> int:
        """The largest number of steps that one point of a series is the mean of."""
        return max((one.num_each for one in self._series.values()), default=1)

    def _read_new(self, until: float) -> None:
        new = self._metrics.read(until)
        if new.from_start:
            self._series = {}
        for name, series in series_of(new.rows).items():
            self._series.setdefault(name, ThinnedSeries()).add(series)
        drawn = self._samples.read(until)
        if drawn.from_start:
            self._newest.clear()
            self._num_samples = 0
        self._newest.extend(drawn.rows)
        self._num_samples += len(drawn.rows)
        watched = self._guard.read(until)
        self._guard_rows = ([] if watched.from_start else self._guard_rows) + watched.rows


class FileCache:
    """What small files hold, read again only if a file has changed."""

    def __init__(self, most: int = 4000) -> None:
        self.most = most
        self._known: OrderedDict[tuple[Path, Callable[..., Any]], tuple[Any, Any, list[str]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, read: Callable[[Path, list[str]], Any]) -> tuple[Any, list[str]]:
        """What `read` gives for a file, and the problems that it noted."""
        try:
            status = path.stat()
            mark = (status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            mark = None
        with self._lock:
            known = self._known.pop((path, read), None)
            if known is not None and known[0] == mark:
                self._known[path, read] = known
                return known[1], known[2]
        problems: list[str] = []
        value = read(path, problems)
        with self._lock:
            self._known[path, read] = mark, value, problems
            while len(self._known) > self.most:
                self._known.popitem(last=False)
        return value, problems


def _inside(directory: Path) -> tuple[set[str], list[Path], list[str], int]:
    """The names of the files in a directory, the directories in it in the order of their names, the links to
    directories, and the number of directories whose names are not UTF-8."""
    names, below, links, num_odd = set(), [], [], 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if any("\ud800" <= letter <= "\udfff" for letter in entry.name):
                        num_odd += 1
                    elif not entry.name.startswith("."):
                        below.append(Path(entry.path))
                else:
                    names.add(entry.name)
                    if entry.is_symlink() and entry.is_dir() and not entry.name.startswith("."):
                        links.append(entry.path)
    except OSError:  # removed meanwhile, or not for us to read
        return set(), [], [], 0
    return names, sorted(below, reverse=True), links, num_odd


def _is_run(directory: Path) -> bool:
    return _is(holds_run, directory) or _is(Path.exists, directory / "metrics.jsonl")


def _is(holds: Callable[[Path], bool], path: Path) -> bool:
    """What `holds` says of a path; False if it is not for us to look at."""
    try:
        return holds(path)
    except OSError:
        return False


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def pipelines_first(found: Found) -> Iterator[tuple[str | None, tuple[str, ...]]]:
    """Each pipeline with its runs, and each run that belongs to none as (None, (run,)), by name."""
    alone = {name: (None, (name,)) for name, pipeline in found.runs.items() if pipeline is None}
    together = {name: (name, runs) for name, runs in found.pipelines.items()}
    for _, entry in sorted({**alone, **together}.items()):
        yield entry
