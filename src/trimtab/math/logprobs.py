"""Log-probabilities, entropy and exact KL from hidden states, a tile of logits at a time; and sampling from logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.math.masking import at_least_float32
from trimtab.math.row_sums import add_to_rows

TILE = (1024, 2048)
"""Rows and vocabulary entries of the logits that are in memory at a time: 8 MB in float32."""
TILE_OF_GPU = (8192, 8192)
"""The same on a GPU: 256 MB. With small tiles, starting the operations would take longer than they do: in float32 on an
H200 tiles of (1024, 2048) take three times as long as those of (8192, 32768), and (4096, 8192) 1.05 times."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    cap: float | None = None,
    tile: tuple[int, int] | None = None,
    with_entropy: bool = False,
    weight_gradient: Tensor | None = None,
    rounded: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi(target) [M] in nats and, if `with_entropy`, the entropy [M] of the same distribution.

        pi = softmax(logits / temperature),   logits = scale (hidden @ weight.T + bias)

    With a cap, each logit x is replaced by cap tanh(x / cap), as in Gemma 2 (arXiv:2408.00118, section 2).

    `hidden` [M, D], `weight` [V, D], `bias` [V], `targets` [M]. Computed in float32 (float64 if given float64),
    inside autocast too. Only the logits of one `tile` (rows, vocabulary entries; `TILE` or `TILE_OF_GPU` if not given)
    are in memory at a time, also in the backward pass, which computes them again. A tile stays in the processor's cache
    from product to product, and each entry of the head is read, and its gradient written, once. Differentiable once, in
    hidden, weight and bias, through both results. With `weight_gradient` [V, D], float32, the gradient of the weight is
    added to it in the backward pass and not returned. If `rounded`, a GPU may round what it multiplies to TF32, which
    has 10 bits after the first where bfloat16 has 7; sums and logarithms stay in float32.
    """
    tile = _tile_for(hidden, tile)
    return cast(
        tuple[Tensor, Tensor | None],
        _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, (temperature, scale, cap), tile, with_entropy, weight_gradient, rounded
        ),
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
    shape_p: tuple[float, float | None] = (1.0, None),
    shape_q: tuple[float, float | None] = (1.0, None),
    tile: tuple[int, int] | None = None,
    rounded: bool = False,
) -> Tensor:
    """KL(p || q) [M] in nats over the whole vocabulary, for the two models' hidden states at the same tokens.

        KL = E_p[logit_p - logit_q] - logsumexp(logit_p) + logsumexp(logit_q)

    Each term is summed over the tiles. `shape_p` and `shape_q` are (scale, cap), and `rounded` is as in
    `token_logprobs`. No gradient.
    Never below 0: a negative sum comes from rounding and is set to 0.
    """
    p = _Head(hidden_p, weight_p, bias_p, (temperature, *shape_p), rounded)
    q = _Head(hidden_q, weight_q, bias_q, (temperature, *shape_q), rounded)
    sum_p, sum_q = _RunningSoftmax(p), _RunningSoftmax(q)
    for rows, entries in p.tiles(_tile_for(hidden_p, tile)):
        logits_p, logits_q = p.logits(rows, entries), q.logits(rows, entries)
        sum_p.add(rows, logits_p, logits_p - logits_q)
        sum_q.add(rows, logits_q)
    return (sum_p.mean - sum_p.logsumexp + sum_q.logsumexp).clamp_(min=0).to(p.dtype)


def _tile_for(hidden: Tensor, tile: tuple[int, int] | None) -> tuple[int, int]:
    return tile or (TILE if hidden.device.type == "cpu" else TILE_OF_GPU)


def truncated_logprobs(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Log-probabilities [B, V] of the distribution that is sampled from; -inf for tokens that are cut off.

    The steps, in this order: divide by the temperature, keep the `top_k` likeliest tokens (0: all), keep the smallest
    set of the likeliest whose mass is at least `top_p` (at least one token), renormalise. If tokens tie at the edge,
    only as many are kept as fit; `top_k=1` is greedy decoding.
    """
    logits = at_least_float32(logits) / temperature
    num_kept = min(top_k or logits.shape[-1], logits.shape[-1])
    if num_kept == logits.shape[-1] and top_p >= 1:
        return logits.log_softmax(-1)
    kept, ids = logits.topk(num_kept)  # sorted, the likeliest first
    if top_p < 1:
        probs = kept.double().softmax(-1)
        mass_before = probs.cumsum(-1) - probs
        cut = mass_before >= top_p
        cut[:, 0] = False
        kept = kept.masked_fill(cut, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, kept.log_softmax(-1))


