"""Fused layers compute what transformers writes: in C, and as on a GPU, where their formulas run uncompiled here but
for one test that compiles them."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch.nn.functional import silu

from tests import tiny
from tests.models.test_forward import relative_difference, some_trees
from trimtab.core.compiled import SWITCH, library
from trimtab.models import compiled_layers, fused_layers
from trimtab.models.attention import backbone, row_states
from trimtab.models.compiled_attention import takes_compiled
from trimtab.models.fused_layers import fuse_layers, own_layers
from trimtab.models.roles import Policy
from trimtab.models.tree_attention import tree_attention

LLAMA_LIKE = ["llama", "qwen3", "mistral_windowed"]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take this machine for a GPU, and compute their formulas one operation at a time."""
    monkeypatch.setattr(fused_layers, "is_gpu", lambda x: True)
    monkeypatch.setattr(fused_layers, "_compiled", lambda function: function)
    monkeypatch.setattr(fused_layers, "can_compile", lambda device: True)
    monkeypatch.setattr(fused_layers, "NARROWEST", 1)


@pytest.fixture
def in_c() -> None:
    if not (takes_compiled(torch.zeros(1)) and compiled_layers.available()):
        pytest.skip("no C compiler with OpenMP on this machine")


@pytest.fixture(params=["in_c", "on_gpu"])
def fused(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(request.param)


def is_fused(model: torch.nn.Module) -> bool:
    return any("transformers_own" in vars(type(m)) for m in model.modules())


def states_and_gradients(policy: Policy) -> list[torch.Tensor]:
    trees, base = some_trees(), backbone(policy.model)
    policy.model.zero_grad()
    states = row_states(base, trees.input_ids, trees.position_ids, tree_attention(trees))
    (states * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
    return [states.detach(), *(p.grad for p in base.parameters())]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_hidden_states_and_gradients_are_those_of_transformers(family):
    policy = Policy(tiny.causal(family), pad_id=0)
    found = states_and_gradients(policy)
    assert is_fused(policy.model)
    with own_layers(policy.model):
        own = states_and_gradients(policy)
    for ours, theirs in zip(found, own, strict=True):
        assert relative_difference(ours, theirs) < 1e-5


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_under_autocast_they_differ_by_rounding(family):
    policy = Policy(tiny.causal(family), pad_id=0)
    policy.precision = "bfloat16"
    with policy.active():
        found = states_and_gradients(policy)
        with own_layers(policy.model):
            own = states_and_gradients(policy)
    for ours, theirs in zip(found, own, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_difference(ours, theirs) < 0.03


@pytest.mark.usefixtures("fused")
def test_plain_forward_passes_and_copies_are_left_as_they_are():
    model = tiny.causal("qwen3")
    ids = torch.arange(5)[None]
    before = model(input_ids=ids).logits
    fuse_layers(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    copied = copy.deepcopy(model)
    layer = copied.model.layers[0]
    assert type(layer.self_attn).__name__ == type(tiny.causal("qwen3").model.layers[0].self_attn).__name__
    layer.mlp.down_proj.weight.data.zero_()
    assert not torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_a_model_on_a_cpu_without_a_compiler_is_left_alone(monkeypatch, family):
    monkeypatch.setenv(SWITCH, "torch")
    assert not is_fused(Policy(tiny.causal(family), pad_id=0).model)


@pytest.mark.usefixtures("in_c")
def test_a_model_on_the_cpu_in_another_precision_computes_as_transformers_does():
    assert not is_fused(Policy(tiny.causal("llama").double(), pad_id=0).model)
    policy = Policy(tiny.causal("llama"), pad_id=0)
    assert is_fused(policy.model)
    logits = policy.model.double()(input_ids=torch.arange(9)[None]).logits
    with own_layers(policy.model):
        assert torch.equal(policy.model(input_ids=torch.arange(9)[None]).logits, logits)


def with_gradients(function, inputs):
    """What it gives for `inputs`, and their gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


def normed_in_float64(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated_in_float64(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos.double()[:, :, None] + torch.cat([-second, first], -1) * sin.double()[:, :, None]


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("n", [1, 63, 64, 130])
@pytest.mark.parametrize("size", [6, 40, 128])
def test_each_kernel_is_its_formula_in_float64(n, size):
    torch.manual_seed(n)
    x, other = (2 * torch.randn(1, n, 3 * size) for _ in range(2))
    angles = torch.rand(1, n, size) * 6
    heads = x.unflatten(-1, (3, size))
    cos, sin = angles.cos(), angles.sin()
    for ours, formula, inputs in (
        (lambda x, w: compiled_layers.normed(x, w, 1e-6), normed_in_float64, [heads, torch.rand(size)]),
        (compiled_layers.gated, lambda gate, up: silu(gate) * up, [30 * x, other]),
        (lambda x: compiled_layers.rotated(x, cos, sin), lambda x: rotated_in_float64(x, cos, sin), [heads]),
        (
            lambda x: compiled_layers.rotated(x, cos, sin),
            lambda x: rotated_in_float64(x, cos, sin),
            [heads.transpose(1, 2).contiguous().transpose(1, 2)],
        ),
    ):
        found, exact = with_gradients(ours, inputs), with_gradients(formula, [x.double() for x in inputs])
        for a, b in zip(found, exact, strict=True):
            assert relative_difference(a.double(), b) < 1e-6


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.usefixtures("in_c")
def test_vectors_of_every_width_compute_the_same(monkeypatch, lanes):
    width = {4: "-U__AVX512F__ -U__AVX__", 8: "-U__AVX512F__ -D__AVX__", 16: "-D__AVX512F__"}[lanes]
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} {width}")
    library.cache_clear()
    try:
        assert compiled_layers.available()
        test_each_kernel_is_its_formula_in_float64(130, 40)
    finally:
        library.cache_clear()


@pytest.mark.usefixtures("in_c")
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it_and_however_many_threads_there_are():
    torch.manual_seed(0)
    x, norm, angles = torch.randn(1, 150, 2, 40), torch.rand(40), torch.rand(1, 150, 40)
    kernels = [
        lambda rows: compiled_layers.normed(x[:, rows], norm, 1e-6),
        lambda rows: compiled_layers.gated(x[:, rows], x[:, rows].flip(-1)),
        lambda rows: compiled_layers.rotated(x[:, rows], angles[:, rows].cos(), angles[:, rows].sin()),
    ]
    threads = torch.get_num_threads()
    for kernel in kernels:
        whole = kernel(slice(None))
        for num_threads in (1, 2, 3):
            try:
                torch.set_num_threads(num_threads)
                parts = [kernel(slice(0, 7)), kernel(slice(7, 8)), kernel(slice(8, 150))]
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.usefixtures("on_gpu")
def test_other_architectures_are_left_alone():
    model = tiny.causal("gpt2")
    fuse_layers(model)
    assert not is_fused(model)


def test_where_nothing_can_be_compiled_it_is_said_once(monkeypatch, capsys):
    def fails(function):
        raise RuntimeError("no compiler here")

    fused_layers.can_compile.cache_clear()
    monkeypatch.setattr(fused_layers, "is_gpu", lambda x: True)
    monkeypatch.setattr(fused_layers, "NARROWEST", 1)
    monkeypatch.setattr(fused_layers, "_compiled", fails)
    for _ in range(2):
        model = tiny.causal("llama")
        fuse_layers(model)
        assert not is_fused(model)
    assert capsys.readouterr().err.count("no compiler here") == 1
    fused_layers.can_compile.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's compiler, at itself
def test_compiled_they_are_the_same_and_new_lengths_need_no_new_kernel():
    draw = torch.Generator().manual_seed(0)
    weight = torch.rand(16, generator=draw)
    for num in (7, 33, 50):
        x, cos, sin = (torch.randn(num, n, 16, generator=draw) for n in (4, 1, 1))
        for function, inputs in (
            (fused_layers.normed, (x, weight, 1e-6, torch.float32)),
            (fused_layers.rotated, (x, cos, sin, torch.float32)),
            (fused_layers.normed_and_rotated, (x, cos, sin, weight, 1e-6, torch.float32)),
            (fused_layers.gated, (x, x.flip(0))),
        ):
            torch.testing.assert_close(fused_layers._compiled(function)(*inputs), function(*inputs))
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] <= 4
