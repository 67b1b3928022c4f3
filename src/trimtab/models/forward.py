"""Runs models over whole batches without gradients, a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.batches.trees import TokenTrees, split_by_tokens
from trimtab.models.roles import Policy, ScalarModel


@torch.no_grad()
def token_logprobs_of(policy: Policy, trees: TokenTrees, token_budget: int) -> Tensor:
    """[M] log-probabilities of the trained tokens, without gradients."""
    return _in_pieces(trees, token_budget, "token", lambda piece: policy(piece).logprobs)


@torch.no_grad()
def exact_kl_of(policy: Policy, reference: Policy, trees: TokenTrees, token_budget: int) -> Tensor:
    """[M] exact KL(policy || reference) at every trained token, in nats."""
    return _in_pieces(trees, token_budget, "token", lambda piece: policy.kl_to(reference, piece))


@torch.no_grad()
def token_values_of(role: Policy | ScalarModel, trees: TokenTrees, token_budget: int) -> Tensor:
    """[M] values before the trained tokens, of a critic or of a policy with a value head."""
    return _in_pieces(trees, token_budget, "token", lambda piece: role(piece).values)


@torch.no_grad()
def sequence_scores_of(model: ScalarModel, trees: TokenTrees, token_budget: int) -> Tensor:
    """[B] scores at the last token of each sequence."""
    return _in_pieces(trees, token_budget, "sequence", lambda piece: model(piece).scores)


@torch.no_grad()
def values_and_scores_of(model: ScalarModel, trees: TokenTrees, token_budget: int) -> tuple[Tensor, Tensor]:
    """[M] values at the token before each trained token, and [B] scores at the last tokens, of one forward pass."""
    values, scores = torch.empty(trees.num_trained), torch.empty(trees.num_sequences)
    for indices in split_by_tokens(trees, token_budget):
        outputs = model(trees.select(indices))
        values[trees.index_of("token", indices)] = outputs.values
        scores[trees.index_of("sequence", indices)] = outputs.scores
    return values, scores


def _in_pieces(trees: TokenTrees, token_budget: int, axis: str, run: Callable[[TokenTrees], Tensor]) -> Tensor:
    size = trees.num_trained if axis == "token" else trees.num_sequences
    result = torch.empty(size, dtype=torch.float32)
    for indices in split_by_tokens(trees, token_budget):
        result[trees.index_of(axis, indices)] = run(trees.select(indices))
    return result
