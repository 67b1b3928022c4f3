import math

import pytest
import torch

from tests.tiny import VOCAB, causal
from trimtab.batches.trees import TokenTrees, TreeBatch, response_tree
from trimtab.core.errors import EngineError
from trimtab.engines.local.learner import NORM_BLOCK, AdamW, LocalLearner, clip_gradients
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.roles import Policy


def batch(seed=0, num=6):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (num, 3), generator=draw).tolist()
    trees = [
        response_tree(*(lambda p, *r: (p, r))(*[torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in row]))
        for row in lengths
    ]
    return TreeBatch(trees=TokenTrees.build(trees))


def learner(token_budget=10**9, **optimizer):
    policy = Policy(causal(), pad_id=0)
    settings = AdamW(learning_rate=1e-3, **optimizer)
    return LocalLearner(policy, settings, token_budget=token_budget, num_updates=10, name="policy")


def gradients_after_update(token_budget, order=None):
    one = learner(token_budget, max_gradient_norm=1e9)
    data = batch()
    one.update([(data if order is None else data.select(order), [SFTLoss()])])
    return torch.cat([p.grad.flatten() for p in one.parameters.values()])


@pytest.mark.parametrize("token_budget", [1, 30, 60])
def test_micro_batches_do_not_change_the_gradient(token_budget):
    whole = gradients_after_update(10**9)
    split = gradients_after_update(token_budget)
    assert float((whole - split).norm() / whole.norm()) < 1e-6


def test_the_order_of_examples_does_not_change_the_gradient():
    whole = gradients_after_update(10**9)
    turned = gradients_after_update(10**9, order=[5, 3, 1, 0, 4, 2])
    assert float((whole - turned).norm() / whole.norm()) < 1e-6


def test_the_loss_is_the_mean_over_all_tokens_of_the_step_not_of_means():
    data = batch()
    policy = Policy(causal(), pad_id=0)
    with torch.no_grad():
        expected = -float(policy(data.trees).logprobs.mean())
    metrics = learner(token_budget=1).update([(data, [SFTLoss()])])
    assert metrics["loss/train"].value == pytest.approx(expected, rel=1e-5)


def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path):
    one = learner()
    for seed in range(3):
        one.update([(batch(seed), [SFTLoss()])])
    one.save(tmp_path)
    other = learner()
    other.load(tmp_path)
    for seed in range(3, 6):
        first = one.update([(batch(seed), [SFTLoss()])])
        second = other.update([(batch(seed), [SFTLoss()])])
        assert {k: m.value for k, m in first.items()} == {k: m.value for k, m in second.items()}
    for a, b in zip(one.parameters.values(), other.parameters.values(), strict=True):
        assert torch.equal(a, b)


def test_one_adamw_step_is_that_of_the_definition():
    one = learner(max_gradient_norm=1e9, weight_decay=0.1, eps=1e-8)
    before = {n: p.detach().clone() for n, p in one.parameters.items()}
    one.update([(batch(), [SFTLoss()])])
    for name, parameter in one.parameters.items():
        g = parameter.grad
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        # after one step both bias-corrected moments are the gradient and its square
        expected = before[name] * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    one = learner()
    with torch.no_grad():
        next(iter(one.parameters.values())).fill_(math.nan)
    with pytest.raises(EngineError, match="loss of the policy became nan"):
        one.update([(batch(), [SFTLoss()])])


def test_the_gradient_norm_is_that_of_float64_and_clipping_scales_to_it():
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (1000, 37, NORM_BLOCK + 5)]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=draw)
    exact = math.sqrt(sum(float(g) ** 2 for p in parameters for g in p.grad))
    assert clip_gradients(parameters, 0.5) == pytest.approx(exact, rel=1e-9)
    assert math.sqrt(sum(float(g) ** 2 for p in parameters for g in p.grad)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75]), ("cosine", [0.5, 1, 1, None])],
)
def test_schedules_by_hand(schedule, expected):
    # ten updates, two of warm-up: the rate halves, peaks, then falls by the schedule; update 4 is 2/8 of the way down
    adam = AdamW(learning_rate=1.0, schedule=schedule, warmup_fraction=0.2)
    cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25))
    expected = [cosine if e is None else e for e in expected]
    assert [adam.rate_at(i, 10) for i in (0, 1, 2, 4)] == pytest.approx(expected)


def test_demonstrations_mixed_into_a_policys_updates_are_learned_at_temperature_1():
    losses = []
    for temperature in (1.0, 0.5):
        one = learner()
        one.role.temperature = temperature
        metrics = one.update([(batch(), [SFTLoss()])])
        losses.append((metrics["loss/train"].value, metrics["optimizer/policy_gradient_norm"].value))
    assert losses[0] == losses[1]
