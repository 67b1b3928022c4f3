"""The models of a stage in one of the processes that compute together, and the shares of calls that they answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trimtab.batches.trees import TokenTrees
from trimtab.core.metrics import Metrics
from trimtab.core.process import own_peak_rss_gb
from trimtab.data.chat import Chat
from trimtab.engines.base import Work
from trimtab.engines.local.form_choice import FormChoice, forms
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.replies import SampledReply, Sampling
from trimtab.engines.local.sampler import LocalSampler
from trimtab.engines.local.scorer import LocalScorer
from trimtab.engines.shards import ShardedLearner
from trimtab.models.precision import Precision
from trimtab.models.roles import Policy, ScalarModel

CALLS = (
    *("make_learner", "make_scorer", "update", "save", "load", "hold", "release", "score", "sample"),
    *("checksums", "peak_rss_gb"),
)
"""The methods of `Replica` that a controller may call."""
_REDUCED = 1 << 24
"""Entries of gradients that are added over the processes at a time: 64 MB in float32."""


@dataclass
class Replica:
    """The roles of a stage by name, and the engines made of them."""

    roles: Mapping[str, Policy | ScalarModel]
    chat: Chat | None
    scorers: dict[str, LocalScorer] = field(default_factory=dict)
    """By the name of the role; a learner is a scorer too."""
    _samplers: dict[Any, LocalSampler] = field(default_factory=dict)

    def make_learner(
        self,
        *,
        name: str,
        optimizer: AdamW,
        token_budget: int,
        num_updates: int,
        precision: Precision,
        checkpoint_activations: bool,
        sharded: bool,
    ) -> None:
        """Makes this process' part of the learner of a role."""
        options: dict[str, Any] = {"name": name, "token_budget": token_budget, "num_updates": num_updates}
        role = prepared(self.roles[name], precision, checkpoint_activations)
        self.scorers[name] = local_learner(role, optimizer, sharded=sharded, **options)

    def make_scorer(self, *, name: str, token_budget: int, precision: Precision) -> None:
        """Makes the scorer of a role."""
        self.roles[name].precision = precision
        self.scorers[name] = LocalScorer(self.roles[name], token_budget=token_budget)

    def update(self, *, name: str, work: Work) -> Metrics:
        """This process' share of an update."""
        return self._learner(name).update(work)

    def load(self, *, name: str, directory: str) -> None:
        """Restores a learner."""
        self._learner(name).load(Path(directory))

    def save(self, *, name: str, directory: str) -> None:
        """Takes part in gathering what the controller saves, if this process has a share of it."""
        if isinstance(learner := self._learner(name), ShardedLearner):
            learner.save(Path(directory))

    def hold(self, *, name: str) -> None:
        """Takes part in gathering the weights of a role, and keeps them until `release`."""
        self.scorers[name].hold()

    def release(self, *, name: str) -> None:
        """Lets go of what `hold` gathered."""
        self.scorers[name].release()

    def score(self, *, name: str, method: str, pieces: Sequence[TokenTrees], reference: str | None) -> list[Tensor]:
        """The results of a method of a scorer for some of the pieces of a batch."""
        scorer = self.scorers[name]
        others = () if reference is None else (self.scorers[reference],)
        with ExitStack() as stack:
            for one in (scorer, *others):
                stack.enter_context(one.whole())
            return [getattr(scorer, method)(*others, piece) for piece in pieces]

    def sample(
        self,
        *,
        name: str,
        sampling: Sampling,
        form: str,
        watched: bool,
        prefixes: Sequence[Sequence[int]],
        group_size: int,
        uniforms: Tensor,
        limits: Tensor | None,
    ) -> tuple[list[SampledReply], float]:
        """Continuations of some prefixes, and the largest difference between sampler and policy."""
        key = (name, sampling, form, watched)
        if key not in self._samplers:
            policy = self.roles[name]
            assert isinstance(policy, Policy)
            assert self.chat is not None
            chosen = next(f for f in forms(policy, sampling, self.chat) if f.name == form)
            choice = FormChoice(type(policy.model).__name__, chosen, {})
            self._samplers[key] = LocalSampler(policy, self.chat, sampling, choice=choice, watched=watched)
        sampler = self._samplers[key]
        with self.scorers[name].whole() if name in self.scorers else nullcontext():
            drawn = sampler.continue_ids(prefixes, group_size=group_size, uniforms=uniforms, limits=limits)
        return drawn, sampler.difference if prefixes else 0.0

    def peak_rss_gb(self) -> float:
        """The most memory that this process has held."""
        return own_peak_rss_gb()

    def checksums(self) -> dict[str, float]:
        """A number for the weights of each role, which are to be equal in all processes."""
        return checksums(self.roles)

    def _learner(self, name: str) -> LocalLearner:
        learner = self.scorers[name]
        assert isinstance(learner, LocalLearner)
        return learner


def prepared(role: Policy | ScalarModel, precision: Precision, checkpoint_activations: bool) -> Policy | ScalarModel:
    """The role, set to compute as a stage's settings say."""
    role.precision = precision
    if checkpoint_activations:
        role.checkpoint_activations()
    return role


def local_learner(role: Policy | ScalarModel, optimizer: AdamW, *, sharded: bool, **options: Any) -> LocalLearner:
    """One process' part of a learner that all processes make at the same time: with a whole model each, whose gradients
    are added, or with a share of it."""
    if sharded:
        return ShardedLearner(role, optimizer, **options)
    return LocalLearner(role, optimizer, reduce_gradients=sum_over_processes, **options)


@torch.no_grad()
def checksums(roles: Mapping[str, Policy | ScalarModel]) -> dict[str, float]:
    """The sum of the weights of each role, in float64. Adapters of other roles on its base do not count: those of
    rewards are only where rewards are."""
    return {
        name: float(sum(p.double().sum() for n, p in role.named_parameters() if is_of_role(n, role.adapter)))
        for name, role in roles.items()
    }


def is_of_role(name: str, adapter: str | None) -> bool:
    """Whether a weight belongs to a role that is this adapter, or the base alone."""
    return "lora_" not in name or (adapter is not None and f".{adapter}." in name)


def sum_over_processes(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over all processes, which is the same in all of them, to the bit. A weight that
    no process has a gradient for keeps none."""
    weights = list(parameters)
    present = torch.tensor([w.grad is not None for w in weights], dtype=torch.int32)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    used = [w for w, there in zip(weights, present.tolist(), strict=True) if there]
    for weight in used:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    while used:
        some = [used.pop()]
        while used and sum(w.numel() for w in some) + used[-1].numel() <= _REDUCED:
            some.append(used.pop())
        gradients = [w.grad for w in some if w.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
