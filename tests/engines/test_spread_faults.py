"""When a process of several ends, hangs or fails, all end, and the error says which it was."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.engines.models_of_tests import CASES, CaseSettings, load, start
from tests.engines.test_device import batch
from trimtab.core.errors import EngineError
from trimtab.engines.build import Engines
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.learner import AdamW
from trimtab.engines.shards import ShardedLearner
from trimtab.engines.spread import cost, deal
from trimtab.math.losses.policy import PPO

OPTIMIZER = AdamW(learning_rate=1e-3)
HOW = {"token_budget": 64, "num_updates": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_model_directory(tmp_path_factory.mktemp("spread") / "model")


def test_a_loss_that_is_not_finite_in_one_process_stops_all(directory):
    engines, models = start(directory, 2, ("nan",))
    with engines:
        learner = engines.learner(models["nan"], OPTIMIZER, name="nan", **HOW)
        broken = batch()
        shares = deal([cost([tree]) for tree in broken.trees.trees], 2)
        advantages = broken.advantages.clone()
        advantages[broken.trees.index_of("token", shares[1])] = torch.nan  # only in the worker's share
        with pytest.raises(EngineError, match="the loss of the nan became nan") as failed:
            learner.update([(replace(broken, advantages=advantages), [PPO()])])
        assert "worker 1" in failed.value.where


def test_a_worker_that_is_killed_is_named_and_the_others_end(directory):
    engines, models = start(directory, 3, ("llama",))
    with engines:
        learner = engines.learner(models["llama"], OPTIMIZER, name="llama", **HOW)
        first, second = engines.group._processes
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="worker 1 was killed by SIGKILL while updating the weights") as lost:
            learner.update([(batch(), [PPO()])])
        assert "goes on from the last checkpoint" in lost.value.fix
        assert second.wait(timeout=10) is not None


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_run_within_the_limit(directory):
    engines, models = start(directory, 2, ("llama",), timeout_seconds=5)
    with engines:
        learner = engines.learner(models["llama"], OPTIMIZER, name="llama", **HOW)
        (worker,) = engines.group._processes
        os.kill(worker.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(EngineError, match="worker 1 does not answer while updating the weights"):
            learner.update([(batch(), [PPO()])])
        assert time.monotonic() - began < 30
        assert worker.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.slow
def test_other_weights_in_a_worker_are_refused(directory, tmp_path):
    settings = CaseSettings(model=str(directory), cases=("llama",), engine=EngineSettings(workers=2))
    models = load(settings, directory)[1]
    with torch.no_grad():
        next(models["llama"].parameters())[0, 0] += 1
    with pytest.raises(EngineError, match="worker 1 loaded other weights"):
        Engines.start(settings, directory, load=load, models=models)


def test_a_sharded_adapter_is_refused():
    with pytest.raises(EngineError, match="the frozen base of an adapter is not sharded"):
        ShardedLearner(CASES["adapter"](), OPTIMIZER, name="adapter", **HOW)


def test_shards_of_one_process_are_refused():
    with pytest.raises(ValueError, match="no other process to share with"):
        EngineSettings(shard=True)
