"""The reward stage over single replies: process models (step labels), outcome models (thumbs), ratings.

The loop is that of pairs, with one loss over labelled tokens. What differs is after it: there is no zero to fix,
because a probability and a rating have their own, and the model is judged by its labels, not by pairs. The directory
says what its scores mean (`reward_kind`) and, of a process model, how steps are found and put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.core import registry
from trimtab.core.errors import DataError, EngineError
from trimtab.core.types import RatedResponse, SteppedResponse, prompt_id
from trimtab.data.chat import Chat
from trimtab.data.graded import (
    Grade,
    GradedPrompts,
    grade_outcome,
    grade_rating,
    grade_steps,
    group_graded,
)
from trimtab.data.layouts import Loaded
from trimtab.data.split import split_by_prompt
from trimtab.engines.build import Engines
from trimtab.math.losses.graded import LabelsFrom, OutcomeLoss, ProcessLoss
from trimtab.models.average import HEAD_START
from trimtab.models.forward import values_and_scores_of
from trimtab.models.lengths import refuse_long
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.models.save import round_as_written
from trimtab.rewards.scorer import finite_scores
from trimtab.runs.run import Run
from trimtab.stages.reading import read, say_too_long, say_trained_on
from trimtab.stages.reward_members import head_start, load_roles, save_members, start_members
from trimtab.stages.reward_settings import RewardSettings
from trimtab.stages.supervised import FIT, Epochs, Validation, make_learner, training, validate
from trimtab.stats import Floats, bootstrap_mean

LABELS_FROM: dict[str, LabelsFrom] = {
    "steps of PRM800K": "people",
    "a feedback project": "people",
    "steps of Math-Shepherd": "rollouts",
}
"""Who labelled the steps, by the layout of the data, of the layouts that say so."""


def train_on_replies(settings: RewardSettings, run: Run) -> None:
    """Trains and judges a model with a loss over single replies; writes it to `run.model_dir`."""
    chat = Chat(load_tokenizer(settings.model))
    loaded = load_replies(settings.data, settings, run, chat, limit=settings.limit)
    counts = dict(loaded.counts)
    if settings.held_out_data is None:
        train, held_out = split_by_prompt(loaded.records, settings.held_out)
    else:
        train, held_out = loaded.records, load_replies(settings.held_out_data, settings, run, chat).records
        trained, judged = ([prompt_id(one.prompt.messages) for one in records] for records in (train, held_out))
        say_trained_on(trained, judged, settings, counts)
    facts = facts_of(settings, loaded)
    refuse_constant(settings, train)
    train_on = graded(train, chat, settings, counts)
    judged_by = graded(held_out, chat, settings, counts)
    say_too_long(counts, settings.max_tokens)
    if not train_on.trees or not judged_by.trees:
        raise DataError(
            f"{train_on.num_replies} replies to train on and {judged_by.num_replies} to judge by; both are needed",
            where=settings.data,
            fix="give more replies, another held_out share, or a larger max_tokens",
        )
    [member], base = start_members(settings, chat)
    if settings.loss.gives == "both" and not member.is_decoder:
        raise EngineError(
            "this model gives a score of a whole reply but none at a token within it",
            where=f"model, architecture {type(member.model).__name__}",
            fix="start from a decoder; an encoder can learn pairs, or ratings with loss = 'regression'",
        )
    start = head_start(member)
    refuse_long(member.model, chain(train_on.trees, judged_by.trees), where=settings.data, fix=FIT)
    epochs = Epochs.of(settings, train_on.trees)
    engines = Engines.start(settings, run.directory, load=load_roles, models={"reward": member})
    learner = make_learner(member, settings, epochs, engines, name="reward")
    validation = Validation(lambda: [tree.num_tokens for tree in judged_by.trees], judged_by.batch)
    with engines, training(run, learner, epochs, settings, description="reward") as steps:
        for number, examples in steps:
            batch = train_on.batch(examples)
            metrics = learner.update([(batch, [settings.loss])]) | steps.speed(batch)
            if steps.validates(number):
                metrics |= validate(learner, settings.loss, validation)
            steps.log(metrics)
    if member.adapter is None:
        round_as_written(member.model)
    known = facts | {"reward_shift": 0.0, HEAD_START: start}
    run.save_model(lambda path: save_members([member], [known], chat.tokenizer, path, base=base, scale=None))
    card = judge(member, judged_by, settings)
    run.finish(card | facts | {"counts": counts} | steps.counts)


def load_replies(source: str, settings: RewardSettings, run: Run, chat: Chat, limit: int | None = None) -> Loaded[Any]:
    """The records that the loss learns from."""
    kind = settings.loss.learns_from
    return read(kind, source, run, on_bad_row=settings.on_bad_row, limit=limit, accepts=chat.refusal)


def facts_of(settings: RewardSettings, loaded: Loaded[Any]) -> dict[str, Any]:
    """What the directory says of its scores. Raises DataError if nothing says who labelled steps, or if every reply has
    one step."""
    loss = settings.loss
    kind = registry.name_of("reward_loss", type(loss))
    if not isinstance(loss, ProcessLoss):
        return {"reward_kind": kind}
    labels_from = loss.labels_from or LABELS_FROM.get(loaded.layout)
    if labels_from is None:
        raise DataError(
            f"nothing says who labelled the steps of {loaded.layout}, and that decides how they become one reward",
            where=settings.data,
            fix="set loss.labels_from = 'rollouts' for labels of sampled completions (the reward is that of the last "
            "step), or 'people' for labels of those who read the steps (the reward is the lowest)",
        )
    if all(len(record.steps) == 1 for record in loaded.records):
        raise DataError(
            f"each of {len(loaded.records)} replies has one step, so that there is no process to learn",
            where=settings.data,
            fix="give replies in several steps, or learn from whole replies with loss = 'outcome' (prompt, completion, "
            "label)",
        )
    aggregate = loss.aggregate or ("last" if labels_from == "rollouts" else "min")
    return {
        "reward_kind": kind,
        "reward_separator": loss.separator,
        "reward_labels_from": labels_from,
        "reward_aggregate": aggregate,
    }


def refuse_constant(settings: RewardSettings, records: Sequence[Any]) -> None:
    """Raises DataError if these records have one label or one rating alone, which a model would give to any reply."""
    given = {float(label) for record in records for label in labels_of(record) if label is not None}
    if len(given) == 1:
        what = "rating" if isinstance(records[0], RatedResponse) else "label"
        raise DataError(
            f"every {what} of {len(records)} replies to train on is {given.pop():g}: nothing tells good replies from "
            "bad ones",
            where=settings.data,
            fix=f"give replies of both kinds; if a program gave each {what}, see that replies can meet and miss it",
        )


def labels_of(record: Any) -> Sequence[float | None]:
    """The labels of the steps of a record, or its one label or rating."""
    if isinstance(record, SteppedResponse):
        return record.labels
    return (record.rating if isinstance(record, RatedResponse) else float(record.label),)


def graded(records: Sequence[Any], chat: Chat, settings: RewardSettings, counts: dict[str, int]) -> GradedPrompts:
    """The records with their labels at tokens. A reply whose steps hold the separator stops the stage, or with
    `on_bad_row = "drop"` is left out and counted."""

    def found() -> Iterator[tuple[Any, Grade]]:
        for record in records:
            try:
                yield record, grade(record, chat, settings.loss)
            except DataError:
                if settings.on_bad_row == "stop":
                    raise
                counts["dropped_separator_in_step"] = counts.get("dropped_separator_in_step", 0) + 1

    fit_in: dict[str, Any] = {"max_tokens": settings.max_tokens, "on_too_long": settings.on_too_long}
    return group_graded(found(), chat, token_budget=settings.token_budget, counts=counts, **fit_in)


def grade(record: Any, chat: Chat, loss: Any) -> Grade:
    """The labels of a record at the tokens at which this loss reads scores."""
    if isinstance(record, SteppedResponse):
        return grade_steps(record, chat, separator=loss.separator)
    if isinstance(loss, OutcomeLoss):
        return grade_outcome(record, chat, tokens=loss.tokens)
    return grade_rating(record, chat)


# --- judging ---


def judge(model: ScalarModel, held_out: GradedPrompts, settings: RewardSettings) -> dict[str, Any]:
    """How well the scores fit the held-out labels, with intervals that resample prompts. Raises EngineError for scores
    that are not finite."""
    batch = held_out.batch()
    values, scores = values_and_scores_of(model, batch.trees, settings.token_budget)
    own = list(scores_by_reply(values, scores, batch.sequence_ids, held_out.grades))
    finite_scores(np.concatenate(own), of=model)
    flat = [grade for grades in held_out.grades for grade in grades]
    labels = [np.array(grade.labels) for grade in flat]
    prompts = [str(i) for i, grades in zip(held_out.prompts, held_out.grades, strict=True) for _ in grades]
    found: dict[str, Any] = {"num_replies": len(own), "num_labels": int(sum(map(len, labels)))}
    if settings.loss.gives == "scores":
        errors = np.array([float(a[-1] - b[-1]) for a, b in zip(own, labels, strict=True)])
        spread = float(np.std([b[-1] for b in labels]))
        found |= bootstrap_mean(errors**2, groups=prompts).named("squared_error")
        return found | {"rating_std": spread}
    of_label = [prompt for prompt, a in zip(prompts, own, strict=True) for _ in a]
    scores_flat, labels_flat = np.concatenate(own), np.concatenate(labels)
    right = ((scores_flat > 0) == (labels_flat > 0.5)).astype(float)
    decided = labels_flat != 0.5
    groups = [prompt for prompt, known in zip(of_label, decided, strict=True) if known]
    found |= bootstrap_mean(right[decided], groups=groups, shares=True).named("label_accuracy") if groups else {}
    found["right_fraction"] = float(labels_flat.mean())
    if not isinstance(settings.loss, ProcessLoss):
        return found
    return found | first_errors(own, labels, [grade.num_before_gap for grade in flat])


def first_errors(scores: Sequence[Floats], labels: Sequence[Floats], gaps: Sequence[int | None] = ()) -> dict[str, Any]:
    """How often the model finds the first wrong step of a reply that has one, and finds none in a reply that has none;
    and the harmonic mean of the two (ProcessBench: Zheng et al., arXiv:2412.06559).

    `gaps` has for each reply the number of labels before the first step that nobody judged, None if there is no such
    step. If no step before it is wrong, nobody knows which is the first wrong step, and the reply is left out.

    `lowest_is_last_fraction` is the share of replies with several judged steps whose lowest score is the last one:
    above 0.4 the process model is in effect an outcome model (Zhang et al., arXiv:2501.07301).
    """

    def first(wrong: NDArray[np.bool_]) -> int:
        return int(np.argmax(wrong)) if wrong.any() else -1

    pairs = [
        (first(a[:gap] <= 0), first(b[:gap] < 0.5))
        for a, b, gap in zip(scores, labels, gaps or [None] * len(labels), strict=True)
        if gap is None or (b[:gap] < 0.5).any()
    ]
    found = {
        "first_error_accuracy": [said == true for said, true in pairs if true >= 0],
        "no_error_accuracy": [said == true for said, true in pairs if true < 0],
    }
    rates = {name: float(np.mean(right)) for name, right in found.items() if right}
    counts = {f"{name}_n": len(right) for name, right in found.items()}
    both = list(rates.values())
    f1 = {"first_error_f1": 2 * both[0] * both[1] / (both[0] + both[1]) if sum(both) else 0.0} if len(both) == 2 else {}
    several = [int(np.argmin(a)) == len(a) - 1 for a in scores if len(a) > 1]
    lowest = {"lowest_is_last_fraction": float(np.mean(several))} if several else {}
    return rates | counts | f1 | lowest


def scores_by_reply(
    values: Tensor, scores: Tensor, sequence_ids: Tensor, grades: Sequence[Sequence[Grade]]
) -> Iterator[Floats]:
    """The scores at the labelled tokens of each reply, from the values [M] and the scores [B] of their batch."""
    flat = [grade for of_prompt in grades for grade in of_prompt]
    sizes = torch.bincount(sequence_ids, minlength=len(flat)).tolist()
    for grade, before, last in zip(flat, torch.split(values, sizes), scores, strict=True):
        ends = grade.places[-1] == len(grade.ids) - 1
        yield torch.cat([before, last[None]] if ends else [before]).double().numpy()
