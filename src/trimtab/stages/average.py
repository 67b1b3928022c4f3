"""Averages the weights of models that were trained from one start: reward models (WARM) or policies (WARP).

Models that began alike and saw their data in another order lie in one basin, and their mean is a model of the same size
that is surer of what they agree on (Ramé et al., arXiv:2401.12187; policies: arXiv:2406.16768). Whether they do is
looked at: an average of reward models is refused where it orders held-out pairs worse than its members do, anywhere on
the way from a member to the average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError, DataError, EngineError
from trimtab.core.files import json_text, new_directory
from trimtab.core.hub import base_of, members_in, reward_facts, same_model
from trimtab.core.types import PreferencePair
from trimtab.data.chat import Chat
from trimtab.data.layouts import Loaded, OnBadRow, load
from trimtab.evals.reward_card import ordering_accuracy, reward_card
from trimtab.models.average import (
    average_heads,
    average_products,
    copies_of,
    refuse_other_architecture,
    refuse_other_layers,
    refuse_unlike,
    save_products,
    set_between,
    weighted_sum,
    weights_of,
)
from trimtab.models.load import is_classifier, load_causal, load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.models.save import round_as_written, save_model, write_reward_facts
from trimtab.reports.card_sentences import said_of_training
from trimtab.rewards.scorer import TOKEN_BUDGET, RewardModelScorer
from trimtab.runs.models import trained_on
from trimtab.stages.card import AVERAGE_FILE, rewards_of_sides
from trimtab.stats import Floats

PARTS = (0.25, 0.5, 0.75, 1.0)
"""Where on the way from a member (0) to the average (1) the accuracy is looked at."""
TOLERANCE = 0.01
"""By so much the accuracy may lie below that of the members before an average is refused."""


@dataclass(frozen=True)
class Point:
    """The accuracy of one mixture of the members on the pairs, for example
    `Point("runs/a/model", 0.5, 0.71, 0.70)`."""

    member: str
    """The member at the start of the way; "" for the average itself."""
    part: float
    """The place on the way: 0 is the member, 1 the average."""
    accuracy: float
    chord: float
    """The mean of the members' own accuracies, each with its share in this mixture."""

    @property
    def below(self) -> float:
        """How far the accuracy lies below the chord; negative if it lies above."""
        return self.chord - self.accuracy


