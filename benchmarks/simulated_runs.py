"""The test of the guard on simulated runs: false alarms, power, and the checkpoints that it chooses.

`python benchmarks/guard.py rates` is its command.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.evals.checkpoint_choice import MeasuredCheckpoint, best_checkpoint, corrected_level, fall_test
from trimtab.stats import wilson

NUM_CHECKS, ALPHA = 11, 0.05
SHAPES = {
    "stays": [0.6] * NUM_CHECKS,
    "rises and stays": [0.3, 0.45, 0.55, *[0.6] * 8],
    "rises all the time": [0.3 + 0.04 * k for k in range(NUM_CHECKS)],
    "falls by 5% of its peak a check, after check 4": [0.3, 0.45, 0.55, 0.6, *[0.6 - 0.03 * k for k in range(7)]],
    "falls by 10%": [0.3, 0.45, 0.55, 0.6, *[0.6 - 0.06 * k for k in range(7)]],
}
"""The true means of simulated runs, check by check; the last two fall from the fifth check on."""


def simulated(means: list[float], seed: int, num_prompts: int) -> list[MeasuredCheckpoint]:
    """Scores in [0, 1]: prompts differ in difficulty (deviation 0.15), replies have noise of their own (0.2)."""
    generator = np.random.default_rng(seed)
    prompts = generator.normal(0, 0.15, num_prompts)
    return [
        MeasuredCheckpoint(
            step=10 * k,
            values=tuple(np.clip(mean + prompts + generator.normal(0, 0.2, num_prompts), 0, 1).tolist()),
            kl=float(k),
            reward=0.0,
        )
        for k, mean in enumerate(means)
    ]


def alarm(series: list[MeasuredCheckpoint], *, corrected: bool) -> int | None:
    """The first check whose fall from the best before it counts as real."""
    for k in range(1, len(series)):
        level = corrected_level(ALPHA, NUM_CHECKS if corrected else 2)
        if fall_test(best_checkpoint(series[:k]), series[k], level=level).is_real:
            return k
    return None


def rates(num_runs: int, num_prompts: int) -> list[dict[str, Any]]:
    """For each shape, with so many prompts: in how many runs there was an alarm, when, and in how many without the
    correction."""
    found = []
    for name, means in SHAPES.items():
        runs = [simulated(means, seed, num_prompts) for seed in range(num_runs)]
        alarms = [k for series in runs if (k := alarm(series, corrected=True)) is not None]
        plain = sum(alarm(series, corrected=False) is not None for series in runs)
        truths = [means[best_checkpoint(series).step // 10] / max(means) for series in runs]
        found.append(
            {
                "shape": name,
                "num_prompts": num_prompts,
                "num_runs": num_runs,
                "num_alarms": len(alarms),
                **wilson(len(alarms), num_runs).named("alarm_fraction"),
                "num_alarms_uncorrected": plain,
                "true_fall_at_alarm": float(np.median([1 - means[k] / max(means) for k in alarms])) if alarms else None,
                "chosen_share_of_peak": float(np.mean(truths)),
                "chosen_share_of_peak_least": float(np.min(truths)),
            }
        )
    return found


def rates_table(rows: list[dict[str, Any]]) -> str:
    """The rows of the page."""
    titles = ["true course", "prompts", "alarms", "95% interval", "without correction", "true fall at the alarm"]
    titles.append("chosen, of the peak")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        fall = "–" if row["true_fall_at_alarm"] is None else f"{row['true_fall_at_alarm']:.0%}"
        lines.append(
            f"| {row['shape']} | {row['num_prompts']} | {row['num_alarms']} of {row['num_runs']} | "
            f"{row['alarm_fraction_low']:.1%} to {row['alarm_fraction_high']:.1%} | {row['num_alarms_uncorrected']} | "
            f"{fall} | {row['chosen_share_of_peak']:.1%}, at worst {row['chosen_share_of_peak_least']:.1%} |"
        )
    return "\n".join(lines)


# --- runs on the help desk ---