def sample(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [B]: for each row of `logprobs` [B, V], the first whose cumulative probability exceeds its uniform.

    `uniforms` [B] lie in [0, 1]. A token of probability 0 is never returned, not even for a uniform of 1.
    """
    probs = logprobs.double().exp()
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Scaled to the sum after rounding, and kept below it, so that some token exceeds the threshold for every uniform.
    threshold = torch.minimum(uniforms.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logprobs.shape[-1] - 1)
    # A parallel cumulative sum may rise by a rounding error at a token of probability 0.
    ids = torch.where(probs.gather(-1, ids) > 0, ids, logprobs.argmax(-1, keepdim=True))
    return ids[:, 0]


def sample_softmax(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Token ids [B] drawn from softmax(logits [B, V] / temperature) and their log-probabilities [B], in nats.

    The draws are those of `sample`, but the normalised distribution is never computed: the exponentials are summed
    block by block, and a uniform selects first a block, then a token inside it.
    """
    num_rows, vocabulary = logits.shape
    highest = logits.amax(-1, keepdim=True)
    # Made with room for whole blocks: to copy it into more room would take as long as all the rest.
    weights = logits.new_empty(num_rows, vocabulary + -vocabulary % _BLOCK)
    weights[:, vocabulary:] = 0
    torch.sub(logits, highest, out=weights[:, :vocabulary]).div_(temperature).exp_()
    blocks = weights.view(num_rows, -1, _BLOCK)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=blocks.shape[1] - 1)
    inside = blocks[torch.arange(num_rows, device=logits.device), block[:, 0]]
    rest = threshold - (cumulative - sums).gather(1, block)
    ids = torch.searchsorted(inside.double().cumsum(-1), rest, right=True).clamp_(max=_BLOCK - 1)
    # Rounding may carry the threshold past the block's last token, or onto one of weight 0.
    ids = torch.where(inside.gather(1, ids) > 0, ids, inside.argmax(-1, keepdim=True)) + block * _BLOCK
    logprobs = (logits.gather(1, ids) - highest) / temperature - total.log().to(logits.dtype)
    return ids[:, 0], logprobs[:, 0]


_BLOCK = 512


