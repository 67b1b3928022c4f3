"""What a reward model pays for length: the reward to be expected at each length, by which a reward is corrected.

A correction is fitted on replies that the model was not trained on, and is fixed from then on (post-hoc reward
calibration: Huang et al., arXiv:2409.17407):

    r'(y) = r(y) - g(length(y)) + mean_i g(length(y_i)),   i over the replies of the fit

so the mean reward of these replies stays as it was. All that goes with length is taken away, also what people mean by
it: where longer replies are better replies, a corrected reward is a worse judge. The card of a model has its accuracy
before and after for that reason.

g is a straight line, or it is smoothed locally (LOWESS: Cleveland, 1979). The published code runs LOWESS with the three
robust passes of its library. They are left out here, because without them g is linear in the rewards: the mean of the
curves of an ensemble's members is the curve of their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from trimtab.core.types import PreferencePair, prompt_id
from trimtab.evals.reward_card import as_share, ordering_accuracy
from trimtab.stats import Floats, Interval, spearman

LengthMethod = Literal["regression", "lowess"]
METHODS: tuple[LengthMethod, ...] = ("regression", "lowess")
BANDWIDTH = 0.5
"""The share of the replies that each local line of LOWESS is fitted to; the default of the published code."""
FEWEST = 20
"""Number of replies below which no curve is fitted: the slope of a few is mostly chance."""
_NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class LengthCurve:
    """The reward to be expected at each length, above its mean over the replies that it was fitted to. For example
    `LengthCurve((10.0, 30.0), (-1.0, 1.0), slope=0.1)` is a line: a reply of 40 tokens gets 2 for its length."""

    lengths: tuple[float, ...]
    """Lengths at which the curve is known, ascending; it is linear between them."""
    rewards: tuple[float, ...]
    """Its value at each of them."""
    slope: float = 0.0
    """How it goes on below the first and above the last length: a line goes on as it is, and LOWESS stays level, for
    nothing is known there."""

    def at(self, lengths: ArrayLike) -> Floats:
        """The value at each length, in the shape of `lengths`."""
        asked = np.asarray(lengths, dtype=np.float64)
        within = np.clip(asked, self.lengths[0], self.lengths[-1])
        return np.asarray(np.interp(within, self.lengths, self.rewards) + self.slope * (asked - within))


def length_refusal(lengths: ArrayLike) -> str:
    """Why no curve can be fitted to replies of these lengths; "" if one can."""
    flat = np.asarray(lengths, dtype=np.float64)
    if flat.size < FEWEST:
        return f"{flat.size} replies, and at least {FEWEST} are needed"
    if np.ptp(flat) == 0:
        return f"each of {flat.size} replies has {flat[0]:g} tokens, so that nothing shows what length is paid"
    return ""


def fit_curve(
    rewards: ArrayLike, lengths: ArrayLike, method: LengthMethod, *, bandwidth: float = BANDWIDTH
) -> LengthCurve:
    """The curve of replies with these rewards and lengths, [num_replies] each. `bandwidth` in (0, 1] is that of LOWESS.
    The lengths must not all be equal; see `length_refusal`."""
    y, x = (np.asarray(values, dtype=np.float64) for values in (rewards, lengths))
    if method == "regression":
        slope = float((x - x.mean()) @ (y - y.mean()) / np.square(x - x.mean()).sum())
        ends = (float(x.min()), float(x.max()))
        return LengthCurve(ends, (slope * (ends[0] - x.mean()), slope * (ends[1] - x.mean())), slope)
    known, counts = np.unique(x, return_counts=True)
    smooth = lowess(x, y, known, bandwidth=bandwidth)
    smooth = smooth - float(smooth @ counts) / x.size
    return LengthCurve(tuple(known.tolist()), tuple(smooth.tolist()))


def lowess(x: Floats, y: Floats, at: Floats, *, bandwidth: float) -> Floats:
    """The locally weighted linear regression of y on x at the points `at` (Cleveland, 1979, without robust passes).

    At a point x0 the weighted least-squares line is read, with the tricube weights (1 - (|x - x0| / h)^3)^3 below the
    distance h of the q-th nearest x, and 0 from there on; q is `bandwidth` times the number of points, rounded up, and
    at least 2. Where all x with a weight are equal, the line is their mean.
    """
    nearest = min(max(2, math.ceil(bandwidth * x.size)), x.size) - 1
    found = np.empty(len(at))
    for i, place in enumerate(at.tolist()):
        distances = np.abs(x - place)
        width = float(np.partition(distances, nearest)[nearest])
        weights = (1 - np.minimum(distances / width, 1) ** 3) ** 3 if width else (distances == 0).astype(np.float64)
        total = weights.sum()
        centre, level = float(weights @ x / total), float(weights @ y / total)
        spread = float(weights @ np.square(x - centre))
        slope = float(weights @ ((x - centre) * y)) / spread if spread > 0 else 0.0
        found[i] = level + slope * (place - centre)
    return found


# --- on the card ---


def length_premium(rewards: ArrayLike, lengths: ArrayLike, prompts: Sequence[str]) -> Interval:
    """The reward that goes with one more standard deviation of length: the slope of the reward on length by least
    squares, times the deviation of the lengths. The interval (95%) resamples whole `prompts`, given for each reply.

    All are nan if all lengths are equal; the bounds are nan if there is one prompt.
    """
    y, x = (np.asarray(values, dtype=np.float64) for values in (rewards, lengths))
    if x.size < 2 or np.ptp(x) == 0:
        return Interval(math.nan, math.nan, math.nan, x.size)
    deviation, x, y = float(x.std()), x - x.mean(), y - y.mean()
    names = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.array([names[prompt] for prompt in prompts])
    # The five sums that least squares needs, for each prompt.
    sums = np.stack([np.bincount(group, weights=w) for w in (np.ones_like(x), x, y, x * x, x * y)])

    def slope_of(totals: Floats) -> float:
        num, sx, sy, sxx, sxy = totals.tolist()
        spread = num * sxx - sx * sx
        return (num * sxy - sx * sy) / spread if spread > 1e-9 * num * num else math.nan  # nan if all lengths are equal

    value = slope_of(sums.sum(1)) * deviation
    draw = np.random.default_rng(0)
    drawn = [slope_of(sums[:, draw.integers(len(names), size=len(names))].sum(1)) for _ in range(_NUM_RESAMPLES)]
    known = np.array([slope for slope in drawn if not math.isnan(slope)])
    if len(names) < 2 or not known.size:
        return Interval(value, math.nan, math.nan, x.size)
    low, high = np.quantile(known, [0.025, 0.975]) * deviation
    return Interval(value, float(low), float(high), x.size)


def length_figures(
    pairs: Sequence[PreferencePair], *, rewards: Mapping[str, Floats], lengths: Floats
) -> dict[str, Any]:
    """What rewards of the pairs, each [2, num_pairs] (chosen, rejected), owe to the length of the replies in tokens,
    [2, num_pairs], as the JSON values of a card: for each of `rewards` by name the premium of length, the rank
    correlation with it, and the accuracy on pairs that have a right side."""
    prompts = np.array([prompt_id(pair.prompt.messages) for pair in pairs])
    decided = np.array([pair.label != 0.5 for pair in pairs])
    found: dict[str, Any] = {"mean_tokens": float(lengths.mean()), "std_tokens": float(lengths.std())}
    for name, (chosen, rejected) in rewards.items():
        both = np.concatenate([chosen, rejected])
        premium = length_premium(both, lengths.ravel(), [*prompts.tolist()] * 2)
        right = ordering_accuracy(chosen[decided], rejected[decided], prompts[decided].tolist())
        found[name] = {
            "premium": {"value": premium.value, "low": premium.low, "high": premium.high, "count": premium.count},
            "spearman": spearman(both, lengths.ravel()),
            "accuracy": as_share(right),
        }
    return found
