from __future__ import annotations

import math

import numpy as np
import pytest
import scipy

from trimtab.core.errors import DataError
from trimtab.evals.style_control import STYLE_RIDGE, style_controlled
from trimtab.evals.verdict_study import study_verdicts
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import by_matchup
from trimtab.votes.table import STYLE, style_difference, style_of


def text(words, headers=0, items=0, bold=0):
    """A reply with these counts; marks are words too."""
    lines = ["# w"] * headers + ["- w"] * items + ["**w**"] * bold
    return "\n".join([*lines, " ".join(["w"] * (words - 2 * headers - 2 * items - bold))])


def simulated(num, generator, *, theta=(0.0, 0.7), effect=(1.5, 0.0, 0.0, 1.0), heavier=4):
    """Verdicts on two models against one baseline; the first is heavier in style. The effects are on unscaled
    differences."""
    rows = []
    for i in range(num):
        base = text(int(generator.integers(60, 140)), 0, int(generator.integers(0, 3)), int(generator.integers(0, 3)))
        for model, strength in zip("ab", theta, strict=True):
            more = heavier if model == "a" else 0
            reply = text(
                int(generator.integers(60, 140)) + 20 * more,
                0,
                int(generator.integers(0, 3)),
                int(generator.integers(0, 3)) + more,
            )
            gap = style_difference(style_of(reply), style_of(base))
            wins = generator.random() < scipy.special.expit(strength + gap @ np.array(effect))
            verdict = PairVerdict(prompt=str(i), model=model, baseline="base", verdict=float(wins))
            rows.append(verdict.with_replies(reply, base))
    return rows


def test_texts_of_the_simulation_have_the_counts_that_are_asked_for():
    assert style_of(text(60, 1, 2, 3)).tolist() == [60, 1, 2, 3]


def test_the_fit_is_the_maximum_of_the_penalised_likelihood_as_a_slow_loop_finds_it():
    rows = simulated(40, np.random.default_rng(3))
    found = style_controlled(by_matchup(rows))
    gaps = [style_difference(style_of(v.reply), style_of(v.baseline_reply)) for v in rows]
    scale = [math.sqrt(sum(gap[s] ** 2 for gap in gaps) / len(gaps)) or 1.0 for s in range(len(STYLE))]

    def loss(beta):
        total = sum(STYLE_RIDGE / 2 * phi**2 for phi in beta[2:])
        for row, gap in zip(rows, gaps, strict=True):
            logit = beta["ab".index(row.model)] + sum(beta[2 + s] * gap[s] / scale[s] for s in range(len(STYLE)))
            total -= row.verdict * -np.logaddexp(0, -logit) + (1 - row.verdict) * -np.logaddexp(0, logit)
        return total

    best = scipy.optimize.minimize(loss, np.zeros(2 + len(STYLE)), tol=1e-12).x
    for i, row in enumerate(found.rates):
        assert row.rate.value == pytest.approx(1 / (1 + math.exp(-best[i])), abs=1e-4)
    assert [gain.value for _, gain in found.effects] == pytest.approx(best[2:].tolist(), abs=1e-3)


def test_a_planted_liking_of_style_is_found_and_taken_out_and_intervals_hold_the_truth_at_their_rate():
    """Model a equals its baseline but for its style, which the judge likes; b is better by 0.7 in log-odds."""
    generator = np.random.default_rng(0)
    truth = {"a": 0.5, "b": float(scipy.special.expit(0.7))}
    held = {"a": 0, "b": 0}
    raw, values, bold, headers = [], [], [], 0
    for _ in range(200):
        rows = simulated(120, generator)
        found = style_controlled(by_matchup(rows))
        for row in found.rates:
            held[row.model] += row.rate.low <= truth[row.model] <= row.rate.high
        values.append([row.rate.value for row in found.rates])
        raw.append(np.mean([v.verdict for v in rows if v.model == "a"]))
        effects = dict(found.effects)
        bold.append(effects["bold spans"].value)
        headers += effects["headers"].value == 0  # no reply has one
    assert np.mean(raw) > 0.65
    assert np.mean(values, axis=0) == pytest.approx([0.5, truth["b"]], abs=0.02)
    assert np.mean(bold) > 0.2
    assert headers == 200
    for model, num in held.items():
        assert 181 <= num <= 199, model  # 190 expected, three standard errors either way


