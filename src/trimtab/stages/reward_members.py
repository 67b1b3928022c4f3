"""The models that the reward stage trains: one, or the members of an ensemble.

Members differ in their seed, and so in their score head, their adapter and the order of their data; with `bootstrap`
each also draws its own prompts. They take their steps side by side, so that a run of five is resumed like a run of
one, and adapters keep their base in memory once. They begin from one model, and what that has wrong they share: the
card says how far their errors go together.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.batches.trees import Tree
from trimtab.core import seeds
from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.hub import ENSEMBLE_FILE, base_of
from trimtab.data.chat import Chat
from trimtab.data.tokens import Lazy
from trimtab.evals.reward_card import ordering_accuracy
from trimtab.models.adapters import is_head, start_adapter
from trimtab.models.load import drawn_head, is_classifier, load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel, head_of_weights
from trimtab.models.save import save_role
from trimtab.stages.reward_settings import RewardSettings
from trimtab.stages.supervised import Epochs
from trimtab.stats import Floats, spearman

ROUNDING = 1e-6
"""Scores whose deviation is below this share of the largest are equal: float32 computes no more digits."""


def settings_of(settings: RewardSettings, member: int) -> RewardSettings:
    """The settings of one member, with a seed of its own. The first has that of the run: without `bootstrap` it is the
    model that a run of one member gives."""
    return replace(settings, seed=seeds.derive(settings.seed, "member", member)) if member else settings


def name_of(member: int) -> str:
    """The name of a member's role."""
    return f"reward_{member}" if member else "reward"


class Examples:
    """The examples of each step of a member: all in its own order, or with `bootstrap` as many as there are, drawn with
    replacement."""

    def __init__(self, settings: RewardSettings, member: int, examples: Sequence[Tree]) -> None:
        own, num = settings_of(settings, member), len(examples)
        draw = seeds.generator(own.seed, "bootstrap")
        self._drawn = draw.integers(num, size=num) if settings.bootstrap else np.arange(num)
        self._epochs = Epochs.of(own, Lazy(num, lambda i: examples[int(self._drawn[i])]))

    def of_step(self, number: int) -> list[int]:
        """The example numbers of a step; steps are counted from 0."""
        return [int(self._drawn[i]) for i in self._epochs.examples(number)]


# --- starting ---


def refuse_unused_seed(settings: RewardSettings) -> None:
    """Raises ConfigError for the seed of a new head if the model brings one that was trained."""
    path = settings.model
    if settings.head_seed is not None and (is_classifier(path) or is_classifier(base_of(path) or path)):
        raise ConfigError(
            f"head_seed = {settings.head_seed}, and {path!r} is a reward model, with whose head the training begins",
            where="head_seed and model",
            fix="leave head_seed out, or start from the model that the reward model was made of",
        )


def start_members(settings: RewardSettings, chat: Chat) -> tuple[list[ScalarModel], str]:
    """The models to train and the base they belong to. Members that are adapters share their base. A trained score
    head, of the adapter that they begin as or of the base, is where all of them begin; otherwise each draws its own."""
    first, base = _start(settings, chat)
    members = [first]
    for number in range(1, settings.members):
        own = settings_of(settings, number)
        if settings.adapter is None:
            members.append(_start(own, chat)[0])
            continue
        name, adapter = name_of(number), replace(settings.adapter, base_bits=32)  # the base is rounded already
        brought = start_adapter(first.model, name, settings.model, adapter, seed=own.seed, with_head=True)
        if "score.weight" in brought:
            head = head_of_weights(brought, first.device)
        elif is_classifier(base):
            head = copy.deepcopy(cast(nn.Linear, first.model.score))
        else:
            head = drawn_head(first.model, _head_seed(own))
        members.append(ScalarModel(first.model, pad_id=chat.pad_id, adapter=name, head=head, gives="scores"))
    return members, base


def _start(settings: RewardSettings, chat: Chat) -> tuple[ScalarModel, str]:
    """One model to train and the base it belongs to: whole, or an adapter, which may begin as the policy's."""
    path = settings.model
    options: dict[str, Any] = {"head_seed": _head_seed(settings), "device": settings.engine.find_device()}
    gives: Literal["scores", "both"] = getattr(settings.loss, "gives", "scores")
    base = path if settings.adapter is None else base_of(path) or path
    model = load_scalar(base, **options)
    _forget_facts(model)
    if settings.adapter is None:
        return ScalarModel(model, pad_id=chat.pad_id, gives=gives), path
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(
            f"the head of a {type(model).__name__} is more than one layer on a token, so it is not trained beside "
            "adapters",
            where="adapter",
            fix="leave adapter out to train all weights, or start from a decoder",
        )
    head = start_adapter(model, "reward", path, settings.adapter, seed=settings.seed, with_head=True)
    if head:
        model.load_state_dict(head, strict=False)
    return ScalarModel(model, pad_id=chat.pad_id, adapter="reward", gives=gives), base


