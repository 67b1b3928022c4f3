"""The protocols of an engine. The local engine is the definition; other engines behave the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trimtab.batches.trees import TokenTrees, TreeBatch
from trimtab.core.metrics import Metrics
from trimtab.core.types import Observation, Prompt, Rollout


class Sampler(Protocol):
    """Samples replies with the weights being trained, as in `sampler.generate(prompts, group_size=8, seed=0)`."""

    @property
    def sampler(self) -> str:
        """How it decodes, for the run's records; for example "fused, compiled"."""

    @property
    def may_draw_meanwhile(self) -> bool:
        """Whether `generate` may run while the policy is updated. It then reads nothing of the policy, and is called by
        another thread than `sync` (never both at once)."""

    def sync(self) -> None:
        """Takes the policy's weights as they are now; `generate` uses those until the next sync. For a sampler that
        shares the policy's weights nothing is to be done."""

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, seed: int) -> list[Rollout]:
        """`group_size` rollouts for each prompt, in the order of prompts. They depend only on prompts, weights and
        seed."""


class Environment(Protocol):
    """Answers the policy's turns: tools, a simulated user, a game."""

    @property
    def stop(self) -> Sequence[str]:
        """Texts that end a turn besides the end token; they belong to the turn."""

    def reset(self, prompt: Prompt, *, seed: int) -> Any:
        """The state of a new episode. Everything random in it comes from `seed` alone."""

    def step(self, state: Any, turn: str) -> Observation:
        """The answer to what the policy wrote since the last observation. May change `state`, but nothing else."""


class Scorer(Protocol):
    """Runs a model over trees without gradients."""

    def logprobs(self, trees: TokenTrees) -> Tensor:
        """[M] log-probability of every trained token at the policy's temperature."""

    def values(self, trees: TokenTrees) -> Tensor:
        """[M] the critic's value before every trained token."""

    def kl_to(self, reference: Scorer, trees: TokenTrees) -> Tensor:
        """[M] exact KL(self || reference) at every trained token, in nats."""


class WeightHolder:
    """A scorer or learner whose role has all its weights inside `with scorer.whole(): …`. Here it always has them; an
    engine that spreads them over processes gathers them for that time."""

    def hold(self) -> None:
        """Gives the role all its weights until `release`."""

    def release(self) -> None:
        """Ends what `hold` began."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside this block the role has all its weights."""
        self.hold()
        try:
            yield
        finally:
            self.release()


class Loss(Protocol):
    """A sum over a batch, and the number that divides it."""

    @property
    def coef(self) -> float:
        """Weight of this loss among those minimised together."""

    def weight(self, batch: Any) -> Tensor:
        """The denominator, known before any forward pass."""

    def __call__(self, outputs: Any, batch: Any) -> tuple[Tensor, Metrics]:
        """The sum, not the mean, and the metrics to log."""


Work = Sequence[tuple[TreeBatch, Sequence[Loss]]]
"""Batches with the losses to minimise on each, such as `[(batch, [policy_loss, entropy_bonus])]`; all in one optimizer
step."""


class Learner(Scorer, Protocol):
    """Owns a model's optimizer and the one backward pass."""

    token_budget: int
    """The tokens of one forward pass."""

    @property
    def form(self) -> str:
        """How the model computes a batch, for the run's records: "tree", "padded" or "alone"."""

    def evaluate(self, batch: Any, loss: Loss) -> Metrics:
        """The metrics of a loss on one micro-batch, without gradients."""

    def update(self, work: Work) -> Metrics:
        """One optimizer step. Micro-batches and ranks change neither the gradient nor the metrics."""

    def save(self, directory: Path) -> None:
        """Weights and optimizer state, as safetensors."""

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, bit for bit."""
