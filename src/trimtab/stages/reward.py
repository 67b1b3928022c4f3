"""Train a reward model on preference pairs, or on judgements of single replies.

It learns from comparisons what people prefer, and the stage writes down how far to trust it. Rankings are read as all
of their pairs, which stay together in one tree, so pairs and rankings differ in the loss alone. The members of an
ensemble take their steps in the same loop: one member is the usual case of it. Losses over single replies (step labels,
outcomes, ratings) have no pairs to be judged by; `reward_replies.py` is their loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.batches.trees import TokenTrees, Tree, split_sizes
from trimtab.core.errors import DataError
from trimtab.core.files import write_out
from trimtab.core.metrics import Metrics, merge
from trimtab.core.types import PreferencePair
from trimtab.data.chat import Chat
from trimtab.data.pairs import Comparisons, group_pairs
from trimtab.data.rankings import only_rankings
from trimtab.engines.build import Engines
from trimtab.evals.length_curves import length_refusal
from trimtab.evals.reward_card import MOST_TRAINING_PAIRS
from trimtab.models.average import HEAD_START
from trimtab.models.forward import sequence_scores_of
from trimtab.models.lengths import refuse_long
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.models.save import round_as_written
from trimtab.rewards.ensemble import EnsembleScorer
from trimtab.rewards.length_correction import corrections_in, fitted, write_correction
from trimtab.rewards.scorer import RewardModelScorer, finite_scores, rewards_of
from trimtab.runs.models import CARD_FILE, model_digest
from trimtab.runs.run import Run
from trimtab.stages.card import card_text, measure, reply_lengths
from trimtab.stages.reading import read_demonstration_trees, read_split, say_too_long
from trimtab.stages.reward_members import (
    Examples,
    agreement_of,
    common_scale,
    head_start,
    load_roles,
    name_of,
    on_scale,
    refuse_unused_seed,
    save_members,
    start_members,
)
from trimtab.stages.reward_replies import train_on_replies
from trimtab.stages.reward_settings import RewardSettings
from trimtab.stages.reward_teacher import TEACHER_FILE, agreement_with_teacher, teach
from trimtab.stages.stage import EPOCHS_GROW, Stage
from trimtab.stages.supervised import (
    FIT,
    Epochs,
    Learners,
    Validation,
    make_learner,
    training,
    validate,
)
from trimtab.stats import Floats

NUM_SHOWN = 1000
"""How many demonstrations the mean reward is taken over."""
NUM_MEASURED = 256
"""How many prompts' replies give the mean and deviation of the reward, to within a few hundredths of the deviation."""


