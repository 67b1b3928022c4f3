"""What every test shares: one thread, so that numbers do not depend on the machine, and no network; and a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported anywhere. Small models are fastest on one thread, and sums keep one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# A slow machine is no reason for a test to fail; pytest's own output says how long each takes.
settings.register_profile("trimtab", deadline=None)
settings.load_profile("trimtab")

_CHROMIUM = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome", shutil.which("chrome")) if p and Path(p).exists()), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of this machine; without one the tests that ask for it are skipped."""
    if _CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()
