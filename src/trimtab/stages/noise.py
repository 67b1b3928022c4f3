"""Seeds the global random generators. This package draws nothing from them, but other code in a run may."""

from __future__ import annotations

import random

import numpy as np
import torch

from trimtab.core import seeds


def seed_noise(seed: int, *purpose: str | int) -> None:
    """Sets the global generators of Python, numpy and torch.

    Every random choice of this package has a generator of its own. A module of a model (the noise of a router, a
    dropout that is not switched off) or a reward of the user's may draw from the global ones. Since they are set before
    every step, they give the same numbers in a run that was resumed, and in one that is repeated.
    """
    derived = seeds.derive(seed, "noise", *purpose)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)
