"""Supervised fine-tuning: imitate the replies of demonstrations, cross-entropy on the reply's tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from trimtab import seeds
from trimtab.config import Choice
from trimtab.data.chat import Chat
from trimtab.data.pairs import fitted_tree
from trimtab.data.split import split_by_prompt
from trimtab.data.trees import TokenTrees, Tree, TreeBatch, sequence_tree
from trimtab.engines.local_learner import AdamW, LocalLearner
from trimtab.errors import DataError
from trimtab.hub import base_of
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.adapters import LoRA, add_adapter, load_adapter
from trimtab.models.lengths import refuse_long
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.precision import Precision
from trimtab.models.quantized import quantize
from trimtab.models.roles import Policy
from trimtab.models.save import save_role
from trimtab.runs.run import Run
from trimtab.stages.reading import read
from trimtab.stages.supervised import FIT, Epochs, fit, last_metrics
from trimtab.types import Demonstration, Message, PreferencePair


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the sft stage."""

    model: str
    """The model to start from: a directory or hub id."""
    data: str
    """Demonstrations: a file, a hub id or a world."""
    chosen_as_demonstrations: bool = False
    """Read preference pairs and imitate their chosen replies, each once, but for those that are rejected in another
    pair. These are only the better of two, not good examples."""
    held_out: float = 0.05
    """Share of the prompts kept for the validation loss."""
    limit: int | None = None
    """Use only the first rows."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Refuse the data at a bad row, or drop and count such rows."""
    train_on: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation are trained."""
    max_tokens: int = 1024
    """Longest example, prompt and reply together."""
    on_too_long: Literal["drop", "truncate_prompt_left"] = "truncate_prompt_left"
    """What happens to a longer example; both are counted."""
    num_epochs: float = 1.0
    """Passes over the data."""
    batch_size: int = 32
    """Examples of one update."""
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=2e-5, schedule="cosine", warmup_fraction=0.03))
    """The optimizer and its schedule."""
    shuffle: bool = True
    """Take the examples of each epoch in an order of its own; false keeps the order of the data."""
    adapter: LoRA | None = None
    """Train a low-rank adapter on the frozen model instead of all its weights."""
    precision: Precision = "float32"
    """Precision of the products of training and scoring; weights and log-probabilities stay float32."""
    checkpoint_activations: bool = False
    """Keep only the input of each block for the backward pass: less memory, a third more work."""
    max_steps: int | None = None
    """Stop after this many updates, on the schedule of the whole run; None trains to the end."""
    token_budget: int = 4096
    """Tokens of one forward pass: memory and speed only."""
    validate_every: int = 0
    """Updates between validations; 0 validates once, at the end."""
    checkpoint_every: int = 100
    """Updates between checkpoints."""
    seed: int = 0
    """Seed of the order of examples."""
    trackers: Annotated[tuple[Any, ...], Choice("tracker")] = ()
    """Where metrics go besides metrics.jsonl: "tensorboard", "wandb"."""


def run(settings: Settings, run: Run) -> None:
    """Trains and writes the model to `run.model_dir`."""
    tokenizer = load_tokenizer(settings.model)
    chat = Chat(tokenizer)
    demonstrations, counts = read_demonstrations(settings, chat, run)
    train, held_out = split_by_prompt(demonstrations, held_out=settings.held_out)
    trees = demonstration_trees(train, chat, settings, counts)
    validation = demonstration_trees(held_out, chat, settings, counts)
    if not trees:
        raise DataError(
            f"no example of {len(demonstrations)} is left to train on",
            where=settings.data,
            fix=f"raise max_tokens (now {settings.max_tokens}) or lower held_out (now {settings.held_out})",
        )
    epochs = Epochs(
        num_examples=len(trees),
        batch_size=settings.batch_size,
        num_epochs=settings.num_epochs,
        seed=settings.seed,
        shuffle=settings.shuffle,
    )
    policy, base = start_policy(settings.model, settings.adapter, chat, seed=settings.seed)
    refuse_long(policy.model, [*trees, *validation], where=settings.data, fix=FIT)
    policy.precision = settings.precision
    if settings.checkpoint_activations:
        policy.checkpoint_activations()
    learner = LocalLearner(
        policy,
        settings.optimizer,
        token_budget=settings.token_budget,
        num_updates=epochs.num_steps,
        name="policy",
    )
    steps = fit(
        run,
        learner,
        SFTLoss(),
        lambda indices: TreeBatch(trees=TokenTrees.build([trees[i] for i in indices])),
        epochs,
        validation=TreeBatch(trees=TokenTrees.build(validation)) if validation else None,
        validate_every=settings.validate_every,
        checkpoint_every=settings.checkpoint_every,
        description="sft",
        max_steps=settings.max_steps,
    )
    run.save_model(lambda path: save_role(policy, chat.tokenizer, path, base=base))
    run.finish({"num_examples": len(trees), "counts": counts} | steps | last_metrics(run, "loss/"))


def start_policy(path: str, adapter: LoRA | None, chat: Chat, *, seed: int) -> tuple[Policy, str]:
    """The policy to train and the base it belongs to: the whole model, a new adapter, or one that is trained on."""
    base = base_of(path)
    if adapter is None:
        return Policy(load_causal(path), pad_id=chat.pad_id), path
    model = load_causal(base or path)
    quantize(model, adapter.base_bits)
    if base is None:
        add_adapter(model, "policy", adapter, seed=seeds.derive(seed, "adapter", "policy"))
    else:
        load_adapter(model, "policy", path)
    return Policy(model, pad_id=chat.pad_id, adapter="policy"), base or path


def read_demonstrations(settings: Settings, chat: Chat, run: Run) -> tuple[list[Demonstration], dict[str, int]]:
    """The demonstrations and the counts of what was read and dropped."""
    options: dict[str, Any] = {"on_bad_row": settings.on_bad_row, "limit": settings.limit, "accepts": chat.refusal}
    if settings.chosen_as_demonstrations:
        pairs = read(PreferencePair, settings.data, run, **options)
        beaten = {(p.prompt.messages, p.rejected) for p in pairs.records}
        best = {(p.prompt.messages, p.chosen): p for p in pairs.records}
        chosen = [p for reply, p in best.items() if reply not in beaten]
        return [Demonstration(prompt=p.prompt, response=p.chosen) for p in chosen], dict(pairs.counts)
    loaded = read(Demonstration, settings.data, run, **options)
    return loaded.records, dict(loaded.counts)


def demonstration_trees(
    demonstrations: Sequence[Demonstration], chat: Chat, settings: Settings, counts: dict[str, int]
) -> list[Tree]:
    """A tree for each demonstration; what was dropped or truncated is added to `counts`."""
    trees = []
    for d in demonstrations:
        if settings.train_on == "all":
            ids, mask = chat.encode_conversation((*d.prompt.messages, Message("assistant", d.response)))
            mask = without_turns(mask, d.untrained_turns)
            if len(ids) > settings.max_tokens:
                counts["dropped_too_long"] = counts.get("dropped_too_long", 0) + 1
            else:
                trees.append(sequence_tree(ids, mask))
            continue
        tree = fitted_tree(
            chat,
            d.prompt,
            [d.response],
            max_tokens=settings.max_tokens,
            on_too_long=settings.on_too_long,
            counts=counts,
        )
        if tree is not None:
            trees.append(tree)
    return trees


def without_turns(mask: Sequence[bool], turns: Sequence[int]) -> list[bool]:
    """The mask without the assistant turns of these numbers: each run of trained tokens is one turn.

    Where the template rewrites earlier turns only the last one is trained, and there is nothing to take out.
    """
    starts = [i for i, trained in enumerate(mask) if trained and not (i and mask[i - 1])]
    found = list(mask)
    for turn in turns if len(starts) > max(turns, default=0) + 1 else ():
        end = next((i for i in range(starts[turn], len(mask)) if not mask[i]), len(mask))
        found[starts[turn] : end] = [False] * (end - starts[turn])
    return found
