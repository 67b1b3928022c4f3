"""What the operating system says of this process, and children that end with it."""

from __future__ import annotations

import ctypes
import inspect
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

_workers_gb: list[float] = []


def note_workers(peaks_gb: Sequence[float]) -> None:
    """Records the memory of the worker processes of this program before they end: the peak of each in GB. A program may
    have groups of workers one after the other; the group with the largest sum counts."""
    if sum(peaks_gb) > sum(_workers_gb):
        _workers_gb[:] = peaks_gb


def peaks_rss_gb() -> list[float]:
    """The most memory in GB (2^30 bytes) that each process of this program has held: this one since it began, then its
    workers. Libraries that processes share count in each."""
    return [own_peak_rss_gb(), *_workers_gb]


def peak_rss_gb() -> float:
    """The sum of `peaks_rss_gb`. The processes together hold at most as much, since they may have their peaks at
    different times."""
    return sum(peaks_rss_gb())


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


def memory_gb(root: Path = Path("/")) -> float:
    """The memory in GB (2^30 bytes) that this process may use: that of the machine, or less if a container or a job has
    a limit. `root` is the directory with `proc` and `sys`."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_limits(root)]) / 2**30


def _limits(root: Path) -> Iterator[int]:
    """The limits in bytes of this process's control groups. One above may be tighter, and inside a container the path
    may be that of the host, so all directories up to the first are read."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                top, file = root / "sys/fs/cgroup", "memory.max"
            elif "memory" in controllers.split(","):
                top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            else:
                continue
            group = top / path.lstrip("/")
            for directory in (group, *group.parents):
                with suppress(OSError, ValueError):  # no such directory here, or "max"
                    yield int((directory / file).read_text(encoding="utf-8"))
                if directory == top:
                    break


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # as in malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep up to 256 MB at the end of its heap that it has freed, and serve tensors of up to 32 MB,
    the most that is possible, from there.

    By default GNU libc gives a freed tensor of some megabytes back to the system, and the next one of that size finds
    its pages anew, which takes longer than to fill them: with a vocabulary of 151,936 entries a PPO step then waits for
    480,000 pages, and sampling takes 1.3 to 1.6 times as long. Other C libraries are left as they are, and so are
    limits that the environment sets.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # a library without this function
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_THRESHOLD, 32 * 2**20)
        set_option(_TRIM_THRESHOLD, 256 * 2**20)


# --- children that end with their parent ---


def end_with(parent: int) -> None:
    """From now on this process is killed when its parent ends, which has the number `parent`. Only Linux can do this;
    elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            sys.exit(1)


_BOUND = """
started_by = os.getppid()  # a script may stand for the interpreter
os.kill(int(sys.argv.pop(1)), 0)  # raises an error if the program that began this has ended already
end_with(started_by)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def bound_module(python: str, module: str) -> list[str]:
    """The words of a command that runs a module as `python -m MODULE` does, and is killed when this process ends,
    however that ends. The interpreter need not have this package. To be started by the main thread: the system kills
    the child when the thread ends that began it."""
    program = f"import ctypes, os, runpy, signal, sys\n{inspect.getsource(end_with)}{_BOUND}"
    return [python, "-c", program, str(os.getpid()), module]
