"""The rollouts of each step, drawn with weights of a fixed age.

With `engine.max_staleness = k`, step n (from 0) trains on rollouts that were drawn with the weights after n - k steps,
and the first k steps on those of the start. Which weights draw for which step follows from n alone, not from which
process is ready first, so a run is still a function of its settings, and a resumed one ends with the same bits.

A sampler that shares the policy's weights draws before the update, in the thread of the loop: the same replies, and no
time gained. A sampler with weights of its own draws in a second thread while the policy is updated. It keeps its
weights while it draws, so a step waits for what is in flight before the next sync, and a lag of one step gains as much
time as a longer one. Rewards are scored in the second thread too if they say that they may be (`thread_safe`), and
otherwise by the loop. If the loop has to score before more can be drawn (dynamic sampling), it draws too, before the
update.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import takewhile

from trimtab.core.metrics import Mean, Metrics, Peak, merge
from trimtab.core.terminal import note
from trimtab.stages.noise import seed_noise
from trimtab.stages.online.checks import Clock
from trimtab.stages.online.draws import Draw
from trimtab.stages.online.rollouts import Replies, RolloutBatch
from trimtab.stages.online.sampling import RolloutSource
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import OnlineState

_LAST_SECONDS = 10.0
"""After a failure the second thread has this long to end. It is a daemon, so a sampler that hangs does not keep the
process from ending."""


@dataclass(frozen=True)
class DrawInFlight:
    """A draw of the second thread: the prompts taken before it, its replies or (if they are judged) its groups, and the
    seconds it took."""

    number: int
    version: int
    future: Future[tuple[int, Replies | RolloutBatch, Metrics]]


class RolloutQueue:
    """Gives each step its rollouts, and draws those of the steps to come: `with RolloutQueue(…) as queue: …`."""

    def __init__(self, source: RolloutSource, state: OnlineState, settings: OnlineSettings) -> None:
        """What is drawn and judged waits in `state` for its step."""
        self._source = source
        self._state = state
        self._settings = settings
        self._lag = settings.engine.max_staleness
        self._draws_meanwhile = all(sampler.may_draw_meanwhile for sampler in source.samplers)
        self._thread_scores = bool(getattr(source.reward, "thread_safe", False))
        independent = self._thread_scores or settings.dynamic_sampling is None
        self._in_thread = self._lag > 0 and self._draws_meanwhile and independent
        self._in_flight: list[DrawInFlight] = []
        """The draws for the steps that follow those of `state.drawn`."""
        self._seconds_between: Metrics = {}
        """What `finish` waited and scored, which belongs to no step; the next one logs it."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> RolloutQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)

    def take(self, number: int, clock: Clock) -> RolloutBatch:
        """The rollouts that step `number` trains on. Begins to draw for the steps to come, with the weights as they are
        now. Raises whatever went wrong while rollouts were drawn, in either thread."""
        state = self._state
        clock.metrics, self._seconds_between = merge([clock.metrics, self._seconds_between]), {}
        self._drop_stale(number)
        for draw in self._in_flight:
            draw.future.result()
        last = min(number + self._lag, self._settings.num_steps - 1)
        if coming := range(number + len(state.drawn) + len(self._in_flight), last + 1):
            if self._in_thread:
                clock.mark("wait_for_rollouts")
            self._source.sync()
            if self._draws_meanwhile:
                clock.mark("sync")
            if self._in_thread:
                self._begin(coming, version=number)
            else:
                state.drawn += [self._draw(step, number, clock) for step in coming]
        mine = state.drawn.pop(0) if state.drawn else self._next_in_flight(clock)
        assert mine.number == number
        return _aged(mine) if self._lag else mine.rollouts

    def finish(self) -> None:
        """Waits for everything that is being drawn and judges it; `state` then holds all of it. Raises whatever went
        wrong while it was drawn."""
        clock = Clock()
        while self._in_flight:
            self._state.drawn.append(self._next_in_flight(clock))
        self._seconds_between = clock.metrics

    def drop_drawn(self) -> None:
        """Drops what was drawn for the steps to come, because the policy has been given other weights. It is drawn
        again by the same random numbers. Nothing may be in flight: call `finish` first."""
        assert not self._in_flight
        if self._state.drawn:
            self._state.num_prompts_taken = self._state.drawn[0].num_prompts_before
            self._state.drawn = []

    def _drop_stale(self, number: int) -> None:
        """Drops what was drawn with older weights than a run allows that goes on with a smaller lag. The same prompts
        are then drawn again by the same random numbers, with the weights of now."""
        state = self._state
        kept = list(takewhile(lambda draw: draw.number - draw.version <= self._lag, state.drawn))
        if dropped := state.drawn[len(kept) :]:
            steps = " and ".join(str(draw.number + 1) for draw in dropped)
            said = f"the rollouts for step {steps} are older than engine.max_staleness = {self._lag} allows"
            note(f"{said}; they are drawn again")
            state.num_prompts_taken = dropped[0].num_prompts_before
            state.drawn = kept

    def _draw(self, number: int, version: int, clock: Clock) -> Draw:
        before = self._state.num_prompts_taken
        replies = self._source.draw(number, self._state, clock)
        return Draw(number, version, before, self._judged(number, replies, clock, now=version))

    def _begin(self, numbers: Sequence[int], *, version: int) -> None:
        """Begins to draw for these steps in a second thread, which ends with the last of them or the first failure."""
        draws = [DrawInFlight(number, version, Future()) for number in numbers]

        def work() -> None:
            try:
                for draw in draws:
                    if not self._closed:
                        draw.future.set_result(self._drawn_in_thread(draw.number))
            except BaseException as error:  # the loop raises it
                for draw in draws:
                    if not draw.future.done():
                        draw.future.set_exception(error)

        self._in_flight += draws
        self._thread = threading.Thread(target=work, name="rollouts", daemon=True)
        self._thread.start()

    def _drawn_in_thread(self, number: int) -> tuple[int, Replies | RolloutBatch, Metrics]:
        clock, before = Clock(), self._state.num_prompts_taken
        replies = self._source.draw(number, self._state, clock)
        judged = self._source.judge(number, replies, self._state, clock) if self._thread_scores else None
        return before, judged or replies, clock.metrics

    def _next_in_flight(self, clock: Clock) -> Draw:
        """The next draw of the second thread, waited for and judged."""
        draw = self._in_flight.pop(0)
        before, drawn, seconds = draw.future.result()
        clock.mark("wait_for_rollouts")
        if isinstance(drawn, Replies):
            drawn = self._judged(draw.number, drawn, clock, now=draw.number)
        return Draw(draw.number, draw.version, before, replace(drawn, metrics=drawn.metrics | seconds))

    def _judged(self, number: int, replies: Replies, clock: Clock, *, now: int) -> RolloutBatch:
        """The replies of step `number`, judged by the loop during step `now`. With a lag, a reward that draws noise is
        asked before the update, after it or before a checkpoint: it must not matter which, neither to the reward nor to
        what draws noise after it."""
        if self._lag:
            seed_noise(self._settings.seed, "rewards", number)
        judged = self._source.judge(number, replies, self._state, clock)
        if self._lag:
            seed_noise(self._settings.seed, "online", now)
        return judged


def _aged(draw: Draw) -> RolloutBatch:
    """The rollouts, with the age of the weights that drew them, in steps."""
    rollouts, staleness = draw.rollouts, draw.number - draw.version
    metrics: Metrics = {
        "rollout/version": Mean(draw.version, 1),
        "rollout/staleness_mean": Mean(staleness * len(rollouts.rollouts), len(rollouts.rollouts)),
        "rollout/staleness_max": Peak(staleness),
    }
    return replace(rollouts, metrics=rollouts.metrics | metrics, staleness=staleness)
