import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import ConfigError
from trimtab.core.registry import find
from trimtab.math.kl import ESTIMATORS, AdaptiveKL, FixedKL, k1, k2, k3


def distributions(V=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, V, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_estimators_by_hand():
    # pi = 0.5, pi_ref = 0.25: d = log 2, r = 1/2
    d = torch.tensor([2.0]).log()
    torch.testing.assert_close(k1(d), torch.tensor([math.log(2)]))
    torch.testing.assert_close(k2(d), torch.tensor([math.log(2) ** 2 / 2]))
    torch.testing.assert_close(k3(d), torch.tensor([0.5 - 1 + math.log(2)]))


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased_estimators_have_the_exact_kl_as_their_mean_over_every_token(name):
    logp, logq = distributions()
    mean = (logp.exp() * ESTIMATORS[name](logp - logq)).sum()
    torch.testing.assert_close(mean, torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="sum"))


@given(st.floats(-15, 15, width=32))
def test_k3_is_never_negative_and_right_to_float32(d):
    actual = k3(torch.tensor([d], dtype=torch.float32)).item()
    exact = math.expm1(-d) + d
    assert actual >= 0
    assert actual == pytest.approx(exact, rel=1e-6, abs=1e-30)


def test_k3_of_a_small_difference_is_not_lost_to_rounding():
    # d^2 / 2 to first order; exp(-d) - 1 + d in float32 gives 0 or 1e-7 here
    assert k3(torch.tensor([1e-5])).item() == pytest.approx(0.5e-10, rel=1e-4)


def test_estimates_are_not_cut_off_where_other_trainers_clamp_them():
    assert k3(torch.tensor([-15.0])).item() == pytest.approx(math.exp(15) - 16)
    assert k1(torch.tensor([-30.0, 30.0])).tolist() == [-30.0, 30.0]
    assert k2(torch.tensor([-30.0])).tolist() == [450.0]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_extreme_log_ratios_stay_finite_with_gradients_of_the_right_sign(name):
    d = torch.tensor([-2e4, -25.0, -1.0, 0.0, 1.0, 2e4], requires_grad=True)
    values = ESTIMATORS[name](d)
    values.sum().backward()
    assert values.isfinite().all()
    assert d.grad.isfinite().all()
    if name != "k1":
        assert (d.grad.sign() == d.detach().sign()).all()


def test_k3_goes_on_smoothly_where_it_turns_into_its_tangent():
    d = torch.tensor([-20.0 - 1e-6, -20.0 + 1e-6], dtype=torch.float64, requires_grad=True)
    values = k3(d)
    values.sum().backward()
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(d.grad[0], d.grad[1], rtol=1e-5, atol=0)


def test_half_precision_is_raised_and_gradients_check():
    assert all(f(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32 for f in ESTIMATORS.values())
    d = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert all(torch.autograd.gradcheck(f, (d,)) for f in ESTIMATORS.values())


@pytest.mark.parametrize(("name", "direction"), [("k2", "policy||reference"), ("k3", "reference||policy")])
def test_as_a_loss_each_estimator_has_the_gradient_of_its_direction(name, direction):
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    logq = distributions()[1]
    logp = logits.log_softmax(-1)
    expected_loss = (logp.exp().detach() * ESTIMATORS[name](logp - logq)).sum()  # mean over tokens drawn from p
    (actual,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)
    p, q = logp.exp(), logq.exp()
    kl = (p * (logp - logq)).sum() if direction == "policy||reference" else (q * (logq - logp)).sum()
    (expected,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(actual, expected)


def test_a_fixed_coefficient_stays():
    assert FixedKL(coef=0.3).initial == 0.3
    assert FixedKL(coef=0.3).update(0.3, 1e9, 64) == 0.3


def test_the_adaptive_coefficient_by_hand():
    controller = AdaptiveKL(coef=0.2, target=6.0, horizon=1000.0)
    assert controller.initial == 0.2
    assert controller.update(0.2, 6.0, 100) == 0.2
    assert controller.update(0.2, 6.6, 100) == pytest.approx(0.2 * (1 + 0.1 * 0.1))  # a tenth above target
    assert controller.update(0.2, 600.0, 100) == pytest.approx(0.2 * (1 + 0.2 * 0.1))  # the error is clipped
    assert controller.update(0.2, 0.0, 100) == pytest.approx(0.2 * (1 - 0.2 * 0.1))


def test_a_negative_kl_lowers_the_coefficient_and_keeps_it_positive():
    coef = AdaptiveKL(horizon=10.0).update(0.2, -50.0, 10_000)
    assert coef == pytest.approx(0.2 * 0.8)


def test_the_adaptive_controller_steers_a_simple_plant_to_its_target():
    # a policy whose KL is inversely proportional to the coefficient
    controller = AdaptiveKL(coef=1.0, target=2.0, horizon=100.0)
    coef = controller.initial
    for _ in range(500):
        coef = controller.update(coef, 0.5 / coef, 50)
    assert 0.5 / coef == pytest.approx(2.0, rel=1e-3)


def test_the_coefficient_is_all_the_state_there_is_so_resuming_goes_on_as_before():
    controller = AdaptiveKL(target=1.0, horizon=100.0)
    observed = [3.0, 0.2, 1.5, 0.9]
    straight = controller.initial
    for kl in observed:
        straight = controller.update(straight, kl, 32)
    saved = controller.update(controller.update(controller.initial, observed[0], 32), observed[1], 32)
    again = AdaptiveKL(target=1.0, horizon=100.0)
    assert again.update(again.update(saved, observed[2], 32), observed[3], 32) == straight


@pytest.mark.parametrize("wrong", [{"target": 0.0}, {"target": -1.0}, {"horizon": 0.0}, {"coef": 0.0}])
def test_a_target_of_zero_and_other_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdaptiveKL(**wrong)


def test_a_negative_fixed_coefficient_is_refused():
    with pytest.raises(ValueError, match="coef"):
        FixedKL(coef=-0.1)


def test_controllers_are_found_by_the_name_a_run_file_gives():
    assert find("kl_controller", "fixed", where="test") is FixedKL
    assert find("kl_controller", "adaptive", where="test") is AdaptiveKL
    with pytest.raises(ConfigError, match="adaptive"):
        find("kl_controller", "adaptve", where="test")
