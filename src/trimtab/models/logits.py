"""How a model turns the output of its head into logits: some models scale it, some hold it below a cap.

Scale and cap are measured: hidden states of many sizes are put in place of the model's own, and its logits are
computed. Small ones give the scale, large ones the cap, and all of them check the result. Nothing is read from the
configuration by name, so it does not matter what a model family calls these settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.batches.device import to_device
from trimtab.core.errors import EngineError
from trimtab.data.tokenizers import first_line
from trimtab.models.attention import backbone, described

SIZES = (1e-2, 1e-1, 1.0, 10.0, 1e3, 1e6)
"""Standard deviations of the head outputs for the measurement: a cap does not yet affect the first, and the last is
beyond every cap."""
TOLERANCE = 1e-4
"""Largest difference in the check, relative to the largest logit."""


@dataclass(frozen=True)
class LogitShape:
    """logits = cap tanh(scale x / cap) of the head's output x, or scale x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """The logits, from the output of the head."""
        if self.cap is not None:
            return self.cap * torch.tanh(raw * (self.scale / self.cap))
        return raw if self.scale == 1 else raw * self.scale


_FOUND: WeakKeyDictionary[PreTrainedModel, LogitShape] = WeakKeyDictionary()


def logit_shape(model: PreTrainedModel) -> LogitShape:
    """The scale and cap of this model's logits. Raises EngineError if its logits are anything else than its head
    applied to its last hidden states, scaled and capped."""
    if (known := _FOUND.get(model)) is None:
        known = _FOUND[model] = _find(model)
    return known


def head_of(model: PreTrainedModel) -> nn.Module:
    """The output embedding. Raises EngineError for a model without one."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise _refusal(model, "this model has no output embedding that transformers knows of")
    return head


@torch.no_grad()
def _find(model: PreTrainedModel) -> LogitShape:
    head: Any = head_of(model)
    weight = head.weight
    hidden = torch.randn(len(SIZES), weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    bias = getattr(head, "bias", None)
    products = (hidden @ weight.T).float()
    sizes = to_device(torch.tensor(SIZES), weight.device)
    hidden = hidden * (sizes / products.std(-1).clamp_min(1e-30))[:, None].to(weight)
    raw = head(hidden).float()
    shown = _logits_for(model, hidden)
    if shown.shape != raw.shape:
        raise _refusal(model, f"it gives {shown.shape[-1]} logits from a head of {raw.shape[-1]}")
    cap = _cap(raw, shown)
    # With a bias the first row need not have the smallest outputs, so the smallest row is searched for.
    row = 0 if bias is None else int(raw.abs().amax(-1).argmin())
    bent = shown[row].double()
    straight = bent if cap is None else cap * torch.atanh((bent / cap).clamp(-0.999999, 0.999999))
    x = raw[row].double()
    shape = LogitShape(_tidy(model, float((straight * x).sum() / (x * x).sum())), cap)
    difference = (shape(raw) - shown).abs().amax(-1) / shown.abs().amax(-1).clamp_min(1e-30)
    if not bool((difference <= TOLERANCE).all()):
        raise _refusal(
            model, f"its logits are not its head applied to its hidden states (off by {float(difference.max()):.2g})"
        )
    return shape


def _cap(raw: Tensor, shown: Tensor) -> float | None:
    """The cap, or None. Capped logits stop growing: a thousand times larger outputs of the head give the same largest
    logit, which is the cap."""
    largest, before = float(shown[-1].abs().max()), float(shown[-2].abs().max())
    return None if largest > 10 * before else largest


def _logits_for(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[n, V] the logits that the model would give if its last hidden states were `hidden` [n, D]."""

    def put(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = hidden[None]
        return output

    ids = torch.arange(len(hidden), device=hidden.device)[None] % model.config.get_text_config().vocab_size
    # Some models call their decoder and not the backbone around it.
    bodies: list[Any] = [backbone(model), model.get_decoder()]  # type: ignore[no-untyped-call]
    hooks = [body.register_forward_hook(put) for body in bodies if body is not None and body is not model]
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        raise _refusal(model, f"its logits cannot be computed: {type(error).__name__}: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return logits.float().reshape(-1, logits.shape[-1])


def _tidy(model: PreTrainedModel, scale: float) -> float:
    """The measured scale, replaced by the exact number it stands for: 1, a number in the configuration, or the inverse
    of one."""
    config = model.config.get_text_config()
    numbers = [1.0, *(float(v) for v in config.to_dict().values() if isinstance(v, int | float) and v)]
    candidates = [x for n in numbers for x in (n, 1 / n)]
    nearest = min(candidates, key=lambda x: abs(x - scale))
    return nearest if abs(nearest - scale) <= 1e-5 * abs(scale) else scale


def _refusal(model: PreTrainedModel, what: str) -> EngineError:
    return EngineError(
        f"log-probabilities cannot be computed from hidden states: {what}",
        where=described(model),
        fix="use a decoder whose logits are a linear head of its last hidden states, scaled and capped if at all",
    )
