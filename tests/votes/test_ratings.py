from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.feedback.published import BASEBALL
from trimtab.core.errors import DataError
from trimtab.votes.ratings import ELO_PER_UNIT, Games, games_of, rate
from trimtab.votes.table import votes_from_rows


def games(*rows, players="xyz", **more) -> Games:
    """Games of (first, second, outcome, times)."""
    flat = [(players.index(a), players.index(b), y) for a, b, y, times in rows for _ in range(times)]
    first, second, outcome = zip(*flat, strict=True)
    return Games(
        players=tuple(players), first=np.array(first), second=np.array(second), outcome=np.array(outcome) * 1.0, **more
    )


def theta(found, name: str) -> float:
    return next((p.elo.value - 1000) / ELO_PER_UNIT for p in found.players if p.name == name)


def baseball() -> Games:
    names = list(BASEBALL)
    rows = [(i, j) for i, wins in enumerate(BASEBALL.values()) for j, n in enumerate(wins) for _ in range(n)]
    first, second = (np.array(side) for side in zip(*rows, strict=True))
    return Games(players=tuple(names), first=first, second=second, outcome=np.ones(len(rows)))


def test_agrestis_baseball_teams():
    found = rate(baseball(), num_resamples=20)
    published = {
        "Milwaukee": 1.58,
        "Detroit": 1.44,
        "Toronto": 1.29,
        "New York": 1.25,
        "Boston": 1.11,
        "Cleveland": 0.68,
    }
    for name, value in published.items():
        assert theta(found, name) - theta(found, "Baltimore") == pytest.approx(value, abs=0.005)
    assert [p.name for p in found.players] == [*published, "Baltimore"]
    assert np.mean([p.elo.value for p in found.players]) == pytest.approx(1000)


def test_two_players_worked_by_hand():
    # 30 wins to 10 are odds of three to one: 400 log10(3) points apart
    found = rate(games(("x", "y", 1, 30), ("x", "y", 0, 10), players="xy"))
    assert found.players[0].elo.value - found.players[1].elo.value == pytest.approx(400 * math.log10(3))
    # Davidson: P(x) : P(tie) : P(y) = 30 : 20 : 10 gives pi = 3 and nu = 20 / sqrt(300)
    found = rate(games(("x", "y", 1, 30), ("x", "y", 0.5, 20), ("x", "y", 0, 10), players="xy"), ties="davidson")
    assert theta(found, "x") - theta(found, "y") == pytest.approx(math.log(3))
    assert found.tie_log_nu.value == pytest.approx(math.log(20 / math.sqrt(300)))


def slow_fit(g: Games, ties: str, style_ridge: float = 0.0) -> np.ndarray:
    """Centred ratings, then style, then log nu, by a general optimiser on the likelihood as it is written."""
    k = len(g.players)
    style = np.zeros((len(g.first), 0)) if g.style is None else g.style / np.sqrt((g.style**2).mean(axis=0))

    def loss(b):
        total = style_ridge / 2 * (b[k : k + style.shape[1]] ** 2).sum() + (b[:k].sum()) ** 2
        for a, c, y, s in zip(g.first, g.second, g.outcome, style, strict=True):
            eta = b[a] - b[c] + s @ b[k : k + len(s)]
            if ties == "half":
                total -= y * -math.log1p(math.exp(-eta)) + (1 - y) * -math.log1p(math.exp(eta))
            else:
                parts = {1.0: math.exp(eta / 2), 0.5: math.exp(b[-1]), 0.0: math.exp(-eta / 2)}
                total -= math.log(parts[y] / sum(parts.values()))
        return total

    return scipy.optimize.minimize(loss, np.zeros(k + style.shape[1] + (ties == "davidson")), tol=1e-12).x


