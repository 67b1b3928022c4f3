"""The four models as roles: a policy or reference gives log-probabilities, a reward model or critic gives scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.data.trees import TokenTrees
from trimtab.math.logprobs import exact_kl, token_logprobs
from trimtab.models.attention import backbone, is_decoder, use_rows
from trimtab.models.tree_attention import hidden_states


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


class Policy(nn.Module):
    """A causal language model that scores the trained tokens of trees; policy or reference."""

    def __init__(
        self, model: PreTrainedModel, *, pad_id: int, temperature: float = 1.0, with_value_head: bool = False
    ) -> None:
        """`temperature` divides the logits, as in sampling. A value head starts at zero."""
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.temperature = temperature
        self.tree_form = use_rows(model)
        width = model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1) if with_value_head else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def head(self) -> nn.Linear:
        """The output embedding, [V, D]."""
        return cast(nn.Linear, self.model.get_output_embeddings())  # type: ignore[no-untyped-call]

    def hidden(self, trees: TokenTrees) -> Tensor:
        """[M, D] the hidden states that predict the trained tokens."""
        return hidden_states(backbone(self.model), trees, tree_form=self.tree_form, pad_id=self.pad_id)[0]

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


class ScalarModel(nn.Module):
    """A model with a scalar head: reward model (a score at the last token) or critic (a value before every token)."""

    def __init__(self, model: PreTrainedModel, *, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.tree_form = use_rows(model)
        self.is_decoder = is_decoder(model) and hasattr(model, "score")
        # transformers reads the score at the last token that is not padding, and needs to know which one that is.
        model.config.pad_token_id = pad_id

    def forward(self, trees: TokenTrees) -> ScoreOutputs:
        """Values and scores of the trees."""
        if self.is_decoder:
            before, last = hidden_states(backbone(self.model), trees, tree_form=self.tree_form, pad_id=self.pad_id)
            head = cast(nn.Linear, self.model.score)
            return ScoreOutputs(values=head(before).squeeze(-1).float(), scores=head(last).squeeze(-1).float())
        rows = trees.padded(self.pad_id)
        scores = self.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask.long()).logits[:, 0].float()
        # An encoder sees the whole reply at every position: it has a score, but no value before a token.
        return ScoreOutputs(values=scores.new_full((trees.num_trained,), torch.nan), scores=scores)
