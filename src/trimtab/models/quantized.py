"""Rounds the frozen base of adapters to 8 or 4 bits for each weight of its linear layers, with `bitsandbytes`.

With 8 bits, weights are scaled row by row, and inputs are rounded too, as in LLM.int8() (Dettmers et al.,
arXiv:2208.07339). 4 bits are NormalFloat in blocks of 64, as in QLoRA (Dettmers et al., arXiv:2305.14314).
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimtab.core.errors import need

Bits = Literal[4, 8, 32]


def quantize(model: PreTrainedModel, bits: Bits) -> None:
    """Rounds the linear layers of the blocks permanently to this many bits. Embeddings, norms and heads are not
    changed. Does nothing for 32."""
    if bits == 32:
        return
    need("bitsandbytes", extra="quantized", setting=f"base_bits = {bits}", where="adapter")
    model.requires_grad_(False)
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}  # type: ignore[no-untyped-call]
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and id(module) not in heads:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _rounded(module, bits))
    # The other weights are views of the file mapped into memory, and would keep all of it there.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether some weights are stored as integers."""
    return not all(p.is_floating_point() for p in model.parameters())


def _rounded(layer: nn.Module, bits: Bits) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    weight, bias = cast(Tensor, layer.weight).detach(), cast("Tensor | None", layer.bias)
    if isinstance(layer, Conv1D):  # its weight is [in, out]
        weight = weight.T
    weight = weight.contiguous()
    if bits == 4:
        kind: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
        made = bnb.Linear4bit(*weight.T.shape, bias=bias is not None, compute_dtype=torch.float32, **kind)
        made.weight = bnb.Params4bit(weight, requires_grad=False, **kind)
        # On processors with bfloat16, passes without gradients would repack the weights and multiply in bfloat16,
        # whatever the precision, and raise for layers narrower than a block. Scores would not be those of training.
        made.support_avx512bf16_for_cpu = False
    else:
        made = bnb.Linear8bitLt(*weight.T.shape, bias=bias is not None, has_fp16_weights=False)
        made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    made = made.to(weight.device)  # moving the layer rounds its weight
    # A buffer, so that code that reads all of a model's weights, such as `model_hash`, includes the scales.
    made.register_buffer("scales", made.weight.quant_state.absmax if bits == 4 else made.weight.SCB, persistent=False)
    return cast(nn.Module, made)
