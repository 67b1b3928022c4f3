"""Engines whose work is spread over the processes of a group. Each process takes a share of every batch, and has the
whole model or, while it trains, a share of it (`shards.py`).

The denominators of losses are those of the whole batch, so what the shares are changes no gradient beyond rounding: the
sum over the shares is the update that one process would make. Every process then makes it, and their weights stay
equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.batches.trees import TokenTrees, Tree, split_by_tokens
from trimtab.core.errors import EngineError
from trimtab.core.metrics import Metrics, merge
from trimtab.data.chat import Chat
from trimtab.engines.base import Loss, Scorer, WeightHolder, Work
from trimtab.engines.group import WorkerGroup
from trimtab.engines.local.form_choice import FormChoice
from trimtab.engines.local.learner import LocalLearner
from trimtab.engines.local.replies import SampledReply, Sampling
from trimtab.engines.local.sampler import LocalSampler
from trimtab.engines.local.scorer import LocalScorer
from trimtab.models.roles import Policy


@dataclass(frozen=True)
class ShareOfLoss:
    """A loss over a share of a batch, divided by the weight of the whole batch."""

    loss: Loss
    whole_weight: float

    @property
    def coef(self) -> float:
        """The loss's own."""
        return self.loss.coef

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss reads the entropy of the policy."""
        return bool(getattr(self.loss, "needs_entropy", False))

    @property
    def at_temperature(self) -> float | None:
        """The temperature of a loss that sets its own."""
        return getattr(self.loss, "at_temperature", None)

    def weight(self, batch: Any) -> Tensor:
        """The weight of the whole batch, whatever the share is."""
        return torch.tensor(self.whole_weight, dtype=torch.float64)

    def __call__(self, outputs: Any, batch: Any) -> tuple[Tensor, Metrics]:
        """The sum over the share, and its metrics."""
        return self.loss(outputs, batch)


class SpreadScorer(WeightHolder):
    """Scores the pieces of a batch in all processes. A piece computes the same wherever it is computed."""

    def __init__(self, local: LocalScorer, *, name: str, group: WorkerGroup) -> None:
        """`local` is this process' part, `name` that of the role; those of the workers are made already."""
        self.local = local
        self.name = name
        self.token_budget = local.token_budget
        self.group = group

    def logprobs(self, trees: TokenTrees) -> Tensor:
        """[M] log-probability of every trained token at the policy's temperature."""
        return _spread(self, "logprobs", trees)

    def values(self, trees: TokenTrees) -> Tensor:
        """[M] the critic's value before every trained token."""
        return _spread(self, "values", trees)

    def kl_to(self, reference: Scorer, trees: TokenTrees) -> Tensor:
        """[M] exact KL(self || reference) of the next-token distribution at every trained token, in nats."""
        assert isinstance(reference, SpreadScorer)
        return _spread(self, "kl_to", trees, reference)


class SpreadLearner(SpreadScorer):
    """A learner of which every process has a part: a whole model, or a share of one."""

    def __init__(self, local: LocalLearner, *, group: WorkerGroup) -> None:
        """`local` is this process' part; those of the workers are made already."""
        super().__init__(local, name=local.name, group=group)
        self.learner = local

    def update(self, work: Work) -> Metrics:
        """One optimizer step over all of `work`; see `LocalLearner.update`."""
        shares = shares_of(work, self.group.size)
        self.group.call("update", [{"name": self.name, "work": share} for share in shares[1:]])
        with self.group.working("update"):
            own = self.learner.update(shares[0])
        others = self.group.answers("update")
        norm = f"optimizer/{self.name}_gradient_norm"
        if any(other[norm].value != own[norm].value for other in others):
            self.group.close()
            raise EngineError(
                f"the processes made different updates: gradient norms {[m[norm].value for m in (own, *others)]}",
                where=f"update {self.learner.updates_done}",
                fix="please report this; the same command goes on from the last checkpoint",
            )
        of_shares = ({k: v for k, v in m.items() if not k.startswith("optimizer/")} for m in others)
        return merge([own, *of_shares])

    @property
    def revision(self) -> int:
        """How often the weights have changed."""
        return self.learner.revision

    @property
    def form(self) -> str:
        """How the model computes a batch."""
        return self.learner.form

    def save(self, directory: Path) -> None:
        """Weights and optimizer state, as `LocalLearner.save` writes them."""
        self._together("save", partial(self.learner.save, directory), directory=str(directory.resolve()))

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, in every process."""
        self._together("load", partial(self.learner.load, directory), directory=str(directory.resolve()))

    def evaluate(self, batch: Any, loss: Loss) -> Metrics:
        """The metrics of a loss on one micro-batch, without gradients."""
        with self.whole():
            return self.learner.evaluate(batch, loss)

    def hold(self) -> None:
        """Gives the roles of all processes all their weights."""
        self._together("hold", self.local.hold)

    def release(self) -> None:
        """Ends what `hold` began, in all processes."""
        self._together("release", self.local.release)

    def _together(self, method: str, here: Callable[[], Any], **arguments: Any) -> None:
        """Calls a method of all workers, and does this process' part meanwhile."""
        self.group.call(method, [{"name": self.name, **arguments}] * (self.group.size - 1))
        with self.group.working(method):
            here()
        self.group.answers(method)


