"""The memory of this program, not that of the one that launched it."""

import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core import process
from trimtab.core.process import memory_gb, note_workers, peak_rss_gb, peaks_rss_gb

LAUNCHER = """
import subprocess, sys
held = b"x" * 2**29
subprocess.run([sys.executable, "-c", "from trimtab.core.process import peak_rss_gb; print(peak_rss_gb())"])
"""


def test_the_peak_grows_with_what_is_held_and_stays():
    before = peak_rss_gb()
    held = b"x" * int((before + 0.1) * 2**30)
    assert peak_rss_gb() > before + 0.09
    del held
    # The kernel counts pages a batch at a time.
    assert peak_rss_gb() > before + 0.09


def test_the_memory_of_the_launcher_is_not_ours():
    said = subprocess.run([sys.executable, "-c", LAUNCHER], capture_output=True, text=True, check=True).stdout
    assert 0 < float(said) < 0.4


def test_workers_are_counted_beside_this_process(monkeypatch):
    monkeypatch.setattr(process, "_workers_gb", [])
    note_workers([0.5, 0.25])
    note_workers([0.6])  # another group of workers, which held less
    own, *workers = peaks_rss_gb()
    assert workers == [0.5, 0.25]
    assert peak_rss_gb() >= own + 0.75


NO_LIMIT = str(2**63 - 4096)
"""What version 1 says instead of "max"."""


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": 2**20}, 2**20),  # in a container
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 2**21, "memory.max": "max"}, 2**21),  # a job above
        ("0::/../../host\n", {"memory.max": 2**20}, 2**20),
        ("4:cpu,memory:/docker/x\n0::/\n", {"memory/memory.limit_in_bytes": 2**22}, 2**22),  # the path of the host
        ("4:memory:/j\n", {"memory/j/memory.limit_in_bytes": 2**20, "memory/memory.limit_in_bytes": NO_LIMIT}, 2**20),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": NO_LIMIT}, None),
        ("4:cpu:/\n", {"memory.max": 2**20}, None),
        (None, {}, None),
    ],
)
def test_the_memory_is_that_of_the_machine_or_a_lower_limit(tmp_path, groups, files, limit):
    if groups is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, value in files.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    machine = int(total.split()[1]) / 2**20  # kB in GB
    assert memory_gb(tmp_path) == pytest.approx(machine if limit is None else limit / 2**30, rel=1e-3)
    assert memory_gb() <= machine * 1.001
