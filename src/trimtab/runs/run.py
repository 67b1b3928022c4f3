"""A run is a directory that can be killed at any instant and resumed."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import trimtab
from trimtab import config
from trimtab.errors import ConfigError, DataError, EngineError
from trimtab.metrics import Metric
from trimtab.runs.trackers import Tracker, Writer

WRITING = ".writing-"
"""Prefix of what is not yet whole. Never read, and removed when a run is opened."""
SUMS = "SHA256SUMS"
# Checkpoints go first and settings last: a `--fresh` cut short leaves a run that starts over, never half a run.
_CONTENTS = (
    *("summary.json", "checkpoints", "model", "metrics.jsonl", "samples.jsonl", "report.html", "data.json"),
    *("start", "start.writing", "train.jsonl", "held_out.jsonl", "replies.jsonl", "best.jsonl", "pairs.jsonl"),
    *("tensorboard", "wandb", "environment.json", "settings.toml"),
)


class Run:
    """An open run directory, held by this process alone until `close` or `finish`.

    settings.toml (can be run again), environment.json, data.json, metrics.jsonl, samples.jsonl, checkpoints/, model/
    and, once finished, summary.json.
    """

    def __init__(self, directory: Path, stage: str, settings: Mapping[str, Any], lock: IO[str]) -> None:
        """Use `Run.open`."""
        self.directory = directory
        self.stage = stage
        self.settings = settings
        self.model_dir = directory / "model"
        self._lock = lock
        self._writers: list[Writer] = []

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        stage: str,
        settings: Mapping[str, Any],
        resume: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> Run:
        """The run in `directory`: begun if there is none, else continued, or with resume=False emptied first.

        `settings` are those of `config.dump`. Raises ConfigError where another process has the run open, where the
        directory holds something else, or a run of another stage or other settings that has begun to write.
        """
        directory = Path(directory)
        settings_file = directory / "settings.toml"
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"{directory} is a file", where="the run directory", fix="give another directory")
        if directory.exists() and not settings_file.exists() and _strangers(directory):
            raise ConfigError(
                f"{directory} holds {', '.join(_strangers(directory)[:3])} and no run",
                where="the run directory",
                fix="give a directory that is empty or does not exist yet",
            )
        directory.mkdir(parents=True, exist_ok=True)
        lock = _locked(directory)
        try:
            text = config.to_toml({"stage": stage, **settings})
            other = settings_file.exists() and settings_file.read_text(encoding="utf-8") != text
            if not resume or (other and not _begun(directory)):
                _empty(directory)
            _remove_unfinished(directory)
            if settings_file.exists():
                _check_same_settings(settings_file, tomllib.loads(text))
                _note_environment(directory / "environment.json")
            else:
                _write(directory / "environment.json", _json_text(environment()))
                _write(settings_file, text)
            run = cls(directory, stage, settings, lock)
            if not run.finished:
                run._writers = [tracker.start(directory, settings) for tracker in trackers]
        except BaseException:
            lock.close()
            raise
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the directory; the run can be opened again."""
        for writer in self._writers:
            writer.close()
        self._writers = []
        self._lock.close()

    @property
    def finished(self) -> bool:
        """True once `finish` was called, by this process or an earlier one."""
        return (self.directory / "summary.json").exists()

    def log(self, step: int, metrics: Mapping[str, Metric] | Mapping[str, float]) -> None:
        """Appends one row to metrics.jsonl and tells the trackers. Steps count from 1 and never go back.

        A value that is not finite becomes null, since JSON has no word for it.
        """
        values = {name: m if isinstance(m, int | float) else m.value for name, m in metrics.items()}
        _append(self.directory / "metrics.jsonl", [{"step": step, **values}])
        for writer in self._writers:
            writer.log(step, values)

    def add_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows of JSON values to samples.jsonl, each under the step that `log` gets for the same work."""
        _append(self.directory / "samples.jsonl", [{"step": step, **row} for row in rows])

    def add_data(self, source: str | Path, sha256: str, rows: int, reading: Mapping[str, Any] | None = None) -> None:
        """Records in data.json what was read and how: with `not_used`, columns that are no part of the records, and
        `dropped`, rows left out by mistake, which are said on stderr too.

        Raises DataError where a resumed run finds other data than it began with.
        """
        path = self.directory / "data.json"
        seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        entry = {"sha256": sha256, "rows": rows}
        before = seen.get(str(source), entry)
        if {name: before[name] for name in entry} != entry:
            raise DataError(
                f"{source} is not the data this run began with ({rows} rows now, {seen[str(source)]['rows']} then)",
                where=str(path),
                fix="restore the data, or begin again with --fresh or another --out",
            )
        seen[str(source)] = entry | dict(reading or {})
        _write(path, _json_text(seen))
        say_reading(str(source), rows, reading or {})

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: int = 2) -> None:
        """Makes checkpoints/step-<step> out of what `write` puts into the directory it is given, all or nothing.

        The newest `keep` checkpoints stay. Raises EngineError where the disk does not take it; the last one stays good.
        """
        checkpoints = self.directory / "checkpoints"
        writing = checkpoints / f"{WRITING}{step}"
        try:
            writing.mkdir(parents=True)
            write(writing)
            (writing / SUMS).write_text(_sums(writing), encoding="utf-8")
            _sync_tree(writing)
            # A checkpoint promises that the rows of its steps are on disk too.
            for name in ("metrics.jsonl", "samples.jsonl"):
                if (self.directory / name).exists():
                    _sync(self.directory / name)
            _discard(checkpoints / _step_name(step))
            writing.rename(checkpoints / _step_name(step))
            _sync(checkpoints)
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise EngineError(
                f"the checkpoint of step {step} could not be written: {error}",
                where=str(checkpoints),
                fix="make room or correct the permissions; the same command goes on from the checkpoint before",
            ) from error
        for old in _checkpoints(checkpoints)[:-keep]:
            _discard(old)

    def load_checkpoint(self) -> tuple[int, Path] | None:
        """Step and directory of the newest checkpoint whose checksums hold; None where there is none.

        A damaged one is named on stderr, moved aside to checkpoints/damaged-<step> and not counted.
        """
        for path in reversed(_checkpoints(self.directory / "checkpoints")):
            if not (problem := _damage(path)):
                return int(path.name.removeprefix("step-")), path
            aside = path.with_name(path.name.replace("step", "damaged"))
            _discard(aside)
            path.rename(aside)
            print(f"warning: checkpoint {path} is damaged ({problem}); moved to {aside.name}", file=sys.stderr)
        return None

    def rewind(self, step: int) -> None:
        """Cuts metrics.jsonl and samples.jsonl before their first row after `step`, or not wholly written."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.directory / name
            if path.exists():
                # One system call, so a kill leaves either the old file or the new one.
                os.truncate(path, _end_of_step(path, step))

    def save_model(self, write: Callable[[Path], None]) -> None:
        """Makes model/ out of what `write` puts into the directory it is given; a model/ before it is replaced."""
        writing = self.directory / f"{WRITING}model"
        writing.mkdir()
        write(writing)
        _sync_tree(writing)
        _discard(self.model_dir)
        writing.rename(self.model_dir)
        _sync(self.directory)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json and closes the run: the last thing a stage does."""
        _write(self.directory / "summary.json", _json_text(summary))
        self.close()


def environment() -> dict[str, Any]:
    """What the numbers of a run may depend on besides its settings and data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "trimtab": trimtab.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str | None:
    """The commit the package was run from, with "-dirty" if changed since; None where it is not in a checkout."""
    package = Path(trimtab.__file__).parent
    git = ["git", "-C", str(package)]
    try:
        # A package installed below somebody else's checkout is not tracked by it.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- opening ---