class SpreadSampler(LocalSampler):
    """Draws replies in all processes. Every reply has its own random numbers, so who draws it changes no token; its
    log-probabilities change by rounding, because prompts that start together share a row."""

    def __init__(
        self,
        policy: Policy,
        chat: Chat,
        sampling: Sampling,
        *,
        name: str,
        group: WorkerGroup,
        whole: Callable[[], AbstractContextManager[None]],
        choice: FormChoice | None = None,
        watched: bool = True,
    ) -> None:
        """`name` is that of the role, which has its weights inside `whole()`."""
        super().__init__(policy, chat, sampling, choice=choice, watched=watched)
        self.name = name
        self.group = group
        self._whole = whole

    def continue_ids(
        self,
        prefixes: Sequence[Sequence[int]],
        *,
        group_size: int,
        uniforms: Tensor,
        limits: Tensor | None = None,
    ) -> list[SampledReply]:
        """`group_size` continuations of each prefix, in order; see `LocalSampler.continue_ids`."""
        shares = deal([len(p) for p in prefixes], self.group.size)
        replies = [[i * group_size + g for i in share for g in range(group_size)] for share in shares]
        given: list[dict[str, Any]] = [
            {
                "prefixes": [list(prefixes[i]) for i in share],
                "group_size": group_size,
                "uniforms": uniforms[rows],
                "limits": None if limits is None else limits[rows],
            }
            for share, rows in zip(shares, replies, strict=True)
        ]
        what = {"name": self.name, "sampling": self.sampling, "form": self.method, "watched": self._watched}
        self.difference = 0.0
        self.group.call("sample", [what | share for share in given[1:]])
        with self.group.working("sample"), self._whole():
            drawn = [super().continue_ids(**given[0])]
        for theirs, difference in self.group.answers("sample"):
            drawn.append(theirs)
            self.difference = max(self.difference, difference)
        found: dict[int, SampledReply] = {}
        for rows, answers in zip(replies, drawn, strict=True):
            found |= dict(zip(rows, answers, strict=True))
        return [found[i] for i in range(len(found))]


def _spread(scorer: SpreadScorer, method: str, trees: TokenTrees, *others: SpreadScorer) -> Tensor:
    """The result [M] of a method of `Scorer`, whose pieces are computed in all processes."""
    groups = split_by_tokens(trees, scorer.token_budget)
    pieces = [trees.select(indices) for indices in groups]
    shares = deal([cost(piece.trees) for piece in pieces], scorer.group.size)
    what = {"name": scorer.name, "method": method, "reference": others[0].name if others else None}
    scorer.group.call("score", [what | {"pieces": [pieces[i] for i in share]} for share in shares[1:]])
    with scorer.group.working("score"), ExitStack() as stack:
        for one in (scorer, *others):
            stack.enter_context(one.local.whole())
        compute = getattr(scorer.local, method)
        found = [[compute(*(other.local for other in others), pieces[i]) for i in shares[0]]]
    found += scorer.group.answers("score")
    result = torch.empty(trees.num_trained)
    for share, values in zip(shares, found, strict=True):
        for i, value in zip(share, values, strict=True):
            result[trees.index_of("token", groups[i])] = value
    return result


def shares_of(work: Work, num: int) -> list[Work]:
    """The work of an update in shares of about the same cost, each with the denominators of the whole."""
    shares: list[list[Any]] = [[] for _ in range(num)]
    for batch, losses in work:
        whole = [ShareOfLoss(loss, float(loss.weight(batch))) for loss in losses]
        dealt = deal([cost([tree]) for tree in batch.trees.trees], num)
        for share, indices in zip(shares, dealt, strict=True):
            share.append((batch.select(indices), whole))
    return list(shares)


def deal(costs: Sequence[float], num: int) -> list[list[int]]:
    """Indices in `num` shares, each in ascending order: the costliest first, to the share that has least so far."""
    shares: list[list[int]] = [[] for _ in range(num)]
    totals = [0.0] * num
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = totals.index(min(totals))
        shares[least].append(i)
        totals[least] += costs[i]
    return [sorted(share) for share in shares]


def cost(trees: Sequence[Tree]) -> float:
    """About how long a model takes over these trees: their tokens, and a little for each pair of tokens."""
    return sum(tree.num_tokens * (1 + tree.num_tokens / 4096) for tree in trees)
