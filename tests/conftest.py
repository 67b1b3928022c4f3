"""What every test shares: one thread, so that numbers do not depend on the machine, and no network."""

from __future__ import annotations

import os

# Before torch is imported anywhere. Small models are fastest on one thread, and sums keep one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

# A slow machine is no reason for a test to fail; pytest's own output says how long each takes.
settings.register_profile("trimtab", deadline=None)
settings.load_profile("trimtab")
