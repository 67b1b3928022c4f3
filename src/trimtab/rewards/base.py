"""The protocol of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trimtab.core.errors import EngineError
from trimtab.core.metrics import Metrics
from trimtab.core.types import Rollout
from trimtab.math.masking import sum_per_sequence


class Reward(Protocol):
    """Judges finished rollouts. For example, `GoldScorer` and `RewardModelScorer` are rewards.

    A reward may say `thread_safe = True`: it may be scored in another thread than the one that trains, while models are
    trained. Then it uses no model of the run, draws nothing from global random generators, and needs no signals. A
    reward that does not say so is scored by the thread of the training loop. The settings of a reward may say `bounds`,
    the lowest and the highest score that there is, for example `(0.0, 1.0)`: then a limit beyond them is refused.
    """

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] float32 rewards in the reward's own units (nan for a reply that it cannot judge), and each of its parts
        as metrics.

        A reward may also give [M]: what each token that the policy chose is paid, reply after reply. The reward of a
        reply is then the sum over its tokens.
        """


def by_reply(rewards: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
    """[B] the reward of each reply, from what a `Reward` gives: [B], or [M] that are added up. Raises EngineError for
    any other number of rewards."""
    if len(rewards) == len(rollouts):  # also if each reply is one token, and both mean the same
        return rewards
    owners = token_owners(rollouts)
    if len(rewards) != len(owners):
        raise EngineError(
            f"a reward gave {len(rewards)} numbers for {len(rollouts)} replies of {len(owners)} tokens in all",
            where="rewards",
            fix="return one number for each reply, or one for each token that the policy chose",
        )
    return sum_per_sequence(rewards, owners, len(rollouts))


def token_owners(rollouts: Sequence[Rollout]) -> Tensor:
    """[M] the number of the reply that each token that the policy chose belongs to."""
    return torch.arange(len(rollouts)).repeat_interleave(torch.tensor([len(r.logprobs) for r in rollouts]))
