"""Ratings of models from wins, losses and ties: the Bradley-Terry model with intervals, and style held equal.

    eta = theta_a - theta_b + phi · (style_a - style_b)
    without ties:  P(A wins) = 1 / (1 + exp(-eta))                                   (Bradley and Terry 1952)
    Davidson:      P(A) : P(tie) : P(B) = exp(eta / 2) : nu : exp(-eta / 2)          (Davidson 1970, JASA 65, eq. 2.3)

Both have a concave likelihood in (theta, phi, log nu), so Newton's method finds its only maximum; it runs for all
resamples of a bootstrap together. A rating is 1000 + 400 theta / ln 10, with theta of mean 0: 400 points are odds of
ten to one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from trimtab.core.errors import DataError
from trimtab.stats import Floats, Interval
from trimtab.votes.table import STYLE, WORTH, Ints, VoteTable, in_root_mean_squares

Ties = Literal["half", "davidson"]
RatingMethod = Literal["bootstrap", "sandwich"]

ELO_CENTRE = 1000.0
ELO_PER_UNIT = 400 / math.log(10)
"""Points for one unit of theta."""
_CELLS = 4_000_000
_MAX_NEWTON = 60
LARGE = 15.0
"""Parameters beyond this count as infinite: they mean odds of e^30 between two players."""


@dataclass(frozen=True, kw_only=True)
class Games:
    """Judged comparisons of players: `players[first[i]]` won game i if `outcome[i]` is 1."""

    players: tuple[str, ...]
    first: Ints
    """[n], index into `players`, as is `second`."""
    second: Ints
    outcome: Floats
    """[n], 1 if the first won, 0 if the second did, 0.5 for a tie."""
    style: Floats | None = None
    """[n, S], style of the first minus that of the second."""
    style_names: tuple[str, ...] = ()
    group: Ints | None = None
    """[n], group of each game; a group (one item or prompt) is resampled together. None if all are independent."""

    def between_different(self) -> Games:
        """The games between two different players."""
        kept = self.first != self.second
        columns = {name: getattr(self, name) for name in ("first", "second", "outcome", "style", "group")}
        return replace(self, **{name: values[kept] for name, values in columns.items() if values is not None})


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One player's rating and rank. Bounds are nan if they are unknown."""

    name: str
    elo: Interval
    """`count` is the number of games."""
    rank: int
    """1 + the number of players whose lower bound is above this one's upper bound; 0 if there is no rating."""
    component: int
    """Players of different components never met, not even through others: their ratings cannot be compared."""
    undefined: str = ""
    """Why there is no rating; empty if there is one."""

    @property
    def text(self) -> str:
        """The rating as text, such as 1032 [1010, 1055]; without one, the reason."""
        return self.undefined or f"{self.elo.value:.0f} [{self.elo.low:.0f}, {self.elo.high:.0f}]"


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """Ratings of all players, best first within each component."""

    players: tuple[Rating, ...]
    num_components: int
    tie_log_nu: Interval | None
    """log nu of Davidson's model: 0 means that equal players tie in one game of three; None if ties are half wins."""
    style: tuple[tuple[str, Interval], ...]
    """Gain in log-odds from a typical difference (the root mean square) in each kind of style."""
    notes: tuple[str, ...]


def games_of(votes: VoteTable) -> Games:
    """The votes as games between the models of their items. Raises DataError if the models are not known."""
    if votes.models is None or not votes.pairwise:
        raise DataError(
            "the votes do not say which models they compare",
            where="the vote table",
            fix="give it the columns model_a and model_b, and choices A, B or tie",
        )
    players = sorted({name for pair in votes.models for name in pair})
    number = {name: i for i, name in enumerate(players)}
    pairs = np.array([[number[a], number[b]] for a, b in votes.models], dtype=np.int64).reshape(-1, 2)[votes.item]
    worth = np.array([WORTH[category] for category in votes.categories])
    return Games(
        players=tuple(players),
        first=pairs[:, 0],
        second=pairs[:, 1],
        outcome=worth[votes.choice],
        style=None if votes.style is None else votes.style[votes.item],
        style_names=STYLE if votes.style is not None else (),
        group=votes.group_of_votes,
    )


