"""Kernels in C, compiled by the machine's own compiler at their first use and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from trimtab.core.errors import EngineError

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
HEADER = Path(__file__).with_name("vectors.h")
"""What the sources have in common."""
SWITCH = "TRIMTAB_KERNELS"
"""Environment variable: `torch` uses torch for everything, `compiled` allows only the compiled kernels."""
NO_WINDOW = 1 << 62
"""The window of attention that sees everything."""


def asked_for() -> str:
    """The value of `SWITCH`, "" if it is not set. Raises EngineError if it is no such word."""
    asked = os.environ.get(SWITCH, "")
    if asked not in ("", "torch", "compiled"):
        raise EngineError(
            f"{SWITCH} = {asked!r}", where="the environment", fix="set it to torch or compiled, or leave it out"
        )
    return asked


def cannot_be_had(problem: str = "", fix: str = "") -> EngineError:
    """The error for kernels that `SWITCH` asks for; without a `problem`, that they cannot be compiled."""
    problem = problem or "no C compiler with OpenMP was found, or its result cannot be kept"
    fix = fix or "install gcc or name a compiler in CC, and see that XDG_CACHE_HOME (~/.cache) can be written"
    return EngineError(f"{SWITCH} = 'compiled', but {problem}", where="the environment", fix=fix)


@functools.cache
def library(source: Path, declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """The functions of a C file, whose types `declare` sets; None if there is no compiler with OpenMP, or what it makes
    cannot be kept. It is looked for once."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        return None
    try:
        found = ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.CalledProcessError):
        return None
    declare(found)
    return found


def _compiled(source: Path, compiler: list[str]) -> Path:
    """The library for this source, compiler and processor. It is compiled if it is not in the cache yet."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    command = [*compiler, *FLAGS]
    facts = [source.read_bytes(), HEADER.read_bytes(), version, " ".join(command).encode(), _processor().encode()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    path = folder / f"{source.stem}-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            command += ["-I", str(HEADER.parent), str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True)
            made.replace(path)
    return path


def _processor() -> str:
    """The features of the processor, which `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
