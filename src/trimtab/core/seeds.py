"""Seeds for every random choice, derived from the run's seed and the purpose of the choice.

No generator lives across steps, so none has to be saved: a resumed run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derive(run_seed, "order", epoch)`. It is the same on every machine."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh numpy generator for one purpose."""
    return np.random.Generator(np.random.Philox(derive(seed, *purpose)))
