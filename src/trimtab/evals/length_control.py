"""Length-controlled win rates: how often a model would win if its replies were as long as its baseline's.

The model is the logistic regression of AlpacaEval 2 (Dubois et al., arXiv:2404.04475, section 3), without intercept:

    logit P(model wins on x) = theta + phi tanh(gap_x / sd(gap)) + psi difficulty_x

with gap the baseline's length minus the model's in characters, and sd over the model's prompts. It is fitted to soft
verdicts with an L1 penalty, whose strength is chosen among ten by five-fold cross-validation over prompts, as
`length_controlled_v1` of the published code does. The length-controlled rate is the mean prediction over the prompts
with phi's term set to 0. A prompt's fold follows from a hash of it, so that the order of the rows of a file changes
nothing.

The published fit also learns, with a small weight, from verdicts on variants of the baseline: the same model told to be
brief or to be verbose. Their rows lack theta, so what length alone does for a baseline regularises phi. They are used
here if they are named. The published difficulties come from a file that belongs to 805 prompts; here they are estimated
from the verdicts on the other models, if there are enough of them, and left out otherwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import DataError
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import Matchup, by_prompt, mean_over_orders
from trimtab.stats import Floats, Interval

MIN_MODELS = 5
"""Fewer models with one baseline give no usable difficulties."""
_PENALTIES = np.logspace(4, -4, 10)
"""L1 penalties on the summed log loss, strongest first: 1 / C for the ten C of scikit-learn's LogisticRegressionCV."""
_FOLDS = 5
_VARIANTS_WEIGHT = 0.2
"""Of a row of the variants in the log loss, divided by their number; `regularize_to_baseline_lambda` of AlpacaEval."""
_DIFFICULTY_RIDGE = 1.0
"""A prompt's difficulty has a standard normal prior."""


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """The length-controlled win rate of a model, and the regression that it comes from."""

    model: str
    baseline: str
    rate: Interval
    """95% bootstrap over prompts; `count` is the number of prompts. Difficulties are held as they are, and resamples
    are fitted with the weakest penalty. The bounds are nan if all verdicts are equal."""
    theta: float
    phi: float
    """Gain in log-odds from a baseline reply that is longer by far; negative if the judges like length."""
    psi: float
    """Weight of the difficulty; 0 if difficulties are not used."""
    penalty: float
    shrunk: bool
    """Whether the penalty has shrunk all weights to 0, so that the rate is one half whatever the verdicts are."""
    extreme: bool
    """Whether the rate is further from the raw one than AlpacaEval takes to be plausible: more than 10 points and more
    than a quarter of the room on that side."""


def length_controlled(
    verdicts: Mapping[Matchup, Sequence[PairVerdict]],
    *,
    variants: Sequence[str] = (),
    num_resamples: int = 200,
    seed: int = 0,
) -> list[LengthControlled]:
    """The length-controlled win rate of each model.

    `variants` are models among these that are variants of their baseline. A model that is its own baseline gets exactly
    0.5. Raises DataError if a verdict lacks a length, or if there is none on a variant.
    """
    if unknown := sorted(set(variants) - {model for model, _ in verdicts}):
        raise DataError(
            f"no verdict is on {', '.join(map(repr, unknown))}",
            where="the variants of the baseline",
            fix=f"name some of {', '.join(sorted({model for model, _ in verdicts}))}, or none",
        )
    tables = {matchup: OutcomeTable.of(rows) for matchup, rows in verdicts.items()}
    found = []
    for (model, baseline), table in tables.items():
        if model == baseline:
            even = Interval(0.5, 0.5, 0.5, len(table.prompts))
            zeros = {"theta": 0.0, "phi": 0.0, "psi": 0.0, "penalty": 0.0}
            same = LengthControlled(model=model, baseline=baseline, rate=even, shrunk=False, extreme=False, **zeros)
            found.append(same)
            continue
        others = {name: t for (name, base), t in tables.items() if base == baseline and name not in (model, baseline)}
        difficulty = difficulties(list(others.values())) if len(others) + 1 >= MIN_MODELS else {}
        beside = [others[name] for name in variants if name in others]
        rows = _Rows.of(table, beside, difficulty)
        found.append(_controlled(model, baseline, rows, num_resamples=num_resamples, seed=seed))
    return found


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of one regression: the model's P prompts, then those of the variants."""

    design: Floats
    """[n, 2 or 3], the factors of theta, phi and, if difficulties are known, psi."""
    outcome: Floats
    weight: Floats
    """[n], 1 for the model's own rows."""
    fold: NDArray[np.int64]
    """[n], the fold of each row in the cross-validation; all rows of a prompt are in one."""
    num_own: int

    @classmethod
    def of(cls, own: OutcomeTable, variants: Sequence[OutcomeTable], difficulty: Mapping[str, float]) -> _Rows:
        tables = (own, *variants)
        sizes = [len(table.prompts) for table in tables]
        columns = [np.repeat([1.0] + [0.0] * len(variants), sizes), np.concatenate([table.gap for table in tables])]
        if difficulty:
            columns.append(np.array([difficulty.get(prompt, 0.0) for table in tables for prompt in table.prompts]))
        place = {prompt: i for i, prompt in enumerate(_shuffled({p for table in tables for p in table.prompts}))}
        return cls(
            fold=np.array([place[prompt] % _FOLDS for table in tables for prompt in table.prompts]),
            design=np.column_stack(columns),
            outcome=np.concatenate([table.outcome for table in tables]),
            weight=np.repeat([1.0] + [_VARIANTS_WEIGHT / max(len(variants), 1)] * len(variants), sizes),
            num_own=sizes[0],
        )


