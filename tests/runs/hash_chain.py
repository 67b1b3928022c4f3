"""A run without any learning: each step hashes the last. Run as a script, so that it can be killed.

python hash_chain.py DIRECTORY NUM_STEPS CHECKPOINT_EVERY STEP_SECONDS    one run
python hash_chain.py crash-points DIRECTORY NUM_STEPS CHECKPOINT_EVERY    one run per file operation, killed there
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trimtab.core.errors import Interrupted
from trimtab.core.metrics import Mean, Metrics, Total
from trimtab.runs.loop import stepping
from trimtab.runs.run import Run, environment


class Chain:
    """The state: one digest, kept in two files so that there is something to tear apart."""

    def __init__(self) -> None:
        self.digest = "start"

    def save(self, path: Path) -> None:
        (path / "part").mkdir()
        (path / "part" / "first.txt").write_text(self.digest[:32])
        (path / "second.txt").write_text(self.digest[32:])

    def load(self, path: Path) -> None:
        self.digest = (path / "part" / "first.txt").read_text() + (path / "second.txt").read_text()

    def advance(self) -> float:
        self.digest = hashlib.sha256(self.digest.encode()).hexdigest()
        return int(self.digest[:12], 16) / 16**12


def run_steps(run: Run, chain: Chain, *, num_steps: int, step: Callable[[int], Metrics], checkpoint_every: int) -> None:
    """Calls `step` for each step that is still to be done."""
    with stepping(run, chain, num_steps=num_steps, checkpoint_every=checkpoint_every, description="chain") as steps:
        for number in steps:
            steps.log(step(number))


def run_chain(directory: Path, num_steps: int, checkpoint_every: int, step_seconds: float = 0.0) -> None:
    """One whole stage: open, step, save the model, finish."""
    settings = {"num_steps": num_steps, "checkpoint_every": checkpoint_every}
    with Run.open(directory, stage="chain", settings=settings) as run:
        if run.finished:
            return
        chain = Chain()

        def step(i: int) -> Metrics:
            began = time.perf_counter()
            value = chain.advance()
            run.add_samples(i + 1, [{"value": value, "text": chain.digest}])
            time.sleep(step_seconds)
            return {"chain/value": Mean(value, 1.0), "time/total_seconds": Total(time.perf_counter() - began)}

        run_steps(run, chain, num_steps=num_steps, step=step, checkpoint_every=checkpoint_every)
        run.save_model(lambda path: (path / "weights.txt").write_text(chain.digest) and None)
        run.finish({"digest": chain.digest})


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.truncate", "shutil.rmtree"}
REMOVALS = {"os.remove", "os.rmdir"}


def crash_at(count: int, directory: Path, num_steps: int, checkpoint_every: int) -> bool:
    """Runs the chain in a child that kills itself before its count-th file operation; False if it got to the end."""
    child = os.fork()
    if child == 0:
        left = count

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            # rmtree removes by name relative to an open directory
            if event in REMOVALS or (event in FILE_EVENTS and str(directory) in str(arguments[0])):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run_chain(directory, num_steps, checkpoint_every)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child failed with {status}"
    return status != 0


def crash_points(parent: Path, num_steps: int, checkpoint_every: int) -> None:
    """One directory for each file operation of a run, killed there and run again."""
    environment()  # asks git, once for all the children
    count = 1
    while crash_at(count, parent / str(count), num_steps, checkpoint_every):
        run_chain(parent / str(count), num_steps, checkpoint_every)
        count += 1


if __name__ == "__main__":
    if sys.argv[1] == "crash-points":
        crash_points(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        try:
            run_chain(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        except Interrupted as stop:
            print(stop)
            sys.exit(130)
