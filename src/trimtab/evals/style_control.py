"""Style-controlled win rates: how often a model would win if its replies had the style of its baseline's.

The model is the logistic regression of Chatbot Arena's style control (Li et al., "Does style matter?", 2024; its code
is FastChat's `rating_systems.py`), with one intercept for each model and its baseline:

    logit P(model wins on x) = theta_model + sum_s phi_s z_s(x),   z_s = (a_s - b_s) / (a_s + b_s + 1) / rms_s

a_s and b_s count words, headers, list items and bold spans of the model's reply and of the baseline's. The effects phi
are those of the judges, and common to all models. With one baseline this is the Bradley-Terry model with covariates;
with several, each matchup keeps a rate of its own. The rate at equal style is the prediction for z = 0.

Differences from the published code: z is divided by its root mean square and not centred. If sides are random the mean
is near 0, but if the model is always on one side, as here and in Arena-Hard, centring would give the rate at the
average difference in style. Intercepts have no penalty; effects have that of the published code,
`STYLE_RIDGE` phi^2 / 2. Intervals are sandwich intervals over prompts (White 1982), since the verdicts on one prompt,
also those on several models, are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from trimtab.core.errors import DataError
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import Matchup, by_prompt, mean_over_orders
from trimtab.stats import Floats, Interval
from trimtab.votes.ratings import LARGE, GameLikelihood
from trimtab.votes.table import STYLE, in_root_mean_squares, style_difference, style_of

STYLE_RIDGE = 0.5
"""The penalty on the effects of style."""


@dataclass(frozen=True, kw_only=True)
class StyleControlled:
    """The win rate of a model at equal style."""

    model: str
    baseline: str
    rate: Interval
    """95%; `count` is the number of prompts. The bounds are nan if all verdicts are wins, or all are losses: the rate
    is the raw one then."""


@dataclass(frozen=True, kw_only=True)
class StyleControl:
    """The win rates at equal style, and what style does."""

    rates: tuple[StyleControlled, ...]
    effects: tuple[tuple[str, Interval], ...]
    """For each count of `STYLE`, the gain in log-odds from a typical difference in it (its root mean square), with all
    others equal. `count` is the number of prompts; of a count in which no two replies differ it is 0, and there are no
    bounds."""


def style_controlled(verdicts: Mapping[Matchup, Sequence[PairVerdict]]) -> StyleControl:
    """The style-controlled win rate of each model, in the order of the match-ups. A model that is its own baseline gets
    exactly 0.5.

    Raises DataError if a verdict lacks the texts of its replies, and if style foretells nearly every verdict.
    """
    tables = {matchup: _Table.of(rows) for matchup, rows in verdicts.items() if matchup[0] != matchup[1]}
    # A model that always won has no finite intercept, and says nothing of the effects of style.
    decided = {matchup: table for matchup, table in tables.items() if 0 < table.outcome.mean() < 1}
    fitted, effects = _fit(decided) if decided else ({}, [Interval(math.nan, math.nan, math.nan, 0)] * len(STYLE))
    rates = []
    for model, baseline in verdicts:
        if model == baseline:
            rate = Interval(0.5, 0.5, 0.5, len(by_prompt(verdicts[model, baseline])))
        elif (model, baseline) in fitted:
            rate = fitted[model, baseline]
        else:
            table = tables[model, baseline]
            rate = Interval(float(table.outcome.mean()), math.nan, math.nan, len(table.prompts))
        rates.append(StyleControlled(model=model, baseline=baseline, rate=rate))
    return StyleControl(rates=tuple(rates), effects=tuple(zip(STYLE, effects, strict=True)))


def _fit(tables: Mapping[Matchup, _Table]) -> tuple[dict[Matchup, Interval], list[Interval]]:
    """The rate of each match-up at equal style, and the effect of each count of `STYLE`."""
    num = len(tables)
    which = np.repeat(np.arange(num), [len(table.prompts) for table in tables.values()])
    style = np.concatenate([table.style for table in tables.values()])
    prompts: dict[str, int] = {}
    likelihood = GameLikelihood.of(
        np.column_stack([np.eye(num)[which], in_root_mean_squares(style)]),
        np.concatenate([table.outcome for table in tables.values()]),
        np.array([prompts.setdefault(name, len(prompts)) for table in tables.values() for name in table.prompts]),
        with_ties=False,
        penalty=np.concatenate([np.zeros(num), np.full(len(STYLE), STYLE_RIDGE)]),
        gauge=np.zeros((0, 0)),
    )
    point = likelihood.fit(np.ones((1, likelihood.num_groups)))[0]
    if np.abs(point).max() >= LARGE:
        raise DataError(
            "style foretells nearly every verdict, so that no rate at equal style can be told from its effects",
            where=f"the verdicts on {', '.join(model for model, _ in tables)}",
            fix="leave style control out: what the judges prefer is the style itself",
        )
    errors = likelihood.sandwich_errors(point, np.eye(likelihood.size))
    rates = {}
    for i, (matchup, table) in enumerate(tables.items()):
        reach = _quantile(len(table.prompts)) * errors[i]
        value, low, high = scipy.special.expit([point[i], point[i] - reach, point[i] + reach]).tolist()
        rates[matchup] = Interval(value, low, high, len(table.prompts))
    reaches = _quantile(len(prompts)) * errors[num:]
    effects = [
        Interval(float(gain), float(gain - reach), float(gain + reach), len(prompts))
        if gaps.any()
        else Interval(0.0, math.nan, math.nan, 0)
        for gain, reach, gaps in zip(point[num:], reaches, style.T, strict=True)
    ]
    return rates, effects


def _quantile(num: int) -> float:
    """Standard errors in half a 95% interval over `num` prompts: Student's t, and the factor for the degrees of freedom
    that an intercept and the effects take from the sandwich."""
    free = max(1, num - 1 - len(STYLE))
    return float(scipy.stats.t.ppf(0.975, free) * math.sqrt(num / free))


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One model's verdicts, one row a prompt."""

    prompts: tuple[str, ...]
    outcome: Floats
    """[P], mean verdicts."""
    style: Floats
    """[P, S], `style_difference` of the model's reply from the baseline's."""

    @classmethod
    def of(cls, verdicts: Sequence[PairVerdict]) -> _Table:
        gaps = {id(verdict): _gap(verdict) for verdict in verdicts}
        rows = by_prompt(verdicts)
        return cls(
            prompts=tuple(rows),
            outcome=np.array([mean_over_orders(own, lambda verdict: verdict.verdict) for own in rows.values()]),
            style=np.array([[mean_over_orders(own, _at(gaps, s)) for s in range(len(STYLE))] for own in rows.values()]),
        )


def _at(gaps: Mapping[int, Floats], s: int) -> Callable[[PairVerdict], float]:
    return lambda verdict: float(gaps[id(verdict)][s])


def _gap(verdict: PairVerdict) -> Floats:
    if verdict.reply is None or verdict.baseline_reply is None:
        raise DataError(
            f"the verdict on {verdict.model!r} against {verdict.baseline!r} lacks the texts of the replies",
            where=verdict.where,
            fix="give every row reply and baseline_reply, give the models' answers with --answers, or leave style "
            "control out",
        )
    return style_difference(style_of(verdict.reply), style_of(verdict.baseline_reply))
