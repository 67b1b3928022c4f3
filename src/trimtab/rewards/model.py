"""A trained reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

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
        embedding: Any = model.model.get_input_embeddings()
        self.num_rows = int(embedding.num_embeddings)
        """Ids from here on the model cannot read."""

    @classmethod
    def from_directory(cls, path: str, *, token_budget: int) -> RewardModelScorer:
        """A frozen reward model. Raises EngineError where the directory has no trained score head."""
        chat = Chat(load_tokenizer(path))
        model = load_scalar(path)
        shift = float(getattr(model.config, "reward_shift", 0.0))
        return cls(ScalarModel(model, pad_id=chat.pad_id, gives="scores"), chat, token_budget=token_budget, shift=shift)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] calibrated rewards of the exact tokens that were sampled.

        A rollout's own ids are used if those of its prompt are what this tokenizer makes of it, and the model has a row
        for each; otherwise the text is encoded anew with this model's template. A reply that was cut off gets no end
        token.
        """
        sequences = []
        for prompt, group in groupby(rollouts, key=lambda r: r.prompt):
            prompt_ids = tuple(self.chat.encode_prompt(prompt.messages))
            sequences += [(prompt_ids, self._response_ids(r, prompt_ids)) for r in group]
        return self._score_ids(sequences), {}

    def _response_ids(self, rollout: Rollout, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        ids = rollout.response_ids
        if rollout.prompt_ids == prompt_ids and max(ids, default=0) < self.num_rows:
            return ids
        ended = rollout.finish_reason != "length"
        return tuple(self.chat.encode_response(rollout.response, ended=ended))

    def score_texts(self, pairs: Sequence[tuple[Prompt, str]]) -> Tensor:
        """[B] calibrated rewards of finished replies given as text."""
        sequences = [
            (tuple(self.chat.encode_prompt(p.messages)), tuple(self.chat.encode_response(t))) for p, t in pairs
        ]
        return self._score_ids(sequences)

    def _score_ids(self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
        trees = [response_tree(p, [r for _, r in g]) for p, g in groupby(sequences, key=lambda s: s[0])]
        return sequence_scores_of(self.model, TokenTrees.build(trees), self.token_budget) - self.shift
