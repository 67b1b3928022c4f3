"""Attention of the GPU's flash kernel, which reads stretches of different lengths without padding. The kernel is played
here by its definition; the kernel itself is compared on a machine that has one (`benchmarks/gpu.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.models.test_forward import attention_and_gradients, masked, relative_difference, some_trees
from trimtab.batches.trees import PackedParts, TokenTrees, response_tree, sequence_tree
from trimtab.models import tree_attention as module
from trimtab.models.roles import Policy
from trimtab.models.tree_attention import head_groups, masked_attention, tree_attention


def scores_of(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """[H, L, T] with key heads repeated for the query heads that read them."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("lhd,thd->hlt", query, key) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf) if causal else scores


def forward(query, key, value, bounds_q, bounds_k, max_q, max_k, dropout, causal, debug, *, scale):
    """As `aten::_flash_attention_forward` says of packed stretches: [n, H, D] and lse [H, n]."""
    assert (dropout, debug) == (0.0, False)
    assert max_q == int(bounds_q.diff().max())
    assert max_k == int(bounds_k.diff().max())
    outputs, lses = [], []
    for i in range(len(bounds_q) - 1):
        q, k, v = (
            query[bounds_q[i] : bounds_q[i + 1]],
            key[bounds_k[i] : bounds_k[i + 1]],
            value[bounds_k[i] : bounds_k[i + 1]],
        )
        scores = scores_of(q, k, scale, causal)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        outputs.append(torch.einsum("hlt,thd->lhd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, -1), None, None, None


def backward(grad, query, key, value, output, lse, bounds_q, bounds_k, max_q, max_k, dropout, causal, _, __, *, scale):
    """From the output and lse that it is given, which may be those of more keys: dS = P * (dP - rowsum(dO * O))."""
    assert lse.is_contiguous()
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for i in range(len(bounds_q) - 1):
        asking, seen = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        q, k, v, g = query[asking], key[seen], value[seen], grad[asking]
        repeats = q.shape[1] // k.shape[1]
        wide_k, wide_v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        weights = (scores_of(q, k, scale, causal) - lse[:, asking, None]).exp()
        of_weights = torch.einsum("lhd,thd->hlt", g, wide_v)
        of_scores = weights * (of_weights - (g * output[asking]).sum(-1).T[..., None]) * scale
        grads[0][asking] = torch.einsum("hlt,thd->lhd", of_scores, wide_k)
        for grad_of, x in (
            (grads[1], torch.einsum("hlt,lhd->thd", of_scores, q)),
            (grads[2], torch.einsum("hlt,lhd->thd", weights, g)),
        ):
            grad_of[seen] = x.unflatten(1, (-1, repeats)).sum(2)
    return tuple(grads)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition in place of the kernel."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(module, "takes_packed", lambda query: True)
    monkeypatch.setattr(module, "num_multiprocessors", lambda query: 7)


ROWS = {
    "trees": [*some_trees().trees, response_tree([3] * 20, [[4] * 5, [5] * 11])],
    "chains": [sequence_tree([3] * 9), response_tree([4] * 3, [[5] * 2]), sequence_tree([6])],
    "a fork without a prompt": [response_tree([], [[4] * 5, [5] * 3])],
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_packed_parts_are_masked_attention_forward_and_backward(row, heads):
    trees = TokenTrees.build(ROWS[row])
    packed = attention_and_gradients(lambda q, k, v: tree_attention(trees)(0, q, k, v, 0.3, None), trees, heads)
    for ours, defined in zip(packed, attention_and_gradients(masked(trees), trees, heads), strict=True):
        assert relative_difference(ours, defined) < 2e-6


@pytest.mark.usefixtures("kernel")
def test_what_the_kernel_does_not_compute_is_not_asked_of_it():
    trees = some_trees()
    states = [torch.randn(trees.num_tokens, 2, 8) for _ in range(3)]
    for window, sinks in ((3, None), (None, torch.zeros(2))):
        plain = masked_attention(*states, trees.strips, trees.visible(window)[:, None], 0.3, sinks)
        assert relative_difference(tree_attention(trees)(0, *states, 0.3, window, sinks), plain) < 2e-6


def test_packed_stretches_say_where_each_begins():
    parts = PackedParts.build([response_tree([1, 2], [[3], [4, 5]]), sequence_tree([6, 7])])
    assert parts.chains.tokens.tolist() == list(range(7))
    assert parts.chains.bounds.tolist() == [0, 2, 3, 5, 7]
    assert parts.chains.longest == 2
    branches, prompts = parts.forks
    assert (branches.tokens.tolist(), prompts.tokens.tolist()) == ([2, 3, 4], [0, 1])
    assert (branches.bounds.tolist(), prompts.bounds.tolist()) == ([0, 3], [0, 2])


def test_a_float32_row_on_the_cpu_is_not_packed():
    assert not module.takes_packed(torch.zeros(3, 2, 8))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_masked_attention_of_a_gpu_has_the_gradients_of_the_definition(heads, window, monkeypatch):
    trees = TokenTrees.build(ROWS["trees"])
    defined = attention_and_gradients(masked(trees, window), trees, heads)
    monkeypatch.setattr(module, "is_gpu", lambda x: True)
    for ours, theirs in zip(attention_and_gradients(masked(trees, window), trees, heads), defined, strict=True):
        assert relative_difference(ours, theirs) < 2e-6
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("kernel")
def test_with_checkpointing_attention_is_computed_once_and_gradients_are_the_same(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    found = []
    for checkpointed in (False, True):
        policy = Policy(tiny.causal("llama"), pad_id=0)
        if checkpointed:
            policy.checkpoint_activations()
        calls.clear()
        policy(some_trees()).logprobs.sum().backward()
        found.append([p.grad for p in policy.parameters()])
        assert len(calls) == 2 * len(policy.model.model.layers)  # the chains and the forks of each
    for again, kept in zip(*found, strict=True):
        assert relative_difference(again, kept) < 1e-5


@pytest.mark.parametrize(("num_stretches", "best"), [(1, {4, 12}), (4, {16})])
def test_heads_are_grouped_so_that_they_fill_the_gpu(num_stretches, best):
    """With 132 processors, 16 heads of one stretch have 9 workers each: 12 of 144 would wait for a second round."""
    groups = head_groups(
        num_heads=16, shared=2, num_stretches=num_stretches, num_blocks=64, num_processors=132, causal=True
    )
    assert set(groups) == best


def test_heads_that_read_one_key_head_stay_together():
    for num_heads, shared in ((14, 7), (9, 3), (6, 1)):
        groups = head_groups(
            num_heads=num_heads, shared=shared, num_stretches=3, num_blocks=5, num_processors=50, causal=False
        )
        assert sum(groups) == num_heads
        assert all(size % shared == 0 for size in groups)
