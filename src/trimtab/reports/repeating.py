"""The commands that repeat what a dossier shows, as they are typed where the runs were begun.

No command writes over what a run has measured: a run that is made again has a directory of its own, whose name ends in
"-again".
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trimtab.core import registry
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.headline import section
from trimtab.runs.resume import flat

_AGAIN = "-again"
_READ_AS = {"prompts": "prompt", "guard.prompts": "prompt", "demonstrations": "sft", "pretraining_mix.data": "sft"}
"""What `trimtab data show --kind` reads a source as, by the key of the setting that names it."""


@dataclass(frozen=True)
class Repeating:
    """The commands of a run or a pipeline. A command that cannot be told, as for a record without files, is None."""

    record: RunRecord | PipelineRecord
    options: Sequence[tuple[str, Path]] = ()
    """The options of `trimtab report` that add files, such as ("--suite", Path("hhh.json"))."""

    @cached_property
    def place(self) -> Path:
        """The directory in which the commands are typed: that in which the runs were begun, since paths of their
        settings may be relative to it. If it is not known, or if the runs were moved, the working directory."""
        known = (section(run.environment, "place").get("cwd") for run in self._runs if not _was_moved(run))
        return Path(next((cwd for cwd in known if isinstance(cwd, str) and os.path.isabs(cwd)), os.getcwd()))

    @property
    def _runs(self) -> Sequence[RunRecord]:
        return self.record.runs if isinstance(self.record, PipelineRecord) else (self.record,)

    @property
    def report(self) -> str | None:
        """Writes the page and the dossier again, from the files that are there."""
        if self.record.directory is None:
            return None
        added = [word for option, path in self.options for word in (option, self.name(path))]
        return _typed("report", self.name(self.record.directory), *added)

    @property
    def whole(self) -> str | None:
        """Runs the pipeline, or the run, once more from its beginning."""
        directory = self.record.directory
        if isinstance(self.record, RunRecord):
            return self.stage(self.record)
        if directory is None or not (directory / "pipeline.toml").is_file():
            return None
        return _typed("run", self.name(directory / "pipeline.toml"), "--out", self.name(_again(directory)))

    def stage(self, run: RunRecord) -> str | None:
        """Runs a stage once more on what it read. If a pipeline was moved its stages name models and files that are no
        longer there, so that all of it is run."""
        if run.directory is None or run.stage not in registry.modules("stage"):
            return None
        if not (run.directory / "settings.toml").is_file():
            return None
        out = _again(run.directory)
        if isinstance(self.record, PipelineRecord):
            if _was_moved(run):
                return self.whole
            out = _again(run.directory.parent) / run.directory.name
        return _typed(run.stage, self.name(run.directory / "settings.toml"), "--out", self.name(out))

    def diagnosis(self, run: RunRecord) -> str | None:
        """Looks at the run's record again."""
        return None if run.directory is None else _typed("doctor", self.name(run.directory))

    def data(self, run: RunRecord, source: str) -> str | None:
        """Counts the rows of a source and takes their hash again; the stage itself, if only that can."""
        known = section(run.data, source)
        if not known.get("sha256"):
            return self.stage(run)
        keys = [key for key, value in flat(run.settings) if value == source]
        if not keys:
            return self.stage(run)
        kind = "sft" if run.stage == "sft" and keys[0] == "data" else _READ_AS.get(keys[0])
        return _typed("data", "show", source, *(["--kind", kind] if kind else []), "--rows", "1", "--all")

    def votes(self, source: str) -> str | None:
        """Says how far the annotators of a feedback project agree; None for any other source."""
        if not source.startswith("feedback:"):
            return None
        project = source.removeprefix("feedback:").partition("?")[0]
        return _typed("feedback", "agreement", project, "--out", f"{Path(project).stem}-agreement{_AGAIN}.html")

    def decision(self, run: RunRecord) -> str | None:
        """Chooses a checkpoint again: by the command that chose it, or by the run, if that was its guard."""
        said = run.decision.get("command")
        if said is None and "run" not in run.decision:
            return self.stage(run) if run.decision else None
        if not isinstance(said, str) or not said or run.directory is None:
            return None
        try:
            words = list(_without(shlex.split(said), "--out", "--export"))
        except ValueError:  # a quotation mark that is not closed: the record is damaged
            return None
        out = run.directory.with_name(f"{run.directory.name}-decision{_AGAIN}.json")
        return shlex.join([*words, "--out", self.name(out)])

    def name(self, path: Path) -> str:
        """The path as it is typed: relative to `place` if it lies below, else absolute."""
        whole = Path(os.path.abspath(path))
        shown = str(whole.relative_to(self.place) if whole.is_relative_to(self.place) else whole)
        return f"./{shown}" if shown.startswith("-") else shown


def _typed(*words: str) -> str:
    return shlex.join(["trimtab", *words])


def _without(words: Sequence[str], *options: str) -> Iterator[str]:
    """The words of a command without some of its options and their values."""
    left_out = False
    for word in words:
        name, equals, _ = word.partition("=")
        if not left_out and name not in options:
            yield word
        left_out = not left_out and name in options and not equals


def _again(directory: Path) -> Path:
    return directory.with_name(directory.name + _AGAIN)


def _was_moved(run: RunRecord) -> bool:
    """Whether the run lies in another directory than it was written in."""
    written = section(run.environment, "place").get("directory")
    if run.directory is None or not isinstance(written, str):
        return False
    try:
        return os.path.realpath(written) != os.path.realpath(run.directory)
    except ValueError:  # a path with a null character
        return True