def _controlled(model: str, baseline: str, rows: _Rows, *, num_resamples: int, seed: int) -> LengthControlled:
    num = rows.num_own
    penalty = choose_penalty(rows.design, rows.outcome, rows.weight, rows.fold)
    drawn = np.ones((1 + num_resamples, num))
    drawn[1:] = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_resamples)
    weights = np.tile(rows.weight, (len(drawn), 1))
    weights[:, :num] = drawn
    # A penalty that shrinks every resample to 50% would make the interval too narrow, so only the estimate has it.
    beta = fit_l1(rows.design, rows.outcome, weights, np.where(np.arange(len(weights)), _PENALTIES[-1], penalty))
    even = rows.design[:num].copy()
    even[:, 1] = 0.0
    rates = (drawn * _sigmoid(beta @ even.T)).sum(axis=1) / num
    varied = np.ptp(rows.outcome[:num]) > 0  # otherwise a bootstrap would claim certainty
    low, high = np.quantile(rates[1:], [0.025, 0.975]) if varied else (math.nan, math.nan)
    raw, rate = float(rows.outcome[:num].mean()), float(rates[0])
    return LengthControlled(
        model=model,
        baseline=baseline,
        rate=Interval(rate, min(float(low), rate), max(float(high), rate), num),
        theta=float(beta[0, 0]),
        phi=float(beta[0, 1]),
        psi=float(beta[0, 2]) if beta.shape[1] == 3 else 0.0,
        penalty=penalty,
        shrunk=not beta[0].any(),
        extreme=not raw - max(0.1, raw / 4) <= rate <= raw + max(0.1, (1 - raw) / 4),
    )


@dataclass(frozen=True, kw_only=True)
class OutcomeTable:
    """One model's verdicts, one row a prompt, in an order that depends on the prompts alone."""

    prompts: tuple[str, ...]
    outcome: Floats
    """[P], mean verdicts."""
    gap: Floats
    """[P], tanh of the baseline's length minus the model's over its standard deviation; 0 if the gaps do not vary."""

    @classmethod
    def of(cls, verdicts: Sequence[PairVerdict]) -> OutcomeTable:
        for verdict in verdicts:
            if verdict.length is None or verdict.baseline_length is None:
                raise DataError(
                    f"the verdict on {verdict.model!r} against {verdict.baseline!r} lacks the lengths of the replies",
                    where=verdict.where,
                    fix="give every row length and baseline_length in characters, or leave length control out",
                )
        rows = by_prompt(verdicts)
        prompts = _shuffled(rows)
        outcome = np.array([mean_over_orders(rows[prompt], lambda verdict: verdict.verdict) for prompt in prompts])
        longer_by = np.array([mean_over_orders(rows[prompt], _longer_by) for prompt in prompts])
        spread = float(longer_by.std(ddof=1)) if len(prompts) > 1 else 0.0
        gap = np.tanh(longer_by / spread) if spread > 0 else np.zeros(len(prompts))
        return cls(prompts=tuple(prompts), outcome=outcome, gap=gap)


def _longer_by(verdict: PairVerdict) -> float:
    assert verdict.length is not None, "a table of outcomes refuses verdicts without lengths"
    assert verdict.baseline_length is not None, "it refuses these too"
    return verdict.baseline_length - verdict.length


