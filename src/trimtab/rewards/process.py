"""A process reward model as a reward: a probability for each step of a reply, put together or paid step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batches.device import CPU
from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.hub import on_base, reward_facts
from trimtab.core.metrics import Metrics, mean_of
from trimtab.core.registry import register
from trimtab.core.types import Prompt, Rollout
from trimtab.data.graded import step_ends
from trimtab.math.steps import StepAggregate, differences, running_aggregate
from trimtab.models.forward import values_and_scores_of
from trimtab.rewards.model import ModelReward
from trimtab.rewards.scorer import RewardModelScorer
from trimtab.rewards.written_text import Ids

Credit = Literal["reply", "steps", "differences"]
"""Where a process reward is paid; see `ProcessReward.credit`."""


@register("reward", "process")
@dataclass(frozen=True, kw_only=True)
class ProcessReward(ModelReward):
    """The probability that the steps of a reply are right, by a process model of the reward stage."""

    aggregate: StepAggregate | None = None
    """How the steps' probabilities become one: "last", "min", "product" or "mean". None is what the model's directory
    says, which follows how its labels were made."""
    credit: Credit = "reply"
    """Where online training pays it: "reply" at the last token; "differences" at the end of each step what that step
    adds to the aggregate so far, whose sum is the reward of the reply; "steps" at the end of each step its probability,
    so that a reply of more steps earns more."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """A reply's reward is a probability, also as the sum of what its steps add; that of steps one by one has no
        bound."""
        return None if self.credit == "steps" else (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.credit == "steps" and self.aggregate is not None:
            raise ValueError(
                f'aggregate = "{self.aggregate}" with credit = "steps", which pays each step by itself; leave it out, '
                'or set credit = "differences"'
            )

    def load(
        self,
        *,
        token_budget: int,
        device: torch.device = CPU,
        name: str = "process",
        shared: PreTrainedModel | None = None,
        base: str = "",
    ) -> ProcessScorer:
        """The model on a device, or as another adapter on the `shared` base if it is one of that; `name` is that of the
        reward in metrics. Raises ConfigError if the directory does not hold a process model."""
        facts = process_facts(self.path)
        if shared is not None and on_base(self.path, base):
            scorer = RewardModelScorer.on_shared(shared, f"reward_{name}", self.path, token_budget=token_budget)
        else:
            scorer = RewardModelScorer.from_directory(self.path, token_budget=token_budget, device=device)
        return ProcessScorer(
            scorer,
            separator=facts["reward_separator"],
            aggregate=self.aggregate or facts["reward_aggregate"],
            credit=self.credit,
            name=name,
        )


_OTHERS = {"outcome": "an outcome model", "regression": "a regression on ratings"}


def process_facts(path: str) -> dict[str, Any]:
    """What the directory of a process model says of it: `reward_separator`, `reward_labels_from`, `reward_aggregate`.
    Raises ConfigError if it is that of another model."""
    facts = reward_facts(path)
    if (kind := facts.get("reward_kind", "")) != "process":
        raise ConfigError(
            f"its scores are those of {_OTHERS.get(kind, 'a model of pairs')}, which learned nothing about steps",
            where=path,
            fix="name it with the reward 'model', or train a process model: trimtab reward with loss = 'process'",
        )
    return facts


class ProcessScorer:
    """Scores each step of a reply, at the token at which the model learned to."""

    def __init__(
        self, scorer: RewardModelScorer, *, separator: str, aggregate: StepAggregate, credit: Credit, name: str
    ) -> None:
        self.scorer = scorer
        scorer.model.gives = "both"
        self.separator = separator
        self.aggregate: StepAggregate = aggregate
        self.credit = credit
        self.name = name
        self._is_first = True

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] the aggregates, or [M] what each token that the policy chose is paid; and as metrics the mean number of
        steps, and the share of replies with one step, whose reward is that of an outcome model.

        Raises EngineError if no reply of the first call has the separator; later this is only counted, because a few
        replies may happen to have none. Raises it too if tokens are to be paid that the model reads in another
        vocabulary than the policy.
        """
        sequences = self.scorer.ids_of(rollouts)
        found, metrics = self._steps(sequences)
        if self.credit == "reply":
            return torch.stack([self.reward_of(own) for _, own in found]), metrics
        paid = [self._paid(r, ids, *own) for r, (_, ids), own in zip(rollouts, sequences, found, strict=True)]
        return torch.cat(paid), metrics

    def score_texts(self, pairs: Sequence[tuple[Prompt, str]]) -> Tensor:
        """[B] the aggregates of finished replies given as text."""
        return torch.stack([self.reward_of(own) for own in self.step_probabilities(pairs)])

    def reward_of(self, probabilities: Tensor) -> Tensor:
        """The aggregate of a reply whose steps have these probabilities [T], a single number."""
        return self._potentials(probabilities)[-1]

    def step_probabilities(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Tensor]:
        """For each finished reply given as text, the probabilities [T] that its T steps are right."""
        return [own for _, own in self._steps(self.scorer.ids_of_texts(pairs))[0]]

    def _steps(self, sequences: Sequence[Ids]) -> tuple[list[tuple[list[int], Tensor]], Metrics]:
        """For each reply the places where its steps end, with the probabilities [T] there; and metrics."""
        ends = [step_ends(self.scorer.chat, ids or (self.scorer.chat.end_id,), self.separator) for _, ids in sequences]
        single = [len(own) == 1 for own in ends]
        first, self._is_first = self._is_first, False
        if first and sequences and all(single):
            raise EngineError(
                f"the separator {self.separator!r} does not occur between two steps in any of {len(ends)} replies, so "
                "each of them is one step",
                where=f"the process reward {self.name}",
                fix="let the policy write steps as the process model learned them (its demonstrations show how), train "
                "one with the separator that the policy writes, or judge whole replies by an outcome model",
            )
        trees, where = self.scorer.trees_of(sequences)
        values, scores = values_and_scores_of(self.scorer.model, trees, self.scorer.token_budget)
        # Every token of a reply is trained in these trees: the score at one is the value of the token behind it.
        sizes = torch.bincount(trees.sequence_ids, minlength=trees.num_sequences)
        starts = sizes.cumsum(0) - sizes
        found = []
        for own, place in zip(ends, where.tolist(), strict=True):
            before = starts[place] + 1 + torch.tensor(own[:-1], dtype=torch.int64)
            found.append((own, torch.cat([values[before], scores[place, None]]).sigmoid()))
        metrics: Metrics = {
            f"reward/{self.name}_steps": mean_of(map(len, ends)),
            f"reward/{self.name}_one_step_fraction": mean_of(single),
        }
        return found, metrics

    def _potentials(self, probabilities: Tensor) -> Tensor:
        return running_aggregate(probabilities, self.aggregate)

    def _paid(self, rollout: Rollout, ids: tuple[int, ...], ends: Sequence[int], probabilities: Tensor) -> Tensor:
        """What each token that the policy chose is paid; a step that an environment ended is paid at the token before
        that."""
        if len(ids) != len(rollout.response_ids) or ids[:-1] != rollout.response_ids[:-1]:
            raise EngineError(
                f"the process model reads a reply as other tokens than the policy wrote: {rollout.response[:60]!r}",
                where=f"the process reward {self.name}, credit = {self.credit!r}",
                fix="train the process model from the policy's own family and tokenizer, or set credit = 'reply'",
            )
        amounts = probabilities if self.credit == "steps" else differences(self._potentials(probabilities))
        chosen = torch.tensor(rollout.response_mask).cumsum(0)
        places = (chosen[torch.tensor(ends)] - 1).clamp(min=0)
        return torch.zeros(len(rollout.logprobs)).index_add(0, places, amounts)
