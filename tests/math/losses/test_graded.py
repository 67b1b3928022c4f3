"""Losses over labels at tokens, against slow loops, torch and transformers."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForTokenClassification, LlamaConfig

from tests.preference_batches import random_ids
from tests.tiny import CONFIGS, scalar
from trimtab.batches.replies import GradedReplies
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.metrics import to_values
from trimtab.data.graded import Grade, GradedPrompts, mask_of
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.math.losses.graded import OutcomeLoss, ProcessLoss, RegressionLoss, binary_cross_entropy
from trimtab.math.steps import differences, running_aggregate
from trimtab.models.roles import ScalarModel


def test_the_cross_entropy_is_torchs_and_that_of_two_classes():
    logits, labels = torch.randn(7, dtype=torch.float64) * 4, torch.rand(7, dtype=torch.float64)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(binary_cross_entropy(logits, labels), bce(logits, labels, reduction="none"))
    two = torch.stack([torch.zeros_like(logits), logits], 1).log_softmax(1)
    slow = [-(1 - y) * row[0] - y * row[1] for y, row in zip(labels, two, strict=True)]
    torch.testing.assert_close(binary_cross_entropy(logits, labels), torch.stack(slow))


def test_far_scores_give_finite_losses_and_gradients():
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = binary_cross_entropy(logits, torch.tensor([0.0, 0.0]))
    assert loss.tolist() == [1e4, 0.0]
    loss.sum().backward()
    assert logits.grad.tolist() == [1.0, 0.0]


# --- batches ---


def graded_prompts(labels="random", places=None):
    """Three prompts with one to three replies; labels at random places, the last among them or not."""
    draw = torch.Generator().manual_seed(1)
    trees, grades = [], []
    for num in (2, 1, 3):
        prompt, own = random_ids(draw, 3, 9), []
        for _ in range(num):
            ids = tuple(random_ids(draw, 4, 9))
            chosen = (
                places(ids) if places else [i for i in range(len(ids)) if float(torch.rand(1, generator=draw)) < 0.5]
            )
            chosen = chosen or [0]
            values = torch.rand(len(chosen), generator=draw) if labels == "random" else torch.ones(len(chosen))
            own.append(Grade(ids, tuple(chosen), tuple(values.tolist())))
        trees.append(response_tree(prompt, [grade.ids for grade in own], [mask_of(grade) for grade in own]))
        grades.append(own)
    return GradedPrompts(trees, grades, prompts=tuple(range(len(trees))))


def token_scores(role, prompt, ids):
    """[len(ids)] the head at every token of a reply that the backbone reads alone, without any tree."""
    with torch.no_grad():
        states = role.model.base_model(input_ids=torch.tensor([[*prompt, *ids]])).last_hidden_state[0]
        return role.head(states).squeeze(-1)[len(prompt) :]


def slow_losses(role, found, one):
    """The loss of each label, one reply and one label after the other."""
    losses = []
    for tree, grades in zip(found.trees, found.grades, strict=True):
        for grade in grades:
            scores = token_scores(role, tree.prompt, grade.ids)
            losses += [one(float(scores[place]), y) for place, y in zip(grade.places, grade.labels, strict=True)]
    return losses


def cross_entropy(z, y):
    return -y * math.log(1 / (1 + math.exp(-z))) - (1 - y) * math.log(1 - 1 / (1 + math.exp(-z)))


LAST = {"places": lambda ids: [len(ids) - 1]}
CASES = {
    "process": (ProcessLoss(), {}, cross_entropy),
    "outcome": (OutcomeLoss(), {"places": lambda ids: list(range(len(ids)))}, cross_entropy),
    "regression": (RegressionLoss(), LAST, lambda z, y: (z - y) ** 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_the_slow_loop_over_replies_read_alone(name):
    loss, options, one = CASES[name]
    found, role = graded_prompts(**options), ScalarModel(scalar(), pad_id=0, gives=loss.gives)
    batch = found.batch()
    slow = slow_losses(role, found, one)
    with torch.no_grad():
        value, metrics = loss(role(batch.trees), batch)
    assert float(loss.weight(batch)) == len(slow) == batch.num_labels
    assert value.item() == pytest.approx(sum(slow), rel=1e-4)
    assert metrics["loss/train"].value == pytest.approx(sum(slow) / len(slow), rel=1e-4)


def test_accuracy_counts_labels_that_have_a_side():
    trees = TokenTrees.build([response_tree([3], [[4, 5, 6, 7, 8]], [[False, True, True, True, False]])])
    batch = GradedReplies(trees=trees, labels=torch.tensor([1.0, 0.5, 0.2]), last_labels=torch.tensor([0.0]))
    outputs = SimpleNamespace(values=torch.tensor([2.0, 1.0, 3.0]), scores=torch.tensor([-1.0]))
    _, metrics = ProcessLoss()(outputs, batch)
    assert (metrics["reward/accuracy"].value, metrics["reward/accuracy"].weight) == (pytest.approx(2 / 3), 3)


@torch.no_grad()
def test_it_is_the_loss_of_a_token_classifier_with_two_labels():
    """The form that TRL trains a process reward model in: two outputs a token, -100 at tokens without a label. Its head
    is the difference of the two."""
    found = graded_prompts(labels="right")
    found = GradedPrompts(
        found.trees,
        [[g._replace(labels=tuple(float((i + j) % 2) for j in range(len(g.places)))) for i, g in enumerate(of)]
         for of in found.grades],
        found.prompts,
    )  # fmt: skip
    role = ScalarModel(scalar(), pad_id=0)
    config: LlamaConfig = CONFIGS["llama"]()
    config.num_labels = 2
    theirs = AutoModelForTokenClassification.from_config(config).eval()
    theirs.model.load_state_dict(role.model.model.state_dict())
    theirs.score.bias.zero_()
    theirs.score.weight.copy_(torch.cat([-role.head.weight / 2, role.head.weight / 2]))
    batch, total, num = found.batch(), 0.0, 0
    for tree, grades in zip(found.trees, found.grades, strict=True):
        for grade in grades:
            labels = torch.full((1, len(tree.prompt) + len(grade.ids)), -100)
            for place, label in zip(grade.places, grade.labels, strict=True):
                labels[0, len(tree.prompt) + place] = int(label)
            ids = torch.tensor([[*tree.prompt, *grade.ids]])
            total += float(theirs(input_ids=ids, labels=labels).loss) * len(grade.places)
            num += len(grade.places)
    value, _ = ProcessLoss()(role(batch.trees), batch)
    assert float(value) / num == pytest.approx(total / num, rel=1e-5)


def update(loss, options, token_budget=4096, order=None, tree_form=True):
    role = ScalarModel(scalar(), pad_id=0, gives=loss.gives)
    role.tree_form = tree_form
    learner = LocalLearner(
        role, AdamW(learning_rate=1e-3, max_gradient_norm=1e9), token_budget=token_budget, num_updates=1, name="reward"
    )
    metrics = learner.update([(graded_prompts(**options).batch(order), [loss])])
    gradient = torch.cat([p.grad.flatten() for p in learner.parameters.values() if p.grad is not None])
    return gradient, to_values(metrics)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "changed",
    [{"token_budget": 1}, {"order": [2, 0, 1]}, {"tree_form": False}, {"token_budget": 40, "order": [1, 2, 0]}],
)
def test_the_same_update_for_any_split_order_and_form(name, changed):
    loss, options, _ = CASES[name]
    gradient, metrics = update(loss, options)
    other, other_metrics = update(loss, options, **changed)
    assert float((gradient - other).norm() / gradient.norm()) < 1e-5
    assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


# --- steps to one reward ---


def test_aggregates_are_those_worked_by_hand():
    p = torch.tensor([0.9, 0.5, 0.8])
    by = {how: running_aggregate(p, how).tolist() for how in ("last", "min", "product", "mean")}
    assert by["last"] == pytest.approx([0.9, 0.5, 0.8])
    assert by["min"] == pytest.approx([0.9, 0.5, 0.5])
    assert by["product"] == pytest.approx([0.9, 0.45, 0.36])
    assert by["mean"] == pytest.approx([0.9, 0.7, 2.2 / 3])


@pytest.mark.parametrize("how", ["last", "min", "product", "mean"])
def test_differences_add_up_to_the_reward_of_the_reply_however_many_steps_it_has(how):
    for num in (1, 2, 7):
        potentials = running_aggregate(torch.rand(num, dtype=torch.float64), how)
        torch.testing.assert_close(differences(potentials).sum(), potentials[-1])


def test_an_empty_separator_is_refused():
    with pytest.raises(ValueError, match="separator is empty"):
        ProcessLoss(separator="")
