"""The loop that pretraining, SFT and reward modelling share: shuffled epochs over examples, one loss."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab import seeds
from trimtab.data.trees import TreeBatch, split_sizes
from trimtab.engines.local_learner import LocalLearner
from trimtab.metrics import Mean, Metrics, Total, merge
from trimtab.protocols import Loss
from trimtab.runs.loop import run_steps
from trimtab.runs.run import Run
from trimtab.stages.noise import seed_noise

FIT = "set max_tokens = LIMIT, so that longer examples are cut or dropped as on_too_long says, or use another model"
"""What to do about examples beyond the positions of a model."""

MakeBatch = Callable[[Sequence[int]], TreeBatch]
"""Makes a batch of the examples with these numbers."""

Prepare = Callable[[Any], TreeBatch]
"""Adds to a whole batch what its parts cannot know alone, with the weights as they are."""


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """Which examples each step trains on: every epoch in an order of its own (or as they come), the last short batch
    included."""

    num_examples: int
    batch_size: int
    num_epochs: float
    seed: int
    shuffle: bool = True

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(self._total / self.batch_size)

    @property
    def _total(self) -> int:
        return max(1, round(self.num_epochs * self.num_examples))

    def examples(self, step: int) -> list[int]:
        """The example numbers of the step counted from 0."""
        return self.take(step * self.batch_size, min((step + 1) * self.batch_size, self._total))

    def take(self, start: int, end: int) -> list[int]:
        """The example numbers at these places of the whole run's order."""
        places = range(start, end)
        orders = {epoch: self._order(epoch) for epoch in {p // self.num_examples for p in places}}
        return [int(orders[p // self.num_examples][p % self.num_examples]) for p in places]

    def used(self, num_steps: int) -> list[int]:
        """The example numbers of the first steps, each once, ascending."""
        return sorted(set(self.take(0, min(num_steps * self.batch_size, self._total))))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return _order_of(self.num_examples, self.seed, epoch) if self.shuffle else np.arange(self.num_examples)


@lru_cache(maxsize=4)
def _order_of(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch. Remembered, for each step of the epoch asks for a part of it."""
    return seeds.generator(seed, "order", epoch).permutation(num_examples)


@dataclass(frozen=True)
class Validation:
    """Held-out examples, of which batches are made when they are judged."""

    sizes: Callable[[], Sequence[int]]
    """Tokens of each example."""
    make_batch: MakeBatch
    whole: bool = False
    """Whether `prepare` has to see all examples in one batch."""

    def pieces(self, token_budget: int, prepared: Callable[[TreeBatch], TreeBatch]) -> Iterator[TreeBatch]:
        """The examples in pieces of at most `token_budget` tokens, as `TreeBatch.pieces` makes them of all."""
        sizes = self.sizes()
        if self.whole:
            yield from prepared(self.make_batch(range(len(sizes)))).pieces(token_budget)
            return
        groups = split_sizes(sizes, token_budget)
        for group in [list(range(len(sizes)))] if len(groups) == 1 else groups:
            yield prepared(self.make_batch(group))


def last_metrics(run: Run, *prefixes: str) -> dict[str, float]:
    """The values of the last logged step whose names begin with one of `prefixes`."""
    lines = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1]) if lines else {}
    return {name: value for name, value in row.items() if name.startswith(prefixes)}


@dataclass
class LearnerState:
    """What a supervised run needs to go on: its learner. Everything else follows from the step number."""

    learner: LocalLearner

    def save(self, path: Path) -> None:
        """Write the learner into `path`."""
        self.learner.save(path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        self.learner.load(path)


def fit(
    run: Run,
    learner: LocalLearner,
    loss: Loss,
    make_batch: MakeBatch,
    epochs: Epochs,
    *,
    validation: Validation | None,
    validate_every: int,
    checkpoint_every: int,
    description: str,
    max_steps: int | None = None,
    prepare: Prepare | None = None,
) -> dict[str, int]:
    """Trains to the last step, or to `max_steps` of them, resuming where an earlier call was stopped; returns the
    numbers of steps. Validation metrics are named
    `OWNER/validation_QUANTITY`, measured every `validate_every` steps and after the last one. `prepare` sees every
    batch before it is split, the validation data each time it is judged."""
    run.note_path("form", learner.role.form)
    num_steps = epochs.num_steps if max_steps is None else min(max_steps, epochs.num_steps)

    def prepared(batch: TreeBatch) -> TreeBatch:
        return batch if prepare is None else prepare(batch)

    def step(number: int) -> Metrics:
        started = time.perf_counter()
        seed_noise(epochs.seed, description, number)
        batch = prepared(make_batch(epochs.examples(number)))
        metrics = learner.update([(batch, [loss])])
        seconds = time.perf_counter() - started
        metrics |= {
            "time/step_seconds": Total(seconds),
            "time/tokens_per_second": Mean(batch.trees.num_tokens, seconds),
        }
        last = number + 1 == num_steps
        if validation is not None and (last or (validate_every and (number + 1) % validate_every == 0)):
            metrics |= validate(learner, loss, validation, prepared)
        return metrics

    run_steps(
        run,
        LearnerState(learner),
        num_steps=num_steps,
        step=step,
        checkpoint_every=checkpoint_every,
        description=description,
    )
    return {"num_steps": num_steps, "num_planned_steps": epochs.num_steps}


@torch.no_grad()
def validate(
    learner: LocalLearner, loss: Loss, validation: Validation, prepared: Callable[[TreeBatch], TreeBatch]
) -> Metrics:
    """The loss's own metrics on held-out data, with `validation` in their names."""
    parts = []
    for micro in validation.pieces(learner.token_budget, prepared):
        parts.append(loss(learner.role(micro.trees), micro)[1])
    return {_validation_name(name): metric for name, metric in merge(parts).items()}


def _validation_name(name: str) -> str:
    owner, quantity = name.split("/", 1)
    return f"{owner}/validation" if quantity == "train" else f"{owner}/validation_{quantity}"
