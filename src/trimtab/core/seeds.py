"""A seed for every random choice, made from the run's seed and what the choice is for.

No generator lives across steps, so there is none to save: a resumed run draws what the first one would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derive(run_seed, "order", epoch)`. Equal on every machine."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh numpy generator for one purpose."""
    return np.random.Generator(np.random.Philox(derive(seed, *purpose)))
