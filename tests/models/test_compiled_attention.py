"""Compiled attention over trees is the masked definition, to the bit the same whatever is beside a tree."""

import os

import pytest
import torch

from tests import tiny
from tests.models.test_forward import relative_difference
from trimtab.batches.trees import TokenTrees, response_tree, sequence_tree
from trimtab.core.compiled import SWITCH, library
from trimtab.core.errors import EngineError
from trimtab.models import compiled_attention
from trimtab.models.roles import Policy
from trimtab.models.tree_attention import masked_attention, tree_attention, way_of

TREES = [
    response_tree(range(37), [range(n) for n in (1, 5, 16, 17, 40)]),
    response_tree([1], [[2], [3]]),
    sequence_tree(range(150)),
    response_tree(range(20), [range(9)]),
    response_tree([], [range(4), range(33)]),
]
SHAPES = [(2, 2, 64), (6, 2, 16), (3, 1, 24), (1, 1, 7)]
"""Query heads, key heads and the size of a head."""


@pytest.fixture
def looked_for_anew():
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(params=["torch", "compiled"])
def way(request, monkeypatch):
    if request.param == "compiled" and not compiled_attention.takes_compiled(torch.zeros(1)):
        pytest.skip("no C compiler with OpenMP on this machine")
    monkeypatch.setenv(SWITCH, request.param)
    return request.param


@pytest.fixture
def in_c():
    if not compiled_attention.takes_compiled(torch.zeros(1)):
        pytest.skip("no C compiler with OpenMP on this machine")


def states(num_tokens, heads, kv_heads, size):
    """Queries, keys, values and the gradient of the output."""
    torch.manual_seed(size)
    return [torch.randn(num_tokens, h, size) for h in (heads, kv_heads, kv_heads, heads)]


def attended(trees, inputs, window=None, sinks=None):
    """The output, and the gradients of queries, keys and values."""
    *inputs, grad = inputs
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = tree_attention(trees)(0, *inputs, 0.3, window, sinks)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def by_definition(trees, inputs, window=None, sinks=None):
    """The same in float64, under the mask of the whole tree."""
    *inputs, grad = (x.double() for x in inputs)
    inputs = [x.detach().requires_grad_() for x in inputs]
    sinks = None if sinks is None else sinks.double()
    output = masked_attention(*inputs, trees.strips, trees.visible(window)[:, None], 0.3, sinks)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def assert_close(found, expected):
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert relative_difference(ours.double(), exact) < 2e-6


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 2, 16, 23, 60, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_are_the_definition(way, shape, window, with_sinks):
    trees = TokenTrees.build(TREES)
    inputs, sinks = states(trees.num_tokens, *shape), torch.randn(shape[0]) if with_sinks else None
    assert (way_of(inputs[0], window, sinks) == "compiled") == (way == "compiled")
    assert_close(attended(trees, inputs, window, sinks), by_definition(trees, inputs, window, sinks))


def test_a_sum_over_many_tokens(way):
    trees = TokenTrees.build([response_tree(range(300), [range(140), range(290)])])
    inputs = states(trees.num_tokens, 2, 1, 32)
    assert_close(attended(trees, inputs), by_definition(trees, inputs))


@pytest.mark.usefixtures("in_c")
def test_a_tree_has_the_same_bits_whatever_is_beside_it_and_however_many_threads_there_are():
    trees = TokenTrees.build(TREES)
    inputs = states(trees.num_tokens, 6, 2, 16)
    threads = torch.get_num_threads()
    try:
        found = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(attended(trees, inputs))
    finally:
        torch.set_num_threads(threads)
    start = 0
    for tree in TREES:
        place = slice(start, start := start + tree.num_tokens)
        alone = attended(TokenTrees.build([tree]), [x[place] for x in inputs])
        for together in found:
            assert all(torch.equal(x[place], y) for x, y in zip(together, alone, strict=True))


def test_heads_that_are_views_of_something_larger(way):
    trees = TokenTrees.build(TREES)
    inputs = states(trees.num_tokens, 2, 2, 16)
    rows = torch.cat(inputs[:3], 1).split(2, 1)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    sizes_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    expected = attended(trees, inputs)
    for given in ([*rows, inputs[3]], heads_first, sizes_first):
        assert not all(x.is_contiguous() for x in given)
        assert all(torch.equal(x, y) for x, y in zip(attended(trees, given), expected, strict=True))


@pytest.mark.usefixtures("in_c")
def test_what_is_not_a_number_stays_so_where_it_is_seen():
    trees = TokenTrees.build([response_tree(range(5), [range(20), range(3)]), sequence_tree(range(9))])
    inputs = states(trees.num_tokens, 1, 1, 16)
    inputs[0][3] = torch.nan
    inputs[1][7] = torch.nan
    output = attended(trees, inputs)[0]
    assert output.isnan().all(-1)[:, 0].nonzero().flatten().tolist() == [3, *range(7, 25)]


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.usefixtures("in_c", "looked_for_anew")
def test_vectors_of_every_width_compute_the_same(monkeypatch, lanes):
    # The compiler makes the width of another processor out of what this one has.
    width = {4: "-U__AVX512F__ -U__AVX__", 8: "-U__AVX512F__ -D__AVX__", 16: "-D__AVX512F__"}[lanes]
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} {width}")
    monkeypatch.setenv(SWITCH, "compiled")
    for shape in SHAPES:
        test_attention_and_its_gradients_are_the_definition("compiled", shape, 23, True)


@pytest.mark.usefixtures("looked_for_anew")
def test_without_a_compiler_torch_computes_and_the_record_says_so(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert Policy(tiny.causal("llama"), pad_id=0).way == "tree"
    trees = TokenTrees.build(TREES)
    inputs = states(trees.num_tokens, 2, 1, 8)
    assert way_of(inputs[0], None, None) == "strips"
    assert_close(attended(trees, inputs), by_definition(trees, inputs))
    monkeypatch.setenv(SWITCH, "compiled")
    with pytest.raises(EngineError, match=r"no C compiler with OpenMP[^$]*install gcc or name"):
        attended(trees, inputs)


@pytest.mark.usefixtures("in_c")
def test_the_record_names_what_is_compiled():
    policy = Policy(tiny.causal("llama"), pad_id=0)
    assert policy.way == "tree, compiled"
    policy.precision = "bfloat16"
    assert policy.way == "tree"
    policy.precision, policy.form = "float32", "padded"
    assert policy.way == "padded"