def _forget_facts(model: PreTrainedModel) -> None:
    """Removes what an earlier run of the stage wrote of the model's scores, which mean something else afterwards."""
    for name in [name for name in model.config.to_dict() if name.startswith("reward_")]:
        delattr(model.config, name)


def _head_seed(settings: RewardSettings) -> int:
    return seeds.derive(settings.seed if settings.head_seed is None else settings.head_seed, "reward head")


def load_roles(settings: RewardSettings, _directory: Path) -> tuple[str, dict[str, ScalarModel]]:
    """The tokenizer and the members by the names of their roles; see `Engines.start`."""
    members, _ = start_members(settings, Chat(load_tokenizer(settings.model)))
    return settings.model, {name_of(number): member for number, member in enumerate(members)}


def head_start(member: ScalarModel) -> str:
    """Sixteen hex digits of the SHA-256 of a member's score head, to compare where the training of models began."""
    own = member.own_head
    found = dict(member.model.named_parameters() if own is None else own.named_parameters("score"))
    digest = hashlib.sha256()
    for name in sorted(filter(is_head, found)):
        digest.update(found[name].detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- writing ---


def save_members(
    members: Sequence[ScalarModel],
    facts: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    base: str,
    scale: Mapping[str, Any] | None,
) -> None:
    """Writes the members with what is known of each, the first into `directory` itself; an ensemble also with the
    `scale` on which its members are compared."""
    places = ["." if number == 0 else f"members/{number}" for number in range(len(members))]
    for member, known, place in zip(members, facts, places, strict=True):
        member.model.config.update(dict(known))  # adapters share it
        save_role(member, tokenizer, directory / place, base=base)
    if scale is not None:
        text = json.dumps({"members": places, **scale}, indent=2) + "\n"
        (directory / ENSEMBLE_FILE).write_text(text, encoding="utf-8")


def common_scale(scores: Floats, shifts: Sequence[float]) -> dict[str, Any]:
    """The means to subtract from the scores of the members and the factors behind that, from their scores [K, n] of
    held-out replies: each then has mean 0 and the members' average deviation. `shift` is the zero on that scale, the
    mean over members of what `shifts` are there.

    Raises EngineError for a member that gives every reply one score, up to rounding: it has no scale, and its constant
    would be the minimum of most replies.
    """
    means, deviations = scores.mean(1), scores.std(1)
    for number in np.flatnonzero(deviations <= ROUNDING * np.abs(scores).max(1)).tolist():
        raise EngineError(
            f"member {number} of {len(scores)} gives each of {scores.shape[1]} held-out replies the score "
            f"{means[number]:.4g}: it has learned nothing that it could be compared by",
            where=name_of(number),
            fix="train with a smaller learning rate or for more steps, or with another seed; or give other held-out "
            "pairs, if their replies are all alike",
        )
    scales = deviations.mean() / deviations
    shift = float((scales * (np.array(shifts) - means)).mean())
    return {"means": means.tolist(), "scales": scales.tolist(), "shift": shift}


def on_scale(scores: Floats, scale: Mapping[str, Any] | None) -> Floats:
    """The scores [K, …] of the members on their common scale; those of a single model, without a scale, as they are."""
    if scale is None:
        return scores
    means, scales = (np.array(scale[name]).reshape(-1, *[1] * (scores.ndim - 1)) for name in ("means", "scales"))
    return np.asarray((scores - means) * scales)


def agreement_of(chosen: Floats, rejected: Floats, labels: Floats) -> dict[str, Any]:
    """How alike the members are on held-out pairs, from their scores [K, num_pairs] on one scale.

    `error_correlation` is the mean over every two members of the correlation of their errors: 0 for independent
    members, 1 for equal ones. Only independent errors are averaged away. `disagreement_spearman` is the rank
    correlation of their disagreement over a pair with the error of their mean: above 0, disagreement warns.
    Without a pair that has a right side the accuracies are nan.
    """
    differences = (chosen - rejected)[:, labels != 0.5]
    wrong = np.where(differences == 0, 0.5, (differences < 0).astype(float))
    both_vary = [(a, b) for a, b in combinations(wrong, 2) if len(set(a)) > 1 and len(set(b)) > 1]
    correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in both_vary]
    mean = differences.mean(0)
    return {
        "accuracies": [ordering_accuracy(row, np.zeros_like(row)).value for row in differences],
        "error_correlation": float(np.mean(correlations)) if correlations else None,
        "disagreement": float(np.concatenate([chosen, rejected], 1).std(0).mean()),
        "disagreement_spearman": spearman(differences.std(0), (mean <= 0).astype(float)),
    }
