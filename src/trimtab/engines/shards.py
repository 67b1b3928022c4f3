"""A learner whose weights, gradients and optimizer state are spread over the processes (FSDP2 of torch).

Each process keeps a share of every tensor; a block of the model is whole only while it computes. The role itself, which
samples, scores and is saved, is a plain model beside it: it has memory only inside `whole`, where it is filled from the
shares. So nothing but this file knows of shards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trimtab.batches.trees import TokenTrees, TreeBatch, sequence_tree, split_by_tokens
from trimtab.core.errors import EngineError
from trimtab.core.metrics import Metrics
from trimtab.engines.base import Loss, Scorer, Work
from trimtab.engines.local.learner import AdamW, LocalLearner, sum_of_squares
from trimtab.engines.local.scorer import LocalScorer
from trimtab.models.attention import num_layers
from trimtab.models.roles import Policy, ScalarModel

NOTHING = sequence_tree([0, 0])


@dataclass(frozen=True, kw_only=True)
class EmptyRounds(TreeBatch):
    """What a process computes while others still have micro-batches, since all take part in gathering each block."""

    num: int
    """The number of micro-batches."""

    def micro_batches(self, token_budget: int) -> Iterator[Self]:
        """Yields the batch `num` times."""
        return iter([self] * self.num)


class NoLoss:
    """A loss that is zero, and whose gradients are."""

    coef = 1.0

    def weight(self, batch: Any) -> Tensor:
        """One."""
        return torch.ones(())

    def __call__(self, outputs: Any, batch: Any) -> tuple[Tensor, Metrics]:
        """Zero."""
        found = [x.sum() for x in vars(outputs).values() if isinstance(x, Tensor) and x.requires_grad]
        return torch.stack(found).sum() * 0, {}


class ShardedLearner(LocalLearner):
    """The learner of one process among several. Every method is called in all of them at the same time."""

    def __init__(
        self, role: Policy | ScalarModel, optimizer: AdamW, *, token_budget: int, num_updates: int, name: str
    ) -> None:
        if role.adapter is not None:
            raise EngineError(
                "the frozen base of an adapter is not sharded",
                where="engine.shard and adapter",
                fix="set engine.shard = false: an adapter has little that could be sharded; or train all weights",
            )
        shards = shard(copy.deepcopy(role))
        super().__init__(
            shards,
            optimizer,
            token_budget=token_budget,
            num_updates=num_updates,
            name=name,
            clip=clip_shards,
        )
        self._scorer = LocalScorer(role, token_budget=token_budget)
        self._users = 0
        self._empty()

    def hold(self) -> None:
        """Gives the role its weights as they are now, until `release`."""
        if self._users == 0:
            self._fill()
        self._users += 1

    def release(self) -> None:
        """Ends what `hold` began; after the last of several, the role's memory is free again."""
        self._users -= 1
        if self._users == 0:
            self._empty()

    def logprobs(self, trees: TokenTrees) -> Tensor:
        """[M] log-probability of every trained token at the policy's temperature."""
        with self.whole():
            return self._scorer.logprobs(trees)

    def values(self, trees: TokenTrees) -> Tensor:
        """[M] the critic's value before every trained token."""
        with self.whole():
            return self._scorer.values(trees)

    def kl_to(self, reference: Scorer, trees: TokenTrees) -> Tensor:
        """[M] exact KL(self || reference) of the next-token distribution at every trained token, in nats."""
        with self.whole():
            return self._scorer.kl_to(reference, trees)

    def evaluate(self, batch: Any, loss: Loss) -> Metrics:
        """The metrics of a loss on one micro-batch, without gradients."""
        with self.whole(), torch.no_grad():
            return loss(self._scorer.role(batch.trees), batch)[1]

    def update(self, work: Work) -> Metrics:
        """One optimizer step with this process' share of the work; see `LocalLearner.update`."""
        own = sum(len(split_by_tokens(batch.trees, self.token_budget)) for batch, _ in work)
        most = torch.tensor(own)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        empty = EmptyRounds(trees=TokenTrees.build([NOTHING]), num=int(most) - own)
        return super().update([*work, (empty, [NoLoss()])])

    def _forward(self, trees: TokenTrees, losses: Sequence[Loss]) -> Any:
        with warnings.catch_warnings():
            # Values are a view of the head's output, and nothing changes them in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            return super()._forward(trees, losses)

    def save(self, directory: Path) -> None:
        """Writes what `LocalLearner.save` writes, from the first process."""
        tensors = {f"weight/{n}": gathered(p.detach()) for n, p in self.parameters.items()}
        for n, p in self.parameters.items():
            for key, value in self.adam.state.get(p, {}).items():
                tensors[f"adam.{key}/{n}"] = gathered(value)
        if dist.get_rank() == 0:
            tensors["updates_done"] = torch.tensor(self.updates_done)
            directory.mkdir(parents=True, exist_ok=True)
            save_file({k: t.contiguous() for k, t in tensors.items()}, directory / f"{self.name}.safetensors")

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Restores what any learner's `save` wrote."""
        tensors = load_file(directory / f"{self.name}.safetensors")
        for n, p in self.parameters.items():
            p.copy_(sharded_like(p, tensors[f"weight/{n}"]))
            if f"adam.exp_avg/{n}" in tensors:
                moments = {key: sharded_like(p, tensors[f"adam.{key}/{n}"]) for key in ("exp_avg", "exp_avg_sq")}
                self.adam.state[p] = {"step": tensors[f"adam.step/{n}"], **moments}
        self.updates_done = int(tensors["updates_done"])
        self.revision += 1

    @torch.no_grad()
    def _fill(self) -> None:
        own = dict(self.role.named_parameters())
        for name, weight in self._scorer.role.named_parameters():
            weight.data = gathered(own[name].detach())

    def _empty(self) -> None:
        for weight in self._scorer.role.parameters():
            weight.data = weight.new_empty(0)


def shard(role: Policy | ScalarModel) -> Policy | ScalarModel:
    """The role with its weights spread over all processes, block by block; the rest of it is one more part. The role is
    the root, because it reads the weight of the head itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    num = num_layers(role.model)
    blocks = next(m for m in role.modules() if isinstance(m, nn.ModuleList) and len(m) == num)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(role, mesh=mesh)
    for part in (*blocks, role):
        part.set_gradient_divide_factor(1.0)  # the sum over processes, not their mean
        part.set_force_sum_reduction_for_comms(True)
    return role


def clip_shards(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """What `clip_gradients` does, for gradients of which each process has a share."""
    shares = [g.to_local() if isinstance(g := p.grad, DTensor) else g for p in parameters if p.grad is not None]
    total = torch.tensor(sum_of_squares([share for share in shares if share.numel()]), dtype=torch.float64)
    dist.all_reduce(total)
    norm = float(total.sqrt())
    if norm > max_norm:
        for share in shares:
            share.mul_(max_norm / norm)
    return norm


def gathered(x: Tensor) -> Tensor:
    """The whole tensor, in every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded_like(like: Tensor, whole: Tensor) -> Tensor:
    """The whole tensor, spread as `like` is. Every process has it, so nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