def _strangers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith(".") and p.name != "environment.json")


def _begun(directory: Path) -> bool:
    """Whether there is anything to lose: a run that failed on a wrong path may be started again with the right one."""
    return set(_strangers(directory)) > {"settings.toml"}


def _locked(directory: Path) -> IO[str]:
    lock = (directory / ".lock").open("a+", encoding="utf-8")
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


def _empty(directory: Path) -> None:
    for name in _CONTENTS:
        _discard(directory / name)
    _sync(directory)


def _remove_unfinished(directory: Path) -> None:
    for place in (directory, directory / "checkpoints"):
        for path in place.glob(f"{WRITING}*"):
            _remove(path)


def _check_same_settings(path: Path, now: Mapping[str, Any]) -> None:
    before = dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    after = dict(_flat(now))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if keys:
        changes = "".join(f"\n  - {k}: {before.get(k, 'unset')!r} there, {after.get(k, 'unset')!r} now" for k in keys)
        raise ConfigError(
            f"{path.parent} holds a run with other settings:{changes}",
            where=str(path),
            fix="give another directory with --out, or begin again there with --fresh",
        )


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _note_environment(path: Path) -> None:
    began = json.loads(path.read_text(encoding="utf-8"))
    now = environment()
    changed = {key: value for key, value in now.items() if began.get(key) != value}
    if changed and changed not in began.get("resumed_with", []):
        print(f"warning: the run began with another {', '.join(changed)}; numbers may differ", file=sys.stderr)
        began.setdefault("resumed_with", []).append(changed)
        _write(path, _json_text(began))


