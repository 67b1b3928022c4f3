"""What is other in a rehearsal of `trimtab plan` than in the run: its last step is the run's largest.

Memory is that of the largest micro-batch, which the first few steps seldom have. The order of examples is known
beforehand, so the step that has the largest micro-batch is known too, and is rehearsed after those that are timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from trimtab.batches.trees import split_sizes
from trimtab.engines.spread import deal
from trimtab.stages.stage import FEW_STEPS

_whole_steps: ContextVar[int | None] = ContextVar("whole_steps", default=None)
"""Steps of the run that is rehearsed; None if nothing is."""
UNKNOWN = 1 << 62
"""In place of the number of steps, if only the data says how many there are."""
MOST_STEPS = 1000
"""How many steps are looked through for the largest. More would take longer than the rehearsal."""


@contextmanager
def rehearsing(num_steps: int | None) -> Iterator[None]:
    """Inside this block stages rehearse a run of so many steps; None if only the data says how many."""
    token = _whole_steps.set(UNKNOWN if num_steps is None else num_steps)
    try:
        yield
    finally:
        _whole_steps.reset(token)


def steps_rehearsed(num_steps: int) -> int:
    """How many steps of the rehearsed run, which has at most `num_steps`, are looked through; 0 if nothing is
    rehearsed, or all of the run is."""
    num = min(num_steps, _whole_steps.get() or 0)
    return min(num, MOST_STEPS) if num > FEW_STEPS else 0


def largest_step(steps: Iterable[Sequence[int]], settings: Any) -> int:
    """The number of the step whose largest micro-batch has most tokens, in any process. Each step is given as the
    tokens of its trees."""
    workers, token_budget = settings.engine.workers, settings.token_budget

    def largest(sizes: Sequence[int]) -> int:
        shares = ([sizes[i] for i in share] for share in deal(sizes, workers))
        groups = ([share[i] for i in group] for share in shares for group in split_sizes(share, token_budget))
        return max(map(sum, groups))

    found = [largest(sizes) for sizes in steps]
    return found.index(max(found))