def test_without_any_difference_in_style_the_rate_is_the_raw_one():
    rows = [
        PairVerdict(prompt=str(i), model="m", baseline="b", verdict=float(i % 4 == 0)).with_replies("x y", "y x")
        for i in range(40)
    ]
    found = style_controlled(by_matchup(rows))
    assert found.rates[0].rate.value == pytest.approx(0.25)
    assert found.rates[0].rate.count == 40
    assert all(gain.value == 0 for _, gain in found.effects)
    assert all(math.isnan(gain.low) and gain.count == 0 for _, gain in found.effects)  # nothing was seen


def test_turned_verdicts_give_the_opposite_rate():
    rows = [row for row in simulated(60, np.random.default_rng(1)) if row.model == "a"]
    one = style_controlled(by_matchup(rows)).rates[0].rate
    other = style_controlled(by_matchup([row.turned() for row in rows])).rates[0].rate
    assert other.value == pytest.approx(1 - one.value, abs=1e-6)
    assert other.low == pytest.approx(1 - one.high, abs=1e-6)


def test_both_orders_and_both_turns_of_a_prompt_are_one_row():
    rows = simulated(50, np.random.default_rng(2))
    twice = [row for v in rows for row in (v, PairVerdict(**vars(v) | {"judge": "again"}))]
    one, other = style_controlled(by_matchup(rows)), style_controlled(by_matchup(twice))
    assert [row.rate for row in one.rates] == [row.rate for row in other.rates]


def test_a_model_that_always_wins_keeps_its_rate_without_bounds_and_moves_no_other():
    rows = simulated(50, np.random.default_rng(4))
    wins = [
        PairVerdict(prompt=v.prompt, model="c", baseline="base", verdict=1.0).with_replies("x " * 300, "y")
        for v in rows[::2]
    ]
    same = [
        PairVerdict(prompt=v.prompt, model="base", baseline="base", verdict=0.5).with_replies("x", "x")
        for v in rows[::2]
    ]
    found = {row.model: row.rate for row in style_controlled(by_matchup([*rows, *wins, *same])).rates}
    alone = {row.model: row.rate for row in style_controlled(by_matchup(rows)).rates}
    assert found["a"] == alone["a"]
    assert found["c"].value == 1.0
    assert math.isnan(found["c"].low)
    assert (found["base"].value, found["base"].low) == (0.5, 0.5)
    only = style_controlled(by_matchup(wins))
    assert only.rates[0].rate.value == 1.0
    assert only.effects[0][1].count == 0


def test_marks_in_code_are_no_style():
    code = "Run this:\n```python\n# a comment\n- 1\nx = 2 ** 3 ** 4\n```\n# Then\n**done**"
    assert style_of(code).tolist() == [len(code.split()), 1, 0, 1]
    assert style_of("```\n# never closed").tolist() == [4, 0, 0, 0]


def test_verdicts_without_the_texts_of_their_replies_are_refused():
    row = PairVerdict(prompt="p", model="m", baseline="b", verdict=1.0, reply="x", where="v.jsonl, row 1")
    with pytest.raises(DataError, match="lacks the texts") as refused:
        style_controlled(by_matchup([row]))
    assert refused.value.where == "v.jsonl, row 1"
    assert "--answers" in refused.value.fix


def test_a_judge_of_style_alone_is_refused():
    """The longer reply always wins, also by one word of a hundred: no rate is left beside the effect."""
    rows = []
    for i in range(6000):
        words = (101 + i % 21, 100) if i % 2 else (100, 101 + i % 21)
        verdict = PairVerdict(prompt=str(i), model="m", baseline="b", verdict=float(i % 2))
        rows.append(verdict.with_replies(text(words[0]), text(words[1])))
    with pytest.raises(DataError, match="style foretells nearly every verdict") as refused:
        style_controlled(by_matchup(rows))
    assert "leave style control out" in refused.value.fix


def test_the_study_has_it_in_the_order_of_its_rates():
    rows = simulated(40, np.random.default_rng(5), heavier=0)
    study = study_verdicts(rows, style_control=True)
    assert [row.model for row in study.style_controlled.rates] == [row.model for row in study.win_rates] == ["b", "a"]
    assert study_verdicts(rows).style_controlled is None
