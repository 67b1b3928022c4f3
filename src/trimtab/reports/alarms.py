"""What looks wrong in a run, each as one sentence with its number and the bound that it passed.

The bounds that rules of the diagnosis judge by are theirs. An alarm is less than a finding: it looks at the last tenth
of a run of any length, and asks a person to look too.
"""

from __future__ import annotations

import math

from trimtab.reports.collect import RunRecord
from trimtab.reports.diagnosis.policy_rules import CLIP_FRACTION, LENGTH_GROWTH, TRUNCATED
from trimtab.reports.headline import interval, number, percent, show, with_bounds
from trimtab.reports.quality import FALL, measured_quality


def alarms_of(run: RunRecord, *, running: bool = False) -> tuple[str, ...]:
    """Facts about a run that a person should look at, each with its number and the bound it passed. That a run is not
    finished is one of them unless it is still running."""
    found = list(run.problems)
    metrics = run.metrics
    if not run.finished and not running:
        found.append(f"the run is not finished: {run.num_steps} steps are logged")
    broken = sorted(name for name, series in metrics.items() if series.num_unknown)
    if broken:
        found.append(f"not a finite number at some step: {', '.join(broken[:5])}")
    if (cut := _last(run, "rollout/truncated_fraction")) > TRUNCATED:
        found.append(f"{percent(cut)} of the last replies hit the length limit (above {percent(TRUNCATED)})")
    if (difference := _last(run, "rollout/logprob_difference")) > 0.01:
        found.append(f"sampler and policy differ by up to {show(difference)} nats on one token (above 0.01)")
    if (clipped := _last(run, "policy/clip_fraction")) > CLIP_FRACTION:
        found.append(f"{percent(clipped)} of the tokens were clipped at the end (above {percent(CLIP_FRACTION)})")
    if (explained := _last(run, "critic/explained_variance")) < 0:
        found.append(f"the critic ends worse than a constant (explained variance {show(explained)})")
    for name, what in (("policy/entropy", "entropy"), ("rollout/distinct_2", "distinct bigrams")):
        if (series := metrics.get(name)) is not None and series.mean_of_last() < 0.5 * series.mean_of_first():
            start, end = show(series.mean_of_first()), show(series.mean_of_last())
            found.append(f"{what} fell from {start} to {end} (below half)")
    if (length := metrics.get("rollout/length_mean")) is not None:
        ratio = length.mean_of_last() / max(length.mean_of_first(), 1e-9)
        if ratio > LENGTH_GROWTH:
            found.append(f"replies grew {show(ratio)} times longer (above {LENGTH_GROWTH})")
    for name, series in metrics.items():
        if name.startswith("reward/") and name.endswith("_failed") and (failed := series.total):
            reward = name.removeprefix("reward/").removesuffix("_failed")
            found.append(f"{show(failed)} replies could not be judged by the reward {reward}")
    quality = measured_quality(run)
    if quality is not None and quality.was_gamed:
        fall = percent(quality.summary.fall_fraction)
        found.append(f"{quality.name} ended {fall} below its peak while the reward kept rising (above {percent(FALL)})")
    accuracy, longer = interval(run.summary, "accuracy"), number(run.summary, "longer_wins")
    if accuracy is not None and longer is not None and accuracy.low <= longer:
        found.append(
            f"the reward model ({with_bounds(accuracy, percent)}) is not clearly better than "
            f"preferring the longer reply ({percent(longer)})"
        )
    return tuple(found)


def _last(run: RunRecord, name: str) -> float:
    """The metric at the end of the run; nan if it was not logged, since nan passes no bound."""
    series = run.metrics.get(name)
    return math.nan if series is None else series.mean_of_last()
