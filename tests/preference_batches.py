"""Random pairs and judged replies as batches, and their definitions in plain Python to compare losses with."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from trimtab.batches.pairs import Compared, ReferencePairs
from trimtab.batches.replies import JudgedReplies, MismatchedReplies
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core import registry

LOSSES = registry.names("preference_loss")


def make(name, **settings):
    return registry.find("preference_loss", name, where="a test")(**settings)


def random_ids(draw, low, high, vocabulary=64):
    num = int(torch.randint(low, high, (), generator=draw))
    return torch.randint(2, vocabulary, (num,), generator=draw).tolist()


def random_trees(num=6, num_replies=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        response_tree(random_ids(draw, 2, 9), [random_ids(draw, 1, 9) for _ in range(num_replies)]) for _ in range(num)
    ]


def two_by_two(num, margins=None, labels=None):
    """The pairs of trees with a chosen and a rejected reply each."""
    margins, labels = margins or [0.0] * num, labels or [1.0] * num
    return tuple((Compared(0, 1, m, q),) for m, q in zip(margins, labels, strict=True))


def random_pairs(num=6, seed=0, **labels):
    """Pairs, and log-probabilities of policy and reference for them that differ by a few nats a reply."""
    trees = TokenTrees.build(random_trees(num, seed=seed))
    ref, logprobs = random_logprobs(trees, seed)
    batch = ReferencePairs(trees=trees, compared=two_by_two(num, **labels), ref_logprobs=ref)
    return batch, logprobs


def random_logprobs(trees, seed=0):
    draw = torch.Generator().manual_seed(seed + 1)
    ref = -3 * torch.rand(trees.num_trained, generator=draw) - 0.1
    return ref, (ref + 0.5 * torch.randn(trees.num_trained, generator=draw)).clamp(max=-0.01)


def random_replies(num=6, seed=0):
    """Judged replies beside mismatched ones, with log-probabilities of the policy for both."""
    trees = TokenTrees.build(random_trees(num, num_replies=1, seed=seed))
    mismatched = TokenTrees.build(random_trees(num, num_replies=1, seed=seed + 50))
    ref, logprobs = random_logprobs(trees, seed)
    mismatched_ref, mismatched_logprobs = random_logprobs(mismatched, seed + 50)
    good = torch.tensor([float(i % 3 != 0) for i in range(num)])
    batch = MismatchedReplies(
        trees=trees,
        ref_logprobs=ref,
        desirable=good,
        undesirable=1 - good,
        mismatched=mismatched,
        mismatched_ref_logprobs=mismatched_ref,
    )
    return batch, logprobs, mismatched_logprobs


def split_pairs(pairs):
    """The batch of pairs as judged replies."""
    desirable, undesirable = torch.zeros(pairs.num_sequences), torch.zeros(pairs.num_sequences)
    for to, ids, share in (
        (desirable, pairs.chosen_ids, pairs.labels),
        (undesirable, pairs.chosen_ids, 1 - pairs.labels),
        (desirable, pairs.rejected_ids, 1 - pairs.labels),
        (undesirable, pairs.rejected_ids, pairs.labels),
    ):
        to.index_add_(0, ids, share)
    return JudgedReplies(
        trees=pairs.trees, ref_logprobs=pairs.ref_logprobs, desirable=desirable, undesirable=undesirable
    )


def mean_loss(loss, batch, logprobs, logprobs_of=None):
    """The loss of a whole batch, prepared and divided by its weight, and its metrics."""
    prepared = loss.complete(batch, logprobs_of or (lambda _: logprobs.detach()))
    total, metrics = loss(SimpleNamespace(logprobs=logprobs), prepared)
    return total / loss.weight(prepared), metrics


def log_ratios(batch, logprobs):
    """For each pair in plain Python: sums, lengths and reference sums of the chosen and of the rejected reply."""
    rows = [[] for _ in range(batch.num_sequences)]
    refs = [[] for _ in range(batch.num_sequences)]
    for own, new, ref in zip(batch.sequence_ids.tolist(), logprobs.tolist(), batch.ref_logprobs.tolist(), strict=True):
        rows[own].append(new)
        refs[own].append(ref)
    pairs = zip(batch.chosen_ids.tolist(), batch.rejected_ids.tolist(), strict=True)
    return [SimpleNamespace(c=rows[c], r=rows[r], ref_c=refs[c], ref_r=refs[r]) for c, r in pairs]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))
