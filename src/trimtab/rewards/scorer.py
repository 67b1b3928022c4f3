"""Scores replies with a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batches.device import CPU
from trimtab.batches.trees import TokenTrees, Tree, response_tree
from trimtab.core.errors import EngineError
from trimtab.core.hub import base_of, refuse_ensemble, reward_facts
from trimtab.core.metrics import Metrics
from trimtab.core.types import Prompt, Rollout
from trimtab.data.chat import Chat
from trimtab.data.tokenizers import load_config
from trimtab.models.adapters import load_adapter
from trimtab.models.forward import sequence_scores_of
from trimtab.models.lengths import positions_of
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel, head_of_weights
from trimtab.rewards.length_correction import LengthCorrection
from trimtab.rewards.written_text import Ids, WrittenText
from trimtab.stats import Floats

TOKEN_BUDGET = 4096
"""The number of tokens in one forward pass of a reward model where no run file gives it."""


class RewardModelScorer:
    """Scores text with a reward model's own tokenizer and chat template, whatever the policy's are.

    A score is read at the token at which the model learned to give it. For models of the reward stage, this is the end
    token of the reply. Any other model is read as `tokenizer.apply_chat_template` and its own forward pass do it: after
    whatever the template writes behind a reply (ChatML writes a line break there), and before padding tokens at the
    end.
    """

    def __init__(
        self, model: ScalarModel, chat: Chat, *, token_budget: int, shift: float, written: WrittenText | None = None
    ) -> None:
        """`shift` is subtracted from every score. `written` says how a model of another program reads a conversation;
        None reads a prompt and a reply up to its end token, as the reward stage does."""
        self.model = model
        self.chat = chat
        self.token_budget = token_budget
        self.shift = shift
        self.written = written
        self.ending = (chat.end_id,) if written is None else written.ending
        """The ids behind the text of a finished reply."""
        embedding: Any = model.model.get_input_embeddings()
        self.num_rows = int(embedding.num_embeddings)
        """The model cannot read an id of this number or above."""
        self.positions = positions_of(model.model)
        self.length_correction: LengthCorrection | None = None
        """What is subtracted from the scores for the length of a reply; None corrects nothing."""

    @classmethod
    def from_directory(cls, path: str, *, token_budget: int, device: torch.device = CPU) -> RewardModelScorer:
        """A frozen reward model. Raises EngineError if the directory has no trained score head, or is an ensemble."""
        refuse_ensemble(path, where=path)
        model = load_scalar(path, device=device)
        shift = getattr(model.config, "reward_shift", None)
        chat = _chat_of(path, shift)
        pad_id = getattr(model, "trained_pad_id", None)
        role = ScalarModel(model, pad_id=chat.pad_id, gives="scores")
        return cls.of(role, chat, token_budget=token_budget, shift=shift, pad_id=pad_id)

    @classmethod
    def on_shared(cls, shared: PreTrainedModel, name: str, path: str, *, token_budget: int) -> RewardModelScorer:
        """A reward model as an adapter with this name, and a head, on a base that other models share."""
        shift = reward_facts(path).get("reward_shift")
        chat = _chat_of(path, shift)
        pad_id = load_config(base_of(path) or path).get_text_config().pad_token_id
        member = member_on(shared, name, path, pad_id=chat.pad_id)
        return cls.of(member, chat, token_budget=token_budget, shift=shift, pad_id=pad_id)

    @classmethod
    def of(
        cls, model: ScalarModel, chat: Chat, *, token_budget: int, shift: float | None, pad_id: int | None = None
    ) -> RewardModelScorer:
        """A reward model of the reward stage, with the shift that it wrote; or one of another program, without, which
        was trained with `pad_id` as its padding token."""
        written = WrittenText.of(chat, pad_id) if shift is None else None
        return cls(model, chat, token_budget=token_budget, shift=float(shift or 0.0), written=written)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] calibrated rewards of the exact tokens that were sampled; and of a correction for length, its metrics.

        A rollout's own ids are used if this tokenizer gives the same ids for its prompt and reads those of its reply as
        the same text, and if the model has a row for each; otherwise the text is encoded anew with this model's
        template. A reply that was cut off has no ending; a reply that ended, on whichever token, gets the ending that
        the model learned.
        """
        sequences = self.ids_of(rollouts)
        return self.score_ids(sequences), self.length_metrics(sequences)

    def ids_of(self, rollouts: Sequence[Rollout]) -> list[Ids]:
        """The ids of the prompt and of the reply of each rollout, as this model reads them."""
        sequences = []
        for prompt, group in groupby(rollouts, key=lambda r: r.prompt):
            prompt_ids = tuple(self.chat.encode_prompt(prompt.messages))
            sequences += [(prompt_ids, self._response_ids(r, prompt_ids)) for r in group]
        return sequences if self.written is None else self._as_written(rollouts, sequences)

    def _as_written(self, rollouts: Sequence[Rollout], sequences: Sequence[Ids]) -> list[Ids]:
        """The ids of rollouts for a model of another program: `sequences`, if its template writes a conversation as
        prompt and reply; otherwise the ids of the text that it writes, without an ending if the reply was cut off."""
        texts = [(r.prompt, r.response) for r in rollouts]
        found = []
        for rollout, own, usual, whole in zip(
            rollouts, sequences, self._usual_ids(texts), self.ids_of_texts(texts), strict=True
        ):
            if rollout.observations or (own[1] and sum(whole, ()) == sum(usual, ())):
                found.append(own)
            elif rollout.finish_reason == "length" and whole[1][-len(self.ending) :] == self.ending:
                found.append((whole[0], whole[1][: -len(self.ending)]))
            else:
                found.append(whole)
        return found

    def _response_ids(self, rollout: Rollout, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        ids = rollout.response_ids
        ended = rollout.finish_reason != "length"
        if rollout.prompt_ids != prompt_ids or not self._reads(rollout):
            ids = tuple(self.chat.encode_response(rollout.response, ended=ended))
        return ids[:-1] + self.ending if ended and self._ends(ids[-1:]) else ids

    def _ends(self, last: tuple[int, ...]) -> bool:
        """Whether the last id of a reply stands for its end. The policy may stop at a special token that ends no reply
        for this model; such a token stands for no text."""
        text = self.chat.tokenizer.decode(list(last), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return bool(last) and (last[0] in self.chat.stop_ids or not text)

    def _reads(self, rollout: Rollout) -> bool:
        """Whether this tokenizer reads the ids of a reply as its text: different tokenizers may agree on a short
        prompt, and the ids of a reply that ended on a stop text go on behind its text. Replies with observations are
        not compared, because between turns an environment writes more than text."""
        if max(rollout.response_ids, default=0) >= self.num_rows:
            return False
        return bool(rollout.observations) or self.chat.decode_response(rollout.response_ids) == rollout.response

    def score_texts(self, pairs: Sequence[tuple[Prompt, str]]) -> Tensor:
        """[B] calibrated rewards of finished replies given as text."""
        return self.score_ids(self.ids_of_texts(pairs))

    def ids_of_texts(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Ids]:
        """The ids of the prompt and of the finished reply of each pair of them."""
        usual = self._usual_ids(pairs)
        return usual if self.written is None else self.written.read(pairs, usual)

    def _usual_ids(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Ids]:
        """The ids of each prompt, up to where the assistant is to speak, and of each finished reply."""
        prompts = list(dict.fromkeys(prompt.messages for prompt, _ in pairs))
        replies = list(dict.fromkeys(reply for _, reply in pairs))
        prompt_ids = dict(zip(prompts, map(tuple, self.chat.prompt_ids(prompts)), strict=True))
        reply_ids = {
            reply: tuple(ids)[:-1] + self.ending
            for reply, ids in zip(replies, self.chat.encode_responses(replies), strict=True)
        }
        return [(prompt_ids[prompt.messages], reply_ids[reply]) for prompt, reply in pairs]

    def score_ids(self, sequences: Sequence[Ids]) -> Tensor:
        """[B] calibrated rewards of prompts and replies given as ids."""
        return self.member_scores(sequences)[0] - self.shift

    def member_scores(self, sequences: Sequence[Ids]) -> Tensor:
        """[K, B] the scores of K models before the shift, corrected for length if that is asked for; here K is 1."""
        trees, where = self.trees_of(sequences)
        return self._corrected(sequence_scores_of(self.model, trees, self.token_budget)[None, where], sequences)

    def _corrected(self, scores: Tensor, sequences: Sequence[Ids]) -> Tensor:
        """Scores [K, B] less what is paid for the length of each reply."""
        return scores if self.length_correction is None else scores - self.length_correction.of(lengths_of(sequences))

    def length_metrics(self, sequences: Sequence[Ids]) -> Metrics:
        """The metrics of the correction for length; none without it."""
        return {} if self.length_correction is None else self.length_correction.metrics(lengths_of(sequences))

    def trees_of(self, sequences: Sequence[Ids]) -> tuple[TokenTrees, Tensor]:
        """Trees that hold each different sequence once, so that equal ones have equal scores, to the last bit; and [B]
        the place of each sequence among theirs. A prompt whose replies exceed the token budget has several trees, so
        that many replies to one prompt take no more memory than the budget allows. Raises EngineError for a sequence
        that the model cannot read."""
        longest = max((len(prompt) + len(response) for prompt, response in sequences), default=0)
        if self.positions is not None and longest > self.positions:
            raise EngineError(
                f"a prompt and reply of {longest} tokens; the reward model has learned {self.positions} positions",
                where=str(self.model.model.config._name_or_path or "the reward model"),
                fix="give shorter texts (a run bounds them by sampling.max_new_tokens and max_prompt_tokens), or use a "
                "reward model that reads longer ones",
            )
        replies: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        for prompt, reply in sequences:
            replies.setdefault(prompt, {}).setdefault(reply or (self.chat.end_id,), 0)
        place = count()
        for of_prompt in replies.values():
            of_prompt.update({reply: next(place) for reply in of_prompt})
        trees = [tree for prompt, own in replies.items() for tree in _within(prompt, list(own), self.token_budget)]
        where = [replies[prompt][reply or (self.chat.end_id,)] for prompt, reply in sequences]
        return TokenTrees.build(trees), torch.tensor(where, dtype=torch.int64)


def _chat_of(path: str, shift: float | None) -> Chat:
    """The chat of a reward model. Raises EngineError for one of another program, which wrote no `shift`, without a chat
    template."""
    tokenizer = load_tokenizer(path)
    if shift is None and tokenizer.chat_template is None:
        raise EngineError(
            "this reward model of another program has no chat template, so nothing says how a prompt and a reply are "
            "written for it",
            where=path,
            fix="write the form that it was trained on into chat_template.jinja in its directory, or train a reward "
            "model with `trimtab reward`",
        )
    return Chat(tokenizer)


def lengths_of(sequences: Sequence[Ids]) -> list[int]:
    """The number of tokens of each reply, with its ending."""
    return [len(reply) for _, reply in sequences]


def _within(prompt: tuple[int, ...], replies: Sequence[tuple[int, ...]], token_budget: int) -> list[Tree]:
    """The replies to a prompt in order, in trees of at most so many tokens; one reply may take more, alone."""
    groups: list[list[tuple[int, ...]]] = []
    num_tokens = 0
    for reply in replies:
        if not groups or num_tokens + len(reply) > token_budget:
            groups.append([])
            num_tokens = len(prompt)
        groups[-1].append(reply)
        num_tokens += len(reply)
    return [response_tree(prompt, group) for group in groups]


def rewards_of(
    scorer: RewardModelScorer, texts: Sequence[tuple[Prompt, str]], *, unread: Literal["refuse", "nan"] = "refuse"
) -> Floats:
    """[B] rewards of prompts with finished replies, all of them finite.

    With `unread = "nan"` a reply that the model has not enough positions to read gets nan. Raises EngineError for such
    a reply otherwise, and if the model gives a reward that is not finite.
    """
    sequences = scorer.ids_of_texts(texts)
    rewards = np.full(len(sequences), np.nan)
    most = scorer.positions
    read = [unread == "refuse" or most is None or len(prompt) + len(reply) <= most for prompt, reply in sequences]
    if any(read):
        found = scorer.score_ids([ids for ids, is_read in zip(sequences, read, strict=True) if is_read])
        rewards[read] = finite_scores(found.double().numpy(), of=scorer.model)
    return rewards


def finite_scores(scores: Floats, *, of: ScalarModel) -> Floats:
    """The scores as they are. Raises EngineError if one of them is not finite: it would count as a wrong judgement, and
    JSON cannot hold it."""
    if broken := int((~np.isfinite(scores)).sum()):
        raise EngineError(
            f"{broken} of {scores.size} rewards are not finite",
            where=str(of.model.config._name_or_path or "the reward model"),
            fix="train the reward model again with a smaller learning rate, or compute in float32",
        )
    return scores


def member_on(shared: PreTrainedModel, name: str, path: str, *, pad_id: int) -> ScalarModel:
    """The reward adapter of a directory on a shared base, with its head. Raises EngineError if it has no head."""
    weights = load_adapter(shared, name, path, with_head=True)
    if "score.weight" not in weights:
        raise EngineError(
            f"the adapter brings no trained score head ({', '.join(weights) or 'nothing beside its LoRA'})",
            where=path,
            fix="train one with `trimtab reward`, or name a directory that the reward stage wrote",
        )
    head = head_of_weights(weights, shared.device)
    return ScalarModel(shared, pad_id=pad_id, adapter=name, head=head, gives="scores")
