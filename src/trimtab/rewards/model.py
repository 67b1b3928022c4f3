"""A trained reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from trimtab.data.chat import Chat
from trimtab.data.trees import TokenTrees, response_tree
from trimtab.metrics import Metrics
from trimtab.models.forward import sequence_scores_of
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.registry import register
from trimtab.types import Prompt, Rollout


@register("reward", "model")
@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """The score of a reward model directory, calibrated: a demonstration scores 0 on average."""

    path: str
    """Directory written by the reward stage, or any sequence-classification model with one label."""
    weight: float = 1.0
    """Factor in the sum of rewards."""

    def load(self, *, token_budget: int) -> RewardModelScorer:
        """The model in memory."""
        return RewardModelScorer.from_directory(self.path, token_budget=token_budget)


class RewardModelScorer:
    """Scores text with a reward model's own tokenizer and chat template, whatever the policy's are."""

    def __init__(self, model: ScalarModel, chat: Chat, *, token_budget: int, shift: float) -> None:
        """`shift` is subtracted from every score."""
        self.model = model
        self.chat = chat
        self.token_budget = token_budget
        self.shift = shift

    @classmethod
    def from_directory(cls, path: str, *, token_budget: int) -> RewardModelScorer:
        """A frozen reward model. Raises EngineError where the directory has no trained score head."""
        chat = Chat(load_tokenizer(path))
        model = load_scalar(path)
        shift = float(getattr(model.config, "reward_shift", 0.0))
        return cls(ScalarModel(model, pad_id=chat.pad_id, gives="scores"), chat, token_budget=token_budget, shift=shift)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] calibrated rewards of the exact tokens that were sampled.

        A rollout's own ids are used when they are what this tokenizer makes of the prompt; otherwise the text is
        encoded anew with this model's template.
        """
        sequences = []
        for prompt, group in groupby(rollouts, key=lambda r: r.prompt):
            prompt_ids = tuple(self.chat.encode_prompt(prompt.messages))
            for r in group:
                own = r.prompt_ids == prompt_ids
                sequences.append((prompt_ids, r.response_ids if own else tuple(self.chat.encode_response(r.response))))
        return self._score_ids(sequences), {}

    def score_texts(self, pairs: Sequence[tuple[Prompt, str]]) -> Tensor:
        """[B] calibrated rewards of finished replies given as text."""
        sequences = [
            (tuple(self.chat.encode_prompt(p.messages)), tuple(self.chat.encode_response(t))) for p, t in pairs
        ]
        return self._score_ids(sequences)

    def _score_ids(self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
        trees = [response_tree(p, [r for _, r in g]) for p, g in groupby(sequences, key=lambda s: s[0])]
        return sequence_scores_of(self.model, TokenTrees.build(trees), self.token_budget) - self.shift
