"""What pretraining, SFT, reward modelling and preference training share: shuffled epochs, validation, and steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.batches.trees import Tree, TreeBatch, split_sizes
from trimtab.core import seeds
from trimtab.core.config import Choice
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.metrics import Mean, Metrics, Total, merge
from trimtab.engines.base import Learner, Loss
from trimtab.engines.build import Engines
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.learner import AdamW
from trimtab.models.precision import Precision
from trimtab.models.roles import Policy, ScalarModel
from trimtab.runs.loop import JointState, LoopState, Steps, stepping
from trimtab.runs.run import Run
from trimtab.stages.noise import seed_noise
from trimtab.stages.rehearsal import largest_step, steps_rehearsed
from trimtab.stages.stage import FEW_STEPS

FIT = "set max_tokens = LIMIT, so that longer examples are cut or dropped as on_too_long says, or use another model"
"""The fix for examples that are longer than the positions of a model."""

MakeBatch = Callable[[Sequence[int]], TreeBatch]
"""Makes a batch of the examples with these numbers."""

Complete = Callable[[Any], TreeBatch]
"""Adds to a whole batch what its micro-batches cannot know alone, computed with the weights as they are."""


@dataclass(frozen=True, kw_only=True)
class EpochSettings:
    """Settings of every stage that trains in epochs over examples."""

    num_epochs: float = 1.0
    """Passes over the data."""
    optimizer: AdamW = field(default_factory=AdamW)
    """The optimizer and its schedule."""
    max_steps: int | None = None
    """Stop after this many updates, on the schedule of the whole run; None trains to the end."""
    token_budget: int = 4096
    """Tokens of one forward pass: memory and speed only."""
    checkpoint_every: int = 100
    """Updates between checkpoints."""
    keep_checkpoints: int = 2
    """The number of newest checkpoints that stay, for `trimtab choose`; each holds the weights and the optimizer."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How the stage is computed."""
    seed: int = 0
    """Seed of the order of examples and of new weights."""
    trackers: Annotated[tuple[Any, ...], Choice("tracker")] = ()
    """Where metrics go besides metrics.jsonl: "tensorboard", "wandb"."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(EpochSettings):
    """Settings of every stage that trains a given model on records and holds some of them out."""

    limit: int | None = None
    """Use only the first rows."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Refuse the data at a bad row, or drop and count such rows."""
    max_tokens: int = 1024
    """Longest prompt and reply together."""
    on_too_long: Literal["drop", "truncate_prompt_left"] = "truncate_prompt_left"
    """What happens to a longer example; both are counted."""
    shuffle: bool = True
    """Take the examples of each epoch in an order of its own; false keeps the order of the data."""
    precision: Precision = "float32"
    """Precision of the matrix products in training and scoring; weights and log-probabilities stay float32."""
    checkpoint_activations: bool = False
    """Keep only the input of each block for the backward pass: less memory, a third more work."""
    validate_every: int = 0
    """Updates between validations; 0 validates once, at the end."""


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """Which examples each step trains on: every epoch has an order of its own (or that of the data), and the last short
    batch is included."""

    num_examples: int
    batch_size: int
    num_epochs: float
    seed: int
    shuffle: bool = True
    largest: tuple[int, ...] = ()
    """In a rehearsal, the examples of its last step; else none."""

    @classmethod
    def of(cls, settings: Any, examples: Sequence[Tree]) -> Epochs:
        """The epochs over these examples that settings ask for; these have `batch_size`."""
        epochs = cls(
            num_examples=len(examples),
            batch_size=settings.batch_size,
            num_epochs=settings.num_epochs,
            seed=settings.seed,
            shuffle=getattr(settings, "shuffle", True),
        )
        if len(examples) and round(settings.num_epochs * len(examples)) < 1:
            raise ConfigError(
                f"num_epochs = {settings.num_epochs:g} of {len(examples)} examples are none",
                where="num_epochs",
                fix="raise it; max_steps ends a run after so many updates",
            )
        if not (num := steps_rehearsed(epochs.num_steps)):
            return epochs
        steps = ([examples[i].num_tokens for i in epochs.examples(n)] for n in range(num))
        step = largest_step(steps, settings)
        return replace(epochs, largest=tuple(epochs.examples(step)))

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps in all."""
        return math.ceil(self._total / self.batch_size)

    @property
    def _total(self) -> int:
        return max(1, round(self.num_epochs * self.num_examples))

    def examples(self, step: int) -> list[int]:
        """The example numbers of a step; steps are counted from 0."""
        if self.largest and step == FEW_STEPS - 1:
            return list(self.largest)
        return self.take(step * self.batch_size, min((step + 1) * self.batch_size, self._total))

    def take(self, start: int, end: int) -> list[int]:
        """The example numbers at these places of the whole run's order."""
        places = range(start, end)
        orders = {epoch: self._order(epoch) for epoch in {p // self.num_examples for p in places}}
        return [int(orders[p // self.num_examples][p % self.num_examples]) for p in places]

    def used(self, num_steps: int) -> list[int]:
        """The example numbers of the first steps, each once, ascending."""
        return sorted({*self.take(0, min(num_steps * self.batch_size, self._total)), *self.largest})

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return _order_of(self.num_examples, self.seed, epoch) if self.shuffle else np.arange(self.num_examples)


@lru_cache(maxsize=4)
def _order_of(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch. It is cached, because each step of the epoch asks for a part of it."""
    return seeds.generator(seed, "order", epoch).permutation(num_examples)


@dataclass(frozen=True)
class Validation:
    """Held-out examples; their batches are made when they are judged."""

    sizes: Callable[[], Sequence[int]]
    """Gives the number of tokens of each example."""
    make_batch: MakeBatch
    whole: bool = False
    """Whether `complete` has to see all examples in one batch."""

    def micro_batches(self, token_budget: int, complete: Complete) -> Iterator[TreeBatch]:
        """The examples in micro-batches of at most `token_budget` tokens, the same as `TreeBatch.micro_batches` makes
        from one batch of all examples."""
        sizes = self.sizes()
        if self.whole:
            yield from complete(self.make_batch(range(len(sizes)))).micro_batches(token_budget)
            return
        groups = split_sizes(sizes, token_budget)
        for group in [list(range(len(sizes)))] if len(groups) == 1 else groups:
            yield complete(self.make_batch(group))


def last_metrics(run: Run, *prefixes: str) -> dict[str, float]:
    """The metrics of the last logged step whose names begin with one of `prefixes`. Raises DataError if a finished
    run's rows were lost."""
    path = run.directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    row = json.loads(lines[-1]) if lines else {}
    if row.get("step") != run.num_done:
        raise DataError(
            f"{path.name} has no row of the last step, whose metrics belong into the summary",
            where=str(path),
            fix="restore it, or begin again with --fresh or another --out",
        )
    return {name: value for name, value in row.items() if name.startswith(prefixes)}


def make_learner(
    role: Policy | ScalarModel, settings: TrainingSettings, epochs: Epochs, engines: Engines, *, name: str
) -> Learner:
    """The learner of a model, which computes as the settings say."""
    return engines.learner(
        role,
        settings.optimizer,
        name=name,
        token_budget=settings.token_budget,
        num_updates=epochs.num_steps,
        precision=settings.precision,
        checkpoint_activations=settings.checkpoint_activations,
    )


class TrainedState(LoopState, Protocol):
    """The state of a run that trains in epochs: a learner, several (`Learners`), or one with more beside it."""

    @property
    def form(self) -> str:
        """How the model computes a batch."""


@dataclass(frozen=True)
class Learners(JointState):
    """Several learners that take their steps together, as the state of one run."""

    members: Sequence[Learner]

    @property
    def form(self) -> str:
        """How the first of them computes a batch."""
        return self.members[0].form


class TrainingSteps:
    """The steps of a supervised run that are still to be done; see `training`."""

    def __init__(self, steps: Steps, epochs: Epochs, num_steps: int, validate_every: int, description: str) -> None:
        self.loop = steps
        """The loop that they are the steps of."""
        self._epochs = epochs
        self._num_steps = num_steps
        self._validate_every = validate_every
        self._description = description
        self._began = 0.0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """The number of each step, from 0, and the numbers of its examples."""
        for number in self.loop:
            self._began = time.perf_counter()
            seed_noise(self._epochs.seed, self._description, number)
            yield number, self._epochs.examples(number)

    def speed(self, *batches: TreeBatch) -> Metrics:
        """The time and speed of the current step's updates, if this is called directly after them."""
        seconds = time.perf_counter() - self._began
        return {
            "time/step_seconds": Total(seconds),
            "time/tokens_per_second": Mean(sum(batch.trees.num_tokens for batch in batches), seconds),
        }

    def validates(self, number: int) -> bool:
        """Whether the held-out data is judged after this step: every `validate_every` steps and after the last."""
        last = number + 1 == self._num_steps
        return last or bool(self._validate_every and (number + 1) % self._validate_every == 0)

    def log(self, metrics: Metrics) -> None:
        """Ends the current step with its metrics."""
        self.loop.log(metrics)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of steps, for the summary."""
        return {"num_steps": self.loop.done, "num_planned_steps": self._epochs.num_steps}


@contextmanager
def training(
    run: Run,
    state: TrainedState,
    epochs: Epochs,
    settings: EpochSettings,
    *,
    description: str,
    also_kept: Callable[[], Collection[int]] = tuple,
) -> Iterator[TrainingSteps]:
    """Yields the steps up to the last one, or up to `max_steps`, and resumes where an earlier call was stopped. The
    checkpoints of the steps that `also_kept` gives stay besides the newest.

    with training(run, learner, epochs, settings, description="sft") as steps:
        for number, examples in steps:
            batch = make_batch(examples)
            metrics = learner.update([(batch, [loss])]) | steps.speed(batch)
            if steps.validates(number):
                metrics |= validate(learner, loss, validation)
            steps.log(metrics)
    """
    run.note_path("form", state.form)
    num_steps = epochs.num_steps if settings.max_steps is None else min(settings.max_steps, epochs.num_steps)
    with stepping(
        run,
        state,  # all that a supervised run needs to go on; the rest follows from the step number
        num_steps=num_steps,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=settings.keep_checkpoints,
        description=description,
        also_kept=also_kept,
    ) as steps:
        yield TrainingSteps(steps, epochs, num_steps, getattr(settings, "validate_every", 0), description)


@torch.no_grad()
def validate(
    learner: Learner, loss: Loss, validation: Validation | None, complete: Complete = lambda batch: batch
) -> Metrics:
    """The loss's own metrics on held-out data as `OWNER/validation_QUANTITY`; empty without such data. `complete` is
    applied to every batch first."""
    if validation is None:
        return {}
    parts = []
    for micro in validation.micro_batches(learner.token_budget, complete):
        parts.append(learner.evaluate(micro, loss))
    return {_validation_name(name): metric for name, metric in merge(parts).items()}


def _validation_name(name: str) -> str:
    owner, quantity = name.split("/", 1)
    return f"{owner}/validation" if quantity == "train" else f"{owner}/validation_{quantity}"
