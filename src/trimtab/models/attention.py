"""Attention over flat rows of real tokens, for any transformers model that takes its attention from the registry.

The linear layers of the model see one row [1, N] without padding. Only attention depends on how tokens are related: as
branches of token trees (`tree_attention.py`), or as replies being decoded (`engines/local/slot_cache.py`). Each kind is
an `Attend`.

Nothing that a model passes to its attention is dropped. The mask is taken as the function of positions from which the
model builds it, so windows and chunks are the model's own. Attention sinks are passed on. Anything else is refused, and
`models/forms.py` then finds a form in which transformers itself computes the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from trimtab.batches.device import to_device
from trimtab.core.errors import EngineError

LLAMA_LIKE = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Models whose blocks compute x + attention(norm(x)), then x + gated MLP(norm(x))."""
ROW_ATTENTION = "trimtab_rows"
UNSEEN = -1e30
"""Added to the score of a key that is not seen. Its weight is then 0, and a row that sees nothing stays finite."""

Visible = Callable[[Tensor, Tensor], Tensor]
"""A function of two tensors of positions that broadcast: whether tokens at the first see tokens at the second. It is
never true for later tokens. Example: chunked attention, in which positions 8 to 15 see each other but nothing
before."""
Window = int | Visible | None
"""The earlier tokens that a token sees: all (None), the `int` nearest, itself included, or those a function gives."""


class Attend(Protocol):
    """Attention among the tokens of a row, for example `tree_attention(trees)`."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: Window,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[N, H, D] for query [N, H, D], key and value [N, KV heads, D]. With a window, a token sees only the tokens in
        it. `sinks` [H] are the scores of one more key for each head, whose value is zero."""


@dataclass(frozen=True)
class PackedRow:
    """What the mask means while a flat row is computed. It is attached to the mask, because every model passes its mask
    to its attention, while many do not pass on further arguments."""

    attend: Attend
    window: Window


_attending: ContextVar[Attend | None] = ContextVar("attending", default=None)
_skipped: ContextVar[int] = ContextVar("skipped", default=0)
_ROW = "trimtab_row"
_HARMLESS = {
    # For kernels that build their own mask; the mask holds the same information.
    *("sliding_window", "is_causal", "position_ids"),
    # These affect only what is returned or counted beside the hidden states.
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"),
    *("use_cache", "cache", "cache_position", "logits_to_keep", "deterministic"),
}


