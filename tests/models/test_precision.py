import subprocess
import sys

import pytest
import torch

from tests.models.test_forward import relative_difference, some_trees
from tests.tiny import causal, scalar
from trimtab.models.forward import sequence_scores_of, token_logprobs_of
from trimtab.models.precision import computing_in
from trimtab.models.roles import Policy, ScalarModel


@pytest.mark.parametrize("users_setting", ["highest", "high", "medium"])
def test_float32_products_are_float32_whatever_the_process_allows(users_setting):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=draw) for _ in range(2))
    exact = a.double() @ b.double().T
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(users_setting)
    try:
        with computing_in("float32", "cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
            error = float((torch.nn.functional.linear(a, b) - exact).abs().max() / exact.abs().max())
        assert torch.get_float32_matmul_precision() == users_setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert error < 2e-6  # bfloat16 is off by 3e-3, TF32 by 4e-4


def test_settings_are_put_back():
    before = torch.get_float32_matmul_precision()
    with computing_in("bfloat16", "cpu"):
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


MANY_SHAPES = """
import resource, torch
import trimtab.models.precision

def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

weight, found = torch.randn(512, 512), []
for rows in range(1, 1001):
    torch.ops.mkldnn._linear_pointwise(torch.randn(200 + rows, 512), weight, None, "none", [], "")
    found += [peak_megabytes()] if rows in (300, 1000) else []
print(found[1] - found[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
def test_memory_does_not_grow_with_the_shapes_that_onednn_has_seen():
    ran = subprocess.run([sys.executable, "-c", MANY_SHAPES], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 150  # 700 further shapes; with the caches as they are by themselves 1,000 to 2,000
