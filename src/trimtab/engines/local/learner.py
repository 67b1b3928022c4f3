"""The local learner: one model, its optimizer and the one backward pass. It is the definition for other engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.batches.trees import TokenTrees
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.errors import EngineError
from trimtab.core.metrics import Mean, Metrics, Total, merge
from trimtab.engines.base import Loss, Work
from trimtab.engines.local.scorer import LocalScorer
from trimtab.models.roles import Policy, ScalarModel

NORM_BLOCK = 1 << 16
"""Entries of a gradient that are converted to float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with a learning-rate schedule."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after warm-up; linear reaches zero, cosine a tenth of the peak."""
    warmup_fraction: float = 0.0
    """Share of the run's updates over which the rate rises from zero."""
    beta1: float = 0.9
    """Decay rate of the running mean of gradients."""
    beta2: float = 0.999
    """Decay rate of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors such as norms and biases are not decayed."""
    max_gradient_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm."""

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "warmup_fraction", "learning_rate", "max_gradient_norm")
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay = {self.weight_decay:g} with learning_rate = {self.learning_rate:g}: each update would "
                "take away the whole of every weight or more; 0.01 to 0.1 are usual"
            )

    def rate_at(self, update: int, num_updates: int) -> float:
        """The learning rate of update number `update`, counted from 0."""
        warmup = math.ceil(self.warmup_fraction * num_updates)
        if update < warmup:
            return self.learning_rate * (update + 1) / warmup
        progress = (update - warmup) / max(1, num_updates - warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1 - progress)
        if self.schedule == "cosine":
            return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        return self.learning_rate


class LocalLearner(LocalScorer):
    """Trains one model in this process, and scores trees with it."""

    def __init__(
        self,
        role: Policy | ScalarModel,
        optimizer: AdamW,
        *,
        token_budget: int,
        num_updates: int,
        name: str,
        reduce_gradients: Callable[[Iterable[nn.Parameter]], None] = lambda _parameters: None,
        clip: Callable[[Iterable[nn.Parameter], float], float] | None = None,
    ) -> None:
        """`token_budget` bounds the tokens of one forward pass, `num_updates` is the length of the schedule, and `name`
        ("policy", "critic", …) is used in metrics and errors. `reduce_gradients` is called before each update, and may
        add the gradients that other processes have computed; `clip` may be another function than `clip_gradients`."""
        super().__init__(role, token_budget=token_budget)
        self.reduce_gradients = reduce_gradients
        self.clip = clip or clip_gradients
        self.settings = optimizer
        self.num_updates = num_updates
        self.name = name
        self.updates_done = 0
        self.revision = 0
        """How often the weights have changed: by an update, or because a state was loaded."""
        self.parameters = role.trained_parameters()
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        plain = [p for p in self.parameters.values() if p.ndim < 2]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=True,
        )

    def update(self, work: Work) -> Metrics:
        """One optimizer step over all of `work`. Raises EngineError when a loss or gradient is not finite.

        Each loss is a sum over its batch, divided by a weight that is known before the first micro-batch, so how a
        batch is split changes neither the gradient nor the metrics.
        """
        rate = self.settings.rate_at(self.updates_done, self.num_updates)
        self.role.clear_gradients()
        found: list[Metrics] = []
        with self.role.gradients_in_place():
            for batch, losses in work:
                scales = [loss.coef / float(loss.weight(batch)) for loss in losses]
                for micro in batch.micro_batches(self.token_budget):
                    outputs = self._forward(micro.trees, losses)
                    total = torch.zeros(())
                    for loss, scale in zip(losses, scales, strict=True):
                        value, metrics = loss(outputs, micro)
                        total = total + scale * value
                        found.append(metrics)
                    self._require_finite(total.item(), "loss")
                    with self.role.active():
                        total.backward()  # type: ignore[no-untyped-call]
        self.reduce_gradients(self.parameters.values())
        norm = self.clip(self.parameters.values(), self.settings.max_gradient_norm)
        self._require_finite(norm, "gradient norm")
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.updates_done += 1
        self.revision += 1
        return merge(found) | {
            f"optimizer/{self.name}_gradient_norm": Mean(norm, 1),
            f"optimizer/{self.name}_learning_rate": Mean(rate, 1),
            f"optimizer/{self.name}_updates": Total(1),
        }

    @property
    def form(self) -> str:
        """How the model computes a batch."""
        return self.role.way

    @torch.no_grad()
    def evaluate(self, batch: Any, loss: Loss) -> Metrics:
        """The metrics of a loss on one micro-batch, without gradients."""
        return loss(self.role(batch.trees), batch)[1]

    def _forward(self, trees: TokenTrees, losses: Sequence[Loss]) -> Any:
        if not isinstance(self.role, Policy):
            return self.role(trees)
        wants_entropy = any(getattr(loss, "needs_entropy", False) for loss in losses)
        # A loss such as SFTLoss sets its own temperature, whatever temperature the policy samples at.
        temperature = next((t for loss in losses if (t := getattr(loss, "at_temperature", None)) is not None), None)
        return self.role(trees, entropy=wants_entropy, temperature=temperature)

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise EngineError(
                f"the {what} of the {self.name} became {value}",
                where=f"update {self.updates_done + 1}",
                fix="lower the learning rate, or look at the last samples and rewards for extreme values",
            )

    def save(self, directory: Path) -> None:
        """Writes weights and optimizer state to `directory`/NAME.safetensors."""
        tensors = {f"weight/{n}": p.detach() for n, p in self.parameters.items()}
        for n, p in self.parameters.items():
            for key, value in self.adam.state.get(p, {}).items():
                tensors[f"adam.{key}/{n}"] = value
        tensors["updates_done"] = torch.tensor(self.updates_done)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, directory / f"{self.name}.safetensors")

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Restores what `save` wrote."""
        tensors = load_file(directory / f"{self.name}.safetensors")
        for n, p in self.parameters.items():
            p.copy_(tensors[f"weight/{n}"])
            state = {
                k: tensors[f"adam.{k}/{n}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}/{n}" in tensors
            }
            if state:
                # A fused optimizer wants its moments and its count of steps beside the weight.
                self.adam.state[p] = {key: value.to(p.device) for key, value in state.items()}
        self.updates_done = int(tensors["updates_done"])
        self.revision += 1


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Returns the gradient norm before clipping, summed in float64. Scales the gradients down to `max_norm` in place.

    Float32 norms of large tensors have errors of 1e-4 on CPUs, which change with how the tensor is split.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum_of_squares(gradients))
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """The sum of squares of all entries in float64. A GPU takes the norms of all tensors in one operation."""
    if not tensors:
        return 0.0
    if all(x.device.type == "cpu" for x in tensors):
        return float(torch.stack([_sum_of_squares(x) for x in tensors]).sum())
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return float(torch.stack(norms).square().sum())


def _sum_of_squares(x: Tensor) -> Tensor:
    """Summed block by block: the copy of a block stays in the processor's cache, so this takes a fifth of the time of
    torch's norm in float64."""
    blocks = (block.double() for block in torch.split(x.reshape(-1), NORM_BLOCK))
    return torch.stack([torch.dot(block, block) for block in blocks]).sum()
