"""Attention over token trees, for any transformers model that takes its attention function from the registry.

The linear layers of the model see one flat row of real tokens. Only attention looks at trees: it lays them side by
side, lets each token see its prompt and its own branch, and puts the result back in the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trimtab.data.trees import TokenTrees, TreeBlocks

TREE_ATTENTION = "trimtab_tree"


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    tree_blocks: TreeBlocks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output [1, N, H, head size] of a row of trees; without `tree_blocks`, plain sdpa on padded rows."""
    if tree_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    num_trees, longest = tree_blocks.rows.shape

    def side_by_side(x: Tensor) -> Tensor:
        heads, size = x.shape[1], x.shape[3]
        gathered = x[0].transpose(0, 1).index_select(0, tree_blocks.rows.view(-1))
        return gathered.view(num_trees, longest, heads, size).transpose(1, 2)

    output = scaled_dot_product_attention(
        side_by_side(query),
        side_by_side(key),
        side_by_side(value),
        attn_mask=tree_blocks.visible,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    flat = output.transpose(1, 2).reshape(num_trees * longest, query.shape[1], value.shape[3])
    return flat.index_select(0, tree_blocks.slots)[None], None


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)


def supports_trees(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder whose attention can be replaced and sees every earlier token.

    A sliding window or another layer type would be silently lost under a tree's mask, so such models use padded rows.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    decoder = not getattr(config, "is_encoder_decoder", False) and is_decoder(model)
    return bool(decoder and model._supports_attention_backend and not windowed and layer_types <= {"full_attention"})


def use_trees(model: PreTrainedModel) -> bool:
    """Gives the model tree attention where it supports it, and says whether it does."""
    if supported := supports_trees(model):
        model.set_attn_implementation(TREE_ATTENTION)
    return supported


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the model attends to earlier tokens only. Read from its attention layers, as configs do not say it."""
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(flags) and all(flags)


def hidden_states(
    backbone: PreTrainedModel, trees: TokenTrees, *, tree_form: bool, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Last hidden states ([M, D] where trained tokens are predicted from, [B, D] at each sequence's last token).

    `tree_form` runs the shared row; otherwise sequences run as padded rows, with the same numbers to rounding.
    """
    if tree_form:
        hidden = backbone(
            input_ids=trees.input_ids[None],
            position_ids=trees.position_ids[None],
            attention_mask=trees.blocks.visible,
            tree_blocks=trees.blocks,
            use_cache=False,
        ).last_hidden_state[0]
        return hidden.index_select(0, trees.predict_from), hidden.index_select(0, trees.last_tokens)
    rows = trees.padded(pad_id)
    hidden = backbone(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden.index_select(0, rows.predict_from), hidden.index_select(0, rows.last_tokens)
