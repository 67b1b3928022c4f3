"""How gold reward rises and falls as a policy is pushed towards a proxy (Gao et al., arXiv:2210.10760).

Distance is d = sqrt(KL(policy || reference)), with the KL in nats. Best-of-n and RL spend KL differently: on this axis
compare only curves of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike

from trimtab.stats import Floats, Interval, bootstrap_mean, moving_mean

CurveForm = Literal["best_of_n", "rl", "linear"]

MAX_EXTRAPOLATION = 1.5
"""A fitted curve is not evaluated beyond this multiple of the largest measured distance."""
MIN_RL_DISTANCE = 0.3
"""Nearer points are left out of the fit of the RL form: its slope at zero is infinite, which no data has."""


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the sampled policy, log n - (n - 1) / n nats (Stiennon et al., arXiv:2009.01325, app. G.3).

    The value is exact if no sample repeats and no scores tie. Otherwise it is an upper bound (Beirami et al.,
    arXiv:2401.01879), and a loose one if few different replies are likely: for every n, the KL is at most the mean
    surprisal of the chosen replies.
    """
    return math.log(n) - (n - 1) / n


def sizes_up_to(num_samples: int) -> list[int]:
    """The values of n for a best-of-n curve from this many samples: the powers of two, and the number itself."""
    powers = [2**k for k in range(num_samples.bit_length())]
    return powers if powers[-1] == num_samples else [*powers, num_samples]


def best_of_n(values: ArrayLike, ranked_by: ArrayLike, n: int) -> Floats:
    """Expected value, for each prompt, of the sample that ranks highest among n drawn from its N samples.

        E_n = sum_{i = n..N} C(i - 1, n - 1) / C(N, n) * value_(i),   value_(i) the i-th lowest by `ranked_by`

    Both arrays are [P, N], the result is [P]. Draws are without replacement, which makes the estimate unbiased for the
    policy. Ties in rank are broken at random: every member of a tie takes the mean value of the tie.
    """
    return np.asarray(best_of_each(values, ranked_by, [n])[:, 0])


def best_of_each(values: ArrayLike, ranked_by: ArrayLike, ns: Sequence[int]) -> Floats:
    """`best_of_n` for several n at once: two arrays [P, N] give [P, len(ns)]."""
    table, ranks = np.asarray(values, dtype=np.float64), np.asarray(ranked_by, dtype=np.float64)
    if table.ndim != 2 or table.shape != ranks.shape:
        raise ValueError(f"expected two arrays [P, N] of one shape, got {table.shape} and {ranks.shape}")
    num_samples = table.shape[1]
    weights = np.zeros((num_samples, len(ns)))
    for column, n in enumerate(ns):
        if not 1 <= n <= num_samples:
            raise ValueError(f"best of {n} needs n between 1 and the {num_samples} samples of each prompt")
        position = np.arange(n, num_samples + 1)
        weights[n - 1 :, column] = np.exp(_log_binomial(position - 1, n - 1) - _log_binomial(num_samples, n))
    sorted_values = [_average_ties(v, r) for v, r in zip(table, ranks, strict=True)]
    return np.array(sorted_values).reshape(-1, num_samples) @ weights


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """One point of a best-of-n curve."""

    n: int
    kl: float
    """`best_of_n_kl` of n, in nats."""
    value: Interval
    """Mean over prompts, with an interval from a bootstrap over prompts."""


def best_of_n_curve(values: ArrayLike, ranked_by: ArrayLike, ns: Sequence[int]) -> tuple[BestOfN, ...]:
    """The curve of `best_of_n`, with one point for each n.

    Gold values ranked by a proxy show what choosing by the proxy gains; ranked by gold itself, they show the most that
    any choice can gain. Both arrays are [P, N]. Raises ValueError for an n above the N samples of each prompt.
    """
    return curve_of(best_of_each(values, ranked_by, ns), ns)