def row_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output [1, N, H, D] of one flat row, computed by its `Attend`; that of padded rows if no flat row is
    being computed.

    Raises EngineError if the model passes anything else to its attention that could change the result.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise _refusal(module, f"is given {', '.join(unknown)}, which is not computed here")
    row: PackedRow | None = getattr(attention_mask, _ROW, None)
    if row is None:
        if _attending.get() is not None:
            raise _refusal(module, "is given a mask of its own")
        return _padded_attention(module, query, key, value, attention_mask, scaling, softcap, s_aux, kwargs), None
    if softcap is not None or kwargs.get("is_causal") is False:
        raise _refusal(module, "caps its scores" if softcap is not None else "sees later tokens")
    size = value.shape[-1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The keys of latent attention are longer than its values: zeros at the end change no score and no output.
    width = max(size, query.shape[-1])
    query, key, value = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    # Under autocast, norms and rotations give float32, while the value has the dtype that the linear layer gave it.
    query, key = query.to(value.dtype), key.to(value.dtype)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return row.attend(layer, query, key, value, scaling, row.window, s_aux)[None, ..., :size], None


def row_mask(*, mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """The mask of a flat row: one placeholder entry, with the model's window attached. If no flat row is being
    computed, the mask of sdpa."""
    attend = _attending.get()
    if attend is None:
        mask: Tensor | None = sdpa_mask(mask_function=mask_function, **kwargs)
        return mask
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device"))
    if not kwargs.get("use_vmap"):  # with vmap the function may not accept tensors of positions
        setattr(marker, _ROW, PackedRow(attend, _window(mask_function, kwargs.get("local_size"))))
    return marker


def is_row(mask: Tensor | None) -> bool:
    """Whether this mask stands for a flat row (`row_mask`)."""
    return hasattr(mask, _ROW)


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, row_mask)


def _window(mask_function: Callable[..., Any], size: int | None) -> Window:
    """The window that a mask function of transformers, called with batch, head and two positions, describes."""
    if mask_function is causal_mask_function:
        return None

    def visible(asking: Tensor, seen: Tensor) -> Tensor:
        first = torch.zeros((), dtype=torch.int64, device=asking.device)
        found: Tensor = mask_function(first, first, asking, seen)
        return found & (seen <= asking)

    if size is None:
        return visible
    # A window is the same at all positions, so its edges at a few of them distinguish it from chunks of that size.
    asking = torch.tensor([0, size - 1, size, size + 1, 2 * size, 3 * size + 1])[:, None]
    seen = asking + torch.tensor([0, -1, 1 - size, -size, -size - 1])
    agree = visible(asking, seen) == (seen > asking - size)
    return size if bool((agree | (seen < 0)).all()) else visible


def _padded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    if softcap is None and sinks is None:
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
        return output
    later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    seen = ~later.triu(1 + key.shape[2] - query.shape[2]) if mask is None else mask
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return softmax_attention(query, key, value, seen, scaling, sinks=sinks, softcap=softcap).transpose(1, 2)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scaling: float,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention [B, H, L, D] by its definition, over the keys that are true in `seen` [B, 1, L, T].

    With `softcap` c a score s is replaced by c tanh(s / c). `sinks` [H] are the scores of one more key whose value is
    zero.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, UNSEEN)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, L, D] and the logsumexp of its scores [B, H, L].

    With the logsumexp, attention over two sets of keys can be merged into attention over both (`merge_attention`).
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
    """Attention over the keys of both parts and its logsumexp [...]: the outputs [..., D] are weighted by the sum of
    exponentials of each part."""
    lse = torch.logaddexp(first_lse, second_lse)
    weight = (second_lse - lse).exp()[..., None].to(first.dtype)
    return torch.lerp(first, second, weight), lse


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    base = model.base_model
    if base is model:  # the class's base_model_prefix does not name its decoder
        base = getattr(model, "model", None) or model.get_decoder()  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, base)


def described(model: PreTrainedModel) -> str:
    """The model in messages: the directory or hub id it was loaded from, if any, and its architecture."""
    path, kind = getattr(model.config, "_name_or_path", ""), f"architecture {type(model).__name__}"
    return f"{path}, {kind}" if path else kind


def num_layers(model: PreTrainedModel) -> int:
    """The number of blocks of the model."""
    number: int = model.config.get_text_config().num_hidden_layers
    return number


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Inside this block a model that is set to `ROW_ATTENTION` computes its attention with `attend`."""
    token = _attending.set(attend)
    try:
        yield
    finally:
        _attending.reset(token)


@contextmanager
def skipping(num: int) -> Iterator[None]:
    """Inside this block the first `num` layers of a model are not computed, so `row_states` does not expect them."""
    token = _skipped.set(num)
    try:
        yield
    finally:
        _skipped.reset(token)


def row_states(backbone: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
    """[N, D] last hidden states of one flat row of tokens. Raises EngineError unless every layer used `attend` exactly
    once."""
    layers: list[int] = []
    input_ids, position_ids = (to_device(x, backbone.device) for x in (input_ids, position_ids))

    def counted(layer: int, *states: Any, **options: Any) -> Tensor:
        layers.append(layer)
        return attend(layer, *states, **options)

    with attending(counted):
        hidden: Tensor = backbone(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            # Without a mask transformers would treat the row as several packed sequences.
            attention_mask=torch.ones_like(input_ids[None]),
            use_cache=False,
        ).last_hidden_state
    if sorted(layers) != list(range(_skipped.get(), num_layers(backbone))):
        raise _refusal(backbone, f"was computed here in the layers {sorted(layers)}, of {num_layers(backbone)}")
    return hidden[0]


def _refusal(module: torch.nn.Module, what: str) -> EngineError:
    return EngineError(
        f"the attention of this model {what}, so it cannot be computed over a shared row",
        where=f"architecture {type(module).__name__}",
        fix="load the model from its directory, where a form that computes it is found; please report this otherwise",
    )
