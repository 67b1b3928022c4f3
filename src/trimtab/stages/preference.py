"""Train a policy on preferences without a reward model: DPO and its family.

The data are pairs of replies, or replies judged one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from trimtab.batches.pairs import PairBatch, ReferencePairs
from trimtab.batches.replies import JudgedReplies, MismatchedReplies
from trimtab.batches.trees import TokenTrees, Tree, TreeBatch, split_by_tokens
from trimtab.core.config import Choice
from trimtab.core.errors import DataError, EngineError
from trimtab.core.hub import same_model
from trimtab.core.metrics import Metrics, Total, to_values
from trimtab.core.terminal import note
from trimtab.core.types import LabelledResponse, PreferencePair
from trimtab.data.chat import Chat
from trimtab.data.layouts import kinds_of
from trimtab.data.pairs import Comparisons, Judgements, group_pairs, group_replies, mismatch, split_in_two
from trimtab.data.sources import records_source
from trimtab.data.tokens import Lazy
from trimtab.engines.build import Engines
from trimtab.engines.local.learner import AdamW
from trimtab.math.losses.preference import PreferenceLoss
from trimtab.math.losses.preference.common import PairLoss
from trimtab.math.losses.preference.pairs import DPO
from trimtab.models.adapters import LoRA
from trimtab.models.forward import token_logprobs_of
from trimtab.models.lengths import refuse_long
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.reference_cache import model_hash, reference_logprobs
from trimtab.models.roles import Policy
from trimtab.models.save import save_role
from trimtab.models.vocabulary import refuse_other_vocabulary
from trimtab.runs.run import Run
from trimtab.stages.guard.independence import same_source
from trimtab.stages.guard.settings import PreferenceGuardSettings, rehearsed
from trimtab.stages.guard.watch import DECISION, RECORD
from trimtab.stages.preference_guard import GuardedLearner, guard_prompts, make_guard, make_sampler
from trimtab.stages.reading import read_split, say_too_long
from trimtab.stages.sft import start_policy
from trimtab.stages.stage import EPOCHS_GROW, FEW_STEPS, Stage
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
from trimtab.stats import wilson


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(TrainingSettings):
    """Settings of the preference stage."""

    model: str
    """The model to start from: usually the SFT model."""
    reference: str | None = None
    """The model that the policy is held to; without one, the model it starts from. Losses that need none load none."""
    data: str
    """Preference pairs, or for losses of single replies also replies with a label: a file, a hub id or a world."""
    held_out_data: str | None = None
    """Data to validate on; without it, a share of `data` split by prompt."""
    held_out: float = 0.1
    """The share of the prompts that is held out. Ignored when held_out_data is given."""
    loss: Annotated[PreferenceLoss, Choice("preference_loss")] = field(default_factory=DPO)
    """The loss that is minimised."""
    batch_size: int = 32
    """Prompts per update, each with all its pairs or replies."""
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-6, schedule="cosine", warmup_fraction=0.1))
    """The optimizer and its schedule."""
    adapter: LoRA | None = None
    """Train a low-rank adapter on the frozen model; its reference is that model with the adapter as it was."""
    reference_cache: str | None = None
    """Directory that keeps the reference's log-probabilities; without one, `.reference` beside the run directory."""
    guard: PreferenceGuardSettings | None = None
    """Watch the run by a measure of the policy's replies, and act when the measure falls; None does not."""

    def __post_init__(self) -> None:
        if self.guard is not None and same_source(self.guard.prompts, self.data):
            raise ValueError(
                f"guard.prompts and data are both {self.data!r}; name prompts that are not trained on, such as those "
                "of held_out_data"
            )


