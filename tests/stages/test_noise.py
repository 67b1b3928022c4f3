"""What draws from the global generators is a function of the settings and the step."""

import random

import numpy as np
import torch

from tests.stages.commands import FAST, run_stage, without_times
from tests.stages.commands import rows as metrics
from trimtab.math.losses.sft import SFTLoss
from trimtab.stages.noise import seed_noise


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_purpose_gives_the_same_noise():
    seed_noise(3, "sft", 7)
    first = drawn()
    seed_noise(3, "sft", 8)
    other = drawn()
    seed_noise(3, "sft", 7)
    assert drawn() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_loss_that_draws_from_torch_is_the_same_whatever_was_drawn_before(tmp_path, base, monkeypatch):
    plain = SFTLoss.__call__

    def noisy(self, outputs, batch):
        loss, found = plain(self, outputs, batch)
        return loss * (1 + torch.rand(())), found

    monkeypatch.setattr(SFTLoss, "__call__", noisy)
    settings = {"model": str(base), "data": "world:arithmetic?num=8", "batch_size": 4, "optimizer": FAST}
    torch.manual_seed(1)
    one = run_stage("sft", tmp_path / "one", **settings)
    torch.manual_seed(2)
    two = run_stage("sft", tmp_path / "two", **settings)
    assert without_times(metrics(one)) == without_times(metrics(two))
