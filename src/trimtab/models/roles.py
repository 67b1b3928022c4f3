"""The four models as roles: a policy or reference gives log-probabilities, a reward model or critic gives scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.data.trees import TokenTrees
from trimtab.math.logprobs import exact_kl, token_logprobs
from trimtab.models.adapters import adapter_parameters, using
from trimtab.models.attention import backbone, is_decoder, use_rows
from trimtab.models.embedding_gradients import gradients_in_place, takes_in_place
from trimtab.models.precision import Precision, computing_in
from trimtab.models.tree_attention import Place, hidden_states


@dataclass(frozen=True)
class TokenOutputs:
    """What a policy says of the trained tokens; all [M]."""

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class ScoreOutputs:
    """What a scalar model says: [M] where trained tokens are predicted from, [B] at the end of each sequence."""

    values: Tensor
    scores: Tensor


class Role(nn.Module):
    """A model in one of its roles, alone or as an adapter on a base that other roles share."""

    def __init__(self, model: PreTrainedModel, *, pad_id: int, adapter: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.adapter = adapter
        self.precision: Precision = "float32"
        self.in_place = False
        self.tree_form = use_rows(model)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the model is this role's: its adapter is applied, or none, and products are in its precision."""
        with using(self.model, self.adapter), computing_in(self.precision):
            yield

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What a learner of this role changes: its adapter and heads, or every weight that takes gradients."""
        if self.adapter is None:
            return {n: p for n, p in self.named_parameters() if p.requires_grad}
        own = {n: p for n, p in self.named_parameters() if not n.startswith("model.")}
        return adapter_parameters(self.model, self.adapter) | own

    @contextmanager
    def gradients_in_place(self) -> Iterator[None]:
        """Within it a backward pass adds the gradients of embedding and head to `.grad` without making them first."""
        head = self.head if isinstance(self, Policy) else None
        self.in_place = takes_in_place(head)
        embedding = self.model.get_input_embeddings()
        with gradients_in_place([embedding, head]):
            try:
                yield
            finally:
                self.in_place = False

    def checkpoint_activations(self) -> None:
        """Keep only the input of each block for the backward pass, and compute the rest again there."""
        self.model.activation_checkpointing_enable()
        self.model.train()


class Policy(Role):
    """A causal language model that scores the trained tokens of trees; policy or reference."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        temperature: float = 1.0,
        with_value_head: bool = False,
        adapter: str | None = None,
    ) -> None:
        """`temperature` divides the logits, as in sampling. A value head starts at zero."""
        super().__init__(model, pad_id=pad_id, adapter=adapter)
        self.temperature = temperature
        self.value_head = zero_head(model) if with_value_head else None

    @property
    def head(self) -> nn.Linear:
        """The output embedding, [V, D]."""
        return cast(nn.Linear, self.model.get_output_embeddings())  # type: ignore[no-untyped-call]

    def hidden(self, trees: TokenTrees) -> Tensor:
        """[M, D] the hidden states that predict the trained tokens."""
        with self.active():
            model = backbone(self.model)
            [hidden] = hidden_states(model, trees, ["predict_from"], tree_form=self.tree_form, pad_id=self.pad_id)
            return hidden

    def forward(self, trees: TokenTrees, *, entropy: bool = False) -> TokenOutputs:
        """Log-probabilities of the trained tokens; their entropy when asked; values where there is a value head."""
        hidden = self.hidden(trees)
        logprobs, entropies = token_logprobs(
            hidden,
            self.head.weight,
            trees.targets,
            bias=self.head.bias,
            temperature=self.temperature,
            with_entropy=entropy,
            weight_gradient=self.head.weight.grad if self.in_place else None,
        )
        values = self.value_head(hidden).squeeze(-1) if self.value_head is not None else None
        return TokenOutputs(logprobs, entropies, values)

    @torch.no_grad()
    def kl_to(self, reference: Policy, trees: TokenTrees) -> Tensor:
        """[M] exact KL(self || reference) of the next-token distribution at every trained token, in nats."""
        return exact_kl(
            self.hidden(trees),
            self.head.weight,
            reference.hidden(trees),
            reference.head.weight,
            bias_p=self.head.bias,
            bias_q=reference.head.bias,
            temperature=self.temperature,
        )


class ScalarModel(Role):
    """A model with a scalar head: reward model (a score at the last token) or critic (a value before every token)."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        adapter: str | None = None,
        head: nn.Linear | None = None,
        gives: Literal["values", "scores", "both"] = "both",
    ) -> None:
        """`head` is given where the model, shared with other roles, has none of its own. What it does not give, values
        of a reward model or scores of a critic, is nan, and is not computed."""
        super().__init__(model, pad_id=pad_id, adapter=adapter)
        self.own_head = head
        self.gives = gives
        self.is_decoder = is_decoder(model) and (head is not None or hasattr(model, "score"))
        # transformers reads the score at the last token that is not padding, and needs to know which one that is.
        model.config.pad_token_id = pad_id

    @property
    def head(self) -> nn.Linear:
        """The scalar head, [1, D]."""
        return self.own_head if self.own_head is not None else cast(nn.Linear, self.model.score)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """As for every role; beside an adapter the head of the model is trained."""
        found = super().trained_parameters()
        if self.adapter is not None and self.own_head is None:
            self.head.requires_grad_(True)
            found |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        return found

    def forward(self, trees: TokenTrees) -> ScoreOutputs:
        """Values and scores of the trees."""
        with self.active():
            if self.is_decoder:
                places: list[Place] = [] if self.gives == "scores" else ["predict_from"]
                places += [] if self.gives == "values" else ["last_tokens"]
                states = hidden_states(
                    backbone(self.model), trees, places, tree_form=self.tree_form, pad_id=self.pad_id
                )
                read = {place: self.head(x).squeeze(-1).float() for place, x in zip(places, states, strict=True)}
                return ScoreOutputs(
                    values=read.get("predict_from", torch.full((trees.num_trained,), torch.nan)),
                    scores=read.get("last_tokens", torch.full((trees.num_sequences,), torch.nan)),
                )
            rows = trees.padded(self.pad_id)
            mask = rows.attention_mask.long()
            scores = self.model(input_ids=rows.input_ids, attention_mask=mask).logits[:, 0].float()
        # An encoder sees the whole reply at every position: it has a score, but no value before a token.
        return ScoreOutputs(values=scores.new_full((trees.num_trained,), torch.nan), scores=scores)


def zero_head(model: PreTrainedModel) -> nn.Linear:
    """A scalar head of zeros for a model's hidden states."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