def curve_of(table: Floats, ns: Sequence[int]) -> tuple[BestOfN, ...]:
    """The curve of a table [P, len(ns)] from `best_of_each`, which may be collected a few prompts at a time."""
    return tuple(
        BestOfN(n=n, kl=best_of_n_kl(n), value=bootstrap_mean(column)) for n, column in zip(ns, table.T, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted curve R(d), with R(0) = 0.

    best_of_n: d (alpha - beta d)      rl: d (alpha - beta log d)      linear: alpha d
    """

    form: CurveForm
    alpha: float
    beta: float
    """How fast the gain is lost; never below 0."""
    aicc: float
    """Akaike's criterion for small samples; of two forms fitted to the same points, the lower one is better."""
    num_points: int
    max_distance: float
    """The largest distance measured."""

    @property
    def peak(self) -> tuple[float, float] | None:
        """(d, R) at the maximum of the curve; None if alpha or beta is 0 or less, or if it is too far out."""
        if self.beta <= 0 or self.alpha <= 0:
            return None
        ratio = self.alpha / self.beta
        # compared as logarithms: the ratio may be too large for exp
        log_distance = math.log(ratio / 2) if self.form == "best_of_n" else ratio - 1
        if log_distance > math.log(MAX_EXTRAPOLATION * self.max_distance):
            return None
        distance = math.exp(log_distance)
        return distance, self(distance)

    def __call__(self, distance: float) -> float:
        """R at a distance. Raises ValueError beyond `MAX_EXTRAPOLATION` times the largest measured distance."""
        if not 0 <= distance <= MAX_EXTRAPOLATION * self.max_distance:
            raise ValueError(f"the curve was measured up to d = {self.max_distance:.3g}; d = {distance:.3g} is too far")
        return float(_basis(self.form, np.array([distance]))[0] @ [self.alpha, -self.beta])


def fit_curve(kl: ArrayLike, reward: ArrayLike, form: CurveForm, *, start: float | None = None) -> Fit:
    """Least-squares fit of a form to rewards measured at some KL from the reference (closed form, beta >= 0).

    R is the gain over the reference, `reward - start`; `start` is the reward at KL 0, by default that of the point with
    the smallest KL. A point at zero distance carries no information and is left out. Raises ValueError for too few
    points.
    """
    distance = np.sqrt(np.maximum(np.asarray(kl, dtype=np.float64), 0.0))
    values = np.asarray(reward, dtype=np.float64)
    if distance.ndim != 1 or distance.shape != values.shape or not distance.size:
        raise ValueError(f"expected two rows of one length, got {distance.shape} and {values.shape}")
    gain = values - (values[distance.argmin()] if start is None else start)
    used = distance > (MIN_RL_DISTANCE if form == "rl" else 0.0)
    num_parameters = 1 if form == "linear" else 2
    num_points = int(used.sum())
    if num_points < num_parameters + 1:
        raise ValueError(f"{num_points} usable points cannot fit the {num_parameters} parameters of {form!r}")
    basis = _basis(form, distance[used])
    alpha, beta = _solve(basis, gain[used], form)
    residual = float(np.sum((gain[used] - basis @ [alpha, -beta]) ** 2))
    return Fit(
        form=form,
        alpha=alpha,
        beta=beta,
        aicc=_aicc(residual, num_points, num_parameters),
        num_points=num_points,
        max_distance=float(distance.max()),
    )


@dataclass(frozen=True, kw_only=True)
class HackingSummary:
    """What happened to the gold score while the proxy was maximised."""

    peak_gold: float
    peak_index: int
    """Index of the peak among the given points."""
    peak_kl: float
    final_gold: float
    fall_fraction: float
    """(peak - final) / |peak|; 0 if gold ended at its peak."""
    fall_error: float
    """Standard error of peak - final at a fixed peak, estimated from the differences of neighbouring points."""
    proxy_kept_rising: bool
    """Whether the proxy ended higher than it was when gold peaked."""


def hacking_summary(points: Sequence[tuple[float, float, float]], *, window: int = 1) -> HackingSummary:
    """Summary of a run given as (kl, proxy, gold) in the order of training.

    With `window` > 1, proxy and gold are first averaged over that many neighbouring points: the highest of many noisy
    points is too high, and a single last point is as noisy. Peak and end are means of whole windows. Raises ValueError
    for no points.
    """
    if not points:
        raise ValueError("no points")
    kl, proxy, gold = np.asarray(points, dtype=np.float64).T
    window = min(window, len(gold))
    noise = float(np.sqrt(np.mean(np.diff(gold) ** 2) / 2)) if len(gold) > 1 else 0.0
    whole = slice(window // 2, window // 2 + len(gold) - window + 1)
    kl, proxy, gold = kl[whole], moving_mean(proxy, window)[whole], moving_mean(gold, window)[whole]
    peak = int(gold.argmax())
    fall = float(gold[peak] - gold[-1])
    return HackingSummary(
        peak_gold=float(gold[peak]),
        peak_index=peak + window // 2,
        peak_kl=float(kl[peak]),
        final_gold=float(gold[-1]),
        fall_fraction=fall / abs(float(gold[peak])) if fall else 0.0,
        fall_error=noise * math.sqrt(2 / window),
        proxy_kept_rising=bool(proxy[-1] > proxy[peak]),
    )


def _basis(form: CurveForm, distance: Floats) -> Floats:
    """The columns [points, 2] that alpha and -beta multiply."""
    second = {
        "best_of_n": distance**2,
        "rl": scipy.special.xlogy(distance, distance),
        "linear": np.zeros_like(distance),
    }
    return np.stack([distance, second[form]], axis=1)


def _solve(basis: Floats, gain: Floats, form: CurveForm) -> tuple[float, float]:
    if form != "linear":
        alpha, minus_beta = np.linalg.lstsq(basis, gain, rcond=None)[0]
        if minus_beta <= 0:
            return float(alpha), float(-minus_beta)
    # beta is at the bound of its range, 0: what is left to fit is a straight line
    return float(basis[:, 0] @ gain / (basis[:, 0] @ basis[:, 0])), 0.0


def _aicc(residual: float, num_points: int, num_parameters: int) -> float:
    """Akaike's criterion for small samples: -inf for an exact fit, inf if points are too few for the correction."""
    k = num_parameters + 1  # the variance is estimated too
    if num_points <= k + 1:
        return math.inf
    if residual <= 0:
        return -math.inf
    return num_points * math.log(residual / num_points) + 2 * k + 2 * k * (k + 1) / (num_points - k - 1)


def _log_binomial(top: ArrayLike, bottom: int) -> Floats:
    """Log of `top` choose `bottom`: the coefficients themselves overflow from about a thousand samples."""
    n = np.asarray(top, dtype=np.float64)
    log_factorial = scipy.special.gammaln
    return np.asarray(log_factorial(n + 1) - log_factorial(bottom + 1) - log_factorial(n - bottom + 1))


def _average_ties(values: Floats, ranks: Floats) -> Floats:
    """`values` sorted by rank, each replaced by the mean over the values of equal rank."""
    _, group = np.unique(ranks, return_inverse=True)
    means = np.bincount(group, weights=values) / np.bincount(group)
    return np.asarray(means[np.sort(group)], dtype=np.float64)
