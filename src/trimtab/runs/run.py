"""A run is a directory that can be killed at any instant and resumed."""

from __future__ import annotations

import fcntl
import json
import os
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trimtab.core import config
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import (
    WRITING,
    append_rows,
    discard,
    json_text,
    read_json,
    remove,
    replacing,
    sync,
    write_json,
    write_whole,
    writing,
)
from trimtab.core.metrics import Metric
from trimtab.core.terminal import note, warn
from trimtab.runs.checkpoints import SUMS, checkpoints_in, damage_of, step_of, sums_of
from trimtab.runs.environment import environment
from trimtab.runs.facts import StageFacts
from trimtab.runs.models import model_digest
from trimtab.runs.resume import Changes, RunPlace, changes, refuse_own_inputs
from trimtab.runs.state import LOCK, STATE, note_end
from trimtab.runs.trackers import Tracker, Writer

_ROWS_OF_STEPS = ("metrics.jsonl", "samples.jsonl", "guard.jsonl")
"""Files whose rows belong to steps: a resumed run takes back those that come after its checkpoint."""
# Checkpoints are removed early and the records last: a `--fresh` that is cut short leaves a run that starts over, never
# half a run. environment.json goes after settings.toml because without it the settings could be a run file of the user.
_CONTENTS = (
    *("summary.json", "checkpoints", "model", "metrics.jsonl", "samples.jsonl", "guard.jsonl", "decision.json"),
    *("report.html", "report.json", "data.json"),
    *("models.json", "snapshots", "tensorboard", "wandb", "settings.toml", "environment.json"),
)
NO_FACTS = StageFacts()
_GOES_ON = "the same command goes on from what was saved"
_BEGINS_AGAIN = "nothing was saved yet: the same command begins again"


