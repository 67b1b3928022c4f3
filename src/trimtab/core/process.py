"""What the operating system says of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_workers_gb = 0.0


def note_workers(gb: float) -> None:
    """Records the memory of the worker processes of this program, in GB, before they end: the sum of their peaks. A
    program may have groups of workers one after the other; the largest sum counts."""
    global _workers_gb
    _workers_gb = max(_workers_gb, gb)


def peak_rss_gb() -> float:
    """The most memory that this program has held since it began, and its workers with it, in GB (2^30 bytes)."""
    return own_peak_rss_gb() + _workers_gb


def own_peak_rss_gb() -> float:
    """The most memory that this process has held since it began, in GB (2^30 bytes).

    Linux's `ru_maxrss` starts at the peak of the program that launched this one, so a run launched by a program that
    once held 20 GB would claim them. `VmHWM` belongs to this program's own memory.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