@pytest.mark.parametrize("ties", ["half", "davidson"])
@pytest.mark.parametrize("with_style", [False, True])
def test_ratings_are_the_maximum_of_the_likelihood(ties, with_style):
    generator = np.random.default_rng(1)
    first = generator.integers(4, size=60)
    second = (first + generator.integers(1, 4, size=60)) % 4
    outcome = generator.choice([0.0, 0.5, 1.0], size=60)
    style = generator.normal(size=(60, 2)) if with_style else None
    g = Games(players=tuple("wxyz"), first=first, second=second, outcome=outcome, style=style, style_names=("a", "b"))
    found = rate(g, ties=ties, style=with_style, num_resamples=5)
    slow = slow_fit(g, ties, 0.5 if with_style else 0.0)
    assert [theta(found, name) for name in "wxyz"] == pytest.approx(slow[:4], abs=1e-4)
    assert [gain.value for _, gain in found.style] == pytest.approx(slow[4 : 4 + 2 * with_style], abs=1e-4)
    if ties == "davidson":
        assert found.tie_log_nu.value == pytest.approx(slow[-1], abs=1e-4)


GAMES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=4, max_size=20
)


@settings(max_examples=30)
@given(GAMES, st.sampled_from(["half", "davidson"]), st.data())
def test_ratings_do_not_depend_on_sides_order_or_names(rows, ties, data):
    first = np.array([a for a, *_ in rows])
    second = np.array([(a + d) % 4 for a, d, _ in rows])
    outcome = np.array([y for *_, y in rows])
    if ties == "davidson" and len(set(outcome == 0.5)) < 2:
        return
    style = np.random.default_rng(0).normal(size=(len(rows), 2))
    turn = np.array([data.draw(st.booleans()) for _ in rows])
    order = data.draw(st.permutations(range(len(rows))))
    before = Games(
        players=tuple("wxyz"), first=first, second=second, outcome=outcome, style=style, style_names=("a", "b")
    )
    after = Games(
        players=tuple("zyxw"),
        first=3 - np.where(turn, second, first)[order],
        second=3 - np.where(turn, first, second)[order],
        outcome=np.where(turn, 1 - outcome, outcome)[order],
        style=np.where(turn[:, None], -style, style)[order],
        style_names=("a", "b"),
    )
    one, two = (rate(g, ties=ties, style=True, ridge=0.1, intervals="sandwich") for g in (before, after))
    for name in "wxyz":
        assert theta(one, name) == pytest.approx(theta(two, name), abs=1e-6)
    for (_, a), (_, b) in zip(one.style, two.style, strict=True):
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-6)


