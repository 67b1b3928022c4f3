"""How a batch is cut, ordered or laid out changes no loss and no gradient: the rule all losses keep, each of them."""

import dataclasses

import pytest
import torch

from tests.preference_batches import LOSSES, make, random_trees, split_pairs
from tests.tiny import causal
from trimtab.batches.pairs import Compared, ReferencePairs
from trimtab.batches.replies import MismatchedReplies
from trimtab.batches.trees import TokenTrees, Tree
from trimtab.core.metrics import to_values
from trimtab.data.pairs import mismatch
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.math.losses.aggregation import means
from trimtab.models.forward import token_logprobs_of
from trimtab.models.roles import Policy

VARIANTS = [
    *((name, {}) for name in LOSSES),
    ("aot", {"paired": False}),
    ("dpo", {"nll_coef": 0.7, "ld_alpha": 0.3, "label_smoothing": 0.1, "margin_coef": 0.5}),
    ("dpo", {"divergence": "js", "length_normalised": True}),
    ("kto", {"baseline": "none"}),
    ("bco", {"shift": "none"}),
    ("simpo", {"nll_coef": 1.0}),
]
# Three replies to a prompt, of which up to three pairs were compared.
COMPARED = [
    (Compared(0, 1, 0.5, 1.0), Compared(0, 2, 0.0, 0.8), Compared(2, 1, 1.0, 1.0)),
    (Compared(1, 2, 0.0, 1.0),),
    (Compared(2, 0, 0.3, 0.6), Compared(2, 1, 0.1, 1.0)),
    (Compared(0, 1, 0.0, 1.0),),
    (Compared(1, 0, 0.0, 1.0), Compared(2, 0, 0.2, 0.9)),
]


@pytest.fixture(scope="module")
def reference():
    return Policy(causal(seed=1), pad_id=0)


def pairs(reference, trees, compared):
    row = TokenTrees.build(trees)
    return ReferencePairs(trees=row, compared=tuple(compared), ref_logprobs=token_logprobs_of(reference, row, 10**9))


def beside_others(replies, reference):
    """Judged replies, with the replies of each prompt set beside another one."""
    row = TokenTrees.build(mismatch(replies.trees.trees, max_tokens=100, bos_id=None))
    fields = {f.name: getattr(replies, f.name) for f in dataclasses.fields(replies)}
    return MismatchedReplies(**fields, mismatched=row, mismatched_ref_logprobs=token_logprobs_of(reference, row, 10**9))


def update(loss, batch, *, token_budget=10**9, tree_form=True):
    """The gradient and the metrics of one update from the same start."""
    policy = Policy(causal(), pad_id=0)
    policy.tree_form = tree_form
    settings = AdamW(learning_rate=1e-3, max_gradient_norm=1e12)
    learner = LocalLearner(policy, settings, token_budget=token_budget, num_updates=1, name="policy")
    prepared = loss.complete(batch, lambda trees: token_logprobs_of(policy, trees, token_budget))
    metrics = learner.update([(prepared, [loss])])
    gradient = torch.cat([p.grad.flatten() for p in learner.parameters.values()])
    return gradient, {k: v for k, v in to_values(metrics).items() if not k.startswith("optimizer/")}


def batch_for(loss, reference):
    whole = pairs(reference, random_trees(5, num_replies=3), COMPARED)
    return whole if loss.reads == "pairs" else beside_others(split_pairs(whole), reference)


def assert_same(one, other):
    assert float((one[0] - other[0]).norm() / one[0].norm()) < 1e-5
    assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_cutting_order_and_layout_change_nothing(reference, name, settings):
    loss = make(name, **settings)
    batch = batch_for(loss, reference)
    whole = update(loss, batch)
    assert float(whole[0].norm()) > 0
    for token_budget in (1, 40):
        assert_same(update(loss, batch, token_budget=token_budget), whole)
    assert_same(update(loss, batch.select([3, 0, 4, 2, 1]), token_budget=40), whole)
    assert_same(update(loss, batch, tree_form=False), whole)


@pytest.mark.parametrize("name", [name for name in LOSSES if make(name).reads == "pairs"])
def test_pairs_of_a_prompt_in_one_tree_are_pairs_on_their_own(reference, name):
    loss = make(name)
    trees = random_trees(5, num_replies=3)
    alone = [
        (Tree(tree.prompt, (tree.branches[p.chosen], tree.branches[p.rejected])), (Compared(0, 1, p.margin, p.label),))
        for tree, compared in zip(trees, COMPARED, strict=True)
        for p in compared
    ]
    assert_same(update(loss, pairs(reference, *zip(*alone, strict=True))), update(loss, batch_for(loss, reference)))


def test_orpo_in_micro_batches_is_orpo_of_the_whole_update(reference):
    """trl#3716: under accumulation the mean was taken of means over replies of unlike lengths."""
    loss = make("orpo")
    batch = batch_for(loss, reference)
    alone = [update(loss, batch.select([i])) for i in range(5)]
    shares = [float(loss.weight(batch.select([i])) / loss.weight(batch)) for i in range(5)]
    gradient, metrics = update(loss, batch, token_budget=1)
    by_hand = sum(share * g for share, (g, _) in zip(shares, alone, strict=True))
    assert float((gradient - by_hand).norm() / gradient.norm()) < 1e-5
    assert metrics["loss/train"] == pytest.approx(
        sum(share * m["loss/train"] for share, (_, m) in zip(shares, alone, strict=True)), rel=1e-5
    )


def test_a_pair_s_targets_follow_it_through_every_split(reference):
    batch = batch_for(make("aot"), reference)
    numbers = torch.arange(9.0)
    prepared = batch.with_targets(numbers, -numbers)
    parts = [prepared.select([i]) for i in (1, 4)]
    assert parts[0].chosen_targets.tolist() == [3.0]
    assert parts[1].chosen_targets.tolist() == [7.0, 8.0]
    assert prepared.select([4, 1]).rejected_targets.tolist() == [-7.0, -8.0, -3.0]
    assert means({"x": prepared.select([2, 0]).margins})["x"].weight == 5
