"""The loop that every training stage runs in: resume, step, log, save, stop when asked."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimtab.core.errors import ConfigError, EngineError, Interrupted
from trimtab.core.metrics import Metrics, Total, to_values
from trimtab.runs.run import Run
from trimtab.runs.state import note_state

_QUIET_SECONDS = 10.0
"""Seconds between two lines of progress if the output is not a terminal."""

SHOWN = {
    "reward/mean": "reward",
    "gold/mean": "gold",
    "policy/kl": "KL",
    "loss/train": "loss",
    "reward/accuracy": "accuracy",
    "policy/accuracy": "accuracy",
    "select/best_reward": "best reward",
    "rollout/length_mean": "length",
}
"""The metrics that a line of progress shows if they are logged, each with the name shown; at most four are shown."""


class LoopState(Protocol):
    """Everything that a step reads and an earlier step wrote: weights, optimizers, schedules, generators, positions.

    For example, `stages.online.state.OnlineState`.
    """

    def save(self, path: Path) -> None:
        """Writes the whole state as files into the directory `path`."""

    def load(self, path: Path) -> None:
        """Restores the state that `save` wrote there."""


@dataclass(frozen=True)
class JointState:
    """Several states as one, such as two files that grow together. Each writes files of names of its own."""

    members: Sequence[LoopState]

    def save(self, path: Path) -> None:
        """Writes the state of all of them."""
        for member in self.members:
            member.save(path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote."""
        for member in self.members:
            member.load(path)


@dataclass
class Steps:
    """The steps of a run that are still to be done, counted from 0. Each is logged before the next begins; `stepping`
    yields them."""

    run: Run
    state: LoopState
    done: int
    num_steps: int
    checkpoint_every: int
    interrupted: Callable[[], int]
    show: Callable[[int, Metrics], None]
    before_save: Callable[[], None]
    keep_checkpoints: int
    """The number of newest checkpoints that stay."""
    also_kept: Callable[[], Collection[int]] = tuple
    """The steps whose checkpoints stay besides these."""
    at_work: bool = False
    """True between the start of a step and its log."""
    began: float = 0.0
    _saves: bool = False
    _ends: bool = False

    def save(self) -> None:
        """Makes a checkpoint after this step, whether its turn has come or not."""
        self._saves = True

    def end(self) -> None:
        """Makes this step the last one; called before the first, there is none."""
        self._ends = True

    def __iter__(self) -> Iterator[int]:
        for number in range(self.done, self.num_steps):
            if self._ends:
                break
            self.at_work, self.began = True, time.perf_counter()
            yield number
            assert self.done == number + 1, f"step {number} was not logged"
            stop = self.interrupted()
            last = self.done == self.num_steps or self._ends
            if self.done % self.checkpoint_every == 0 or last or self._saves or stop:
                self.at_work = True  # on the steps to come
                self.before_save()
                self.at_work = False
                also = self.also_kept()
                self.run.save_checkpoint(self.done, self.state.save, keep=self.keep_checkpoints, also=also)
                self._saves = False
            if stop:
                break
        if self.interrupted():
            said = f"stopped after step {self.done} of {self.num_steps}, saved in {self.run.directory}"
            raise Interrupted(said, signal_number=self.interrupted())

    def log(self, metrics: Metrics) -> None:
        """Ends the current step: its metrics, with the seconds since it began, become its row of metrics.jsonl."""
        self.at_work = False
        seconds: Metrics = {"time/step_seconds": Total(time.perf_counter() - self.began)}
        self.run.log(self.done + 1, seconds | metrics)
        self.done += 1
        self.show(self.done, metrics)


@contextmanager
def stepping(
    run: Run,
    state: LoopState,
    *,
    num_steps: int,
    checkpoint_every: int,
    description: str,
    keep_checkpoints: int = 2,
    before_save: Callable[[], None] = lambda: None,
    also_kept: Callable[[], Collection[int]] = tuple,
) -> Iterator[Steps]:
    """Yields the steps that are still to be done, from where the run had got to; step i is logged as step i + 1.

        with stepping(run, state, num_steps=100, checkpoint_every=10, description="sft") as steps:
            for number in steps:
                steps.log(train_step(number))

    If the process is killed at any instant and this is called again, the state and the rows become the same, `time/`
    metrics aside. Samples of step i are added under i + 1 too. Nothing is logged before the first step: first
    measurements belong to step 1. The progress shows the metrics in `SHOWN`. `before_save` is called before each
    checkpoint, and completes a state on which other threads are at work. The newest checkpoints stay, and those of the
    steps that `also_kept` gives.

    Raises Interrupted after Ctrl-C or SIGTERM, once the current step is finished and saved (a second signal stops at
    once). An EngineError of a step is raised with the last good checkpoint named in its fix.
    """
    done = _resume(run, state)
    if done > num_steps:
        raise ConfigError(
            f"{run.directory} has done {done} steps, and {num_steps} are asked for",
            where="the length of the run",
            fix="ask for as many steps or more, or begin again with --fresh",
        )
    with _interrupts(run.directory, num_steps) as interrupted, _progress(description, done, num_steps) as show:
        steps = Steps(
            run, state, done, num_steps, checkpoint_every, interrupted, show, before_save, keep_checkpoints, also_kept
        )
        try:
            yield steps
        except EngineError as error:
            if not steps.at_work:
                raise
            raise _naming_checkpoint(error, run, steps.done + 1) from error


def _resume(run: Run, state: LoopState) -> int:
    """Loads the newest checkpoint; returns the number of steps already done."""
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
def _interrupts(directory: Path, num_steps: int) -> Iterator[Callable[[], int]]:
    """Notes the first Ctrl-C or SIGTERM (which batch systems and containers send) instead of letting it stop the
    process, here and in the state of the run. Yields a function that gives the number of the signal, or 0."""
    asked: list[int] = []
    state = {"num_steps": num_steps}
    note_state(directory, **state)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: 0
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        restore()
        note_state(directory, **state, stepping=os.getpid(), stopping=os.getpid())
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    note_state(directory, **state, stepping=os.getpid())
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        restore()
        note_state(directory, **state)


def shown_with_progress(metrics: Metrics) -> str:
    """The metrics of a step that are in `SHOWN`, as "  reward 1.2  KL 3.4"; if there are none, its first metric."""
    values = {name: value for name, value in to_values(metrics).items() if not name.startswith("time/")}
    known = [f"  {word} {values[name]:.3g}" for name, word in SHOWN.items() if name in values]
    return "".join(known[:4]) or next((f"  {name} {value:.4g}" for name, value in values.items()), "")


@contextmanager
def _progress(description: str, done: int, num_steps: int) -> Iterator[Callable[[int, Metrics], None]]:
    """Yields a function that shows how far the loop is: as a bar on a terminal, else as a line now and then."""
    began = last = time.perf_counter()
    console = Console(stderr=True)

    def status(step: int, metrics: Metrics) -> str:
        rate = (step - done) / (time.perf_counter() - began)
        return f"{rate:.3g} steps/s{shown_with_progress(metrics)}"

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

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[status]}"), console=console) as progress:
        task = progress.add_task(description, total=num_steps, completed=done, status="")
        yield lambda step, metrics: progress.update(task, completed=step, status=status(step, metrics))