class Run:
    """An open run directory, held by this process alone until `close` or `finish`.

    settings.toml (can be run again), environment.json, data.json, models.json, metrics.jsonl, samples.jsonl,
    checkpoints/, model/ and, once finished, summary.json.
    """

    def __init__(
        self, directory: Path, stage: str, settings: Mapping[str, Any], facts: StageFacts, lock: IO[str]
    ) -> None:
        """Use `Run.open`."""
        self.directory = directory
        self.stage = stage
        self.facts = facts
        self.settings = settings
        self.model_dir = directory / "model"
        self._lock = lock
        self._writers: list[Writer] = []
        self._kinds: dict[str, str] = {}
        """The kind of record that each source was first read as."""

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        stage: str,
        settings: Mapping[str, Any],
        facts: StageFacts = NO_FACTS,
        resume: bool = True,
        models: Sequence[str] = (),
        trackers: Sequence[Tracker] = (),
    ) -> Run:
        """The run in `directory`: begun if there is none, else continued, or with resume=False emptied first.

        `settings` are those of `config.dump`. A run may go on with other settings of how it is computed, from another
        place, and to a greater length (`runs.resume`); this is recorded. `models` are the models that the stage loads.
        Raises DataError if one of them is another than the run began with. Raises ConfigError if another process has
        the run open, or if the directory holds something else, or a run of another stage or with other settings that
        has begun to write, or if what is to be emptied holds something that the settings name.
        """
        directory = Path(directory)
        _refuse_strangers(directory)
        if not resume:
            refuse_own_inputs(settings, directory)
        with writing("the run directory", directory):
            directory.mkdir(parents=True, exist_ok=True)
            lock = _locked(directory)
        try:
            run = cls(directory, stage, settings, facts, lock)
            with writing("the record of the run", directory):
                run._begin_or_go_on(resume, models)
            if not run.finished:
                run._writers = [tracker.start(directory, settings) for tracker in trackers]
                discard(directory / STATE)  # it tells how the process before this one ended
        except BaseException:
            lock.close()
            raise
        return run

    def _begin_or_go_on(self, resume: bool, models: Sequence[str]) -> None:
        """Brings settings.toml and environment.json up to date, or raises ConfigError if the run must not go on."""
        directory, settings_file = self.directory, self.directory / "settings.toml"
        record = directory / "environment.json"
        text = config.to_toml({"stage": self.stage, **self.settings})
        if not resume or (settings_file.exists() and not _begun(directory) and _text_of(settings_file) != text):
            _empty(directory, [*self.facts.writes, *_written_before(record)])
        _remove_unfinished(directory)
        here = RunPlace.of(directory)
        if not settings_file.exists():
            write_whole(record, json_text({**environment(), "place": vars(here), "stage": self.facts.recorded}))
            write_whole(settings_file, text)
            self._record_models(models)
            return
        found = self._changes(here)
        if self.finished and not found.length:
            return  # nothing is computed: the record stays as it was, and the place is that of its settings
        self._record_models(models)
        now = environment()
        began = self._environment() or now
        other = {key: value for key, value in now.items() if began.get(key, value) != value}
        if other and other not in began.get("resumed_with", []):
            warn(f"the run began with another {', '.join(other)}; numbers may differ")
            began.setdefault("resumed_with", []).append(other)
        if found:
            self._take_over(found, text, began)
        if began.get("place") != vars(here) or other or found or not record.exists():
            write_whole(record, json_text({**began, "place": vars(here)}))

    def _environment(self) -> dict[str, Any]:
        """What environment.json holds; {} if it was lost. Raises DataError if it is damaged."""
        record = self.directory / "environment.json"
        fix = "restore it, or remove it: the run goes on without this record"
        found = read_json(record, fix=fix) if record.exists() else {}
        for name, kind in (("paths", dict), ("resumed_with", list), ("changed_settings", list)):
            if not isinstance(found.get(name, kind()), kind):
                raise DataError(f"{record.name} is damaged: {name} = {found[name]!r:.40}", where=str(record), fix=fix)
        return found

    def _changes(self, here: RunPlace) -> Changes:
        """How the settings in the directory differ from those now. Raises ConfigError for what may not differ."""
        settings_file = self.directory / "settings.toml"
        try:
            before = tomllib.loads(settings_file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"settings.toml is damaged: {error}",
                where=str(settings_file),
                fix="restore it, give another directory with --out, or begin again there with --fresh",
            ) from error
        now = tomllib.loads(config.to_toml({"stage": self.stage, **self.settings}))
        place = self._environment().get("place")
        then = RunPlace(**place) if isinstance(place, dict) and set(place) == set(vars(here)) else None
        return changes(
            before, now, grows=self.facts.grows, then=then, here=here, num_done=self.num_done, finished=self.finished
        )

    def _take_over(self, found: Changes, text: str, began: dict[str, Any]) -> None:
        """Goes on with other settings: writes them, and records the earlier ones with the step."""
        if found.recorded:
            step = self.num_done
            began.setdefault("changed_settings", []).append({"after_step": step, "settings": found.recorded})
            note(f"the run goes on after step {step} with {found.said}")
        if found.length:  # first, so that a kill in between leaves a run that is finished again, with either length
            discard(self.directory / "summary.json")
        write_whole(self.directory / "settings.toml", text)

    @property
    def num_done(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        steps = checkpoints_in(self.directory / "checkpoints")
        return step_of(steps[-1]) if steps else 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None and not (self.directory / "summary.json").exists():
            note_end(self.directory, error)
        self.close()

    def close(self) -> None:
        """Releases the directory; the run can be opened again."""
        for writer in self._writers:
            writer.close()
        self._writers = []
        self._lock.close()

    @property
    def finished(self) -> bool:
        """True once `finish` was called, by this process or an earlier one. Raises DataError if summary.json is
        damaged."""
        path = self.directory / "summary.json"
        if path.exists():
            read_json(path, fix="remove it: the same command finishes the run again from its last checkpoint")
        return path.exists()

    def log(self, step: int, metrics: Mapping[str, Metric] | Mapping[str, float]) -> None:
        """Appends one row to metrics.jsonl and passes it to the trackers. Steps count from 1 and never go back.

        A value that is not finite becomes null, since JSON cannot write it.
        """
        values = {name: m if isinstance(m, int | float) else m.value for name, m in metrics.items()}
        self._append("metrics.jsonl", [{"step": step, **values}])
        for writer in self._writers:
            writer.log(step, values)

    def add_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows of JSON values to samples.jsonl, each with the step that `log` gets for the same work."""
        self.add_rows("samples.jsonl", step, rows)

    def add_rows(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows of JSON values to one of the files whose rows belong to steps, each with its step."""
        assert name in _ROWS_OF_STEPS, name
        self._append(name, [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        with writing(name, self.directory / name, kept=_GOES_ON):
            append_rows(self.directory / name, rows)

    def add_data(
        self, source: str | Path, sha256: str, rows: int, reading: Mapping[str, Any] | None = None, *, kind: str = ""
    ) -> None:
        """Records in data.json what was read and how. `reading` holds `not_used`, the columns that are not part of the
        records, and `dropped`, the numbers of dropped rows by kind of mistake; both are said on stderr too. A source
        that a stage reads as two kinds of record, such as prompts and demonstrations, has an entry for each.

        Raises DataError if a resumed run finds other data than it began with.
        """
        first = self._kinds.setdefault(str(source), kind)
        name = str(source) if kind == first else f"{source} as {kind}"
        self._record_source("data", name, {"sha256": sha256, "rows": rows}, reading or {})
        say_reading(str(source), rows, reading or {})

    def _record_models(self, names: Sequence[str]) -> None:
        """Records in models.json the directories of models that exist, each with its digest. A hub id has none. Until
        there is a checkpoint nothing depends on them, and they may still be mended."""
        if not checkpoints_in(self.directory / "checkpoints"):
            discard(self.directory / "models.json")
        for name in names:
            if Path(name).is_dir():
                self._record_source("models", name, {"sha256": model_digest(name)}, {})

    def _record_source(self, what: str, name: str, entry: Mapping[str, Any], further: Mapping[str, Any]) -> None:
        """Records a source in data.json or models.json. Raises DataError if its `entry` is another than the recorded
        one; `further` may differ."""
        path = self.directory / f"{what}.json"
        lost = f"restore it, or begin again with --fresh: it says which {what} the run began with"
        seen = read_json(path, fix=lost) if path.exists() else {}
        known = next((other for other in seen if other == name or self._is_same_source(other, name)), None)
        before = entry if known is None else seen[known] if isinstance(seen[known], dict) else {}
        if {key: before.get(key) for key in entry} != entry:
            noun = what.removesuffix("s")
            rows = f" ({entry['rows']} rows now, {before.get('rows')} then)" if "rows" in entry else ""
            raise DataError(
                f"{name} is not the {noun} this run began with{rows}",
                where=str(path),
                fix=f"restore the {noun}, or begin again with --fresh or another --out",
            )
        whole = {**entry, **further}
        if known is None or seen[known] != whole:
            write_json(path, {**seen, known or name: whole}, kept=_GOES_ON)

    def _is_same_source(self, before: str, now: str) -> bool:
        """Whether two names mean one file: the run may have been moved, or its file named in another way."""
        here = RunPlace.of(self.directory)
        inside = here.beside(now)
        if here.resolved(before) == here.resolved(now):
            return True
        return inside is not None and before.endswith(inside.removeprefix("../")) and not os.path.exists(before)

    def note_path(self, name: str, taken: str, *, effect: str = "last digits may differ") -> None:
        """Records which of several ways of computing the run takes, such as ("sampler", "fused, compiled").

        A resumed run that must take another way says so with its `effect`, and records it.
        """
        record = self.directory / "environment.json"
        noted = self._environment()
        before = noted.setdefault("paths", {}).get(name)
        other = {f"paths.{name}": taken}
        if before == taken or other in noted.get("resumed_with", []):
            return
        if before is None:
            noted["paths"][name] = taken
        else:
            noted.setdefault("resumed_with", []).append(other)
            warn(f"the run began with the {name} {before!r} and goes on with {taken!r}; {effect}")
        write_json(record, noted, kept=_GOES_ON)

    def note_cards(self, hashes: Mapping[str, str]) -> None:
        """Records the hashes of the cards of the run's reward models, by key path; also those of a resumed run."""
        noted, other = self._environment(), {"reward_cards": dict(hashes)}
        if noted.get("reward_cards", {}) == hashes or other in noted.get("resumed_with", []):
            return
        if "reward_cards" in noted:
            noted.setdefault("resumed_with", []).append(other)
        else:
            noted |= other
        write_json(self.directory / "environment.json", noted, kept=_GOES_ON)

    def save_checkpoint(
        self, step: int, write: Callable[[Path], None], keep: int = 2, also: Collection[int] = ()
    ) -> None:
        """Makes checkpoints/step-<step> out of what `write` puts into the directory it is given, all or nothing.

        The newest `keep` checkpoints stay, and those of the steps in `also`. Raises EngineError if it cannot be
        written; the one before stays good.
        """
        checkpoints = self.directory / "checkpoints"
        before = self.num_done
        kept = f"the same command goes on from the checkpoint of step {before}" if before else _BEGINS_AGAIN
        with writing(f"the checkpoint of step {step}", checkpoints, kept=kept):
            checkpoints.mkdir(exist_ok=True)
            with replacing(checkpoints / f"step-{step:08d}") as aside:
                aside.mkdir()
                write(aside)
                (aside / SUMS).write_text(sums_of(aside), encoding="utf-8")
                # A checkpoint promises that the rows of its steps are on disk too.
                for name in _ROWS_OF_STEPS:
                    if (self.directory / name).exists():
                        sync(self.directory / name)
        for old in checkpoints_in(checkpoints)[:-keep]:
            if step_of(old) not in also:
                discard(old)

    def load_checkpoint(self) -> tuple[int, Path] | None:
        """The step and directory of the newest checkpoint whose checksums hold; None if there is none.

        A damaged checkpoint is named on stderr, moved aside to checkpoints/damaged-<step> and not counted.
        """
        for path in reversed(checkpoints_in(self.directory / "checkpoints")):
            if not (problem := damage_of(path)):
                return step_of(path), path
            aside = path.with_name(path.name.replace("step", "damaged"))
            discard(aside)
            path.rename(aside)
            warn(f"checkpoint {path} is damaged ({problem}); moved to {aside.name}")
        return None

    def rewind(self, step: int) -> None:
        """Cuts metrics.jsonl and the like before their first row that is after `step`, incomplete or damaged; says so
        if metrics.jsonl then ends before `step`."""
        for name in _ROWS_OF_STEPS:
            path = self.directory / name
            end, last = _up_to(path, step) if path.exists() else (0, 0)
            if path.exists():
                os.truncate(path, end)  # one system call, so a kill leaves either the old file or the new one
            if name == "metrics.jsonl" and last < step:
                rows = f"the rows of steps {last + 1} to {step}"
                warn(f"{path} is damaged: the run goes on after step {step} without {rows}")

    def save_model(self, write: Callable[[Path], None]) -> None:
        """Makes model/ out of what `write` puts into the directory it is given; a model/ before it is replaced."""
        with writing("the model", self.model_dir, kept=_GOES_ON), replacing(self.model_dir) as aside:
            aside.mkdir()
            write(aside)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json and closes the run: the last thing a stage does."""
        write_json(self.directory / "summary.json", summary, kept=_GOES_ON)
        self.close()

    def kept(self) -> str:
        """A sentence that says what of this run is not lost if it stops now."""
        if self.finished:
            return f"{self.directory} is finished"
        if done := self.num_done:
            return f"{self.directory} goes on after step {done}"
        return f"nothing of {self.directory} was saved yet: this stage begins again"


# --- opening ---


def _refuse_strangers(directory: Path) -> None:
    """Raises ConfigError if the path is not a directory, or if the directory holds something that is not a run."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file", where="the run directory", fix="give another directory")
    if directory.exists() and not holds_run(directory) and _strangers(directory):
        raise ConfigError(
            f"{directory} holds {', '.join(_strangers(directory)[:3])} and no run",
            where="the run directory",
            fix="give a directory that is empty or does not exist yet",
        )


def holds_run(directory: Path) -> bool:
    """Whether a run began here. settings.toml alone may be a run file of the user; a run has environment.json beside
    it, or if that was lost, checkpoints."""
    began = (directory / "environment.json").exists() or any((directory / "checkpoints").glob(f"step-*/{SUMS}"))
    return began and (directory / "settings.toml").exists()


def _text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def _strangers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith(".") and p.name != "environment.json")


def _begun(directory: Path) -> bool:
    """Whether there is anything to lose: a run that failed on a wrong path may be started again with the right one."""
    return bool(set(_strangers(directory)) - {"settings.toml", "models.json"})


@contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Holds a directory that exists for this process, as an open run does. Raises ConfigError if another one does."""
    lock = _locked(directory)
    try:
        yield
    finally:
        lock.close()


def _locked(directory: Path) -> IO[str]:
    lock = (directory / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ConfigError(
            f"{directory} is in use by process {holder}",
            where="the run directory",
            fix="wait for it or stop it, or give another directory with --out",
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _written_before(record: Path) -> list[str]:
    """The files that the directory's stage writes, as the record of its run says."""
    try:
        names = json.loads(record.read_text(encoding="utf-8"))["stage"]["writes"]
        return [name for name in names if isinstance(name, str) and Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _empty(directory: Path, written: Sequence[str]) -> None:
    for name in (*written, *_CONTENTS):
        discard(directory / name)
    sync(directory)


def _remove_unfinished(directory: Path) -> None:
    for place in (directory, directory / "checkpoints"):
        for path in place.glob(f"{WRITING}*"):
            remove(path)


# --- rows of steps ---


def _up_to(path: Path, step: int) -> tuple[int, int]:
    """The byte at which the first row begins that is after `step`, incomplete or damaged; and the step before it."""
    end = last = 0
    with path.open("rb") as file:
        for line in file:
            try:
                number = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith(b"\n") or not isinstance(number, int) or number > step:
                break
            end, last = end + len(line), number
    return end, last


def say_reading(source: str, kept: int, reading: Mapping[str, Any]) -> None:
    """Says on stderr what was not used of a source, and which rows were left out."""
    if dropped := reading.get("dropped"):
        kinds = ", ".join(f"{num} {name.replace('_', ' ')}" for name, num in dropped.items())
        num = sum(dropped.values())
        note(f"{source}: {num:,} of {num + kept:,} rows are left out ({kinds})")
    if names := reading.get("not_used"):
        note(f"{source}: not used: {', '.join(names)}")
