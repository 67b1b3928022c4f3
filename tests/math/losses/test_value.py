import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trimtab.core.metrics import merge
from trimtab.math.losses.value import ValueLoss, clipped_value_loss, explained_variance

IDS = torch.tensor([0, 1, 1, 1, 2, 2])


def example():
    values, old_values, returns = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return values, old_values, returns


@pytest.mark.parametrize("clip", [0.2, 0.7, math.inf, None])
def test_the_loss_is_that_of_the_definition(clip):
    values, old_values, returns = example()
    bound = math.inf if clip is None else clip
    expected = [
        0.5 * max((v - r) ** 2, (min(max(v, old - bound), old + bound) - r) ** 2)
        for v, old, r in zip(values.tolist(), old_values.tolist(), returns.tolist(), strict=True)
    ]
    actual = clipped_value_loss(values, old_values, returns, clip)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_without_a_clip_it_is_half_of_torchs_squared_error():
    values, old_values, returns = example()
    expected = torch.nn.functional.mse_loss(values, returns, reduction="none") / 2
    torch.testing.assert_close(clipped_value_loss(values, old_values, returns, None), expected)


def test_a_value_that_moved_far_enough_towards_its_return_is_not_moved_further():
    # 0.5 away from the old value 0, return 1: the loss is that of 0.2, and no gradient is left
    values = torch.tensor([0.5], requires_grad=True)
    loss = clipped_value_loss(values, torch.zeros(1), torch.ones(1), 0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * 0.8**2)
    assert values.grad.item() == 0


def test_gradients_check():
    values, old_values, returns = example()
    assert torch.autograd.gradcheck(
        lambda v: clipped_value_loss(v, old_values, returns, 0.2), (values.requires_grad_(),)
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_splitting_the_batch_changes_neither_loss_nor_metrics(aggregation):
    values, old_values, returns = example()
    loss_class = ValueLoss(aggregation=aggregation)

    def run(cuts):
        results, weight = [], 0
        for first, last in cuts:
            rows = (first <= IDS) & (last > IDS)
            batch = SimpleNamespace(
                sequence_ids=IDS[rows] - first,
                num_sequences=last - first,
                old_values=old_values[rows],
                returns=returns[rows],
            )
            results.append(loss_class(SimpleNamespace(values=values[rows]), batch))
            weight += loss_class.weight(batch)
        loss = sum(total for total, _ in results) / weight
        return loss, {k: m.value for k, m in merge(m for _, m in results).items()}

    whole, whole_metrics = run([(0, 3)])
    split, split_metrics = run([(0, 1), (1, 2), (2, 3)])
    torch.testing.assert_close(split, whole)
    assert split_metrics == pytest.approx(whole_metrics)
    assert set(whole_metrics) == {"critic/loss", "critic/clip_fraction", "critic/explained_variance"}
    assert whole_metrics["critic/loss"] == pytest.approx(whole.item())


def test_only_values_held_by_the_clip_are_counted():
    values = torch.tensor([0.5, 0.1, -0.5])  # moved far towards the return; little; far away from it
    batch = SimpleNamespace(
        sequence_ids=torch.zeros(3, dtype=torch.long), num_sequences=1, old_values=torch.zeros(3), returns=torch.ones(3)
    )
    _, metrics = ValueLoss()(SimpleNamespace(values=values), batch)
    assert metrics["critic/clip_fraction"].value == pytest.approx(1 / 3)
    _, metrics = ValueLoss(clip=None)(SimpleNamespace(values=values), batch)
    assert "critic/clip_fraction" not in metrics


def test_explained_variance_by_numpy_whole_and_in_parts():
    values, _, returns = example()
    returns = values + 0.3 * returns
    expected = 1 - np.var((returns - values).numpy()) / np.var(returns.numpy())
    assert explained_variance(values, returns).value == pytest.approx(expected)
    parts = explained_variance(values[:1], returns[:1]).merge(explained_variance(values[1:], returns[1:]))
    assert parts.value == pytest.approx(expected)


def test_explained_variance_of_a_perfect_a_constant_and_an_undefined_critic():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns).value == 1.0
    assert explained_variance(torch.full((3,), 9.0), returns).value == pytest.approx(0.0)
    assert explained_variance(-returns, returns).value < 0
    assert math.isnan(explained_variance(returns, torch.ones(3)).value)
    assert math.isnan(explained_variance(returns[:0], returns[:0]).value)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="clip"):
        ValueLoss(clip=0.0)
