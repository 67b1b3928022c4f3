"""What a round of sampling gives: groups of rollouts with their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import dropwhile

import torch
from torch import Tensor

from trimtab.batches.rollouts import rollout_trees
from trimtab.batches.trees import TokenTrees
from trimtab.core.metrics import Metrics
from trimtab.core.types import Prompt, Rollout
from trimtab.rewards.combined import COST


@dataclass(frozen=True)
class Group:
    """The replies to one prompt with their rewards [G], and the reward of the greedy reply, nan if there is none."""

    rollouts: Sequence[Rollout]
    rewards: Tensor
    baseline: float
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """The scores [G] of each reward by name, before its weight; empty if there is only one."""
    baseline_parts: Mapping[str, float] = field(default_factory=dict)
    """The scores of the greedy reply by each of them; empty if there is no greedy reply."""
    paid: Tensor | None = None
    """What each token that the policy chose is paid, of all replies one after the other, if the reward pays tokens;
    `rewards` are then its sums."""

    def has_signal(self, *, parts_apart: bool) -> bool:
        """Whether some reply is better, costs less or is paid at other tokens than another. `parts_apart` says that the
        advantages scale each part by itself, so that replies of one sum may still differ."""
        judged = [self.rewards, *(x for name, x in self.parts.items() if parts_apart or name == COST)]
        if any(bool(scores.min() < scores.max()) for scores in judged):
            return True
        if self.paid is None:
            return False
        # Counted from the end, because tokens before the first payment are all worth the whole sum.
        paid = torch.split(self.paid, [len(r.logprobs) for r in self.rollouts])
        return len({tuple(dropwhile(lambda amount: amount == 0, own.tolist())) for own in paid}) > 1


@dataclass(frozen=True)
class RolloutBatch:
    """The rollouts that a step trains on: groups with their rewards, B rollouts in all, and the metrics of sampling."""

    groups: Sequence[Group]
    metrics: Metrics
    staleness: int = 0
    """The steps whose updates the policy has made since these rollouts were drawn."""
    replaced_costs: Sequence[float] = ()
    """What the cost gave, before its weight, to the replies of groups that dynamic sampling replaced. They are not
    trained on, but a limit is on the replies of all prompts."""

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, group after group."""
        return [r for group in self.groups for r in group.rollouts]

    @cached_property
    def trees(self) -> TokenTrees:
        """The rollouts as trees, the prompt of a group once."""
        return rollout_trees([group.rollouts for group in self.groups])

    @cached_property
    def logprobs(self) -> Tensor:
        """[M] the sampler's log-probability of every token that it drew."""
        return torch.tensor([x for r in self.rollouts for x in r.logprobs])

    @property
    def rewards(self) -> Tensor:
        """[B] the rewards, group after group."""
        return torch.cat([group.rewards for group in self.groups])

    @property
    def paid(self) -> Tensor | None:
        """[M] what each token is paid, if the reward pays tokens."""
        if all(group.paid is None for group in self.groups):
            return None
        # Where all replies that were scored together are one token, rewards of replies and of tokens are the same.
        return torch.cat([group.rewards if group.paid is None else group.paid for group in self.groups])

    @property
    def baselines(self) -> Tensor:
        """[B] the reward of the greedy reply to the same prompt; nan if none was asked for."""
        return torch.cat([torch.full_like(group.rewards, group.baseline) for group in self.groups])

    @property
    def parts(self) -> dict[str, Tensor]:
        """The scores [B] of each reward by name, before its weight; empty if there is only one."""
        return {name: torch.cat([group.parts[name] for group in self.groups]) for name in self.groups[0].parts}

    @property
    def baseline_parts(self) -> dict[str, Tensor]:
        """The scores [B] of the greedy reply by each of them; nan if no greedy reply was asked for."""
        return {
            name: torch.cat([torch.full_like(g.rewards, g.baseline_parts.get(name, torch.nan)) for g in self.groups])
            for name in self.groups[0].parts
        }

    @property
    def group_ids(self) -> Tensor:
        """[B] the number of each rollout's group."""
        sizes = torch.tensor([len(group.rollouts) for group in self.groups])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @property
    def finished(self) -> Tensor:
        """[B] whether a reply ended by itself."""
        return torch.tensor([r.finish_reason == "stop" for r in self.rollouts])


@dataclass(frozen=True)
class Replies:
    """The replies to some prompts, before they are judged: `group_size` rollouts for each prompt, and the likeliest
    reply to each if the advantages compare with it."""

    prompts: Sequence[Prompt]
    rollouts: Sequence[Rollout]
    greedy: Sequence[Rollout]
