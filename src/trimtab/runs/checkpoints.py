"""The checkpoints of a run directory: where they are, and whether they are whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trimtab.core.errors import DataError

SUMS = "SHA256SUMS"
"""The file of a checkpoint with the checksums of all others."""


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints in the directory `checkpoints` of a run, in the order of their steps."""
    return sorted(directory.glob("step-" + "[0-9]" * 8))


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint is the end of."""
    return int(checkpoint.name.removeprefix("step-"))


def whole_checkpoint(run: Path, step: int) -> Path:
    """The checkpoint of one step of a run. Raises DataError if it is missing or damaged."""
    path = run / "checkpoints" / f"step-{step:08d}"
    if problem := damage_of(path) if path.exists() else "it is missing":
        raise DataError(
            f"the checkpoint of step {step} cannot be used: {problem}",
            where=str(path),
            fix="restore it, or begin again with --fresh",
        )
    return path


def sums_of(directory: Path) -> str:
    """The checksums of all files, as `sha256sum` writes them, so that `sha256sum -c SHA256SUMS` checks them too."""
    lines = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / SUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(directory).as_posix()}\n")
    return "".join(lines)


def damage_of(directory: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    if not (directory / SUMS).is_file():
        return f"no {SUMS}"
    recorded = (directory / SUMS).read_bytes().decode(errors="replace").splitlines()
    differing = set(recorded) ^ set(sums_of(directory).splitlines())
    names = sorted({line.partition("  ")[2] for line in differing})
    return f"{', '.join(names)} does not match {SUMS}" if differing else ""
