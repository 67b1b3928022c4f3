"""What only a launcher by Ray does: a cluster that this process has joined before, and actors that fail."""

from __future__ import annotations

import signal
import time

import pytest

from tests.engines.models_of_tests import with_ray
from trimtab.core.errors import EngineError
from trimtab.engines.launch import PYTHON

pytestmark = [with_ray, pytest.mark.slow]


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that this process has joined."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_a_cluster_that_was_joined_before_stays_joined(cluster):
    from trimtab.engines.ray_cluster import RayLauncher

    handler = signal.getsignal(signal.SIGTERM)
    launcher = RayLauncher("local", 2)
    try:
        assert launcher.num_threads(64, 2) == 1
        assert launcher.launch([PYTHON, "-c", "import sys; sys.exit(7)"], {}, rank=1).wait(60) == 7
    finally:
        launcher.close()
    assert cluster.is_initialized()
    deadline = time.monotonic() + 20
    while cluster.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cluster.available_resources()["CPU"] == 2  # the actors are gone, and what was set aside for them
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_actor_that_fails_is_said(cluster, monkeypatch):
    from trimtab.engines import ray_cluster

    class Failing:
        def serve(self, *_):
            raise ImportError("no trimtab here")

    monkeypatch.setattr(ray_cluster, "AgentActor", Failing)
    with pytest.raises(EngineError, match="an actor ended: ImportError: no trimtab here") as failed:
        ray_cluster.RayLauncher("local", 2)
    assert "installed on every machine" in failed.value.fix


def test_processors_that_others_hold_are_not_waited_for_without_end(cluster, monkeypatch):
    from trimtab.engines import ray_cluster

    monkeypatch.setattr(ray_cluster, "_PLACE_SECONDS", 2.0)
    other = cluster.util.placement_group([{"CPU": 2}])
    assert other.wait(30)
    with pytest.raises(EngineError, match="1 workers of 1 processors each do not find them among the 2"):
        ray_cluster.RayLauncher("local", 2)
