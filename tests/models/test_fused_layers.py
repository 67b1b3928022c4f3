"""Fused layers compute what transformers writes. On the CPU their formulas run uncompiled; one test compiles them."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import tiny
from tests.models.test_forward import relative_difference, some_trees
from trimtab.models import fused_layers
from trimtab.models.attention import backbone, row_states
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


def states_and_gradients(policy: Policy) -> list[torch.Tensor]:
    trees, base = some_trees(), backbone(policy.model)
    policy.model.zero_grad()
    states = row_states(base, trees.input_ids, trees.position_ids, tree_attention(trees))
    (states * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
    return [states.detach(), *(p.grad for p in base.parameters())]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_hidden_states_and_gradients_are_those_of_transformers(family):
    policy = Policy(tiny.causal(family), pad_id=0)
    found = states_and_gradients(policy)
    assert any("transformers_own" in vars(type(m)) for m in policy.model.modules())
    with own_layers(policy.model):
        own = states_and_gradients(policy)
    for ours, theirs in zip(found, own, strict=True):
        assert relative_difference(ours, theirs) < 1e-5


@pytest.mark.usefixtures("on_gpu")
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


@pytest.mark.usefixtures("on_gpu")
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


@pytest.mark.parametrize("family", [*LLAMA_LIKE, "gpt2"])
def test_a_model_on_the_cpu_is_left_alone(family):
    policy = Policy(tiny.causal(family), pad_id=0)
    assert not any("transformers_own" in vars(type(m)) for m in policy.model.modules())


@pytest.mark.usefixtures("on_gpu")
def test_other_architectures_are_left_alone():
    model = tiny.causal("gpt2")
    fuse_layers(model)
    assert not any("transformers_own" in vars(type(m)) for m in model.modules())


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
        assert not any("transformers_own" in vars(type(m)) for m in model.modules())
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
