"""The guard of a run: checks, the decision about what they show, and the actions.

It stands in the loop around the step. A check draws replies to prompts of its own by random numbers of its own and
changes nothing that training reads, so a run whose guard takes no action has the same bits as a run without one. Cheap
signals ask for the measure; the measure alone decides (`evals.checkpoint_choice` has the rule and the test). What the
guard knows is part of the run's checkpoints, so that a run that was killed decides again as it did.

Rolling back does not turn the clock back. The weights, the optimizers with their place in the schedule and whatever
else belongs to the weights are those of the best checkpoint, and the next step is the next one, with data and random
numbers of its own: the same steps again would end in the same place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from trimtab.core.errors import DataError, EngineError
from trimtab.core.files import write_json
from trimtab.core.metrics import Mean, Metrics
from trimtab.core.terminal import note
from trimtab.evals.checkpoint_choice import (
    FallTest,
    MeasuredCheckpoint,
    best_checkpoint,
    corrected_level,
    decision,
    fall_test,
    interval_of_chosen,
)
from trimtab.evals.reply_signals import LEXICON_VERSION, measure_signals
from trimtab.runs.checkpoints import whole_checkpoint
from trimtab.runs.loop import Steps
from trimtab.runs.run import Run
from trimtab.stages.guard.measuring import CheckReplies, PolicyCheck, evidence_of
from trimtab.stages.guard.settings import GuardAction, GuardSettings
from trimtab.stages.guard.state import GuardState

RECORD = "guard.jsonl"
DECISION = "decision.json"
_MORE_TRUNCATED = 0.05
"""The signal `truncated` fires if the share of replies that were cut off has risen by more than this."""
_STEEPER = 2.0
"""The signal `kl_slope` fires if the KL rises by this factor faster than on average so far, once it is above a nat."""


class GuardedState(Protocol):
    """The state of a run with a guard, such as `OnlineState` or `GuardedLearner`."""

    guard: GuardState | None
    """What the guard has seen and done."""

    def save(self, path: Path) -> None:
        """Writes the whole state, with that of the guard, into the directory `path`."""

    def load_models(self, path: Path) -> Any:
        """Restores of it the weights, the optimizers, and what else belongs to the weights."""


class RunGuard:
    """Checks the policy of one run, and acts: `guard.begin(steps)` before the first step, `guard.check(…)` in each.

    A stage whose policy could be pulled back in another way has a guard of its own (`OnlineGuard`)."""

    def __init__(
        self,
        settings: GuardSettings,
        run: Run,
        state: GuardedState,
        policy_check: PolicyCheck,
        *,
        num_steps: int,
        num_trained_on: int,
    ) -> None:
        """`num_trained_on` of the prompts of checks are trained on."""
        self.settings = settings
        self.run = run
        self.state = state
        self.policy_check = policy_check
        self.num_steps = num_steps
        self.num_trained_on = num_trained_on
        state.guard = GuardState()
        if settings.actions and settings.every >= num_steps:
            note(
                f"guard.every = {settings.every} of {num_steps} steps: there is no check before the last step, "
                f"so that none of guard.actions = {list(settings.actions)} can be taken"
            )

    @property
    def seen(self) -> GuardState:
        """What was measured and done so far. Loading a checkpoint replaces it."""
        assert self.state.guard is not None
        return self.state.guard

    def kept(self) -> Sequence[int]:
        """The step whose checkpoint may be rolled back to."""
        return [best_checkpoint(self.seen.series).step] if self.seen.series else []

    def begin(self, steps: Steps) -> None:
        """Measures the policy before the first step, if this is not yet done, and keeps it as a checkpoint. Ends a run
        that the guard has stopped. Raises EngineError if the measure cannot judge the replies."""
        if self.seen.stopped:
            if steps.done < self.num_steps:
                print(f"guard: the run stays stopped after step {steps.done}: {self.seen.stopped}", file=sys.stderr)
            steps.end()
        if self.seen.series:
            return
        self.run.rewind(-1)  # a run that was killed before its first checkpoint has written the row of this check
        replies = self.replies(0)
        self.seen.start = replies.texts
        first = replies.measured(0, self.policy_check.measure)
        if not first.may_be_chosen:
            raise EngineError(
                f"the measure judged the replies to {first.estimate.count} of {len(self.policy_check.prompts)} prompts",
                where="guard.measure, before the first step",
                fix="mend the measure, or give prompts that it can judge; the log says why it failed",
            )
        self.seen.series.append(first)
        self.seen.num_checks = 1
        self.seen.kl, self.seen.truncated = (0, first.kl), replies.truncated_fraction
        self._record(0, {"event": "check", **_row_of(first), "fired": []})
        self.run.save_checkpoint(0, self.state.save)

    def check(self, step: int, steps: Steps) -> Metrics:
        """After step number `step`, counted from 1: a check if it is due, and what follows from it, as metrics."""
        if step % self.settings.every and step != self.num_steps:
            return {}
        replies = self.replies(step)
        level = self._level(step)
        found, fired = self._signals(step, replies)
        budget = self.settings.kl_budget
        spent = budget is not None and found["kl"] > budget
        due = step % (self.settings.every * self.settings.measure_every) == 0 or step == self.num_steps or spent
        asked = sorted(set(fired) - set(self.seen.fired))
        row: dict[str, Any] = {"event": "check", "kl": found["kl"], "fired": fired}
        # A share that no reply was there for is no number, and left out.
        metrics: Metrics = {f"guard/{name}": Mean(value, 1) for name, value in found.items() if math.isfinite(value)}
        metrics["guard/signals"] = Mean(len(fired), 1)
        decided: list[dict[str, Any]] = []
        if due or asked:
            now, best = replies.measured(step, self.policy_check.measure), best_checkpoint(self.seen.series)
            fall = fall_test(best, now, level=level, margin=self.settings.margin)
            self.seen.series.append(now)
            self.seen.fired = fired
            row |= {**_row_of(now), "asked_by": [] if due else asked}
            row |= {"compared_with_step": best.step, **_row_of_fall(fall)}
            if now.may_be_chosen:
                known = {name: value for name, value in now.estimate.named("measure").items() if math.isfinite(value)}
                metrics |= {f"guard/{name}": Mean(value, 1) for name, value in known.items()}
            else:
                unjudged = f"the measure judged {now.estimate.count} of {len(now.values)} prompts"
                print(f"guard: step {step}: {unjudged}: no fall can be found", file=sys.stderr)
                if self.settings.actions and step < self.num_steps:
                    decided.append(self._stop(f"{unjudged}, and what it cannot judge may be what is wrong"))
            metrics["guard/unjudged"] = Mean(len(now.values) - now.estimate.count, 1)
            metrics["guard/best_step"] = Mean(self.kept()[0], 1)
            if self.kept() == [step]:
                steps.save()
            if spent:
                decided.append(self._stop(f"a KL of {found['kl']:.3g} nats is above kl_budget = {budget:g}"))
            elif step < self.num_steps and not decided:  # after the last step there is nothing left to change
                decided += self._decide(step, now, best, fall)
        self._record(step, row, *decided)
        for action in decided:
            print(f"guard: step {step}: {action['event'].replace('_', ' ')}: {action['why']}", file=sys.stderr)
            steps.save()
        if self.seen.stopped:
            steps.end()
        return metrics

    def finish(self) -> dict[str, Any]:
        """Writes decision.json, gives the policy the weights of the chosen checkpoint if it is to be the run's model,
        and returns what the summary says of the guard."""
        seen, chosen = self.seen, best_checkpoint(self.seen.series)
        last = seen.series[-1]
        said, model_is = interval_of_chosen(chosen, len(seen.series)), f"the last step, {last.step}"
        if self.settings.writes == "best":
            written, row = self._load_best(last.step, seen.series)
            if row:
                self._record(last.step, *row)
                print(f"guard: {row[0]['why']}: step {written}", file=sys.stderr)
            model_is = f"step {written}, as the chosen checkpoint is damaged" if row else "the chosen checkpoint"
        evidence: dict[str, Any] = {
            "model_is": model_is,
            **evidence_of(self.settings, self.policy_check.prompts, self.num_trained_on),
            "fall": {name: getattr(self.settings, name) for name in ("alpha", "margin")},
            "stopped": seen.stopped,
            "lexicons": LEXICON_VERSION,
        }
        path = self.run.directory / DECISION
        write_json(path, decision(seen.series, evidence=evidence))
        if self.settings.writes == "last" and chosen is not last:
            print(
                f"guard: the measure is best at step {chosen.step} ({said}); the model is that of the last step "
                f"({last.estimate})",
                file=sys.stderr,
            )
        return {
            "chosen_step": chosen.step,
            "stopped": seen.stopped,
            "num_actions": seen.num_actions,
            "prompts_trained_on": self.num_trained_on,
            **said.named("measure_chosen"),
            **last.estimate.named("measure_last"),
        }

    def replies(self, step: int) -> CheckReplies:
        """The replies of the policy as it is now."""
        return self.policy_check.replies(step)

    def act(self, action: GuardAction, step: int, why: str) -> list[dict[str, Any]]:
        """Takes an action after `step`, and returns it as rows of the record."""
        if action == "stop":
            return [self._stop(why)]
        assert action == "roll_back", f"{action} is an action of a stage of its own"
        to_step, damaged = self._load_best(step, self.seen.series[:-1])
        return [*damaged, {"event": action, "why": f"{why}; on with the weights of step {to_step}", "to_step": to_step}]

    def at_new_best(self, now: MeasuredCheckpoint) -> list[dict[str, Any]]:
        """What is taken back because the measure has a new best, as rows of the record; nothing here."""
        return []

    def _level(self, step: int) -> float:
        """The level of a test in this check: what is left of alpha, over the pairs of this check and those to come. The
        level of the last check is not spent, for nothing is decided there and the run may be given more steps."""
        seen, left = self.seen, self.settings.num_checks(self.num_steps - step)
        level = corrected_level(self.settings.alpha - seen.spent, left, num_before=seen.num_checks)
        if step < self.num_steps:
            seen.spent += level * seen.num_checks
        seen.num_checks += 1
        return level

    def _load_best(self, step: int, series: Sequence[MeasuredCheckpoint]) -> tuple[int, list[dict[str, Any]]]:
        """Gives the models the weights of the best checkpoint in `series` that is whole, and returns its step, with a
        row for the record if it is not the best. Without any, the models stay as they are after `step`."""
        row: list[dict[str, Any]] = []
        able = [one for one in series if one.may_be_chosen]
        while able:
            best = best_checkpoint(able)
            try:
                self.state.load_models(whole_checkpoint(self.run.directory, best.step))
            except DataError as error:
                able.remove(best)
                why = f"{error.problem}; the best that is whole is taken instead"
                row = row or [{"event": "damaged", "why": why, "best_step": best.step}]
            else:
                return best.step, row
        return step, row

    def _signals(self, step: int, replies: CheckReplies) -> tuple[dict[str, float], list[str]]:
        """The cheap signals by name, and those that fired."""
        assert self.seen.start is not None
        found, fired = measure_signals(replies.texts, self.seen.start)
        before, kl_before = self.seen.kl
        kl = float(replies.kl.double().mean())
        slope, average = (kl - kl_before) / (step - before), kl_before / max(1, before)
        self.seen.kl = (step, kl)
        if kl > 1 and before and slope > _STEEPER * average:
            fired.append("kl_slope")
        truncated = replies.truncated_fraction
        if truncated > self.seen.truncated + _MORE_TRUNCATED:
            fired.append("truncated")
        rewards = replies.rewards[replies.rewards.isfinite()]
        found |= {"kl": kl, "kl_slope": slope, "truncated": truncated, "reward": float(rewards.double().mean())}
        return found, fired

    def _decide(
        self, step: int, now: MeasuredCheckpoint, best: MeasuredCheckpoint, fall: FallTest
    ) -> list[dict[str, Any]]:
        """Takes the next action if the fall is real and its turn has come. Returns what was done as rows of the
        record."""
        seen, ladder = self.seen, self.settings.actions
        if not fall.is_real:
            return self.at_new_best(now) if self.kept() == [step] else []
        rested = len(seen.series) - seen.measured_at_action >= self.settings.patience or not seen.num_actions
        if not rested or seen.num_actions == len(ladder):
            return []
        action = ladder[seen.num_actions]
        seen.num_actions += 1
        seen.measured_at_action = len(seen.series)
        why = (
            f"the measure fell from {best.estimate} at step {best.step} to {now.estimate}, by {fall.difference} "
            f"paired, p = {fall.p_value:.2g} below {fall.level:.2g}"
        )
        return self.act(action, step, why)

    def _stop(self, why: str) -> dict[str, Any]:
        self.seen.stopped = why
        return {"event": "stop", "why": why}

    def _record(self, step: int, *rows: dict[str, Any]) -> None:
        self.run.add_rows(RECORD, step, rows)


def _row_of(found: MeasuredCheckpoint) -> dict[str, Any]:
    numbers = {"kl": found.kl, "reward": found.reward, "num_judged": found.estimate.count}
    return numbers | found.estimate.named("measure")


def _row_of_fall(fall: FallTest) -> dict[str, Any]:
    return fall.difference.named("fall") | {"p_value": fall.p_value, "level": fall.level}