def average(
    *,
    out: Path,
    models: Sequence[str],
    weights: Sequence[float] = (),
    data: str | None = None,
    on_bad_row: OnBadRow = "stop",
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> list[str]:
    """Writes the average of `models` to the directory `out`, whole or not at all; returns sentences about it.

    An ensemble stands for its members. `weights` are the members' shares, equal ones if empty. Reward models need
    `data`, preference pairs on which the way to the average is looked at and its zero, moments and temperature are
    fitted anew. Raises EngineError for models that do not belong together, ConfigError for weights and a tolerance that
    are none, and DataError if no pair has a right side, or if the average is worse than its members, unless `force`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} is there and not empty", where="OUT", fix="name a new directory")
    models = [member for path in models for member in members_in(path)]
    shares = _shares(models, weights)
    _check_tolerance(tolerance)
    scalar, base = _are_reward_models(models, data), base_of(models[0])
    _check_members(models, rank)
    refuse_repeated_models(models)
    loaded = None if data is None else _pairs_with_a_side(data, on_bad_row)
    load_member: Callable[[Any], PreTrainedModel] = load_scalar if scalar else load_causal
    loaders = [partial(load_member, path) for path in models]
    model = loaders[0]()
    for path, member in zip(models[1:], loaders[1:], strict=True):
        refuse_other_architecture(models[0], model, path, member())
    tokenizer = load_tokenizer(models[0])
    record: dict[str, Any] = {"members": list(models), "weights": shares}
    said = [f"the average of {len(models)} models with the weights {', '.join(f'{share:.3g}' for share in shares)}"]
    with new_directory(out) as aside:
        if base is None:
            mean = weighted_sum(loaders, shares)
        else:
            changes = average_products(models, shares, rank=rank)
            save_products(changes, average_heads(models, shares), models, aside, base=base)
            tokenizer.save_pretrained(aside)
            mean = copies_of(load_member(aside))
            record |= {"rank": changes.rank, "kept_fraction": changes.kept_fraction}
            said.append(f"an adapter of rank {changes.rank} with {changes.kept_fraction:.1%} of the squared change")
        judge = None
        if data is not None and loaded is not None:
            judge = _Judge.of(model, Chat(tokenizer), loaded.records)
            points = judge.way(models, loaders, shares, mean)
            num_decided = sum(pair.label != 0.5 for pair in loaded.records)
            said.append(_verdict(points, tolerance, force, where=data, num_pairs=num_decided))
            record |= {"data": data, "tolerance": tolerance, "points": [vars(point) for point in points]}
            said += _said_of_pairs(loaded, data, models)
        set_between(model, mean, mean, 1.0)
        if judge is not None:
            if base is None:
                round_as_written(model)
            record["card"] = judge.fit()
        if base is None:
            save_model(model, tokenizer, aside)
        elif scalar:
            write_reward_facts(model, aside)
        (aside / AVERAGE_FILE).write_text(json_text(record), encoding="utf-8")
    return [f"{out}: {said[0]}", *said[1:]]


def refuse_repeated_models(models: Sequence[str]) -> None:
    """Raises ConfigError if two of the members are one directory."""
    for number, path in enumerate(models):
        if any(same_model(path, other) for other in models[:number]):
            raise ConfigError(
                f"{path} is given twice",
                where="MODEL",
                fix="give each model once; --weight says how much each counts",
            )


def _check_tolerance(tolerance: float) -> None:
    """Raises ConfigError for a tolerance that is no difference of accuracies."""
    if not 0 <= tolerance <= 1:  # nan is neither
        raise ConfigError(
            f"a tolerance of {tolerance}; it is a difference of accuracies",
            where="--tolerance",
            fix=f"give a number from 0 to 1, such as {TOLERANCE}, or leave it out",
        )


def _said_of_pairs(loaded: Loaded[PreferencePair], data: str, models: Sequence[str]) -> list[str]:
    """What speaks against the pairs that judged the average: that a member learnt from them, and rows left out."""
    seen = trained_on(models, {data: loaded.sha256})
    said = [said_of_training(seen)] if seen else []
    if loaded.num_dropped:
        said.append(loaded.left_out)
    return said


def _shares(models: Sequence[str], weights: Sequence[float]) -> list[float]:
    """The share of each member. Raises ConfigError unless they are above 0 and add up to 1."""
    if len(models) < 2:
        raise ConfigError(f"{len(models)} model; an average needs two or more", where="MODEL", fix="name more models")
    shares = list(weights) or [1 / len(models)] * len(models)
    above_0 = all(share > 0 for share in shares)  # nan is not
    if len(shares) != len(models) or not above_0 or not abs(sum(shares) - 1) <= 1e-6:
        raise ConfigError(
            f"the weights {', '.join(f'{share:g}' for share in shares)} of {len(models)} models",
            where="--weight",
            fix="give each model one, all above 0 and 1 in sum, or leave them out for equal ones",
        )
    return shares


def _check_members(models: Sequence[str], rank: int | None) -> None:
    """Raises EngineError for models that do not belong together, and for reward models whose zero and moments are not
    those of pairs; ConfigError for a `rank` of whole models."""
    for path in models:
        if (kind := reward_facts(path).get("reward_kind")) is not None:
            raise EngineError(
                f"a reward model of the kind {kind!r}, and the way to an average is looked at on pairs",
                where=path,
                fix="average models that were trained on pairs",
            )
    refuse_unlike(models)
    if base_of(models[0]) is not None:
        refuse_other_layers(models)
    elif rank is not None:
        raise ConfigError("these are whole models, which have no rank", where="--rank", fix="leave it out")


def _pairs_with_a_side(data: str, on_bad_row: OnBadRow) -> Loaded[PreferencePair]:
    """The pairs of a source. Raises DataError if none of them has a right side."""
    loaded = load(PreferencePair, data, on_bad_row=on_bad_row)
    pairs = loaded.records
    if all(pair.label == 0.5 for pair in pairs):
        raise DataError(
            f"all {len(pairs)} pairs have the label 0.5: no side is right, so they cannot tell how good an average is",
            where=data,
            fix="give pairs of which one side is preferred",
        )
    return loaded


def _are_reward_models(models: Sequence[str], data: str | None) -> bool:
    """Whether all of these are reward models. Raises ConfigError if only some are, or if `data` does not suit them."""
    kinds = [is_classifier(path) for path in models]
    if any(kinds) != all(kinds):
        raise ConfigError(
            f"{models[kinds.index(True)]} is a reward model and {models[kinds.index(False)]} is none",
            where="MODEL",
            fix="average models of one kind",
        )
    if all(kinds) and data is None:
        raise ConfigError(
            "the average of reward models has another zero and scale than its members, and may be worse",
            where="--data",
            fix="give pairs that none of them was trained on: --data held_out.jsonl",
        )
    if not any(kinds) and data is not None:
        raise ConfigError(
            "these models are policies, which are not judged by pairs",
            where="--data",
            fix="leave it out, and use trimtab evaluate on what is written",
        )
    return all(kinds)


@dataclass(frozen=True)
class _Judge:
    """Scores pairs with one model, whose weights are set again and again."""

    scorer: RewardModelScorer
    pairs: Sequence[PreferencePair]

    @classmethod
    def of(cls, model: PreTrainedModel, chat: Chat, pairs: Sequence[PreferencePair]) -> _Judge:
        """Reads the scores of a model where it learned to give them, without its shift."""
        shift = None if getattr(model.config, "reward_shift", None) is None else 0.0
        role = ScalarModel(model, pad_id=chat.pad_id, gives="scores")
        pad_id = getattr(model, "trained_pad_id", None)
        return cls(RewardModelScorer.of(role, chat, token_budget=TOKEN_BUDGET, shift=shift, pad_id=pad_id), pairs)

    def scores(self) -> tuple[Floats, Floats]:
        """The scores of the chosen and of the rejected replies."""
        return rewards_of_sides(self.scorer, self.pairs)

    def accuracy(self) -> float:
        """The share of pairs with a right side that are ordered as labelled, ties half."""
        chosen, rejected = self.scores()
        decided = np.array([pair.label != 0.5 for pair in self.pairs])
        return ordering_accuracy(chosen[decided], rejected[decided]).value

    def way(
        self,
        names: Sequence[str],
        members: Sequence[Callable[[], PreTrainedModel]],
        shares: Sequence[float],
        mean: Mapping[str, Tensor],
    ) -> list[Point]:
        """The points on the way from each member to the average, and the average last."""
        model = self.scorer.model.model
        own: list[list[float]] = []
        for load_member in members:
            start = weights_of(load_member())
            found = []
            for part in (0.0, *PARTS):
                set_between(model, start, mean, part)
                found.append(self.accuracy())
            own.append(found)
        chord = sum(share * found[0] for share, found in zip(shares, own, strict=True))
        points = [
            Point(name, part, accuracy, (1 - part) * found[0] + part * chord)
            for name, found in zip(names, own, strict=True)
            for part, accuracy in zip((0.0, *PARTS), found, strict=True)
            if part < 1
        ]
        return [*points, Point("", 1.0, own[0][-1], chord)]

    def fit(self) -> dict[str, Any]:
        """Sets the zero, moments and temperature of the model in its configuration; returns its card on the pairs.

        The zero is the mean of the chosen replies, as in the reward stage without demonstrations. A model that another
        program made has no such entries, and gets none: they would change how it is read.
        """
        chosen, rejected = self.scores()
        card = reward_card(self.pairs, score_chosen=chosen, score_rejected=rejected)
        config = self.scorer.model.model.config
        if getattr(config, "reward_shift", None) is not None:
            both = np.concatenate([chosen, rejected])
            shift = float(chosen.mean())
            moments = {"reward_mean": float(both.mean()) - shift, "reward_std": float(both.std())}
            config.update({"reward_shift": shift, "reward_temperature": card["temperature"], **moments})
        return card


def _verdict(points: Sequence[Point], tolerance: float, force: bool, *, where: str, num_pairs: int) -> str:
    """A sentence about the way to the average. Raises DataError if it sinks too far below the chord, unless `force`."""
    worst, average_ = max(points, key=lambda point: point.below), points[-1]
    place = f"{worst.part:.0%} of the way from {worst.member}" if worst.member else "the average"
    said = (
        f"on {num_pairs} pairs the average is right about {average_.accuracy:.2%} and its members about "
        f"{average_.chord:.2%}; at worst, {place} is {max(0.0, worst.below):.2%} below its ends"
    )
    if worst.below <= tolerance:
        return said
    if force:
        return f"{said}, more than the tolerance of {tolerance:.2%}: written because of --force"
    raise DataError(
        f"the accuracy sinks between these models: {said}, and {tolerance:.2%} is allowed",
        where=where,
        fix="average models that began with one score head (head_seed) and were trained with a smaller learning rate "
        "or for fewer steps; or keep them apart as an ensemble; or write it all the same with --force",
    )