# --- checkpoints ---


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / SUMS)


def _sums(directory: Path) -> str:
    """As `sha256sum` writes it, so that `sha256sum -c SHA256SUMS` checks it too."""
    lines = []
    for path in _files(directory):
        with path.open("rb") as file:
            lines.append(
                f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(directory).as_posix()}\n"
            )
    return "".join(lines)


def _damage(directory: Path) -> str:
    """What is wrong with a checkpoint, or ''."""
    if not (directory / SUMS).is_file():
        return f"no {SUMS}"
    recorded = (directory / SUMS).read_bytes().decode(errors="replace").splitlines()
    differing = set(recorded) ^ set(_sums(directory).splitlines())
    names = sorted({line.partition("  ")[2] for line in differing})
    return f"{', '.join(names)} does not match {SUMS}" if differing else ""


# --- files ---


def _json_text(value: Any) -> str:
    # dumps writes NaN and Infinity, which are not JSON; reading them back turns both into null.
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    finite = json.loads(json.dumps(rows), parse_constant=lambda _: None)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finite))


def _end_of_step(path: Path, step: int) -> int:
    """The byte at which the first row after `step`, or the first row that is not whole, begins."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or row["step"] > step:
                break
            end += len(line)
    return end


def say_reading(source: str, kept: int, reading: Mapping[str, Any]) -> None:
    """Says on stderr what was not used of a source, and which rows were left out."""
    if dropped := reading.get("dropped"):
        kinds = ", ".join(f"{num} {name.replace('_', ' ')}" for name, num in dropped.items())
        num = sum(dropped.values())
        print(f"note: {source}: {num:,} of {num + kept:,} rows are left out ({kinds})", file=sys.stderr)
    if names := reading.get("not_used"):
        print(f"note: {source}: not used: {', '.join(names)}", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    """Replaces a file at once: whoever reads it, now or after a power cut, sees all of the old or all of the new."""
    writing = path.with_name(WRITING + path.name)
    writing.write_text(text, encoding="utf-8")
    _sync(writing)
    writing.replace(path)
    _sync(path.parent)


def _discard(path: Path) -> None:
    """Removes a file or tree that may not exist; one half removed never shows under its own name."""
    if path.exists():
        aside = path.with_name(f"{WRITING}old-{path.name}")
        _remove(aside)
        path.rename(aside)
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
