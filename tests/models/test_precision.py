import pytest
import torch

from tests.models.test_forward import relative_difference, some_trees
from tests.tiny import causal, scalar
from trimtab.models import precision
from trimtab.models.forward import sequence_scores_of, token_logprobs_of
from trimtab.models.precision import MAX_ERROR, computing_in, fastest_float32, product_error
from trimtab.models.roles import Policy, ScalarModel


def test_float32_is_float32_whatever_path_is_taken():
    assert product_error("highest") <= MAX_ERROR
    assert product_error(fastest_float32()) <= MAX_ERROR


@pytest.mark.parametrize(("error", "capability", "expected"), [
    (1e-6, "AVX512", "medium"), (3e-3, "AVX512", "highest"), (1e-6, "AVX2", "highest"),
])  # fmt: skip
def test_the_other_path_is_taken_only_where_it_gains_and_is_exact(monkeypatch, error, capability, expected):
    monkeypatch.setattr(precision, "product_error", lambda setting: error)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fastest_float32.__wrapped__() == expected


def test_settings_are_put_back():
    before = torch.get_float32_matmul_precision()
    with computing_in("bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.get_float32_matmul_precision() == before
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_bfloat16_is_near_float32_in_values_and_gradients(name):
    results = {}
    for chosen in ("float32", "bfloat16"):
        role = Policy(causal(name), pad_id=0)
        role.precision = chosen
        outputs = role(some_trees())
        assert outputs.logprobs.dtype == torch.float32
        outputs.logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in role.parameters() if p.grad is not None])
        results[chosen] = (token_logprobs_of(role, some_trees(), 20), gradient)
    assert not torch.equal(results["float32"][0], results["bfloat16"][0])
    assert relative_difference(results["bfloat16"][0], results["float32"][0]) < 0.05
    assert relative_difference(results["bfloat16"][1], results["float32"][1]) < 0.1


def test_scores_in_bfloat16_are_near_those_in_float32():
    role = ScalarModel(scalar("qwen3"), pad_id=0)
    exact = sequence_scores_of(role, some_trees(), 100)
    role.precision = "bfloat16"
    assert relative_difference(sequence_scores_of(role, some_trees(), 100), exact) < 0.1
