"""Log-probabilities, entropy and exact KL from hidden states, a few rows of logits at a time; and the sampler's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.math.masking import at_least_float32


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 256,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi(target) [M] in nats and, where asked for, the entropy [M] of the same distribution.

        pi = softmax((hidden @ weight.T + bias) / temperature)

    `hidden` [M, D], `weight` [V, D], `bias` [V], `targets` [M]. Computed in float32 (float64 if given float64),
    inside autocast too; logits exist for `chunk` rows at a time, in the backward pass as well, which computes them
    again. Differentiable once, in hidden, weight and bias, through both results.
    """
    return cast(
        tuple[Tensor, Tensor | None],
        _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, chunk, with_entropy),  # type: ignore[no-untyped-call]
    )


@torch.no_grad()
def exact_kl(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """KL(p || q) [M] in nats over the whole vocabulary, for the two models' hidden states at the same tokens.

    No gradient. Never below 0: a sum that rounding took there is set to 0.
    """
    weight_p, weight_q = at_least_float32(weight_p), at_least_float32(weight_q)
    kl = torch.empty(len(hidden_p), dtype=weight_p.dtype, device=hidden_p.device)
    for rows in _chunks(len(hidden_p), chunk):
        logp = _log_softmax(hidden_p[rows], weight_p, bias_p, temperature)
        logq = _log_softmax(hidden_q[rows], weight_q, bias_q, temperature)
        kl[rows] = (logp.exp() * (logp - logq)).sum(-1)
    return kl.clamp_(min=0)


def truncated_logprobs(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Log-probabilities [B, V] of the distribution that is sampled from; -inf for tokens that are cut off.

    In this order: divide by the temperature, keep the `top_k` likeliest tokens (0: all), keep the smallest
    set of the likeliest whose mass is at least `top_p` (at least one token), renormalise. Of tokens that tie at the
    edge only as many stay as there is room for; `top_k=1` is greedy decoding.
    """
    logits = at_least_float32(logits) / temperature
    num_kept = min(top_k or logits.shape[-1], logits.shape[-1])
    if num_kept == logits.shape[-1] and top_p >= 1:
        return logits.log_softmax(-1)
    kept, ids = logits.topk(num_kept)  # the likeliest first
    if top_p < 1:
        probs = kept.double().softmax(-1)
        mass_before = probs.cumsum(-1) - probs
        cut = mass_before >= top_p
        cut[:, 0] = False
        kept = kept.masked_fill(cut, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, kept.log_softmax(-1))


def sample(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [B]: for each row of `logprobs` [B, V], the first whose cumulative probability exceeds its uniform.

    `uniforms` [B] in [0, 1]. A token of probability 0 is never returned, for a uniform of 1 neither.
    """
    probs = logprobs.double().exp()
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Scaled to what the sum really is, and kept below it: some token exceeds the threshold for every uniform.
    threshold = torch.minimum(uniforms.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logprobs.shape[-1] - 1)
    # A parallel cumulative sum may rise by a rounding error where the probability is 0.
    ids = torch.where(probs.gather(-1, ids) > 0, ids, logprobs.argmax(-1, keepdim=True))
    return ids[:, 0]


def sample_softmax(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [B] drawn from softmax(logits [B, V]) and their log-probabilities [B], in nats: `sample` of the whole
    distribution without forming it.

    The weights are summed block by block; a uniform first finds its block, then its token inside.
    """
    num_rows, vocabulary = logits.shape
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp_()
    if vocabulary % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % _BLOCK))
    blocks = weights.view(num_rows, -1, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=blocks.shape[1] - 1)
    inside = blocks[torch.arange(num_rows, device=logits.device), block[:, 0]]
    rest = threshold - (cumulative - sums).gather(1, block)
    ids = torch.searchsorted(inside.double().cumsum(-1), rest, right=True).clamp_(max=_BLOCK - 1)
    # Rounding may carry the threshold past the block's last token, or onto one of weight 0.
    ids = torch.where(inside.gather(1, ids) > 0, ids, inside.argmax(-1, keepdim=True)) + block * _BLOCK
    logprobs = logits.gather(1, ids) - highest - total.log().to(logits.dtype)
    return ids[:, 0], logprobs[:, 0]


_BLOCK = 512


def draw(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their log-probabilities [B] under the distribution sampled from: logits [B, V] divided by the
    temperature and truncated as in `truncated_logprobs`. `uniforms` [B] in [0, 1] decide."""
    if top_p >= 1 and not 0 < top_k < logits.shape[-1]:
        return sample_softmax(at_least_float32(logits) / temperature, uniforms)
    distribution = truncated_logprobs(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    ids = sample(distribution, uniforms)
    return ids, distribution.gather(1, ids[:, None])[:, 0]


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Log-probabilities [rows, V]; `weight` in the precision to compute in."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(weight.dtype) @ weight.T
    if bias is not None:
        logits += bias
    return logits.div_(temperature).log_softmax(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        precise = at_least_float32(weight)
        logprobs = precise.new_empty(len(hidden))
        entropy = precise.new_empty(len(hidden)) if with_entropy else None
        for rows in _chunks(len(hidden), chunk):
            logp = _log_softmax(hidden[rows], precise, bias, temperature)
            logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
            if entropy is not None:
                entropy[rows] = -logp.exp().mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        precise = at_least_float32(weight)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(precise) if need_weight else None
        grad_bias = precise.new_zeros(len(weight)) if need_bias else None
        if grad_logprobs is None:
            grad_logprobs = precise.new_zeros(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), ctx.chunk):
                # d logp(y) / d logit_i = [i = y] - p_i;   d entropy / d logit_i = -p_i (log p_i + entropy)
                logp = _log_softmax(hidden[rows], precise, bias, ctx.temperature)
                grad_logits = logp.exp()
                outer = grad_logprobs[rows, None]
                if grad_entropy is None:
                    grad_logits *= -outer
                else:
                    factor = logp.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(outer)
                    grad_logits *= factor.neg_()
                grad_logits[torch.arange(len(grad_logits), device=targets.device), targets[rows]] += outer[:, 0]
                grad_logits /= ctx.temperature
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ precise
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[rows].to(precise.dtype))
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