def logprobs_of(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B] of token ids [B] under softmax(logits [B, V] / temperature), in nats. The distribution is
    never computed: a large vocabulary takes more time to find memory for than to sum."""
    highest = logits.amax(-1, keepdim=True)
    total = (logits - highest).div_(temperature).exp_().sum(-1)
    return (logits.gather(1, ids[:, None]) - highest)[:, 0] / temperature - total.log()


def draw(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their log-probabilities [B] under the distribution that is sampled from: logits [B, V] divided
    by the temperature and truncated as in `truncated_logprobs`. `uniforms` [B] in [0, 1] are the random numbers."""
    if top_p >= 1 and not 0 < top_k < logits.shape[-1]:
        return sample_softmax(at_least_float32(logits), uniforms, temperature)
    distribution = truncated_logprobs(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    ids = sample(distribution, uniforms)
    return ids, distribution.gather(1, ids[:, None])[:, 0]


@contextmanager
def _products(like: Tensor, rounded: bool) -> Iterator[None]:
    """Inside this block products are computed in the dtype of their operands, also under autocast. On a GPU float32
    operands are rounded to TF32 if that is allowed here; it is allowed nowhere else, since positions and sums cannot
    bear it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if rounded and like.device.type != "cpu" else "highest")
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


_Shape = tuple[float, float, float | None]
"""Temperature, scale and cap."""


class _Room:
    """Memory for one tile after another. To find it anew takes longer than to compute what stands in it."""

    def __init__(self, like: Tensor) -> None:
        self._kept = like.new_empty(0)

    def of(self, rows: int, entries: int) -> Tensor:
        """[rows, entries] of any content, which the next call overwrites."""
        if len(self._kept) < rows * entries:
            self._kept = self._kept.new_empty(rows * entries)
        return self._kept[: rows * entries].view(rows, entries)


class _Head:
    """Hidden states and the head over them. Their logits [M, V], divided by the temperature and capped if there is a
    cap, are computed tile by tile."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape, rounded: bool) -> None:
        temperature, scale, cap = shape
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight
        self.hidden = hidden.to(self.dtype)
        self.bias = bias
        self.temperature, self.scale = temperature, scale
        self.cap = None if cap is None else cap / temperature
        if temperature != 1 or scale != 1:
            self.hidden = self.stretch(self.hidden.clone())
            self.bias = None if bias is None else self.stretch(bias.clone())
        self.room = _Room(self.hidden)
        self.rounded = rounded

    def tiles(self, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        """Yields the rows and vocabulary entries of every tile: all rows of some entries before the next entries."""
        for entry in range(0, len(self.weight), tile[1]):
            for row in range(0, len(self.hidden), tile[0]):
                yield slice(row, row + tile[0]), slice(entry, entry + tile[1])

    def logits(self, rows: slice, entries: slice, minus: Tensor | None = None) -> Tensor:
        """The logits of one tile, less each row's entry of `minus` [M], in a buffer that the next call reuses."""
        hidden, weight = self.hidden[rows], self.weight[entries].to(self.dtype)
        logits = self.room.of(len(hidden), len(weight))
        with _products(hidden, self.rounded):
            if minus is None or self.cap is not None:
                torch.mm(hidden, weight.T, out=logits)
            else:
                torch.addmm(minus[rows, None], hidden, weight.T, beta=-1, out=logits)
        if self.bias is not None:
            logits.add_(self.bias[entries])
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
            if minus is not None:
                logits.sub_(minus[rows, None])
        return logits

    def stretch(self, x: Tensor) -> Tensor:
        """Multiplies `x` by scale / temperature, in place: the derivative of an uncapped logit in its product."""
        x = x.div_(self.temperature) if self.temperature != 1 else x
        return x.mul_(self.scale) if self.scale != 1 else x

    def bend(self, logits: Tensor) -> Tensor | None:
        """The derivative of the cap at these logits, 1 - tanh^2; None without a cap."""
        return None if self.cap is None else 1 - (logits / self.cap).square_()


class _RunningSoftmax:
    """The logsumexp of every row of logits and a mean under their softmax, accumulated over tiles. Kept in float64
    between tiles, because the rounding errors of hundreds of float32 sums over 151,936 entries would add up."""

    def __init__(self, head: _Head) -> None:
        self.logsumexp = head.hidden.new_full((len(head.hidden),), -torch.inf, dtype=torch.float64)
        self.mean = torch.zeros_like(self.logsumexp)
        self._room = _Room(head.hidden)

    def add(self, rows: slice, logits: Tensor, mean_of: Tensor | Literal["logits", "nothing"] = "nothing") -> None:
        """Adds a tile of logits, which is overwritten. `mean_of` is a tensor of the values to average, or "logits" for
        the logits themselves."""
        highest = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(highest)
        exps = torch.exp(shifted, out=self._room.of(*shifted.shape) if mean_of == "logits" else shifted)
        sums = exps.sum(-1).double()
        before, here = self.logsumexp[rows], highest[:, 0].double() + sums.log()
        total = torch.logaddexp(before, here)
        if isinstance(mean_of, Tensor):
            mean = exps.mul_(mean_of).sum(-1).double() / sums
        elif mean_of == "logits":
            mean = highest[:, 0] + exps.mul_(shifted).sum(-1).double() / sums
        else:
            mean = torch.zeros_like(here)
        self.mean[rows] = self.mean[rows] * (before - total).exp() + mean * (here - total).exp()
        self.logsumexp[rows] = total


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: _Shape,
        tile: tuple[int, int],
        with_entropy: bool,
        weight_gradient: Tensor | None,
        rounded: bool,
    ) -> tuple[Tensor, Tensor | None]:
        head = _Head(hidden, weight, bias, shape, rounded)
        softmax = _RunningSoftmax(head)
        of_targets = torch.zeros_like(softmax.logsumexp)
        for rows, entries in head.tiles(tile):
            logits = head.logits(rows, entries)
            places = targets[rows, None] - entries.start
            here = (places >= 0) & (places < logits.shape[1])
            found = logits.gather(1, places.clamp(0, logits.shape[1] - 1))
            of_targets[rows] += torch.where(here, found, 0.0)[:, 0]
            softmax.add(rows, logits, "logits" if with_entropy else "nothing")
        logprobs = (of_targets - softmax.logsumexp).to(head.dtype)
        entropy = (softmax.logsumexp - softmax.mean).to(head.dtype) if with_entropy else None
        of_targets = of_targets.to(head.dtype)
        ctx.save_for_backward(hidden, weight, bias, targets, softmax.logsumexp.to(head.dtype), of_targets, entropy)
        ctx.shape, ctx.tile, ctx.weight_gradient, ctx.rounded = shape, tile, weight_gradient, rounded
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        # With y the target, d logp(y) / d logit_i = [i = y] - p_i and d entropy / d logit_i = -p_i (log p_i + entropy).
        # Without entropy, p_i is multiplied by one number for the whole row: it is applied to the hidden states before
        # the products and to the sum over entries after them. With entropy, each p_i has a factor of its own, which
        # multiplies p_i itself. A cap multiplies the derivative in each logit, the target's too, by the cap's own.
        hidden, weight, bias, targets, logsumexp, of_targets, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        head = _Head(hidden, weight, bias, ctx.shape, ctx.rounded)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logsumexp)
        each = grad_logprobs[:, None]
        bend = head.bend(of_targets)
        of_target = grad_logprobs if bend is None else grad_logprobs * bend
        by_entry = grad_entropy is not None
        multiplied = head.hidden if by_entry else head.hidden * each
        grad_hidden = torch.zeros_like(head.hidden)
        grad_weight = ctx.weight_gradient
        if grad_weight is None:
            grad_weight = head.hidden.new_zeros(weight.shape if need_weight else 0)
        grad_bias = head.hidden.new_zeros(len(weight) if need_bias else 0)
        with _products(hidden, ctx.rounded):
            for rows, entries in head.tiles(ctx.tile):
                probs = head.logits(rows, entries, minus=logsumexp)
                bend = None if head.cap is None else head.bend(probs + logsumexp[rows, None])
                if grad_entropy is not None:
                    factor = (probs + entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(each[rows])
                    probs.exp_().mul_(factor)
                else:
                    probs.exp_()
                if bend is not None:
                    probs.mul_(bend)
                if need_hidden:
                    grad_hidden[rows].addmm_(probs, weight[entries].to(probs.dtype))
                if need_weight:
                    grad_weight[entries].addmm_(probs.T, multiplied[rows], alpha=-1)
                if need_bias:
                    grad_bias[entries] -= probs.sum(0) if by_entry else probs.T @ grad_logprobs[rows]
        if need_hidden:
            grad_hidden.mul_(-1 if by_entry else -each).addcmul_(weight[targets], of_target[:, None])
            head.stretch(grad_hidden)
        if need_weight:
            add_to_rows(grad_weight, targets, head.hidden * of_target[:, None])
        if need_bias:
            add_to_rows(grad_bias, targets, of_target)
            head.stretch(grad_bias)
        return (
            grad_hidden.to(hidden.dtype) if need_hidden else None,
            grad_weight.to(weight.dtype) if need_weight and ctx.weight_gradient is None else None,
            grad_bias.to(bias.dtype) if need_bias else None,
            *[None] * 6,
        )
