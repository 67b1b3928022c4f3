"""Everything that verdicts say about models: win rates, differences, length and style control, and a ladder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.core.errors import DataError
from trimtab.evals.length_control import MIN_MODELS, LengthControlled, length_controlled
from trimtab.evals.style_control import StyleControl, style_controlled
from trimtab.evals.verdict_layouts import ReplyScore
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import Difference, Matchup, WinRate, by_matchup, differences, per_prompt, win_rate_of
from trimtab.stats import Interval, bootstrap_mean
from trimtab.votes.ratings import Games, Ratings, rate


@dataclass(frozen=True, kw_only=True)
class VerdictStudy:
    """What the verdicts on some models say."""

    win_rates: tuple[WinRate, ...]
    """Of each model against each of its baselines, the highest rate of each baseline first."""
    differences: tuple[Difference, ...]
    """Of every two models with a common baseline, `model` being the one with the higher win rate."""
    length_controlled: tuple[LengthControlled, ...]
    """In the order of `win_rates`; empty if it was not asked for."""
    style_controlled: StyleControl | None
    """Its rates are in the order of `win_rates`; None if it was not asked for."""
    ladder: Ratings | None
    """Bradley-Terry ratings of models and baselines; None if fewer than three models compare."""
    notes: tuple[str, ...]
    """What a reader of the numbers must know."""


def study_verdicts(
    verdicts: Sequence[PairVerdict],
    *,
    length_control: bool = False,
    style_control: bool = False,
    variants: Sequence[str] = (),
    half_width: float = 0.03,
    seed: int = 0,
) -> VerdictStudy:
    """The whole study of at least one verdict; see `length_controlled` for `variants` and what is raised."""
    found = by_matchup(verdicts)
    rates = [win_rate_of(rows, half_width=half_width, seed=seed) for rows in found.values()]
    rates.sort(key=lambda row: (row.baseline, -row.rate.value, row.model))
    matchups = {(row.model, row.baseline): found[row.model, row.baseline] for row in rates}
    controlled: list[LengthControlled] = []
    if length_control:
        own = {(row.model, row.baseline): row for row in length_controlled(found, variants=variants, seed=seed)}
        controlled = [own[matchup] for matchup in matchups]
    ladder, ladder_notes = _ladder(verdicts, matchups)
    return VerdictStudy(
        win_rates=tuple(rates),
        differences=tuple(differences(matchups)),
        length_controlled=tuple(controlled),
        style_controlled=style_controlled(matchups) if style_control else None,
        ladder=ladder,
        notes=(
            *_notes_on_sides(matchups),
            *_notes_on_orders(rates),
            *_notes_on_length(controlled, rates, variants),
            *ladder_notes,
        ),
    )


def _notes_on_sides(matchups: Collection[Matchup]) -> Iterator[str]:
    """Which two models have two win rates, since each is the baseline of some verdicts on them."""
    for model, baseline in matchups:
        if model < baseline and (baseline, model) in matchups:
            yield (
                f"{model} and {baseline} are each the baseline of the other in some verdicts, so they have two win "
                "rates here; --baseline with one of them makes one win rate of both"
            )


def _notes_on_orders(rates: Sequence[WinRate]) -> Iterator[str]:
    """What the order of display may have done to the win rates."""
    for row in rates:
        if row.num_one_order:
            yield (
                f"{row.model} against {row.baseline}: {row.num_one_order} of {row.rate.count} prompts were judged in "
                "one order only, so position bias is in the win rate"
            )
    for row in rates:
        if row.num_unbalanced:
            yield (
                f"{row.model} against {row.baseline}: {row.num_unbalanced} of {row.rate.count} prompts were judged "
                "more often in one order than in the other; each order counts half there"
            )


def _notes_on_length(
    controlled: Sequence[LengthControlled], rates: Sequence[WinRate], variants: Sequence[str]
) -> Iterator[str]:
    """What the rates at equal length must not be taken for; nothing if there are none."""
    if controlled and not variants:
        yield (
            "length control without --variant: AlpacaEval 2 also learns the effect of length from variants of the "
            "baseline, so rates at equal length differ from its leaderboard, most for models that are nearly "
            "always shorter or longer than their baseline"
        )
    for row in controlled:
        if row.extreme:
            yield (
                f"{row.model} against {row.baseline}: length control moves the win rate so far that the regression "
                "may have failed; look at phi and at the lengths"
            )
        if row.shrunk:
            yield (
                f"{row.model} against {row.baseline}: the penalty that predicts best shrinks all weights to 0, so "
                "the rate at equal length is 50% whatever the verdicts are; read its interval, or judge more prompts"
            )
    few = sorted({row.baseline for row in controlled if _num_others(rates, row) < MIN_MODELS - 1})
    if few:
        yield (
            f"fewer than {MIN_MODELS} models were compared with {', '.join(few)}: length control there is without "
            "the difficulty of prompts"
        )


def _ladder(verdicts: Sequence[PairVerdict], matchups: Collection[Matchup]) -> tuple[Ratings | None, list[str]]:
    """The ratings of all models and baselines, if there are three or more and ratings can be fitted; and notes."""
    if len({name for matchup in matchups for name in matchup}) < 3:
        return None, []
    try:
        ladder = rate(games_between(verdicts), intervals="sandwich")
    except DataError as error:
        return None, [f"there is no ladder: {error.problem}"]
    return ladder, [f"ladder: {note}" for note in ladder.notes]


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """The mean of a judge's scores of a model's replies."""

    model: str
    turn: int | None
    """Of the replies in this turn; None for all turns together."""
    score: Interval
    """From 1 to 10, with a 95% bootstrap over prompts. Replies without a score are left out."""


def mean_scores(scores: Sequence[ReplyScore]) -> tuple[MeanScore, ...]:
    """The mean score of each model, the highest first, and those of its turns below it if there are several."""
    found: list[tuple[MeanScore, ...]] = []
    for model in sorted({one.model for one in scores}):
        own = [one for one in scores if one.model == model]
        turns = sorted({one.turn for one in own if one.turn is not None})
        parts = [None, *turns] if len(turns) > 1 else [None]
        found.append(tuple(_mean_score(model, turn, own) for turn in parts))
    return tuple(row for rows in sorted(found, key=lambda rows: -rows[0].score.value) for row in rows)


def _mean_score(model: str, turn: int | None, scores: Sequence[ReplyScore]) -> MeanScore:
    own = [one for one in scores if turn is None or one.turn == turn]
    mean = bootstrap_mean([one.score for one in own], groups=[one.prompt for one in own])
    return MeanScore(model=model, turn=turn, score=mean)


def games_between(verdicts: Sequence[PairVerdict]) -> Games:
    """The verdicts as games of models and baselines, to be resampled by prompt. A model plays its baseline once on each
    prompt, and the outcome is the mean verdict, as in the win rates."""
    players = sorted({name for verdict in verdicts for name in (verdict.model, verdict.baseline)})
    number = {name: i for i, name in enumerate(players)}
    means = {matchup: per_prompt(rows) for matchup, rows in by_matchup(verdicts).items()}
    played = [(model, baseline, prompt) for (model, baseline), rows in means.items() for prompt in rows]
    prompts: dict[str, int] = {}
    return Games(
        players=tuple(players),
        first=np.array([number[model] for model, _, _ in played], dtype=np.int64),
        second=np.array([number[baseline] for _, baseline, _ in played], dtype=np.int64),
        outcome=np.array([outcome for rows in means.values() for outcome in rows.values()]),
        group=np.array([prompts.setdefault(prompt, len(prompts)) for _, _, prompt in played], dtype=np.int64),
    )


def _num_others(rates: Sequence[WinRate], row: LengthControlled) -> int:
    """The models that were compared with the baseline of this row, without the two of the row."""
    return len({r.model for r in rates if r.baseline == row.baseline} - {row.model, row.baseline})