def run(settings: RewardSettings, run: Run) -> None:
    """Trains, calibrates and judges the reward model; writes it to `run.model_dir` and its card beside that."""
    refuse_unused_seed(settings)
    if settings.learns_from is not PreferencePair:
        train_on_replies(settings, run)
        return
    chat = Chat(load_tokenizer(settings.model))
    train_on, judged_by, counts = read_comparisons(settings, run, chat)
    shown = read_demonstrations(settings, chat, run, counts)
    taught = teach(settings, run, chat, train_on, judged_by, counts) if settings.teacher else None
    learned, validated = (train_on, judged_by) if taught is None else (taught.train, taught.held_out)
    members, base = start_members(settings, chat)
    starts = [head_start(member) for member in members]
    refuse_long(members[0].model, chain(train_on.trees, judged_by.trees, shown), where=settings.data, fix=FIT)
    epochs = Epochs.of(settings, learned.trees)
    roles = {name_of(number): member for number, member in enumerate(members)}
    engines = Engines.start(settings, run.directory, load=load_roles, models=roles)
    learners = [make_learner(role, settings, epochs, engines, name=name) for name, role in roles.items()]
    own_examples = [Examples(settings, number, learned.trees) for number in range(len(members))]
    validation = Validation(lambda: [tree.num_tokens for tree in validated.trees], validated.batch)
    with engines, training(run, Learners(learners), epochs, settings, description="reward") as steps:
        for number, _ in steps:
            batches = [learned.batch(own.of_step(number)) for own in own_examples]
            updates: list[Metrics] = []
            for learner, batch in zip(learners, batches, strict=True):
                updates.append(learner.update([(batch, [settings.loss])]))
            metrics = merge(updates) | steps.speed(*batches)
            if steps.validates(number):
                metrics |= merge(validate(learner, settings.loss, validation) for learner in learners)
            steps.log(metrics)

    for member in members:
        if member.adapter is None:
            round_as_written(member.model)
    moments = [calibrate(member, settings, learned, shown) for member in members]
    scores = np.array([scores_of_pairs(member, judged_by, settings) for member in members])  # [K, 2, pairs]
    flat = scores.reshape(len(members), -1)
    scale = None if len(members) == 1 else common_scale(flat, [own["shift"] for own in moments])
    scores = on_scale(scores, scale)
    scorer = scorer_of(members, chat, settings, scale=scale)
    lengths = reply_lengths(scorer, judged_by.pairs())
    sources = [settings.held_out_data or settings.data]

    def write(path: Path) -> None:
        facts = [
            {f"reward_{name}": value for name, value in own.items()} | {HEAD_START: start}
            for own, start in zip(moments, starts, strict=True)
        ]
        save_members(members, facts, chat.tokenizer, path, base=base, scale=scale)
        if not length_refusal(lengths.ravel()):
            write_correction(fitted(scores.reshape(len(members), -1), lengths.ravel(), data=sources), path)

    run.save_model(write)
    card = judge(scores, train_on, judged_by, settings, scorer=scorer, lengths=lengths, directory=run.model_dir)
    if taught is not None:
        card["teacher"] = agreement_with_teacher(settings, judged_by.pairs(), scores.mean(0), taught.scores)
    about = {"model": str(run.model_dir), "digest": model_digest(run.model_dir)}
    write_out(run.directory / CARD_FILE, card_text(card, **about, data=sources))
    zero = moments[0] if scale is None else {"shift": scale["shift"]}
    run.finish(card | zero | {"counts": counts} | steps.counts)


def read_comparisons(settings: RewardSettings, run: Run, chat: Chat) -> tuple[Comparisons, Comparisons, dict[str, int]]:
    """The pairs to train on and to judge by, as rankings if the loss needs these, and counts of what was read and left
    out. Raises DataError if there is nothing to train on or to judge by, or no pair with a right side."""
    train, held_out, counts = read_split(PreferencePair, settings, run, chat)
    fit_in: dict[str, Any] = {"max_tokens": settings.max_tokens, "on_too_long": settings.on_too_long, "counts": counts}
    judged_by = group_pairs(held_out, chat, **fit_in)
    train_on = group_pairs(train, chat, **fit_in)
    if settings.loss.needs_ranking:
        ties = getattr(settings.loss, "ties", "refuse")
        ranked: dict[str, Any] = {"ties": ties, "on_bad_row": settings.on_bad_row, "counts": counts}
        train_on = only_rankings(train_on, where=settings.data, **ranked)
        judged_by = only_rankings(judged_by, where=settings.held_out_data or settings.data, **ranked)
    say_too_long(counts, settings.max_tokens)
    if not train_on.trees or not judged_by.trees:
        raise DataError(
            f"{train_on.num_pairs} pairs to train on and {judged_by.num_pairs} to judge by; both are needed",
            where=settings.data,
            fix="give more pairs, another held_out share, or a larger max_tokens",
        )
    if not settings.teacher and (train_on.labels == 0.5).all():
        raise DataError(
            f"all {train_on.num_pairs} pairs to train on have the label 0.5: nothing says which reply is better",
            where=settings.data,
            fix="give pairs of which one side is preferred, or name a teacher that scores these",
        )
    return train_on, judged_by, counts


def read_demonstrations(settings: RewardSettings, chat: Chat, run: Run, counts: dict[str, int]) -> Sequence[Tree]:
    """The demonstrations whose mean reward is to be zero, fitted as the pairs are; what was dropped or truncated is
    counted. Raises DataError if none is left; this happens before training, because the run could not be finished."""
    if settings.demonstrations is None:
        return ()
    return read_demonstration_trees(
        settings.demonstrations,
        run,
        chat,
        max_tokens=settings.max_tokens,
        on_too_long=settings.on_too_long,
        on_bad_row=settings.on_bad_row,
        counts=counts,
        owner="demonstrations",
        where=settings.demonstrations,
        fix="raise max_tokens, give shorter demonstrations, or leave demonstrations out",
        limit=NUM_SHOWN,
    )