def run(settings: PreferenceSettings, run: Run) -> None:
    """Trains, validates and writes the policy to `run.model_dir`."""
    chat = Chat(load_tokenizer(settings.model))
    loss = settings.loss
    counts: dict[str, int] = {}
    train, held_out = read_data(settings, chat, run, counts)
    watched = guard_prompts(settings.guard, train, run, chat) if settings.guard else None
    epochs = Epochs.of(settings, train.trees)
    num_steps = epochs.num_steps if settings.max_steps is None else min(settings.max_steps, epochs.num_steps)
    device = settings.engine.find_device()
    policy, base = start_policy(settings.model, settings.adapter, chat, seed=settings.seed, device=device)
    refuse_long(policy.model, chain(train.trees, held_out.trees), where=settings.data, fix=FIT)
    policy.precision = settings.precision
    reference = start_reference(settings, policy, base, chat)
    used, first = epochs.used(num_steps), epochs.examples(0)
    make_batch, validation = make_batches(settings, policy, reference, chat, train, used, first, held_out, run)
    engines = Engines.start(settings, run.directory, load=load_roles, models=roles_of(settings, policy, reference))
    sampler = make_sampler(settings, run, policy, chat, watched, engines) if watched else None
    learner = make_learner(policy, settings, epochs, engines, name="policy")
    state, guard = GuardedLearner(learner), None
    if watched and sampler and reference:
        guard = make_guard(
            settings, run, state, watched, sampler, engines, chat, reference=reference, num_steps=num_steps
        )

    def complete(batch: TreeBatch) -> TreeBatch:
        found: TreeBatch = loss.complete(batch, learner.logprobs)
        return found

    def judged() -> Metrics:
        return validate(learner, loss, validation, complete)

    how: dict[str, Any] = {"description": "preference"} | ({"also_kept": guard.kept} if guard else {})
    with engines, training(run, state if guard else learner, epochs, settings, **how) as steps:
        if guard:
            guard.begin(steps.loop)
        for number, examples in steps:
            batch = complete(make_batch(examples))
            metrics = learner.update([(batch, [loss])]) | steps.speed(batch)
            if validates := steps.validates(number):
                metrics |= judged()
            if guard:
                began = time.perf_counter()
                metrics |= guard.check(number + 1, steps.loop)
                metrics["time/guard_seconds"] = Total(time.perf_counter() - began)
                if guard.seen.stopped and not validates:
                    metrics |= judged()  # as after every last step
            steps.log(metrics)
        last = last_metrics(run, "loss/", "policy/")
        guarded = {"guard": guard.finish()} if guard else {}
        if guard and guard.settings.writes == "best":
            last |= to_values(judged())  # of the model that is written
    run.save_model(lambda path: save_role(policy, chat.tokenizer, path, base=base))
    card = held_out_accuracy(held_out, last) if validation is not None else {}
    run.finish({"num_prompts": len(train.trees), "counts": counts} | card | guarded | steps.counts | last)


def load_roles(settings: PreferenceSettings, _directory: Path) -> tuple[str, dict[str, Policy]]:
    """The tokenizer and the roles by name; see `Engines.start`."""
    chat, device = Chat(load_tokenizer(settings.model)), settings.engine.find_device()
    policy, base = start_policy(settings.model, settings.adapter, chat, seed=settings.seed, device=device)
    reference = start_reference(settings, policy, base, chat) if settings.guard else None
    return settings.model, roles_of(settings, policy, reference)


def roles_of(settings: PreferenceSettings, policy: Policy, reference: Policy | None) -> dict[str, Policy]:
    """The models that compute while there are steps: the policy, and for a guard the reference."""
    return {"policy": policy} | ({"reference": reference} if settings.guard and reference is not None else {})


def held_out_accuracy(held_out: Comparisons | Judgements, last: dict[str, float]) -> dict[str, float]:
    """The share of held-out pairs (or replies) on which the implied reward is right, with its interval and their
    number. Pairs with even votes have no right side and are left out."""
    if isinstance(held_out, Judgements):
        num, num_prompts = round(sum(held_out.totals)), len(held_out.trees)
    else:
        decided = held_out.labels != 0.5
        num = int(decided.sum())
        num_prompts = int(np.logical_or.reduceat(decided, held_out.groups.starts[:-1]).sum()) if len(decided) else 0
    share = last.get("policy/validation_accuracy") or 0.0
    # Pairs of one prompt are not independent; the interval counts each prompt once, which is wide rather than narrow.
    found = wilson(min(num_prompts, share * num_prompts), num_prompts)
    return found.named("accuracy") | {"num_held_out": num}


# --- data ---


