"""Checks for every batch of replies that the sampler's log-probabilities are those of the policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.errors import EngineError
from trimtab.engines.local.replies import ReplyBuffer
from trimtab.models.forward import token_logprobs_of
from trimtab.models.precision import Precision
from trimtab.models.roles import Policy

MAX_LOGPROB_DIFFERENCE: dict[Precision, float] = {"float32": 0.01, "bfloat16": 0.5}
"""Largest allowed difference at one token, in nats. In float32 the local sampler and scorer differ only by rounding,
about 1e-5. If either of them computes in bfloat16, they differ by a few hundredths."""
NUM_TOKENS = 256
"""Tokens of prompts and replies that are scored for the comparison, about a hundredth of the work of sampling a
batch."""


def logprob_difference(
    policy: Policy, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer
) -> float:
    """The largest difference between the policy's log-probability of a token and the sampler's, in nats, over some of
    the replies: the longest, the shortest and, if they are short, some of the others."""
    if policy.temperature != replies.sampling.temperature:
        raise EngineError(
            f"the policy has temperature {policy.temperature} and its sampler {replies.sampling.temperature}",
            where="the sampler",
            fix="make the policy with the temperature of its sampling",
        )
    chosen = list(_some([len(prompts[i // group_size]) + n for i, n in enumerate(replies.lengths.tolist())]))
    drawn = [(prompts[i // group_size], replies.tokens[i, : replies.lengths[i]].tolist()) for i in chosen]
    scored = token_logprobs_of(policy, TokenTrees.build([response_tree(p, [ids]) for p, ids in drawn]), NUM_TOKENS)
    sampled = torch.cat([replies.policy_logprobs[i, : replies.lengths[i]] for i in chosen])
    return float((sampled - scored).abs().max())


def allowed_difference(policy: Precision, sampler: Precision) -> float:
    """The largest difference that rounding explains, for the precisions of policy and sampler."""
    return max(MAX_LOGPROB_DIFFERENCE[precision] for precision in (policy, sampler))


def refuse_difference(difference: float, policy: Precision, sampler: Precision, *, where: str) -> None:
    """Raises EngineError for a difference that is more than rounding in these precisions."""
    bound = allowed_difference(policy, sampler)
    if not difference <= bound:
        raise EngineError(
            f"sampler and policy disagree by {difference:.3g} nats on the same token (bound: {bound})",
            where=where,
            fix="the sampler's weights or precision differ from the policy's; do not use its samples",
        )


def _some(lengths: Sequence[int]) -> Iterator[int]:
    """Indices of the longest row, the shortest and evenly spaced ones between: at least two, up to `NUM_TOKENS`."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    spread = order[:: max(1, len(order) // 8)]
    left = NUM_TOKENS
    for count, i in enumerate(dict.fromkeys([order[-1], *spread])):
        left -= lengths[i]
        if count >= 2 and left < 0:
            return
        yield i
