"""Agents as actors of a Ray cluster, each with processors of its own. What they start is as under every launcher."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trimtab.core.errors import EngineError
from trimtab.engines.agents import AgentLauncher, serve
from trimtab.engines.launch import Process
from trimtab.engines.links import LinkListener, connect

_PLACE_SECONDS = 60.0
"""The cluster has this long to set processors aside, and as long to start the actors."""
_OBJECT_STORE = 80 << 20
"""Bytes of the object store of a cluster that is made here. Nothing is put there; 75 MB is Ray's least."""


class AgentActor:
    """The actor: the agent of one rank."""

    def serve(self, host: str, port: int, key: str, rank: int) -> None:
        """Calls the controller and does as it says, until it ends."""
        serve(connect(host, port, key), rank, key)


class RayLauncher(AgentLauncher):
    """Starts processes by actors in a placement group of a cluster."""

    def __init__(self, address: str, size: int) -> None:
        """Connects to a cluster, or starts one of this machine for "local", and waits for an actor for each of the
        ranks 1 to `size` - 1. Raises EngineError if there is no such cluster, or too few processors are free in it."""
        import torch  # here, since the actors import this file and need no torch

        self._group: Any = None
        self._was_there = ray.is_initialized()
        if not self._was_there:
            _begin(address)
        host = "127.0.0.1" if address == "local" else ray.util.get_node_ip_address()
        super().__init__(host=host, interface=host if address == "local" else "", key=secrets.token_hex(32))
        try:
            processors = int(ray.cluster_resources().get("CPU", 0))
            self._num_threads = max(1, min(torch.get_num_threads(), processors // size))
            self._group = _group(size - 1, self._num_threads, processors)
            self._actors = _actors(self._group, size - 1, self._num_threads)  # an actor without a handle ends
            with LinkListener(self.interface, self.key) as listener:
                served = [
                    actor.serve.remote(host, listener.port, self.key, rank)
                    for rank, actor in enumerate(self._actors, start=1)
                ]

                def check() -> None:
                    for ended in ray.wait(served, num_returns=len(served), timeout=0)[0]:
                        ray.get(ended)

                where = f"engine.ray = {address!r}"
                self.gather(listener, size, started_by=where, seconds=_PLACE_SECONDS, check=check)
        except ray.exceptions.RayError as error:
            self.close()
            raise EngineError(
                f"an actor ended: {_lines(error)[-1]}",
                where="engine.ray",
                fix="see that trimtab and its extra 'train' are installed on every machine of the cluster, in the same "
                "version",
            ) from error
        except BaseException:
            self.close()
            raise

    def launch(self, command: Sequence[str], variables: Mapping[str, str], rank: int) -> Process:
        """Starts the command; Python finds its modules there where it does here."""
        path = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
        return super().launch(command, {**path, **variables}, rank)

    def num_threads(self, own: int, size: int) -> int:
        """The processors of an actor."""
        return self._num_threads

    def close(self) -> None:
        """Ends the actors and leaves the cluster; one that was started here ends."""
        super().close()
        with _quiet():
            if not self._was_there:
                ray.shutdown()
            elif self._group is not None:
                remove_placement_group(self._group)


def _begin(address: str) -> None:
    """Connects this process to the cluster."""
    made = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if address == "local" else {}
    if made:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _quiet():
            ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=False, **made)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise EngineError(
            f"no Ray cluster could be joined: {_lines(error)[0]}",
            where=f"engine.ray = {address!r}",
            fix="start one with `ray start --head` and use --ray auto, or use --ray local for one of this machine",
        ) from error


def _group(num: int, num_threads: int, processors: int) -> Any:
    """Processors for so many actors, set aside on as few machines as can be."""
    too_few = EngineError(
        f"{num} workers of {num_threads} processors each do not find them among the {processors} of the cluster",
        where="engine.workers, engine.ray",
        fix="use fewer workers, or wait for other jobs to end; `ray status` says what is taken",
    )
    if num * num_threads > processors:
        raise too_few
    group = placement_group([{"CPU": num_threads}] * num, strategy="PACK")
    if not group.wait(_PLACE_SECONDS):
        remove_placement_group(group)
        raise too_few
    return group


def _actors(group: Any, num: int, num_threads: int) -> list[Any]:
    actor: Any = ray.remote(num_cpus=num_threads)(AgentActor)
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(num)]
    return [actor.options(scheduling_strategy=place).remote() for place in places]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside this block Ray logs errors only, and does not keep SIGTERM, which says when to stop a run."""
    logger, handler = logging.getLogger("ray"), signal.getsignal(signal.SIGTERM)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
