"""The memory of this program, not that of the one that launched it."""

import subprocess
import sys

from trimtab.core import process
from trimtab.core.process import note_workers, peak_rss_gb, peaks_rss_gb

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
