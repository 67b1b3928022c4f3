"""The four models as roles: a policy or reference gives log-probabilities, a reward model or critic gives scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.batches.device import to_cpu, to_device
from trimtab.batches.outputs import ScoreOutputs, TokenOutputs
from trimtab.batches.trees import TokenTrees
from trimtab.core.errors import EngineError
from trimtab.math.logprobs import exact_kl, token_logprobs
from trimtab.models.adapters import adapter_parameters, trained_weight_of, using
from trimtab.models.attention import backbone
from trimtab.models.checkpointing import checkpoint_blocks
from trimtab.models.compiled_attention import takes_compiled
from trimtab.models.embedding_gradients import gradients_in_place, takes_in_place
from trimtab.models.forms import Form, Place, hidden_states, proved
from trimtab.models.logits import head_of, logit_shape
from trimtab.models.precision import Precision, computing_in, products_in_float32


class Role(nn.Module):
    """A model in one of its roles, alone or as an adapter on a base that other roles share."""

    def __init__(self, model: PreTrainedModel, *, pad_id: int, adapter: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.adapter = adapter
        self.precision: Precision = "float32"
        self.in_place = False
        facts = proved(model)
        self.form: Form = facts.form
        self.causal = facts.causal
        self.length_limit = facts.length_limit

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside this block the model computes for this role: with its adapter or none, and in its precision."""
        with using(self.model, self.adapter), computing_in(self.precision, self.device.type):
            yield

    @property
    def device(self) -> torch.device:
        """Where the model computes. Trees come from the CPU, and results go back to it: this is where tensors cross."""
        return self.model.device

    @property
    def tree_form(self) -> bool:
        """Whether trees are computed as one shared row. Setting it to false selects padded rows instead."""
        return self.form == "tree"

    @tree_form.setter
    def tree_form(self, value: bool) -> None:
        if value != self.tree_form:
            self.form = "tree" if value else "padded"

    @property
    def way(self) -> str:
        """The form and whether its attention is compiled, for a run's records. Example: "tree, compiled"."""
        fits = self.tree_form and self.precision == "float32" and takes_compiled(next(self.model.parameters()))
        return self.form + ", compiled" * fits

    def states(self, trees: TokenTrees, places: list[Place]) -> list[Tensor]:
        """The last hidden states at each of `places`, computed in the role's form."""
        return hidden_states(
            backbone(self.model),
            trees,
            places,
            form=self.form,
            pad_id=self.pad_id,
            length_limit=self.length_limit,
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that a learner of this role changes: its adapter and heads, or every weight that requires
        gradients."""
        if self.adapter is None:
            return {n: p for n, p in self.named_parameters() if p.requires_grad}
        own = {n: p for n, p in self.named_parameters() if not n.startswith("model.")}
        return adapter_parameters(self.model, self.adapter) | own

    @contextmanager
    def gradients_in_place(self) -> Iterator[None]:
        """Inside this block a backward pass adds the gradients of embedding and head directly to `.grad`."""
        embedding, head = self._vocabulary_layers
        self.in_place = takes_in_place(head)
        with gradients_in_place([embedding, head]):
            try:
                yield
            finally:
                self.in_place = False

    def clear_gradients(self) -> None:
        """Drops the gradients of this role's weights. Those that are added to in place are set to zero where they are,
        because finding memory for a large vocabulary again takes longer than to fill it."""
        in_place = {id(m.weight) for m in self._vocabulary_layers if m is not None and takes_in_place(m)}
        for weight in self.trained_parameters().values():
            if weight.grad is not None and id(weight) in in_place:
                weight.grad.zero_()
            else:
                weight.grad = None

    @property
    def _vocabulary_layers(self) -> list[Any]:
        """The input embedding, and the head of a policy."""
        return [self.model.get_input_embeddings(), self.head if isinstance(self, Policy) else None]

    def checkpoint_activations(self) -> None:
        """Makes the model keep only the input of each block for the backward pass, and compute the rest again there."""
        checkpoint_blocks(self.model)


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
        if not self.causal:
            raise EngineError(
                "what this model says of a token changes with the tokens after it",
                where=f"architecture {type(model).__name__}",
                fix="use a decoder as policy and reference; an encoder can be a reward model",
            )
        self.shaped = logit_shape(model)
        self.temperature = temperature
        self.value_head = zero_head(model) if with_value_head else None

    @property
    def head(self) -> nn.Linear:
        """The output embedding, [V, D]."""
        return cast(nn.Linear, head_of(self.model))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] the model's logits for hidden states [n, D]: the output of its head, scaled and capped as in the
        model. The head computes in float32, whatever the precision of the model's products."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return self.shaped(raw)

    @property
    def head_weight(self) -> Tensor:
        """[V, D] the weight of the output embedding, with this role's adapter if that changes it."""
        return trained_weight_of(self.head, self.adapter)

    def hidden(self, trees: TokenTrees) -> Tensor:
        """[M, D] the hidden states that predict the trained tokens."""
        with self.active():
            [hidden] = self.states(trees, ["predict_from"])
            return hidden

    def forward(self, trees: TokenTrees, *, entropy: bool = False, temperature: float | None = None) -> TokenOutputs:
        """Log-probabilities of the trained tokens, at the role's temperature if no other is given; also their entropy
        if asked for, and values if there is a value head."""
        hidden = self.hidden(trees)
        logprobs, entropies = token_logprobs(
            hidden,
            self.head_weight,
            to_device(trees.targets, hidden.device),
            bias=self.head.bias,
            temperature=self.temperature if temperature is None else temperature,
            scale=self.shaped.scale,
            cap=self.shaped.cap,
            with_entropy=entropy,
            weight_gradient=self.head.weight.grad if self.in_place else None,
            rounded=self.precision == "bfloat16",
        )
        values = self.value_head(hidden.float()).squeeze(-1) if self.value_head is not None else None
        return TokenOutputs(*to_cpu(logprobs, entropies, values))

    @torch.no_grad()
    def kl_to(self, reference: Policy, trees: TokenTrees) -> Tensor:
        """[M] exact KL(self || reference) of the next-token distribution at every trained token, in nats.

        Two embeddings for one tokenizer may have different numbers of rows, padded to a round number. Only the tokens
        that both have are compared.
        """
        ours, theirs = self.head_weight, reference.head_weight
        rows = min(len(ours), len(theirs))
        biases = [bias if bias is None else bias[:rows] for bias in (self.head.bias, reference.head.bias)]
        return exact_kl(
            self.hidden(trees),
            ours[:rows],
            reference.hidden(trees),
            theirs[:rows],
            bias_p=biases[0],
            bias_q=biases[1],
            temperature=self.temperature,
            shape_p=(self.shaped.scale, self.shaped.cap),
            shape_q=(reference.shaped.scale, reference.shaped.cap),
            rounded=self.precision == "bfloat16",
        ).cpu()


class ScalarModel(Role):
    """A model with a scalar head: a reward model (a score at the last token) or a critic (a value before each
    token)."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        adapter: str | None = None,
        head: nn.Linear | None = None,
        gives: Literal["values", "scores", "both"] = "both",
    ) -> None:
        """`head` is given if the model is shared with other roles and has no scalar head. `gives` says which outputs
        are computed; the others, such as the values of a reward model or the scores of a critic, are nan."""
        super().__init__(model, pad_id=pad_id, adapter=adapter)
        self.own_head = head
        self.gives = gives
        # transformers reads the score at the last token that is not padding, and needs to know which one that is.
        model.config.pad_token_id = pad_id
        model.config.get_text_config().pad_token_id = pad_id
        self.is_decoder = self.causal and (head is not None or reads_last_token(model))
        if gives == "values" and not self.is_decoder:
            raise EngineError(
                "this model gives a score of a whole reply but no values of its tokens: "
                + ("its head is not read at single tokens" if self.causal else "it sees later tokens"),
                where=f"the critic, architecture {type(model).__name__}",
                fix="set critic.init = 'policy' or 'value_head', or critic.path to a decoder",
            )

    @property
    def head(self) -> nn.Linear:
        """The scalar head, [1, D]."""
        return self.own_head if self.own_head is not None else cast(nn.Linear, self.model.score)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that a learner of this role changes. Beside an adapter, the scalar head is trained too."""
        found = super().trained_parameters()
        if self.adapter is not None and self.own_head is None:
            self.head.requires_grad_(True)
            found |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        return found

    def forward(self, trees: TokenTrees) -> ScoreOutputs:
        """Values and scores of the trees. The head computes in float32, whatever the precision of the model's
        products."""
        with self.active():
            if not self.is_decoder:
                # An encoder sees the whole reply at every position: it has a score, but no value before a token.
                scores = self._pooled(trees).cpu()
                return ScoreOutputs(values=scores.new_full((trees.num_trained,), torch.nan), scores=scores)
            places: list[Place] = [] if self.gives == "scores" else ["predict_from"]
            places += [] if self.gives == "values" else ["last_tokens"]
            states = self.states(trees, places)
            with torch.autocast(states[0].device.type, enabled=False):
                read = {place: self.head(x.float()).squeeze(-1).cpu() for place, x in zip(places, states, strict=True)}
        return ScoreOutputs(
            values=read.get("predict_from", torch.full((trees.num_trained,), torch.nan)),
            scores=read.get("last_tokens", torch.full((trees.num_sequences,), torch.nan)),
        )

    def _pooled(self, trees: TokenTrees) -> Tensor:
        """[B] scores from the model's own pooling."""
        rows = trees.padded(self.pad_id)
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        with products_in_float32(heads):
            if self.form == "alone":
                pairs = zip(rows.input_ids, rows.attention_mask, strict=True)
                alone = [to_device(ids[mask][None], self.device) for ids, mask in pairs]
                logits = torch.cat([self.model(input_ids=ids).logits for ids in alone])
            else:
                ids, mask = (to_device(x, self.device) for x in (rows.input_ids, rows.attention_mask.long()))
                logits = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[:, 0].float()


@torch.no_grad()
def reads_last_token(model: PreTrainedModel) -> bool:
    """Whether the model's score is its linear head applied to the hidden state of the last token."""
    head = getattr(model, "score", None)
    if not callable(head):
        return False
    config = model.config.get_text_config()
    ids = (torch.arange(3, 9, device=model.device) % config.vocab_size)[None]
    ids = torch.where(ids == model.config.pad_token_id, (ids + 7) % config.vocab_size, ids)
    theirs = model(input_ids=ids).logits.flatten()
    ours = head(backbone(model)(input_ids=ids).last_hidden_state[:, -1]).flatten()
    return theirs.shape == ours.shape and bool(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4))


def zero_head(model: PreTrainedModel) -> nn.Linear:
    """A scalar head of zeros for a model's hidden states."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def head_of_weights(weights: dict[str, Tensor], device: torch.device) -> nn.Linear:
    """The scalar head stored beside an adapter: "score.weight" [1, D] and, if there, "score.bias"."""
    weight, bias = weights["score.weight"], weights.get("score.bias")
    head = nn.Linear(weight.shape[1], 1, bias=bias is not None, device=device)
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    return head
