"""The memory of this program, not that of the one that launched it; and children that end with it."""

import json
import os
import subprocess
import sys
import time
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


MODULE = r"""
import json, os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(json.dumps([os.getpid(), __name__, sys.argv[2:], sys.path[0]]) + "\n")
if sys.argv[2] == "wait":
    time.sleep(300)
sys.exit(7)
"""
STARTER = """
import subprocess, sys
from trimtab.core.process import bound_module
sys.exit(subprocess.run([*bound_module(sys.argv[1], "probe_module"), *sys.argv[2:]]).returncode)
"""


def started(tmp_path, *words, python=sys.executable):
    """A program that runs a module bound to it, begun where the module is."""
    (tmp_path / "probe_module.py").write_text(MODULE)
    command = [sys.executable, "-c", STARTER, python, str(tmp_path / "said"), *words]
    return subprocess.Popen(command, cwd=tmp_path)


def test_a_bound_module_runs_as_python_runs_a_module(tmp_path):
    assert started(tmp_path, "a b", "--c").wait(60) == 7
    _, name, words, first = json.loads((tmp_path / "said").read_text())
    assert (name, words) == ("__main__", ["a b", "--c"])
    assert Path(first).resolve() in (tmp_path.resolve(), Path.cwd())  # "" is the working directory, as with -m


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_bound_module_ends_with_the_program_that_started_it(tmp_path):
    process = started(tmp_path, "wait")
    until = time.monotonic() + 60
    while not ((tmp_path / "said").exists() and (tmp_path / "said").read_text().endswith("\n")):
        assert time.monotonic() < until
        time.sleep(0.02)
    child = json.loads((tmp_path / "said").read_text())[0]
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and ") Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_module_bound_to_a_program_that_has_ended_does_not_begin(tmp_path):
    words = process.bound_module(sys.executable, "probe_module")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    words[words.index(str(os.getpid()))] = str(ended.pid)
    done = subprocess.run([*words, str(tmp_path / "said"), "x"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "ProcessLookupError" in done.stderr
    assert not (tmp_path / "said").exists()


FREED = """
import ctypes, resource, sys
from trimtab.core.process import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def pages_found():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        # Two at a time: what is free at the end of the heap is then more than the library keeps by itself.
        both = [libc.malloc(20 * 2**20) for _ in range(2)]
        for place in both:
            ctypes.memset(place, 1, 20 * 2**20)
        for place in both:
            libc.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = pages_found()
keep_freed_memory()
pages_found()
print(without, pages_found())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only GNU libc has this setting")
@pytest.mark.parametrize("set_by_the_user", [False, True])
def test_memory_that_was_freed_is_not_looked_for_again(set_by_the_user):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if set_by_the_user:
        environment["MALLOC_TRIM_THRESHOLD_"] = "0"
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, env=environment, check=True)
    without, kept = map(int, done.stdout.split())
    pages = 20 * 40 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert without > pages / 2
    assert kept > pages / 2 if set_by_the_user else kept < pages / 100


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
