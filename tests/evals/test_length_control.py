from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize

from trimtab.core.errors import DataError
from trimtab.evals.length_control import (
    OutcomeTable,
    _Rows,
    choose_penalty,
    difficulties,
    fit_l1,
    length_controlled,
)
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import by_matchup, win_rate_of


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simulated(num=400, *, model="mine", theta=0.0, phi=-1.5, psi=0.0, longer=0.0, seed=0, hard=None, soft=False):
    """Verdicts from the regression itself; replies are longer than the baseline's by `longer` spreads."""
    generator = np.random.default_rng(seed)
    gaps = np.round(1000 * (generator.normal(size=num) - longer))  # baseline minus model
    hard = np.zeros(num) if hard is None else hard
    chance = sigmoid(theta + phi * np.tanh(gaps / gaps.std(ddof=1)) + psi * hard)
    wins = chance if soft else (generator.random(num) < chance).astype(float)
    return [
        PairVerdict(
            prompt=f"p{i}",
            model=model,
            baseline="base",
            verdict=float(win),
            length=int(10_000 - gap),
            baseline_length=10_000,
            where=f"f, row {i + 1}",
        )
        for i, (win, gap) in enumerate(zip(wins, gaps, strict=True))
    ]


@pytest.mark.parametrize("penalty", [0.01, 1.0, 20.0])
def test_the_regression_is_that_of_a_general_optimizer(penalty):
    generator = np.random.default_rng(3)
    design = np.column_stack([np.ones(80), np.tanh(generator.normal(size=80)), generator.normal(size=80)])
    outcome, weight = generator.random(80) ** 2, generator.random(80)

    def objective(parts):  # beta as a difference of parts that are not negative, which makes |beta| smooth
        logits = design @ (parts[:3] - parts[3:])
        return (weight * (np.log1p(np.exp(logits)) - outcome * logits)).sum() + penalty * parts.sum()

    best = scipy.optimize.minimize(
        objective, np.full(6, 0.1), bounds=[(0, None)] * 6, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    (beta,) = fit_l1(design, outcome, weight[None], np.array([penalty]))
    np.testing.assert_allclose(beta, best.x[:3] - best.x[3:], atol=2e-4)
    assert objective(np.concatenate([np.maximum(beta, 0), np.maximum(-beta, 0)])) <= best.fun + 1e-9


def test_a_strong_penalty_gives_zeros_and_a_weak_one_survives_separation():
    design, outcome = np.ones((10, 1)), np.ones(10)
    beta = fit_l1(design, outcome, np.ones((2, 10)), np.array([1e4, 1e-4]))
    assert beta[0, 0] == 0
    # sum of p - 1 = -penalty: p = 1 - 1e-5
    assert beta[1, 0] == pytest.approx(math.log((1 - 1e-5) / 1e-5), rel=1e-6)


def test_the_penalty_is_chosen_as_by_a_slow_loop():
    generator = np.random.default_rng(5)
    design = np.column_stack([np.ones(43), generator.normal(size=43)])
    outcome, weight = generator.random(43), np.where(np.arange(43) < 30, 1.0, 0.1)
    losses = []
    for penalty in np.logspace(4, -4, 10):
        folds = []
        for k in range(5):
            held = np.arange(43) % 5 == k
            (beta,) = fit_l1(design[~held], outcome[~held], weight[None, ~held], np.array([penalty]))
            p = sigmoid(design[held] @ beta)
            entropy = -(outcome[held] * np.log(p) + (1 - outcome[held]) * np.log(1 - p))
            folds.append((weight[held] * entropy).mean())
        losses.append(np.mean(folds))
    assert choose_penalty(design, outcome, weight, np.arange(43) % 5) == pytest.approx(
        np.logspace(4, -4, 10)[int(np.argmin(losses))]
    )


def test_a_model_that_wins_by_length_alone_is_even_at_equal_length():
    rows = simulated(800, theta=0.0, phi=-2.0, longer=1.0, soft=True)
    (found,) = length_controlled(by_matchup(rows))
    assert win_rate_of(rows).rate.value > 0.7
    assert found.rate.value == pytest.approx(0.5, abs=0.01)
    assert found.phi == pytest.approx(-2.0, abs=0.05)
    assert found.extreme
    assert found.psi == 0


def test_without_an_effect_of_length_control_changes_little():
    rows = simulated(800, theta=0.6, phi=0.0, longer=1.0)
    (found,) = length_controlled(by_matchup(rows))
    assert found.rate.value == pytest.approx(win_rate_of(rows).rate.value, abs=0.04)
    assert not found.extreme


def test_swapped_sides_give_one_minus_the_rate():
    rows = simulated(300, theta=0.5, longer=0.5)
    swapped = [
        PairVerdict(
            prompt=row.prompt,
            model="base",
            baseline="mine",
            verdict=1 - row.verdict,
            length=row.baseline_length,
            baseline_length=row.length,
        )
        for row in rows
    ]
    (one,), (other,) = length_controlled(by_matchup(rows)), length_controlled(by_matchup(swapped))
    assert one.rate.value + other.rate.value == pytest.approx(1, abs=1e-6)


def test_a_model_that_is_its_own_baseline_gives_exactly_half():
    (found,) = length_controlled(by_matchup(simulated(20, model="base", theta=1.0)))
    assert (found.rate.value, found.rate.low, found.rate.high) == (0.5, 0.5, 0.5)


def test_the_order_of_the_rows_changes_nothing():
    rows = [*simulated(37, theta=0.3, longer=0.5), *simulated(37, model="brief", phi=-0.5, seed=1)]
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    found, other = (
        {row.model: row for row in length_controlled(by_matchup(some), variants=["brief"])} for some in (rows, mixed)
    )
    assert found == other


def test_rows_of_a_prompt_are_in_one_fold():
    """Otherwise a prompt would be predicted from a verdict on itself, of a variant of the baseline."""
    tables = [OutcomeTable.of(simulated(23, seed=seed)) for seed in (0, 1)]
    rows = _Rows.of(tables[0], tables[1:], {})
    folds = {}
    for prompt, fold in zip((*tables[0].prompts, *tables[1].prompts), rows.fold, strict=True):
        assert folds.setdefault(prompt, fold) == fold
    assert sorted(np.bincount(rows.fold[: rows.num_own]).tolist()) == [4, 4, 5, 5, 5]


def test_both_orders_weigh_the_same_in_outcomes_and_lengths():
    given = [("model", 1.0, 10), ("model", 1.0, 10), ("baseline", 0.0, 30)]
    rows = [
        PairVerdict(
            prompt=str(i), model="m", baseline="b", verdict=x, shown_first=side, length=n + i, baseline_length=20,
            judge=str(j),
        )
        for i in range(2)
        for j, (side, x, n) in enumerate(given)
    ]  # fmt: skip
    table = OutcomeTable.of(rows)
    assert table.outcome.tolist() == [0.5, 0.5]
    # The baseline is longer by 0 and by -1: the standard deviation of both is 1 / sqrt(2).
    assert sorted(table.gap) == pytest.approx([math.tanh(-math.sqrt(2)), 0.0])


def test_equal_lengths_leave_the_raw_rate():
    rows = [
        PairVerdict(prompt=str(i), model="m", baseline="b", verdict=float(i % 4 == 0), length=5, baseline_length=5)
        for i in range(400)
    ]
    (found,) = length_controlled(by_matchup(rows))
    assert found.rate.value == pytest.approx(0.25, abs=0.01)
    assert found.phi == 0


def test_few_verdicts_are_not_certain_when_the_penalty_leaves_half():
    (found,) = length_controlled(by_matchup(simulated(9, theta=0.2, seed=3)))
    assert found.shrunk
    assert found.rate.value == 0.5
    assert found.rate.high - found.rate.low > 0.3
    assert not length_controlled(by_matchup(simulated(200, theta=1.0)))[0].shrunk


def test_intervals_at_equal_length_cover_about_as_often_as_they_say():
    covered = []
    for seed in range(100):
        (found,) = length_controlled(by_matchup(simulated(150, theta=0.0, phi=-2.0, longer=1.0, seed=seed)))
        covered.append(found.rate.low <= 0.5 <= found.rate.high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_difficulties_are_the_maximum_of_the_joint_likelihood():
    hard = np.random.default_rng(2).normal(size=12)
    given = enumerate((-1.0, 0.0, 1.0))
    tables = [OutcomeTable.of(simulated(12, theta=t, psi=1.0, hard=hard, seed=k, soft=True)) for k, t in given]
    found = difficulties(tables)
    gamma = np.array([found[f"p{i}"] for i in range(12)])

    def loss(parameters):
        theta, phi, hard = parameters[:3], parameters[3:6], parameters[6:]
        total = 0.5 * (hard**2).sum()
        for m, table in enumerate(tables):
            for prompt, outcome, gap in zip(table.prompts, table.outcome, table.gap, strict=True):
                logit = theta[m] + phi[m] * gap + hard[int(prompt[1:])]
                total += np.logaddexp(0, logit) - outcome * logit
        return total

    best = scipy.optimize.minimize(loss, np.zeros(18), method="BFGS", options={"gtol": 1e-5})
    np.testing.assert_allclose(gamma, best.x[6:], atol=1e-4)
    assert np.corrcoef(gamma, hard)[0, 1] > 0.9


def test_difficulties_of_the_other_models_serve_from_five_models_on():
    hard = np.random.default_rng(9).normal(size=300) * 1.5
    rows = [simulated(300, model=f"m{k}", theta=-0.5 + 0.2 * k, psi=1.0, seed=k, hard=hard) for k in range(5)]
    found = length_controlled(by_matchup(list(itertools.chain(*rows))))
    assert all(row.psi > 0.7 for row in found)
    assert all(row.psi == 0 for row in length_controlled(by_matchup(list(itertools.chain(*rows[:4])))))


def test_variants_of_the_baseline_pull_the_effect_of_length_towards_theirs():
    mine = simulated(60, theta=0.5, phi=-4.0, soft=True)
    brief = simulated(600, model="brief", theta=0.0, phi=-0.5, soft=True, seed=1)
    alone, _ = length_controlled(by_matchup([*mine, *brief]))
    pulled, _ = length_controlled(by_matchup([*mine, *brief]), variants=["brief"])
    assert alone.phi < pulled.phi < -0.5
    # its rows count 0.2 and lack theta: the published regression, by a general optimizer
    rows = length_controlled(by_matchup([*mine, *brief]), variants=["brief"])[0]
    gap = [np.array([r.baseline_length - r.length for r in side]) for side in (mine, brief)]
    gap = [np.tanh(g / g.std(ddof=1)) for g in gap]
    outcome = [np.array([r.verdict for r in side]) for side in (mine, brief)]

    def objective(beta):
        logits = beta[0] + beta[1] * gap[0], beta[1] * gap[1]
        losses = [(np.log1p(np.exp(x)) - y * x).sum() for x, y in zip(logits, outcome, strict=True)]
        return losses[0] + 0.2 * losses[1] + rows.penalty * np.abs(beta).sum()

    best = scipy.optimize.minimize(
        objective, [0.5, -1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}
    )
    assert (rows.theta, rows.phi) == pytest.approx(tuple(best.x), abs=1e-4)


def test_a_model_that_never_wins_has_a_rate_and_no_bounds():
    rows = simulated(50, theta=-100.0)
    rate = length_controlled(by_matchup(rows))[0].rate
    assert rate.value < 0.01
    assert math.isnan(rate.low)
    assert math.isnan(rate.high)


def test_a_verdict_without_lengths_is_refused():
    row = PairVerdict(prompt="p", model="m", baseline="b", verdict=1.0, length=3, where="f, row 7")
    with pytest.raises(DataError, match="lacks the lengths") as refused:
        length_controlled(by_matchup([row]))
    assert refused.value.where == "f, row 7"
    assert "baseline_length" in refused.value.fix


def test_a_variant_without_verdicts_is_refused():
    with pytest.raises(DataError, match="no verdict is on 'brief'") as refused:
        length_controlled(by_matchup(simulated(5)), variants=["brief"])
    assert "mine" in refused.value.fix