def calibrate(
    model: ScalarModel, settings: RewardSettings, train: Comparisons, shown: Sequence[Tree]
) -> dict[str, float]:
    """The shift that makes demonstrations average zero (Ouyang et al., arXiv:2203.02155, section 3.5), and the mean
    and deviation of the shifted reward over the replies compared in training."""
    num = len(train.trees)
    # Spread over the data, which may be sorted.
    batch = train.batch([i * num // NUM_MEASURED for i in range(NUM_MEASURED)] if num > NUM_MEASURED else range(num))
    scores = sequence_scores_of(model, batch.trees, settings.token_budget).double()
    if shown:
        shift = float(sequence_scores_of(model, TokenTrees.build(shown), settings.token_budget).double().mean())
    else:
        shift = float(scores[batch.chosen_ids].mean())
    return {"shift": shift, "mean": float(scores.mean()) - shift, "std": float(scores.std(correction=0))}


def judge(
    scores: Floats,
    train: Comparisons,
    held_out: Comparisons,
    settings: RewardSettings,
    *,
    scorer: RewardModelScorer,
    lengths: Floats,
    directory: Path,
) -> dict[str, Any]:
    """The card on the held-out pairs, from the members' scores [K, 2, num_pairs] of chosen and rejected replies on
    their common scale, the replies' lengths [2, num_pairs], what the scorer gives to changed replies, and the
    corrections in the model's directory. The card of an ensemble is that of its mean, and says how alike its members
    are."""
    pairs = held_out.pairs()
    together: dict[str, Any] = {}
    if len(scores) > 1:
        together = {"ensemble": agreement_of(scores[:, 0], scores[:, 1], np.array([pair.label for pair in pairs]))}
    chosen, rejected = scores.mean(0)
    card = measure(
        pairs,
        chosen=chosen,
        rejected=rejected,
        score=lambda texts: rewards_of(scorer, texts, unread="nan"),
        lengths=lengths,
        corrections=corrections_in(directory),
        training_pairs=train.pairs(MOST_TRAINING_PAIRS),
        seed=settings.seed,
    )
    return card | together


def scorer_of(
    members: Sequence[ScalarModel], chat: Chat, settings: RewardSettings, *, scale: Mapping[str, Any] | None
) -> RewardModelScorer:
    """What scores texts with the trained models as they are in memory; the zero does not matter for a card."""
    if scale is None:
        return RewardModelScorer.of(members[0], chat, token_budget=settings.token_budget, shift=0.0)
    return EnsembleScorer(members, chat, token_budget=settings.token_budget, **scale)


def scores_of_pairs(model: ScalarModel, pairs: Comparisons, settings: RewardSettings) -> tuple[Floats, Floats]:
    """The scores of the chosen and the rejected reply of each pair, in the micro-batches that one batch would have.
    Raises EngineError if one is not finite."""
    trees = pairs.trees
    groups = split_sizes([tree.num_tokens for tree in trees], settings.token_budget)
    found: list[list[tuple[float, float]]] = [[] for _ in trees]
    for members in groups:
        batch = pairs.batch(members)
        scores = sequence_scores_of(model, batch.trees, settings.token_budget).double()
        both = iter(zip(scores[batch.chosen_ids].tolist(), scores[batch.rejected_ids].tolist(), strict=True))
        for i, compared in zip(members, batch.compared, strict=True):
            found[i] = [next(both) for _ in compared]
    both_sides = np.array([scores for of_tree in found for scores in of_tree]).reshape(-1, 2)
    chosen, rejected = finite_scores(both_sides, of=model).T
    return chosen, rejected


STAGE = Stage(
    settings=RewardSettings,
    run=run,
    makes="reward model",
    model="any",
    trains="reward model",
    data=lambda settings: (settings.learns_from,),
    writes=("metrics.jsonl", CARD_FILE, TEACHER_FILE),
    grows=EPOCHS_GROW,
    about="A reward model learned what people prefer, from comparisons of replies or from judgements of single ones.",
    charts=(
        ("loss/train", "loss/validation"),
        ("reward/accuracy", "reward/validation_accuracy"),
        ("reward/margin", "reward/validation_margin"),
    ),
)
