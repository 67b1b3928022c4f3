"""Teach a model to reply, from demonstrations.

Supervised fine-tuning: cross-entropy on the tokens of the replies only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from trimtab.batches.device import CPU
from trimtab.batches.trees import TokenTrees, Tree, TreeBatch, sequence_tree
from trimtab.core.errors import DataError
from trimtab.core.hub import base_of
from trimtab.core.types import Demonstration, PreferencePair
from trimtab.data.chat import Chat
from trimtab.data.pairs import group
from trimtab.data.tokens import Lazy, TokenTable
from trimtab.engines.build import Engines
from trimtab.engines.local.learner import AdamW
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.adapters import LoRA, start_adapter
from trimtab.models.lengths import refuse_long
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.models.save import save_role
from trimtab.runs.run import Run
from trimtab.stages.reading import hold_out, prepare_data, say_too_long
from trimtab.stages.stage import EPOCHS_GROW, Stage
from trimtab.stages.supervised import (
    FIT,
    Epochs,
    MakeBatch,
    TrainingSettings,
    Validation,
    last_metrics,
    make_learner,
    training,
    validate,
)


@dataclass(frozen=True, kw_only=True)
class SFTSettings(TrainingSettings):
    """Settings of the sft stage."""

    model: str
    """The model to start from: a directory or hub id."""
    data: str
    """Demonstrations: a file, a hub id or a world."""
    chosen_as_demonstrations: bool = False
    """Read preference pairs and imitate their chosen replies, each once, except those that are rejected in another
    pair. Such a reply is only the better of two, and need not be a good example."""
    held_out: float = 0.05
    """Share of the prompts kept for the validation loss."""
    train_on: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation are trained."""
    batch_size: int = 32
    """Examples per update."""
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=2e-5, schedule="cosine", warmup_fraction=0.03))
    """The optimizer and its schedule."""
    adapter: LoRA | None = None
    """Train a low-rank adapter on the frozen model instead of all its weights."""


def run(settings: SFTSettings, run: Run) -> None:
    """Trains and writes the model to `run.model_dir`."""
    tokenizer = load_tokenizer(settings.model)
    chat = Chat(tokenizer)
    demonstrations, counts = read_demonstrations(settings, chat, run)
    train, held_out = hold_out(demonstrations, settings.held_out, where=settings.data)
    trees = demonstration_trees(train, chat, settings, counts)
    validation = demonstration_trees(held_out, chat, settings, counts)
    say_too_long(counts, settings.max_tokens)
    if not trees:
        raise DataError(
            f"no example of {len(demonstrations)} is left to train on",
            where=settings.data,
            fix=f"raise max_tokens (now {settings.max_tokens}) or lower held_out (now {settings.held_out})",
        )
    epochs = Epochs.of(settings, trees)
    device = settings.engine.find_device()
    policy, base = start_policy(settings.model, settings.adapter, chat, seed=settings.seed, device=device)
    refuse_long(policy.model, chain(trees, validation), where=settings.data, fix=FIT)
    engines = Engines.start(settings, run.directory, load=load_roles, models={"policy": policy})
    learner = make_learner(policy, settings, epochs, engines, name="policy")
    loss, make_batch = SFTLoss(), batch_of(trees)
    judged = Validation(lambda: [tree.num_tokens for tree in validation], batch_of(validation)) if validation else None
    with engines, training(run, learner, epochs, settings, description="sft") as steps:
        for number, examples in steps:
            batch = make_batch(examples)
            metrics = learner.update([(batch, [loss])]) | steps.speed(batch)
            if steps.validates(number):
                metrics |= validate(learner, loss, judged)
            steps.log(metrics)
    run.save_model(lambda path: save_role(policy, chat.tokenizer, path, base=base))
    run.finish({"num_examples": len(trees), "counts": counts} | steps.counts | last_metrics(run, "loss/"))


def start_policy(
    path: str, adapter: LoRA | None, chat: Chat, *, seed: int, device: torch.device = CPU
) -> tuple[Policy, str]:
    """The policy to train and the base it belongs to: a whole model, a new adapter, or an adapter to train further."""
    if adapter is None:
        return Policy(load_causal(path, device=device), pad_id=chat.pad_id), path
    base = base_of(path) or path
    model = load_causal(base, device=device)
    start_adapter(model, "policy", path, adapter, seed=seed)
    return Policy(model, pad_id=chat.pad_id, adapter="policy"), base


def load_roles(settings: Any, _directory: Path) -> tuple[str, dict[str, Policy]]:
    """The tokenizer and the policy, for a stage that starts from one as this does; see `Engines.start`."""
    chat, device = Chat(load_tokenizer(settings.model)), settings.engine.find_device()
    policy, _ = start_policy(settings.model, settings.adapter, chat, seed=settings.seed, device=device)
    return settings.model, {"policy": policy}


def read_demonstrations(settings: SFTSettings, chat: Chat, run: Run) -> tuple[TokenTable, dict[str, int]]:
    """The demonstrations and the counts of what was read and dropped."""
    kind = PreferencePair if settings.chosen_as_demonstrations else Demonstration
    options: dict[str, Any] = {"on_bad_row": settings.on_bad_row, "limit": settings.limit}
    prepared = prepare_data(kind, settings.data, run, chat, by_prompt=False, **options)
    table = prepared.table.best_replies() if settings.chosen_as_demonstrations else prepared.table
    return table, dict(prepared.counts)


def demonstration_trees(table: TokenTable, chat: Chat, settings: SFTSettings, counts: dict[str, int]) -> Sequence[Tree]:
    """A tree for each demonstration; what was dropped or truncated is added to `counts`."""
    if settings.train_on == "last":
        fits = {"max_tokens": settings.max_tokens, "on_too_long": settings.on_too_long}
        groups = group(table, chat, **fits, counts=counts, alone=True)  # type: ignore[arg-type]
        return Lazy(len(groups), lambda i: groups.tree(i)[0])
    sizes = table.of("num_prompt") + table.longest()
    if num := int((sizes > settings.max_tokens).sum()):
        counts["dropped_too_long"] = counts.get("dropped_too_long", 0) + num
    kept = table.chosen[sizes <= settings.max_tokens].tolist()
    return Lazy(len(kept), lambda i: conversation_tree(table, kept[i]))


def conversation_tree(table: TokenTable, record: int) -> Tree:
    """The tree of a demonstration in which the earlier replies are trained too."""
    _, reply = table.replies(record)[0]
    prompt = table.prompt(record)
    mask = table.prompt_mask(record)
    return sequence_tree(prompt + reply, mask + [True] * len(reply))


def batch_of(trees: Sequence[Tree]) -> MakeBatch:
    """A function that makes a batch of the trees with given numbers."""
    return lambda indices: TreeBatch(trees=TokenTrees.build([trees[i] for i in indices]))


def records_of(settings: SFTSettings) -> tuple[type, ...]:
    """The kinds of record that the data of these settings holds."""
    return (PreferencePair,) if settings.chosen_as_demonstrations else (Demonstration,)


STAGE = Stage(
    settings=SFTSettings,
    run=run,
    makes="policy",
    trains="policy",
    data=records_of,
    writes=("metrics.jsonl",),
    grows=EPOCHS_GROW,
    about="Supervised fine-tuning: imitate demonstrations. Its result is the reference of everything after it.",
)
