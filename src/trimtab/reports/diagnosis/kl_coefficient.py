"""The KL coefficient that a run asks for, from what its reward gained on the way or pays for what should not grow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from trimtab.reports.collect import RunRecord
from trimtab.reports.diagnosis.rule import (
    SettingChange,
    changed,
    ends_at,
    number_setting,
    scaled,
    setting,
    two_digits,
)
from trimtab.reports.diagnosis.sampled_replies import is_text, sides_of
from trimtab.reports.diagnosis.trends import MIN_POINTS, known
from trimtab.reports.headline import number

KL_PER_TOKEN = 1.0
"""Nats per token at which the reference gives a sampled token less than 1/e of the policy's probability. Measured: the
quickstart's PPO ends at 0.15, and without a KL coefficient at 2."""
NO_SPREAD = 1e-3
"""A standard deviation of rewards this small beside their size, or beside 1, leaves nothing to compare."""


def kl_coef_at(run: RunRecord, kl: float) -> float:
    """The KL coefficient with which the reward that this run earned has its maximum near a KL, in nats per reply.

    Reward grows about as a sqrt(KL) (Bai et al., arXiv:2204.05862, section 4.3), so its slope at that KL is half of the
    gain there over the KL. Rewards that are divided by a deviation before the KL is charged (in the loss,
    advantages are) are divided here too.
    nan if the run earned nothing on the way.
    """
    distance, level = run.metrics.get("policy/kl"), run.metrics.get("reward/mean")
    if distance is None or level is None or not kl > 0:
        return math.nan
    rewards = dict(zip(known(level).steps.tolist(), known(level).values.tolist(), strict=True))
    points = [
        (nats, rewards[step])
        for step, nats in zip(known(distance).steps.tolist(), known(distance).values.tolist(), strict=True)
        if step in rewards
    ]
    if len(points) < MIN_POINTS:
        return math.nan
    nats, values = np.array(points).T
    near = np.argsort(np.abs(nats - kl))[: max(3, len(points) // 10)]
    gain, there = float(np.median(values[near]) - np.median(values[:3])), float(np.median(nats[near]))
    if gain <= 0 or there <= 0:
        return math.nan
    return gain / (2 * there) / reward_unit(run)


def kl_coef_holding(run: RunRecord, holds: Callable[[str], bool], *, most: float) -> float:
    """The KL coefficient at which replies that hold something become no more frequent than the share `most`.

    The best policy by reward minus the coefficient times the KL is the reference times exp(reward / coefficient)
    (Rafailov et al., arXiv:2305.18290, eq. 4), so what earns the replies that hold it a higher reward on average
    multiplies the odds of such a reply by exp(difference / coefficient). The share of the first replies stands for that
    of the reference. nan if the rewards of the sampled replies do not pay for it.
    """
    paid: dict[bool, list[float]] = {True: [], False: []}
    for row in run.samples:
        if is_text(row, "response") and (reward := number(row, "reward")) is not None:
            paid[holds(row["response"])].append(reward)
    early, _ = sides_of(run)
    if not paid[True] or not paid[False] or not early:
        return math.nan
    difference = float(np.mean(paid[True]) - np.mean(paid[False]))
    # half a reply more on each side, since none of a few replies does not mean never
    share = (sum(holds(row["response"]) for row in early) + 0.5) / (len(early) + 1)
    if difference <= 0 or not share < most < 1:
        return math.nan
    return difference / (_log_odds(most) - _log_odds(share)) / reward_unit(run)


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def reward_unit(run: RunRecord) -> float:
    """What rewards are divided by before the KL is charged: their deviation if they are normalised, or if advantages
    are and the KL is charged in the loss; else 1. A KL coefficient times this is in the unit of the reward."""
    scales = setting(run, "advantage.scale") == "group" or setting(run, "advantage.whiten") is True
    divided = setting(run, "shaping.normalize") is True or (setting(run, "kl_in") == "loss" and scales)
    return max(ends_at(run, "reward/std"), NO_SPREAD) if divided else 1.0


def kl_change(run: RunRecord, coef: float, *, target: float = math.nan) -> tuple[SettingChange, ...]:
    """The change to this KL coefficient, at least twice the old one unless it is to become smaller on purpose; a
    controller that adapts it gets the target instead. Without a usable number the usual 0.1 is taken."""
    old = number_setting(run, "kl.coef")
    if setting(run, "kl.name") == "adaptive" and 0 < target < math.inf:
        return changed(run, kl__target=two_digits(target)) + scaled(run, "kl.horizon", 0.1)
    if not math.isfinite(coef) or coef <= 0:
        coef = 0.1
    if not math.isnan(target) and old > 0:
        coef = max(coef, 2 * old)
    return changed(run, kl__coef=two_digits(coef))