def read_data(
    settings: PreferenceSettings, chat: Chat, run: Run, counts: dict[str, int]
) -> tuple[Comparisons, Comparisons] | tuple[Judgements, Judgements]:
    """The data to train on and the data to validate on, grouped by prompt. What was dropped, and the margins and labels
    that the loss does not use, are added to `counts`. Raises DataError if nothing is left to train on, or if no pair
    says which reply is better."""
    loss = settings.loss
    kind: type[Any] = LabelledResponse if loss.reads == "replies" and holds_labels(settings.data) else PreferencePair
    train, held_out, read = read_split(kind, settings, run, chat)
    counts |= read
    fit_in: dict[str, Any] = {"max_tokens": settings.max_tokens, "on_too_long": settings.on_too_long, "counts": counts}
    found: tuple[Comparisons, Comparisons] | tuple[Judgements, Judgements]
    if kind is LabelledResponse:
        found = group_replies(train, chat, **fit_in), group_replies(held_out, chat, **fit_in)
        say_balance(found[0], loss)
    else:
        pairs, held_out_pairs = group_pairs(train, chat, **fit_in), group_pairs(held_out, chat, **fit_in)
        if not loss.uses_margins and (num := int((~np.isnan(pairs.margins)).sum())):
            counts["margins_not_used"] = num
        if not loss.uses_labels and (num := int((pairs.labels != 1).sum())):
            counts["soft_labels_not_used"] = num
        if loss.uses_labels and pairs.num_pairs and (pairs.labels == 0.5).all():
            raise DataError(
                f"all {pairs.num_pairs} pairs to train on have the label 0.5: nothing says which reply is better",
                where=settings.data,
                fix="give pairs of which one side is preferred",
            )
        apart = loss.reads == "replies"
        found = (split_in_two(pairs), split_in_two(held_out_pairs)) if apart else (pairs, held_out_pairs)
    say_too_long(counts, settings.max_tokens)
    if not found[0].trees:
        raise DataError(
            "no example is left to train on",
            where=settings.data,
            fix=f"raise max_tokens (now {settings.max_tokens}) or lower held_out (now {settings.held_out})",
        )
    return found


def holds_labels(source: str) -> bool:
    """Whether the source holds replies with a thumb up or down."""
    return records_source(source) is None and LabelledResponse in kinds_of(source)


def say_balance(replies: Judgements, loss: Any) -> None:
    """Says on stderr if good and bad replies weigh very differently (KTO, arXiv:2402.01306, section 4.2: their total
    weights are best within 1 to 4/3 of each other)."""
    good, bad = replies.totals
    good_weight, bad_weight = loss.desirable_weight * good, loss.undesirable_weight * bad
    if not good_weight or not bad_weight:
        missing = "good" if bad_weight else "bad"
        note(
            f"{good:.0f} good and {bad:.0f} bad replies: no {missing} reply counts, so nothing is learnt about "
            f"what sets good apart from bad; add replies with the label {str(missing == 'good').lower()}"
        )
    elif not 0.75 <= good_weight / bad_weight <= 4 / 3:
        note(
            f"{good:.0f} good and {bad:.0f} bad replies weigh as {good_weight / bad_weight:.2f} to 1; "
            "loss.desirable_weight and loss.undesirable_weight can even that out"
        )


# --- batches ---


