"""Padding, batch split and order never change a number of the PPO update."""

import pytest
import torch

from tests.tiny import VOCAB, causal, scalar
from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.math.losses.policy import CISPO, GSPO, PPO, EntropyBonus, KLPenalty, Reinforce
from trimtab.math.losses.value import ValueLoss
from trimtab.models.roles import Policy, ScalarModel


def batch():
    """Five prompts with two replies each, all of different lengths; numbers about as far apart as in a real update."""
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(2, VOCAB, (n,), generator=draw).tolist()

    lengths = [(3, 9, 1), (12, 2, 5), (1, 4, 4), (7, 13, 2), (5, 1, 8)]
    trees = TokenTrees.build([response_tree(ids(p), [ids(a), ids(b)]) for p, a, b in lengths])
    with torch.no_grad():
        logprobs = Policy(causal(), pad_id=0)(trees).logprobs

    def near(x, scale):
        return x + scale * torch.randn(trees.num_trained, generator=draw)

    zeros = torch.zeros(trees.num_trained)
    return PolicyBatch(
        trees=trees,
        old_logprobs=near(logprobs, 0.2),
        correction=near(zeros, 0.1) + 1,
        ref_logprobs=near(logprobs, 0.5),
        old_values=near(zeros, 1.0),
        advantages=near(zeros, 1.0),
        returns=near(zeros, 1.0),
    )


def policy_update(aggregation, *, token_budget=10**9, order=None, tree_form=True):
    """Gradients and metrics of one update of the policy."""
    role = Policy(causal(), pad_id=0)
    losses = [PPO(aggregation=aggregation), EntropyBonus(coef=0.1, aggregation=aggregation)]
    losses.append(KLPenalty(coef=0.3, aggregation=aggregation))
    return update(role, losses, token_budget, order, tree_form)


def family_update(loss, *, token_budget=10**9, order=None, tree_form=True):
    """The same with another policy loss."""
    return update(Policy(causal(), pad_id=0), [loss], token_budget, order, tree_form)


def critic_update(aggregation, *, token_budget=10**9, order=None, tree_form=True):
    role = ScalarModel(scalar(), pad_id=0)
    return update(role, [ValueLoss(aggregation=aggregation)], token_budget, order, tree_form)


def update(role, losses, token_budget, order, tree_form):
    assert role.tree_form
    role.tree_form = tree_form
    optimizer = AdamW(learning_rate=1e-3, max_gradient_norm=1e9)
    learner = LocalLearner(role, optimizer, token_budget=token_budget, num_updates=1, name="policy")
    whole = batch()
    metrics = learner.update([(whole if order is None else whole.select(order), losses)])
    gradient = torch.cat([p.grad.flatten() for p in learner.parameters.values() if p.grad is not None])
    return gradient, {name: metric.value for name, metric in metrics.items()}


CHANGES = [
    {"token_budget": 1},
    {"token_budget": 64},
    {"order": [4, 2, 0, 1, 3]},
    {"tree_form": False},
    {"token_budget": 64, "order": [3, 4, 1, 0, 2], "tree_form": False},
]
FAMILY = [
    PPO(clip_high=0.28, dual_clip=3.0),
    PPO(aggregation="constant_length", length=16),
    GSPO(clip_low=0.1, clip_high=0.1),
    CISPO(max_ratio=1.2),
    Reinforce(aggregation="sequence_mean"),
]


@pytest.mark.parametrize("updated", [policy_update, critic_update])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_the_same_update_for_any_split_order_and_form(updated, aggregation, changed):
    compare(updated, aggregation, changed)


@pytest.mark.parametrize("loss", FAMILY, ids=lambda loss: f"{type(loss).__name__}, {loss.aggregation}")
@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_every_policy_loss_gives_the_same_update_for_any_split_order_and_form(loss, changed):
    compare(family_update, loss, changed)


def compare(updated, what, changed):
    gradient, metrics = updated(what)
    other_gradient, other_metrics = updated(what, **changed)
    assert float((gradient - other_gradient).norm() / gradient.norm()) < 1e-5
    assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_sequences_left_out_are_as_if_they_had_never_been_there():
    whole = batch()
    kept = torch.tensor([True, False, True, True, False, False, True, True, True, False])
    part = whole.filter(kept)
    assert part.num_sequences == int(kept.sum())
    assert len(part.trees.trees) == 4  # both replies of the third prompt are gone
    tokens = kept[whole.sequence_ids]
    assert torch.equal(part.trees.targets, whole.trees.targets[tokens])
    assert torch.equal(part.advantages, whole.advantages[tokens])
    with torch.no_grad():
        logprobs = Policy(causal(), pad_id=0)(whole.trees).logprobs
        torch.testing.assert_close(Policy(causal(), pad_id=0)(part.trees).logprobs, logprobs[tokens])
