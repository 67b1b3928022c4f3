"""Reward modelling: learn from comparisons what people prefer, and write down how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from trimtab import seeds
from trimtab.data.layouts import load
from trimtab.data.chat import Chat
from trimtab.data.preferences import split_by_prompt
from trimtab.data.trees import TokenTrees, Tree, TreeBatch, per, response_tree
from trimtab.engines.local_learner import AdamW, LocalLearner
from trimtab.errors import DataError
from trimtab.evals.reward_card import reward_card
from trimtab.math.losses.reward import RewardLoss
from trimtab.models.forward import sequence_scores_of
from trimtab.models.load import load_scalar, load_tokenizer, save_model
from trimtab.models.roles import ScalarModel
from trimtab.runs.run import Run
from trimtab.stages.supervised import Epochs, fit, fitted_tree
from trimtab.types import Demonstration, PreferencePair


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the reward stage."""

    model: str
    """The model to start from: usually the SFT model; any causal model or encoder."""
    data: str
    """Preference pairs: a file, a hub id or a world."""
    held_out_data: str | None = None
    """Pairs to judge the model by; without it, a share of `data` split by prompt."""
    held_out: float = 0.1
    """That share. Ignored when held_out_data is given."""
    demonstrations: str | None = None
    """Demonstrations whose mean reward is shifted to zero; without them, the chosen replies of the training pairs."""
    limit: int | None = None
    """Use only the first pairs."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Refuse the data at a bad row, or drop and count such rows."""
    max_tokens: int = 1024
    """Longest prompt and reply together."""
    on_too_long: Literal["drop", "truncate_prompt_left"] = "truncate_prompt_left"
    """What happens to a longer pair; both are counted."""
    loss: RewardLoss = field(default_factory=RewardLoss)
    """The Bradley-Terry loss and its options."""
    num_epochs: float = 1.0
    """Passes over the data; more than one overfits noisy votes quickly."""
    batch_size: int = 64
    """Pairs of one update."""
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-5, schedule="cosine", warmup_fraction=0.03))
    """The optimizer and its schedule."""
    token_budget: int = 4096
    """Tokens of one forward pass: memory and speed only."""
    validate_every: int = 0
    """Updates between validations; 0 validates once, at the end."""
    checkpoint_every: int = 100
    """Updates between checkpoints."""
    seed: int = 0
    """Seed of the new head and the order of pairs."""


@dataclass(frozen=True, kw_only=True)
class PairBatch(TreeBatch):
    """Pairs as trees: the prompt once, then the chosen and the rejected reply."""

    margins: torch.Tensor = per("tree")
    """[P] margin of each pair; 0 where the data has none."""
    labels: torch.Tensor = per("tree")
    """[P] probability that the chosen reply is preferred."""


def run(settings: Settings, run: Run) -> None:
    """Trains, calibrates and judges the reward model; writes it to `run.model_dir` and its card to summary.json."""
    chat = Chat(load_tokenizer(settings.model))
    loaded = load(PreferencePair, settings.data, on_bad_row=settings.on_bad_row, limit=settings.limit)
    run.add_data(settings.data, loaded.sha256, len(loaded.records))
    counts: dict[str, int] = dict(loaded.counts)
    if settings.held_out_data is None:
        train, held_out = split_by_prompt(loaded.records, held_out=settings.held_out)
    else:
        judged = load(PreferencePair, settings.held_out_data, on_bad_row=settings.on_bad_row)
        run.add_data(settings.held_out_data, judged.sha256, len(judged.records))
        train, held_out = loaded.records, judged.records
    train, train_trees = pair_trees(train, chat, settings, counts)
    held_out, held_out_trees = pair_trees(held_out, chat, settings, counts)
    if not train or not held_out:
        raise DataError(
            f"{len(train)} pairs to train on and {len(held_out)} to judge by; both are needed",
            where=settings.data,
            fix="give more pairs, another held_out share, or a larger max_tokens",
        )
    model = ScalarModel(
        load_scalar(settings.model, head_seed=seeds.derive(settings.seed, "reward head")), pad_id=chat.pad_id
    )
    epochs = Epochs(
        num_examples=len(train), batch_size=settings.batch_size, num_epochs=settings.num_epochs, seed=settings.seed
    )
    learner = LocalLearner(
        model, settings.optimizer, token_budget=settings.token_budget, num_updates=epochs.num_steps, name="reward"
    )
    fit(
        run,
        learner,
        settings.loss,
        lambda indices: pair_batch([train[i] for i in indices], [train_trees[i] for i in indices]),
        epochs,
        validation=pair_batch(held_out, held_out_trees),
        validate_every=settings.validate_every,
        checkpoint_every=settings.checkpoint_every,
        description="reward",
    )
    moments = calibrate(model, chat, settings, train, train_trees)
    model.model.config.update({f"reward_{name}": value for name, value in moments.items()})
    run.save_model(lambda path: save_model(model.model, chat.tokenizer, path))
    run.finish(judge(model, train, held_out, held_out_trees, settings) | moments | {"counts": counts})


def pair_trees(
    pairs: Sequence[PreferencePair], chat: Chat, settings: Settings, counts: dict[str, int]
) -> tuple[list[PreferencePair], list[Tree]]:
    """The pairs that fit and their trees; the others are counted."""
    kept, trees = [], []
    for pair in pairs:
        tree = fitted_tree(
            chat,
            pair.prompt,
            [pair.chosen, pair.rejected],
            max_tokens=settings.max_tokens,
            on_too_long=settings.on_too_long,
            counts=counts,
        )
        if tree is not None:
            kept.append(pair)
            trees.append(tree)
    return kept, trees


def pair_batch(pairs: Sequence[PreferencePair], trees: Sequence[Tree]) -> PairBatch:
    """The pairs as one batch."""
    return PairBatch(
        trees=TokenTrees.build(trees),
        margins=torch.tensor([pair.margin or 0.0 for pair in pairs]),
        labels=torch.tensor([pair.label for pair in pairs]),
    )


def calibrate(
    model: ScalarModel, chat: Chat, settings: Settings, pairs: Sequence[PreferencePair], trees: Sequence[Tree]
) -> dict[str, float]:
    """The shift that makes demonstrations average zero (Ouyang et al., arXiv:2203.02155, section 3.5), and the mean
    and deviation of the shifted reward over the replies compared in training."""
    sample = trees[: min(len(trees), 2000)]
    scores = sequence_scores_of(model, TokenTrees.build(sample), settings.token_budget).double()
    if settings.demonstrations is None:
        shift = float(scores[0::2].mean())
    else:
        demonstrations = load(Demonstration, settings.demonstrations, limit=2000).records
        shown = [
            response_tree(chat.encode_prompt(d.prompt.messages), [chat.encode_response(d.response)])
            for d in demonstrations
        ]
        shift = float(sequence_scores_of(model, TokenTrees.build(shown), settings.token_budget).double().mean())
    return {"shift": shift, "mean": float(scores.mean()) - shift, "std": float(scores.std(correction=0))}


def judge(
    model: ScalarModel,
    train: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    held_out_trees: Sequence[Tree],
    settings: Settings,
) -> dict[str, object]:
    """The reward model's card on the held-out pairs."""
    scores = sequence_scores_of(model, TokenTrees.build(held_out_trees), settings.token_budget).double().numpy()
    known = [pair.prompt.facts.get("probability_chosen") for pair in held_out]
    return reward_card(
        held_out,
        score_chosen=scores[0::2],
        score_rejected=scores[1::2],
        training_pairs=train,
        probability_chosen=None if None in known else np.array(known, dtype=float),
        seed=settings.seed,
    )