def make_batches(
    settings: PreferenceSettings,
    policy: Policy,
    reference: Policy | None,
    chat: Chat,
    train: Comparisons | Judgements,
    used: Sequence[int],
    first: Sequence[int],
    held_out: Comparisons | Judgements,
    run: Run,
) -> tuple[MakeBatch, Validation | None]:
    """A function that makes the batch of some examples, and the validation data.

    The reference reads the examples in `used` once, before any weight changes. It reads the held-out ones when they are
    first judged, so that a run of a few steps on a large set need not wait for them. Those of the first update,
    `first`, it reads together, as the update does: a policy that starts as its reference then differs from it by
    exactly nothing, in every precision, and the first loss says so.
    """
    loss = settings.loss
    reference = reference if loss.needs_reference else None
    directory = Path(settings.reference_cache) if settings.reference_cache else run.directory.parent / ".reference"

    def logprobs_by_place(scorer: Policy | None, trees: Sequence[Tree], places: Sequence[int]) -> dict[int, Tensor]:
        if scorer is None:
            return {}
        wanted = Lazy(len(places), lambda i: trees[places[i]])
        found = reference_logprobs(scorer, wanted, token_budget=settings.token_budget, directory=directory)
        return dict(zip(places, found, strict=True))

    def batch_maker(scorer: Policy | None, examples: Comparisons | Judgements, places: Sequence[int]) -> MakeBatch:
        ref = logprobs_by_place(scorer, examples.trees, places)
        if scorer is not None and examples is train:
            trees = TokenTrees.build([train.trees[i] for i in first])
            found = logprobs_as_in_update(scorer, trees, settings.token_budget)
            ref |= zip(first, torch.split(found, [tree.num_trained for tree in trees.trees]), strict=True)
        if isinstance(examples, Comparisons):
            return lambda indices: pair_batch(examples, indices, ref)
        if not loss.needs_mismatched:
            return lambda indices: reply_batch(examples, indices, ref)
        mixed = mismatch(examples.trees, max_tokens=settings.max_tokens, bos_id=chat.tokenizer.bos_token_id)
        mixed_ref = logprobs_by_place(scorer, mixed, places)
        return lambda indices: mismatched_batch(reply_batch(examples, indices, ref), indices, mixed, mixed_ref)

    if loss.needs_mismatched:
        check_mismatched(settings, train, held_out)
    make_batch = batch_maker(reference, train, used)
    if not held_out.trees:
        return make_batch, None
    reference_as_it_was = late_reference(settings, policy, reference, chat)

    @cache
    def make_held_out() -> MakeBatch:
        with reference_as_it_was() as scorer:
            return batch_maker(scorer, held_out, range(len(held_out.trees)))

    validation = Validation(
        lambda: [tree.num_tokens for tree in held_out.trees],
        lambda indices: make_held_out()(indices),
        whole=getattr(type(loss), "complete", None) is not PairLoss.complete,
    )
    return make_batch, validation


@torch.no_grad()
def logprobs_as_in_update(policy: Policy, trees: TokenTrees, token_budget: int) -> Tensor:
    """[M] log-probabilities with the bits that an update over these trees gives them: a batch that is one micro-batch
    keeps its order there, while scoring sorts it."""
    if len(split_by_tokens(trees, token_budget)) == 1:
        return policy(trees).logprobs  # type: ignore[no-any-return]
    return token_logprobs_of(policy, trees, token_budget)


def check_mismatched(
    settings: PreferenceSettings, train: Comparisons | Judgements, held_out: Comparisons | Judgements
) -> None:
    """Raises DataError if there is a single prompt, because there are no replies to another prompt to set beside it."""
    for part, examples in (("train on", train), ("validate on", held_out)):
        if len(examples.trees) == 1:
            raise DataError(
                f"a single prompt to {part}, and no other whose replies could be set beside it",
                where=settings.held_out_data or settings.data if examples is held_out else settings.data,
                fix="give more prompts, hold out another share or none, or set loss.baseline = 'none'",
            )


def late_reference(
    settings: PreferenceSettings, policy: Policy, reference: Policy | None, chat: Chat
) -> Callable[[], AbstractContextManager[Policy | None]]:
    """A function that gives the reference as it was before training. If the reference is the policy itself, it gives a
    copy that is loaded anew and kept no longer than it is used."""
    digest = model_hash(policy) if reference is policy else ""

    @contextmanager
    def again() -> Iterator[Policy | None]:
        if reference is not policy:
            # It may be the policy's own model, some of whose blocks train with checkpointing.
            modes = [(m, m.training) for m in reference.model.modules()] if reference is not None else []
            for module, _ in modes:
                module.training = False
            yield reference
            for module, was in modes:
                module.training = was
            return
        device = settings.engine.find_device()
        copy, _ = start_policy(settings.model, settings.adapter, chat, seed=settings.seed, device=device)
        copy.precision = settings.precision
        if model_hash(copy) != digest:
            raise EngineError(
                "the model on disk is not the one that this run began with, so the reference is lost",
                where=settings.model,
                fix="restore it and start the same command again: it goes on from the last checkpoint",
            )
        yield copy

    return again


