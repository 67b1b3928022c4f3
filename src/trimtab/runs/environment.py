"""Records what the numbers of a run may depend on besides its settings and data."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import trimtab

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "TRIMTAB_KERNELS", "CC")


def environment() -> dict[str, Any]:
    """The machine, the libraries, and the environment variables that decide how numbers are computed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": {name: os.environ.get(name) for name in _VARIABLES[:2]},
        "variables": {name: os.environ[name] for name in _VARIABLES[2:] if name in os.environ},
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
    """The commit that the package was run from, with "-dirty" if changed since; None if it is not in a checkout."""
    package = Path(trimtab.__file__).parent
    git = ["git", "-C", str(package)]
    try:
        # A package installed below somebody else's checkout is not tracked by it.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
