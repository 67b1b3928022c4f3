"""The loop every training stage runs in: resume, step, log, save, stop when asked."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimtab.errors import EngineError, Interrupted
from trimtab.metrics import Metrics, Total, to_values
from trimtab.runs.run import Run

_QUIET_SECONDS = 10.0
"""Where output is not a terminal, a line of progress is printed this often."""


class LoopState(Protocol):
    """Everything a step reads that an earlier step wrote: weights, optimizers, schedules, generators, positions."""

    def save(self, path: Path) -> None:
        """Writes it all as files into the directory `path`."""

    def load(self, path: Path) -> None:
        """Becomes what `save` wrote there."""


def run_steps(
    run: Run,
    state: LoopState,
    *,
    num_steps: int,
    step: Callable[[int], Metrics],
    checkpoint_every: int,
    description: str,
) -> None:
    """Calls step(0) to step(num_steps - 1), from where the run had got to; step(i) is logged as step i + 1.

    Killed at any instant and called again, it leaves the same state and the same rows, `time/` metrics aside. What a
    step adds to the samples goes under i + 1 too, and nothing is logged before the first step: first measurements
    belong into step 1. The first metric that is not a time is shown with the progress.

    Raises Interrupted after Ctrl-C, with the step in hand finished and saved (a second Ctrl-C stops at once), and
    EngineError as `step` raised it, the last good checkpoint named in its fix.
    """
    done = _resume(run, state)
    with _interrupts() as interrupted, _progress(description, done, num_steps) as show:
        for i in range(done, num_steps):
            began = time.perf_counter()
            try:
                metrics = step(i)
            except EngineError as error:
                raise _naming_checkpoint(error, run, i + 1) from error
            run.log(i + 1, {"time/step_seconds": Total(time.perf_counter() - began), **metrics})
            show(i + 1, metrics)
            done = i + 1
            stop = interrupted()
            if (i + 1) % checkpoint_every == 0 or i + 1 == num_steps or stop:
                run.save_checkpoint(i + 1, state.save)
            if stop:
                break
        if interrupted():
            raise Interrupted(f"stopped after step {done} of {num_steps}, saved in {run.directory}")


def _resume(run: Run, state: LoopState) -> int:
    """Steps already done."""
    checkpoint = run.load_checkpoint()
    done = 0
    if checkpoint:
        done, path = checkpoint
        state.load(path)
    run.rewind(done)
    return done


def _naming_checkpoint(error: EngineError, run: Run, step: int) -> EngineError:
    checkpoint = run.load_checkpoint()
    last = f"the last good checkpoint is {checkpoint[1]}" if checkpoint else "there is no checkpoint yet"
    return EngineError(
        error.problem, where=f"{error.where}, step {step} of {run.directory}", fix=f"{error.fix}; {last}"
    )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C is noted instead of raised, the first time."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(description: str, done: int, num_steps: int) -> Iterator[Callable[[int, Metrics], None]]:
    """Within, the function given shows how far the loop is: a bar on a terminal, else a line now and then."""
    began = last = time.perf_counter()
    console = Console(stderr=True)

    def status(step: int, metrics: Metrics) -> str:
        rate = (step - done) / (time.perf_counter() - began)
        shown = next((f"  {k} {v:.4g}" for k, v in to_values(metrics).items() if not k.startswith("time/")), "")
        return f"{rate:.3g} steps/s{shown}"

    if not console.is_terminal:

        def line(step: int, metrics: Metrics) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= _QUIET_SECONDS or step == num_steps:
                last = now
                left = (num_steps - step) * (now - began) / (step - done)
                text = f"{description}: step {step} of {num_steps}  {status(step, metrics)}  {left:.0f} s left"
                print(text, file=sys.stderr, flush=True)

        yield line
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=num_steps, completed=done, status="")
        yield lambda step, metrics: progress.update(task, completed=step, status=status(step, metrics))