def rate(
    games: Games,
    *,
    ties: Ties = "half",
    style: bool = False,
    intervals: RatingMethod = "bootstrap",
    ridge: float = 0.0,
    style_ridge: float = 0.5,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Ratings:
    """Ratings by maximum likelihood.

    `ties` count as half a win for each side, or have a parameter of their own (Davidson). With `style`, the differences
    in style are covariates, in units of their root mean square (which does not depend on how sides are named) and with
    a penalty of `style_ridge` phi² / 2, so that ratings are for replies of equal style. `ridge` theta² / 2 is a prior
    that makes every rating finite. Without it (0), players who won or lost everything have no rating, and `undefined`
    says why. Intervals (95%) are percentiles of a bootstrap over `games.group`, or come from the sandwich covariance
    clustered by it (White 1982). Raises DataError if no ratings can be fitted.
    """
    num_given, games = len(games.first), games.between_different()
    num, left_out = len(games.players), num_given - len(games.first)
    if not len(games.first):
        raise DataError("there is no game between two players", where="the games", fix="compare different models")
    notes = [f"{left_out} games of a model against itself left out"] if left_out else []
    component, blocked = _connected(num, games.first, games.second, games.outcome)
    if ridge > 0:
        blocked = {}
    fitted = np.array([p not in blocked for p in range(num)])
    together = (component[:, None] == component[None]) & fitted[None] & fitted[:, None]
    model = _likelihood(games, together, ties=ties, with_style=style, ridge=ridge, style_ridge=style_ridge)

    centre = np.eye(model.size)  # subtracts from each rating the mean of its component
    centre[:num, :num] -= together / np.maximum(together.sum(axis=1, keepdims=True), 1)
    fit = model.fit(np.ones((1, model.num_groups)))
    if not _finite(fit).all():
        raise DataError(
            "no finite ratings: stronger players never lost and ties lie between, or style foretells every outcome",
            where="the games",
            fix="count ties as halves, leave style out, or give a prior: ridge = 1",
        )
    point = fit[0] @ centre.T
    if intervals == "bootstrap":
        drawn, num_lost = _bootstrap(model, component, num if ridge == 0 else 0, num_resamples, seed)
        if num_lost:
            notes.append(f"{num_lost / num_resamples:.1%} of the resamples have no finite ratings and are left out")
        nothing = np.full((2, model.size), math.nan)
        low, high = np.quantile(drawn @ centre.T, [0.025, 0.975], axis=0) if len(drawn) else nothing
    else:
        error = 1.959964 * model.sandwich_errors(point, centre)
        low, high = point - error, point + error

    num_games = int(model.games.sum())
    found = [Interval(float(x), float(a), float(b), num_games) for x, a, b in zip(point, low, high, strict=True)]
    styles = found[num : len(found) - model.with_ties]
    return Ratings(
        players=_ranked(games, found[:num], component, blocked),
        num_components=len(set(component.tolist())),
        tie_log_nu=found[-1] if model.with_ties else None,
        style=tuple(zip(games.style_names, styles, strict=False)),
        notes=tuple(notes),
    )


def _likelihood(
    games: Games, together: NDArray[np.bool_], *, ties: Ties, with_style: bool, ridge: float, style_ridge: float
) -> GameLikelihood:
    """The likelihood of the games between players who can be rated. `together` [players, players] says which of them
    are in one component; it is false for the others. Raises DataError if there is no such game, and for ties that
    Davidson's model cannot be fitted to."""
    num, fitted = len(games.players), together.diagonal()
    use = fitted[games.first] & fitted[games.second]
    outcome = games.outcome[use]
    if not use.any():
        raise DataError(
            "no player has a finite rating: every game between two of them went the same way",
            where="the games",
            fix="collect more games, or give a prior: ridge = 1",
        )
    with_ties = ties == "davidson"
    if with_ties and np.unique(outcome == 0.5).size < 2:
        raise DataError("there is no tie, or nothing but ties", where="the games", fix="use ties = 'half'")
    design = np.eye(num)[games.first] - np.eye(num)[games.second]
    if with_style and games.style is not None:
        design = np.column_stack([design, in_root_mean_squares(games.style)])
    group = np.arange(len(games.first)) if games.group is None else games.group
    return GameLikelihood.of(
        design[use],
        outcome,
        np.unique(group[use], return_inverse=True)[1],
        with_ties=with_ties,
        penalty=np.repeat([ridge, style_ridge], [num, design.shape[1] - num]),
        gauge=together.astype(np.float64) + np.diag(~fitted),
    )


def _ranked(
    games: Games, strengths: Sequence[Interval], component: Ints, blocked: Mapping[int, str]
) -> tuple[Rating, ...]:
    """The ratings of the players, best first within each component, from the theta of each; `blocked` says why some
    have no rating."""
    counts = np.bincount(np.concatenate([games.first, games.second]), minlength=len(games.players)).tolist()
    unrated = Interval(math.nan, math.nan, math.nan, 0)
    elos = [_elo(unrated if p in blocked else theta, counts[p]) for p, theta in enumerate(strengths)]
    ranks = [
        0 if p in blocked else 1 + sum(elos[o].low > elos[p].high for o in np.flatnonzero(component == own))
        for p, own in enumerate(component)
    ]
    rated = [
        Rating(
            name=name,
            elo=elos[p],
            component=int(component[p]),
            undefined=blocked.get(p, ""),
            rank=ranks[p],
        )
        for p, name in enumerate(games.players)
    ]
    return tuple(sorted(rated, key=lambda r: (r.component, math.isnan(r.elo.value), -r.elo.value, r.name)))


def _elo(theta: Interval, num_games: int) -> Interval:
    """A parameter theta as a rating in points, with the number of the player's games."""
    value, low, high = (ELO_CENTRE + ELO_PER_UNIT * x for x in (theta.value, theta.low, theta.high))
    return Interval(value, low, high, num_games)


@dataclass(frozen=True, kw_only=True)
class GameLikelihood:
    """The penalised likelihood of weighted games in the parameters (theta, phi), with log nu at the end for Davidson.

    Identical games are merged into one of U rows.
    """

    design: Floats
    """[U, D], the factors of the parameters in eta."""
    outcome: Floats
    """[U], as in `Games`."""
    games: Any
    """Sparse [groups, U], how many games of each group are in each row."""
    with_ties: bool
    penalty: Floats
    """[D], ridge of each parameter."""
    gauge: Floats
    """[players, players], added to the second derivatives along directions in which the likelihood is flat: a common
    shift of a component, and players without a rating."""

    @classmethod
    def of(
        cls, design: Floats, outcome: Floats, group: Ints, *, with_ties: bool, penalty: Floats, gauge: Floats
    ) -> GameLikelihood:
        rows, row = np.unique(np.column_stack([design, outcome]), axis=0, return_inverse=True)
        games = scipy.sparse.coo_matrix((np.ones(len(design)), (group, row.reshape(-1)))).tocsr()
        return cls(
            design=rows[:, :-1], outcome=rows[:, -1], games=games, with_ties=with_ties, penalty=penalty, gauge=gauge
        )

    @property
    def size(self) -> int:
        return int(self.design.shape[1]) + self.with_ties

    @property
    def num_groups(self) -> int:
        return int(self.games.shape[0])

    def weights(self, times: Floats) -> Floats:
        """Weights of the rows [B, U], from how often each group was drawn, `times` [B, groups]."""
        return np.asarray((self.games.T @ times.T).T)

    def fit(self, times: Floats) -> Floats:
        """Parameters [B, D] that maximise the likelihood with each group counted as often as `times` says.

        If there is no maximum, they stop at a value that `_finite` refuses.
        """
        weights = self.weights(times)
        beta = np.zeros((len(weights), self.size))
        value = self._likelihood(beta, weights)
        active = np.arange(len(beta))
        for _ in range(_MAX_NEWTON):
            gradient, hessian = self._derivatives(beta[active], weights[active])
            solved = np.linalg.solve(hessian + self._flat(), gradient[..., None])[..., 0]
            longest = np.abs(solved).max(axis=1, keepdims=True)
            step: Floats = np.asarray(solved * np.minimum(1.0, 5.0 / np.maximum(longest, 1.0)), dtype=np.float64)
            moved, value[active] = self._search(beta[active], step, weights[active], value[active])
            done = (np.abs(moved - beta[active]).max(axis=1) < 1e-9) | ~_finite(moved)
            beta[active] = moved
            active = active[~done]
            if not active.size:
                break
        return beta

    def sandwich_errors(self, beta: Floats, centre: Floats) -> Floats:
        """Standard errors of `centre` @ parameters: the square root of H⁻¹ (sum_g s_g s_gᵀ) H⁻¹ on the diagonal."""
        _, hessian = self._derivatives(beta[None], self.weights(np.ones((1, self.num_groups))))
        sums = self.games @ self._scores(beta)
        bread = centre @ np.linalg.inv(hessian[0] + self._flat())
        variances = np.einsum("ij,jk,ik->i", bread, sums.T @ sums, bread)
        return np.asarray(np.sqrt(np.maximum(variances, 0.0)))

    def _flat(self) -> Floats:
        flat = np.eye(self.size) * 1e-15  # keeps it solvable: on the way to infinity all is flat
        flat[: len(self.gauge), : len(self.gauge)] = self.gauge
        return flat

    def _probabilities(self, beta: Floats) -> tuple[Floats, Floats, Floats]:
        """P(first wins), P(second wins), P(tie) of each game, [B, n]."""
        d = self.design.shape[1]
        eta = beta[:, :d] @ self.design.T
        if not self.with_ties:
            p = 1 / (1 + np.exp(-np.clip(eta, -500, 500)))
            return p, 1 - p, np.zeros_like(p)
        parts = np.stack([eta / 2, -eta / 2, np.broadcast_to(beta[:, -1:], eta.shape)])
        parts = np.exp(parts - parts.max(axis=0))
        parts /= parts.sum(axis=0)
        return parts[0], parts[1], parts[2]

    def _likelihood(self, beta: Floats, weights: Floats) -> Floats:
        first, second, tie = self._probabilities(beta)
        y = self.outcome
        tiny = 1e-300
        if not self.with_ties:
            logs = y * np.log(first + tiny) + (1 - y) * np.log(second + tiny)
        else:
            logs = np.where(y == 1, np.log(first + tiny), np.where(y == 0, np.log(second + tiny), np.log(tie + tiny)))
        d = self.design.shape[1]
        return np.asarray((weights * logs).sum(axis=1) - (beta[:, :d] ** 2 @ self.penalty) / 2)

    def _scores(self, beta: Floats) -> Floats:
        """Derivative of each row's log-likelihood at one set of parameters, [U, D]."""
        first, second, tie = self._probabilities(beta[None])
        along = (self.outcome - 0.5) - (first[0] - second[0]) / 2
        scores = along[:, None] * self.design
        return np.column_stack([scores, (self.outcome == 0.5) - tie[0]]) if self.with_ties else scores

    def _derivatives(self, beta: Floats, weights: Floats) -> tuple[Floats, Floats]:
        """Gradient [B, D] and negative second derivatives [B, D, D]."""
        d = self.design.shape[1]
        first, second, tie = self._probabilities(beta)
        mean = (first - second) / 2
        gradient = np.zeros_like(beta)
        gradient[:, :d] = (weights * (self.outcome - 0.5 - mean)) @ self.design - self.penalty * beta[:, :d]
        hessian = np.zeros((len(beta), self.size, self.size))
        hessian[:, :d, :d] = self._products(weights * ((first + second) / 4 - mean**2))
        hessian[:, np.arange(d), np.arange(d)] += self.penalty
        if not self.with_ties:
            return gradient, hessian
        gradient[:, d] = (weights * ((self.outcome == 0.5) - tie)).sum(axis=1)
        hessian[:, :d, d] = hessian[:, d, :d] = (weights * (-mean * tie)) @ self.design
        hessian[:, d, d] = (weights * tie * (1 - tie)).sum(axis=1)
        return gradient, hessian

    def _products(self, weights: Floats) -> Floats:
        """The weighted sums [B, D, D] of the products of the design's columns, with weights [B, U]."""
        num_rows, d = self.design.shape
        if num_rows * d * d > _CELLS:  # the products of all rows would not fit into memory
            return np.stack([(self.design * one[:, None]).T @ self.design for one in weights])
        outer = (self.design[:, :, None] * self.design[:, None, :]).reshape(-1, d * d)
        return np.asarray((weights @ outer).reshape(-1, d, d))

    def _search(self, beta: Floats, step: Floats, weights: Floats, value: Floats) -> tuple[Floats, Floats]:
        """The parameters after the step, halved until no likelihood falls, and their likelihoods."""
        scale = np.ones((len(beta), 1))
        for _ in range(30):
            moved = beta + scale * step
            gained = self._likelihood(moved, weights)
            worse = gained < value - 1e-12 * np.abs(value)
            if not worse.any():
                break
            scale[worse] /= 2
        return moved, gained


def _bootstrap(model: GameLikelihood, component: Ints, num: int, num_resamples: int, seed: int) -> tuple[Floats, int]:
    """Parameters fitted to resamples of whole groups, and how many resamples have no finite ones.

    A resample has none if its games do not connect the first `num` players as all games do, or if Davidson's model
    finds no ties in it, or only ties.
    """
    generator = np.random.default_rng(seed)
    players = len(model.gauge)
    first, second = (model.design[:, :players] > 0).argmax(axis=1), (model.design[:, :players] < 0).argmax(axis=1)
    rated = np.unique(np.concatenate([first, second]))
    parts = np.unique(component[rated]).size
    block = max(1, _CELLS // max(model.num_groups, len(model.design), model.size**2))
    found = []
    for done in range(0, num_resamples, block):
        even = np.full(model.num_groups, 1 / model.num_groups)
        times = generator.multinomial(model.num_groups, even, size=min(block, num_resamples - done)).astype(np.float64)
        weights = model.weights(times) > 0
        usable = np.ones(len(times), dtype=bool)
        if num:
            usable = np.array([_num_parts(num, first[w], second[w], model.outcome[w], rated) == parts for w in weights])
        if model.with_ties:
            tie = model.outcome == 0.5
            usable &= weights[:, tie].any(axis=1) & weights[:, ~tie].any(axis=1)
        found.append(model.fit(times[usable]))
    drawn = np.concatenate(found)
    drawn = drawn[_finite(drawn)]
    return drawn, num_resamples - len(drawn)


def _finite(beta: Floats) -> NDArray[np.bool_]:
    """Which rows of parameters [B, D] are finite: their likelihood has a maximum."""
    return np.asarray(np.abs(beta).max(axis=1, initial=0.0) < LARGE)


def _num_parts(num: int, first: Ints, second: Ints, outcome: Floats, of: Ints) -> int:
    """Number of parts of the players `of`; in a part everybody beats or ties everybody, directly or through others."""
    return int(np.unique(_strong_parts(num, first, second, outcome)[of]).size)


def _strong_parts(num: int, first: Ints, second: Ints, outcome: Floats) -> Ints:
    won, lost = outcome > 0, outcome < 1
    winners, losers = np.concatenate([first[won], second[lost]]), np.concatenate([second[won], first[lost]])
    beats = scipy.sparse.coo_matrix((np.ones(winners.size), (winners, losers)), shape=(num, num))
    part = scipy.sparse.csgraph.connected_components(beats, directed=True, connection="strong")[1]
    return np.asarray(part, dtype=np.int64)


def _connected(num: int, first: Ints, second: Ints, outcome: Floats) -> tuple[Ints, dict[int, str]]:
    """Each player's component, and why a player has no finite rating.

    Ratings exist within a component if it cannot be split in two so that one part never won or tied against the other
    (Ford 1957). If it can, only the largest part that cannot is rated.
    """
    ones = np.ones(first.size)
    met = scipy.sparse.coo_matrix((ones, (first, second)), shape=(num, num))
    _, component = scipy.sparse.csgraph.connected_components(met, directed=False)
    part = _strong_parts(num, first, second, outcome)
    won, lost = outcome > 0, outcome < 1
    blocked: dict[int, str] = {}
    for number in np.unique(component):
        members = np.flatnonzero(component == number)
        parts, sizes = np.unique(part[members], return_counts=True)
        if parts.size == 1:
            continue
        core = parts[np.argmax(sizes)] if sizes.max() > 1 else -1
        wins = np.bincount(np.concatenate([first[won], second[lost]]), minlength=num)
        losses = np.bincount(np.concatenate([second[won], first[lost]]), minlength=num)
        for p in members[part[members] != core]:
            blocked[int(p)] = (
                "never lost, so that no rating is high enough"
                if not losses[p]
                else "never won, so that no rating is low enough"
                if not wins[p]
                else "its games go one way against all others together, so that no rating is extreme enough"
            )
    return component.astype(np.int64), blocked
