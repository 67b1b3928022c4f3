"""Attention over flat rows of real tokens, for any transformers model that takes its attention from the registry.

The linear layers of the model see one row [1, N] without padding. Only attention knows what the tokens are to each
other: branches of token trees here, replies being decoded in `models/slots.py`. Each is an `Attend`.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LLAMA_LIKE = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Models whose blocks are x + attention(norm(x)), then x + gated MLP(norm(x))."""
ROW_ATTENTION = "trimtab_rows"
UNSEEN = -1e30
"""Added to the score of a key that is not seen: its weight is 0, and a row that sees nothing stays finite."""


class Attend(Protocol):
    """Attention among the tokens of a row."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """[N, H, D] for query [N, H, D], key and value [N, KV heads, D]; with a window, a token sees only those less
        than `window` positions before it."""
        ...


def row_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    attend: Attend | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output [1, N, H, D] of one flat row as `attend` has it; without it, plain sdpa on padded rows."""
    if attend is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast norms and rotations leave float32, where the value is still as the linear layer gave it.
    query, key = query.to(value.dtype), key.to(value.dtype)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attend(layer, query, key, value, scaling, sliding_window)[None], None


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, L, D] and the log of the sum of exponentials of its scores [B, H, L].

    With the latter, attention over two sets of keys is merged into attention over both (`merge_attention`).
    """
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, 0.0, causal, attn_mask=bias, scale=scaling
        )
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if bias is not None:
        scores = scores + bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, UNSEEN)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value.float()).to(query.dtype), lse


def merge_attention(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both: outputs [..., D] weighed by what each part's exponentials sum to, [...]."""
    lse = torch.logaddexp(first_lse, second_lse)
    weight = (second_lse - lse).exp()[..., None].to(first.dtype)
    return torch.lerp(first, second, weight), lse


def supports_rows(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder whose attention can be replaced, and replaced by what is known here."""
    config = model.config.get_text_config()
    known = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    capped = getattr(config, "attn_logit_softcapping", None)
    decoder = not getattr(config, "is_encoder_decoder", False) and is_decoder(model)
    return bool(decoder and model._supports_attention_backend and known and not capped)


def use_rows(model: PreTrainedModel) -> bool:
    """Gives the model attention over flat rows where it supports it, and says whether it does."""
    if supported := supports_rows(model):
        model.set_attn_implementation(ROW_ATTENTION)
    return supported


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the model attends to earlier tokens only. Read from its attention layers, as configs do not say it."""
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(flags) and all(flags)


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    return cast(PreTrainedModel, model.base_model)


def row_states(backbone: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
    """[N, D] last hidden states of one flat row of tokens."""
    # A mask with four axes is passed through untouched; without one transformers would build its own, N by N.
    untouched = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    hidden: Tensor = backbone(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=untouched,
        attend=attend,
        use_cache=False,
    ).last_hidden_state
    return hidden[0]