def pair_batch(pairs: Comparisons, indices: Sequence[int], ref: dict[int, Tensor]) -> PairBatch:
    """The prompts with these numbers as one batch, with the reference's log-probabilities if there is a reference."""
    batch = pairs.batch(indices)
    if not ref:
        return batch
    ref_logprobs = torch.cat([ref[i] for i in indices])
    return ReferencePairs(trees=batch.trees, compared=batch.compared, ref_logprobs=ref_logprobs)


def reply_batch(replies: Judgements, indices: Sequence[int], ref: dict[int, Tensor]) -> JudgedReplies:
    """The prompts with these numbers as one batch."""
    return JudgedReplies(
        trees=TokenTrees.build([replies.trees[i] for i in indices]),
        ref_logprobs=torch.cat([ref[i] for i in indices]),
        desirable=torch.tensor([n for i in indices for n in replies.desirable[i]]),
        undesirable=torch.tensor([n for i in indices for n in replies.undesirable[i]]),
    )


def mismatched_batch(
    batch: JudgedReplies, indices: Sequence[int], mixed: Sequence[Tree], mixed_ref: dict[int, Tensor]
) -> MismatchedReplies:
    """The batch with the trees of `mixed` beside it: its prompts with the replies to other prompts."""
    return MismatchedReplies(
        trees=batch.trees,
        ref_logprobs=batch.ref_logprobs,
        desirable=batch.desirable,
        undesirable=batch.undesirable,
        mismatched=TokenTrees.build([mixed[i] for i in indices]),
        mismatched_ref_logprobs=torch.cat([mixed_ref[i] for i in indices]),
    )


def start_reference(settings: PreferenceSettings, policy: Policy, base: str, chat: Chat) -> Policy | None:
    """The reference: the policy as it starts, its base with the adapter off, or another model. None if nothing asks it.

    A new adapter changes nothing yet, so its reference is the base. An adapter that was trained before is its own
    reference, as it was then: the base with the adapter off would be another model. A guard compares with the reference
    while the policy moves, so for a guard the policy as it starts is a copy.
    """
    if not (settings.loss.needs_reference or settings.guard):
        return None
    device = settings.engine.find_device()
    path = settings.reference or settings.model
    if policy.adapter is not None and same_model(path, base):
        reference = Policy(policy.model, pad_id=chat.pad_id)
    elif same_model(path, settings.model):
        if settings.guard is None:
            return policy
        reference, _ = start_policy(settings.model, settings.adapter, chat, seed=settings.seed, device=device)
    else:
        refuse_other_vocabulary(chat.tokenizer, path, role="reference")
        reference = Policy(load_causal(path, device=device), pad_id=chat.pad_id)
    reference.precision = settings.precision
    return reference


def records_of(settings: PreferenceSettings) -> tuple[type, ...]:
    """The kinds of record, any one of them, that the data of these settings may hold."""
    return (LabelledResponse, PreferencePair) if settings.loss.reads == "replies" else (PreferencePair,)


def few_steps(table: Mapping[str, Any], _settings: PreferenceSettings) -> dict[str, Any]:
    """Settings for a few steps, with a guard that checks the first and the last policy."""
    return {"max_steps": min(FEW_STEPS, table.get("max_steps") or FEW_STEPS)} | rehearsed(table)


def further_steps(settings: PreferenceSettings, num_steps: int) -> float:
    """The cost of the reference, in steps: it reads the data once, in a forward pass, which is a third of a step."""
    return num_steps / (3 * max(1.0, settings.num_epochs)) if settings.loss.needs_reference else 0.0


STAGE = Stage(
    settings=PreferenceSettings,
    run=run,
    makes="policy",
    trains="policy",
    data=records_of,
    writes=("metrics.jsonl", RECORD, DECISION),
    grows=EPOCHS_GROW,
    few=few_steps,
    further_steps=further_steps,
    about="The policy learned from preferences without a reward model: what it gains on its reference is a reward "
    "that it implies.",
    charts=(
        ("loss/train", "loss/validation"),
        ("policy/accuracy", "policy/validation_accuracy"),
        ("guard/measure", "guard/measure_low", "guard/measure_high"),
        ("guard/kl",),
        ("policy/margin", "policy/validation_margin"),
        ("policy/chosen_reward", "policy/rejected_reward"),
        ("policy/chosen_logprobs", "policy/rejected_logprobs"),
    ),
)