@pytest.mark.parametrize("intervals", ["bootstrap", "sandwich"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(intervals):
    generator = np.random.default_rng(0)
    strength = np.array([0.6, 0.2, -0.2, -0.6])
    hits = 0
    for seed in range(30):
        first = generator.integers(4, size=300)
        second = (first + generator.integers(1, 4, size=300)) % 4
        won = generator.random(300) < 1 / (1 + np.exp(strength[second] - strength[first]))
        g = Games(players=tuple("wxyz"), first=first, second=second, outcome=won * 1.0)
        for player in rate(g, intervals=intervals, num_resamples=100, seed=seed).players:
            truth = 1000 + ELO_PER_UNIT * strength["wxyz".index(player.name)]
            hits += player.elo.low <= truth <= player.elo.high
    assert 0.88 <= hits / 120 <= 0.99


@pytest.mark.parametrize("intervals", ["bootstrap", "sandwich"])
def test_games_of_one_item_count_together(intervals):
    base = baseball()
    doubled = Games(
        players=base.players,
        first=np.tile(base.first, 4),
        second=np.tile(base.second, 4),
        outcome=np.tile(base.outcome, 4),
        group=np.tile(np.arange(len(base.first)), 4),
    )
    one, four = (rate(g, intervals=intervals, num_resamples=300) for g in (base, doubled))
    for a, b in zip(one.players, four.players, strict=True):
        assert b.elo.high - b.elo.low == pytest.approx(a.elo.high - a.elo.low, rel=0.02)


def test_style_held_equal_undoes_a_liking_for_length():
    generator = np.random.default_rng(0)
    longer = generator.normal(loc=1.0, size=3000)  # x writes longer, and is no better
    won = generator.random(3000) < 1 / (1 + np.exp(-1.5 * longer))
    g = games(("x", "y", 1, 3000), players="xy", style=longer[:, None], style_names=("words",))
    g = Games(**{**g.__dict__, "outcome": won * 1.0})
    raw, level = rate(g, intervals="sandwich"), rate(g, style=True, intervals="sandwich")
    assert theta(raw, "x") > 0.3
    assert abs(theta(level, "x")) < 0.1
    assert level.style[0][1].low > 1


def test_models_that_never_met_are_not_compared():
    found = rate(games(("w", "x", 1, 3), ("w", "x", 0, 2), ("y", "z", 1, 4), ("y", "z", 0, 1), players="wxyz"))
    assert found.num_components == 2
    assert {p.name: p.component for p in found.players} == {"w": 0, "x": 0, "y": 1, "z": 1}
    assert {p.rank for p in found.players} == {1}


def test_who_won_everything_has_no_rating_until_a_prior_is_given():
    rows = [("x", "y", 1, 5), ("y", "z", 1, 3), ("y", "z", 0, 3)]
    found = {p.name: p for p in rate(games(*rows)).players}
    assert found["x"].undefined == "never lost, so that no rating is high enough"
    assert math.isnan(found["x"].elo.value)
    assert found["x"].rank == 0
    assert found["y"].elo.value == pytest.approx(1000)
    finite = {p.name: p for p in rate(games(*rows), ridge=0.1).players}
    assert finite["x"].elo.value > finite["y"].elo.value
    with pytest.raises(DataError, match="no player has a finite rating"):
        rate(games(("x", "y", 1, 5), players="xy"))


def test_resamples_without_ratings_are_counted():
    found = rate(games(("x", "y", 1, 5), ("x", "y", 0, 1), players="xy"))
    assert "of the resamples have no finite ratings" in found.notes[0]


def test_ties_between_one_sided_games_leave_davidsons_model_without_a_maximum():
    # the stronger x never lost: making it stronger and ties likelier together always fits better
    one_sided = games(("x", "y", 1, 3), ("x", "y", 0.5, 3), players="xy")
    with pytest.raises(DataError, match="no finite ratings"):
        rate(one_sided, ties="davidson")
    assert rate(one_sided).players[0].elo.value == pytest.approx(1000 + 200 * math.log10(3))
    assert rate(one_sided, ties="davidson", ridge=0.1).players[0].elo.value > 1000


def test_games_that_say_nothing_are_refused_or_counted():
    with pytest.raises(DataError, match="no game between two players"):
        rate(games(("x", "x", 1, 5)))
    with pytest.raises(DataError, match="no tie"):
        rate(games(("x", "y", 1, 5), ("x", "y", 0, 1), players="xy"), ties="davidson")
    found = rate(games(("x", "y", 1, 5), ("x", "y", 0, 5), ("x", "x", 1, 2), players="xy"), num_resamples=50)
    assert found.notes[0] == "2 games of a model against itself left out"


def test_votes_become_games():
    rows = [
        {"item": "1", "annotator": "a", "choice": choice, "model_a": "gpt", "model_b": "llama"}
        for choice in ("A", "B", "tie", "both_bad")
    ]
    g = games_of(votes_from_rows([("", row) for row in rows]))
    assert g.players == ("gpt", "llama")
    assert g.outcome.tolist() == [1, 0, 0.5, 0.5]
    assert g.group.tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match="do not say which models"):
        games_of(votes_from_rows([("", {"item": "1", "annotator": "a", "choice": "A"})]))


def test_many_games_are_summed_in_parts_to_the_same_ratings(monkeypatch):
    generator = np.random.default_rng(2)
    first, second = generator.integers(4, size=200), generator.integers(4, size=200)
    games = Games(
        players=tuple("abcd"),
        first=first,
        second=second,
        outcome=generator.choice([0.0, 0.5, 1.0], size=200),
        style=generator.normal(size=(200, 2)),
        style_names=("x", "y"),
    )
    whole = rate(games, style=True, intervals="sandwich")
    monkeypatch.setattr("trimtab.votes.ratings._CELLS", 0)
    parts = rate(games, style=True, intervals="sandwich")
    assert [p.elo.value for p in parts.players] == pytest.approx([p.elo.value for p in whole.players])
    assert [p.elo.low for p in parts.players] == pytest.approx([p.elo.low for p in whole.players])