def _shuffled(prompts: Iterable[str]) -> list[str]:
    """The prompts in the order of their SHA-256: one that looks drawn by chance and is the same for the same set."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest())


def difficulties(tables: Sequence[OutcomeTable]) -> dict[str, float]:
    """How much more often than their average the models win on each prompt, in log-odds, at equal length.

    The penalised maximum of the joint regression theta_m + phi_m gap + difficulty_x over all models m, found by
    Newton's method. Difficulties have a standard normal prior. A prompt that few models were judged on stays near 0.
    """
    numbers: dict[str, int] = {}
    for table in tables:
        for prompt in table.prompts:
            numbers.setdefault(prompt, len(numbers))
    own = [np.array([numbers[prompt] for prompt in table.prompts]) for table in tables]
    designs = [np.column_stack([np.ones(len(table.prompts)), table.gap]) for table in tables]
    beta = np.zeros((len(tables), 2))
    hard = np.zeros(len(numbers))
    for _ in range(100):
        # The prompts' block of the second derivatives is diagonal, so it is eliminated, and a small system is left.
        slope = -_DIFFICULTY_RIDGE * hard
        curve = np.full(len(numbers), _DIFFICULTY_RIDGE)
        cross = np.zeros((2 * len(tables), len(numbers)))
        block = np.zeros((2 * len(tables), 2 * len(tables)))
        slopes = np.zeros(2 * len(tables))
        for m, (table, index, design) in enumerate(zip(tables, own, designs, strict=True)):
            p = _sigmoid(design @ beta[m] + hard[index])
            w = p * (1 - p)
            at = slice(2 * m, 2 * m + 2)
            slope[index] += table.outcome - p
            curve[index] += w
            cross[at, index] = (w[:, None] * design).T
            block[at, at] = design.T @ (w[:, None] * design) + 1e-6 * np.eye(2)
            slopes[at] = design.T @ (table.outcome - p)
        step = np.linalg.solve(block - cross / curve @ cross.T, slopes - cross @ (slope / curve))
        moved = (slope - cross.T @ step) / curve
        scale = min(1.0, 2.0 / max(np.abs(step).max(), np.abs(moved).max(), 1e-12))
        beta += scale * step.reshape(-1, 2)
        hard += scale * moved
        if max(np.abs(step).max(), np.abs(moved).max()) < 1e-9:
            break
    return {prompt: float(hard[number]) for prompt, number in numbers.items()}


def choose_penalty(design: Floats, outcome: Floats, weight: Floats, fold: NDArray[np.int64]) -> float:
    """The penalty with the least weighted log loss in cross-validation over the folds [n] of the rows, the strongest of
    equals.

    Each fold counts equally. A single one cannot be held out: the penalty is then the weakest.
    """
    parts = np.unique(fold)
    if len(parts) < 2:
        return float(_PENALTIES[-1])
    trained = np.repeat(fold[None] != parts[:, None], len(_PENALTIES), axis=0)
    beta = fit_l1(design, outcome, trained * weight, np.tile(_PENALTIES, len(parts)))
    losses = weight * (np.logaddexp(0, beta @ design.T) - outcome * (beta @ design.T))
    held = (losses * ~trained).sum(axis=1) / (~trained).sum(axis=1)
    return float(_PENALTIES[held.reshape(len(parts), -1).mean(axis=0).argmin()])


def fit_l1(design: Floats, outcome: Floats, weights: Floats, penalty: Floats) -> Floats:
    """Logistic regressions [B, D] of one outcome in [0, 1], each with its row weights [B, n] and L1 penalty [B].

    Minimises the weighted sum of log losses plus penalty |beta|_1 by proximal Newton steps with a line search; the
    quadratic model of a step is minimised by coordinate descent.
    """
    beta = np.zeros((len(weights), design.shape[1]))
    value = _objective(beta, design, outcome, weights, penalty)
    outer = np.einsum("nd,ne->nde", design, design).reshape(len(design), -1)
    for _ in range(200):
        p = _sigmoid(beta @ design.T)
        gradient = (weights * (p - outcome)) @ design
        curve = ((weights * p * (1 - p)) @ outer).reshape(len(beta), design.shape[1], -1)
        curve += 1e-9 * np.eye(design.shape[1])
        goal = beta.copy()
        for _ in range(200):
            before = goal.copy()
            for d in range(design.shape[1]):
                slope = gradient[:, d] + np.einsum("be,be->b", curve[:, d], goal - beta)
                target = curve[:, d, d] * goal[:, d] - slope
                goal[:, d] = np.sign(target) * np.maximum(np.abs(target) - penalty, 0) / curve[:, d, d]
            if np.abs(goal - before).max() < 1e-12:
                break
        step = goal - beta
        step *= np.minimum(1.0, 5.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
        scale = np.ones((len(beta), 1))
        for _ in range(30):
            moved = beta + scale * step
            gained = _objective(moved, design, outcome, weights, penalty)
            worse = gained > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            scale[worse] /= 2
        change = np.abs(moved - beta).max()
        beta, value = moved, gained
        if change < 1e-8:
            break
    return beta


def _objective(beta: Floats, design: Floats, outcome: Floats, weights: Floats, penalty: Floats) -> Floats:
    logits = beta @ design.T
    losses = np.logaddexp(0, logits) - outcome * logits
    return np.asarray((weights * losses).sum(axis=1) + penalty * np.abs(beta).sum(axis=1))


def _sigmoid(x: Floats) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))
