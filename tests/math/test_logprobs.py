import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax as scipy_softmax
from scipy.stats import entropy as scipy_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.math.logprobs import (
    _products,
    draw,
    exact_kl,
    logprobs_of,
    sample,
    sample_softmax,
    token_logprobs,
    truncated_logprobs,
)
from trimtab.models import roles


def gather_logprobs(hidden, weight, targets, *, bias=None, temperature=1.0, scale=1.0, cap=None):
    """The textbook way, all logits at once."""
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def example(M=7, D=5, V=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((M, D), (V, D), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (M,), generator=generator)


@pytest.mark.parametrize("tile", [(1, 1), (3, 4), (7, 5), (2, 11), (100, 100)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_all_logits_at_once(tile, with_bias):
    hidden, weight, bias, targets = example()
    leaves = [t.requires_grad_() for t in (hidden, weight, *([bias] if with_bias else []))]
    bias = bias if with_bias else None
    up_logprobs, up_entropy = torch.randn(2, 7, dtype=torch.float64)

    expected = gather_logprobs(hidden, weight, targets, bias=bias, temperature=0.7)
    actual = token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, tile=tile, with_entropy=True)
    torch.testing.assert_close(actual, expected)

    grads = [
        torch.autograd.grad((up_logprobs * logprobs).sum() + (up_entropy * entropy).sum(), leaves)
        for logprobs, entropy in (actual, expected)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("tile", [(3, 4), (100, 100)])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [{"scale": 0.3}, {"cap": 1.5}, {"scale": 2.5, "cap": 1.5, "temperature": 0.7}])
def test_scaled_and_capped_logits_have_the_values_and_gradients_of_autograd(shape, with_bias, with_entropy, tile):
    hidden, weight, bias, targets = example()
    leaves = [t.requires_grad_() for t in (hidden, weight, *([bias] if with_bias else []))]
    shape = shape | {"bias": bias if with_bias else None}
    up_logprobs, up_entropy = torch.randn(2, 7, dtype=torch.float64)
    expected = gather_logprobs(hidden, weight, targets, **shape)
    actual = token_logprobs(hidden, weight, targets, tile=tile, with_entropy=with_entropy, **shape)
    torch.testing.assert_close(actual[0], expected[0])
    sums = []
    for logprobs, entropy in (actual, expected):
        sums.append((up_logprobs * logprobs).sum() + ((up_entropy * entropy).sum() if with_entropy else 0))
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in sums))


@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradients_pass_gradcheck(with_entropy):
    hidden, weight, bias, targets = example(M=4, D=3, V=5)

    def function(hidden, weight, bias):
        results = token_logprobs(
            hidden, weight, targets, bias=bias, temperature=1.3, tile=(3, 2), with_entropy=with_entropy
        )
        return results if with_entropy else results[0]

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (hidden, weight, bias)])


def test_entropy_alone_can_be_differentiated():
    hidden, weight, _, targets = example()
    hidden.requires_grad_()
    (expected,) = torch.autograd.grad(gather_logprobs(hidden, weight, targets)[1].sum(), hidden)
    (actual,) = torch.autograd.grad(token_logprobs(hidden, weight, targets, with_entropy=True)[1].sum(), hidden)
    torch.testing.assert_close(actual, expected)


def test_entropy_agrees_with_scipy_and_is_left_out_unless_asked_for():
    hidden, weight, _, targets = example()
    entropy = token_logprobs(hidden, weight, targets, with_entropy=True)[1]
    expected = [scipy_entropy(row) for row in scipy_softmax((hidden @ weight.T).numpy(), axis=1)]
    torch.testing.assert_close(entropy, torch.tensor(expected, dtype=torch.float64))
    assert token_logprobs(hidden, weight, targets)[1] is None


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one():
    hidden, weight, _, targets = example()
    hidden.requires_grad_()
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    frozen = hidden.grad
    hidden.grad = None
    weight.requires_grad_()
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    assert torch.equal(hidden.grad, frozen)
    assert weight.grad is not None


def test_a_trained_head_on_frozen_hidden_states_gets_its_gradient():
    hidden, weight, _, targets = example()
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(gather_logprobs(hidden, weight, targets)[0].sum(), weight)
    (actual,) = torch.autograd.grad(token_logprobs(hidden, weight, targets, tile=(2, 3))[0].sum(), weight)
    torch.testing.assert_close(actual, expected)


def test_loss_is_torchs_cross_entropy():
    hidden, weight, bias, targets = example(dtype=torch.float32)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="none")
    torch.testing.assert_close(-token_logprobs(hidden, weight, targets, bias=bias)[0], expected)


def test_half_precision_weights_are_computed_in_float32():
    # bfloat16 logits are wrong in the third digit, which moves every ratio of PPO
    hidden, weight, _, targets = example(M=16, D=64, V=50, dtype=torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    actual = token_logprobs(hidden, weight, targets)[0]
    expected = gather_logprobs(hidden.double(), weight.double(), targets)[0]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-5)
    actual.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_autocast_does_not_lower_the_precision():
    hidden, weight, _, targets = example(dtype=torch.float32)
    hidden.requires_grad_()
    plain = token_logprobs(hidden, weight, targets)[0]
    (plain_grad,) = torch.autograd.grad(plain.sum(), hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_logprobs(hidden, weight, targets)[0]
        (cast_grad,) = torch.autograd.grad(cast.sum(), hidden)
        kl = exact_kl(hidden, weight, hidden, weight + 0.1 * weight.flip(0))
    assert torch.equal(cast, plain)
    assert torch.equal(cast_grad, plain_grad)
    assert torch.equal(kl, exact_kl(hidden, weight, hidden, weight + 0.1 * weight.flip(0)))


def test_logprobs_do_not_depend_on_the_tile_or_the_micro_batch():
    hidden, weight, _, targets = example(M=64, D=16, V=33, dtype=torch.float32)
    whole = token_logprobs(hidden, weight, targets)[0]
    for tile in ((1, 33), (5, 7), (64, 1)):
        torch.testing.assert_close(token_logprobs(hidden, weight, targets, tile=tile)[0], whole, rtol=0, atol=5e-6)
    parts = [token_logprobs(h, weight, t)[0] for h, t in zip(hidden.split(10), targets.split(10), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=5e-6)


def test_temperature_is_part_of_the_distribution():
    hidden, weight, _, targets = example()
    cold = token_logprobs(hidden, weight, targets, temperature=0.5)[0]
    torch.testing.assert_close(cold, token_logprobs(2 * hidden, weight, targets)[0])
    assert not torch.allclose(cold, token_logprobs(hidden, weight, targets)[0])


def test_logits_of_ten_thousand_stay_finite():
    # two tokens: logits +1e4 and -1e4, so log p = 0 and -2e4, entropy 0
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    assert logprobs.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.tolist() == [[0.0], [-2e4]]  # (onehot - p) @ weight
    assert weight.grad.tolist() == [[-1.0], [1.0]]


def test_no_tokens_give_no_logprobs_and_zero_gradients():
    hidden, weight, _, targets = example(M=0)
    weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, with_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad.count_nonzero() == 0


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_all_logits_are_never_held_at_once_forward_or_backward():
    M, D, V, tile = 64, 4, 50, (8, 25)
    hidden, weight, bias, targets = example(M, D, V)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with LargestTensor() as largest:
        logprobs, entropy = token_logprobs(hidden, weight, targets, bias=bias, tile=tile, with_entropy=True)
        torch.autograd.grad(logprobs.sum() + entropy.sum(), leaves)
        exact_kl(hidden, weight, hidden, weight, tile=tile)
    assert largest.numel == max(math.prod(tile), M * D)


def test_exact_kl_agrees_with_scipy():
    hidden_p, weight_p, bias_p, _ = example()
    hidden_q, weight_q, _, _ = example(D=6, seed=1)  # another model, of another width
    actual = exact_kl(hidden_p, weight_p, hidden_q, weight_q, bias_p=bias_p, temperature=0.8, tile=(3, 4))
    p = scipy_softmax((hidden_p @ weight_p.T + bias_p).numpy() / 0.8, axis=1)
    q = scipy_softmax((hidden_q @ weight_q.T).numpy() / 0.8, axis=1)
    expected = torch.tensor([scipy_entropy(a, b) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(actual, expected)


def test_exact_kl_of_models_that_scale_and_cap_differently():
    hidden_p, weight_p, bias_p, _ = example()
    hidden_q, weight_q, _, _ = example(D=6, seed=1)
    shapes = {"shape_p": (0.3, 1.5), "shape_q": (2.0, None)}
    actual = exact_kl(hidden_p, weight_p, hidden_q, weight_q, bias_p=bias_p, temperature=0.8, tile=(3, 4), **shapes)
    p = scipy_softmax(1.5 * (0.3 * (hidden_p @ weight_p.T + bias_p) / 1.5).tanh().numpy() / 0.8, axis=1)
    q = scipy_softmax(2.0 * (hidden_q @ weight_q.T).numpy() / 0.8, axis=1)
    torch.testing.assert_close(actual, torch.tensor([scipy_entropy(a, b) for a, b in zip(p, q, strict=True)]))


def test_exact_kl_is_never_negative_and_zero_for_the_same_model():
    hidden, weight, _, _ = example(M=200, dtype=torch.float32)
    assert exact_kl(hidden, weight, hidden, weight).tolist() == [0.0] * 200
    assert (exact_kl(hidden, weight, hidden + 1e-7, weight) >= 0).all()
    hidden = torch.ones(1, 1)
    kl = exact_kl(hidden, torch.tensor([[1e4], [-1e4]]), hidden, torch.tensor([[-1e4], [1e4]]))
    assert kl.tolist() == [2e4]


# --- the sampler's distribution ------------------------------------------------------------------------------------


def slow_truncation(logits, temperature, top_p, top_k):
    """One row, in plain Python."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or None]
    mass = sum(weights[i] for i in order)
    kept, seen = [], 0.0
    for i in order:
        kept.append(i)
        seen += weights[i] / mass
        if seen >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [math.log(weights[i] / total) if i in kept else -math.inf for i in range(len(logits))]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    list(itertools.product([0.5, 1.0, 2.0], [0.05, 0.61, 0.93, 1.0], [0, 1, 4, 99])),
)
def test_truncation_is_that_of_the_definition(temperature, top_p, top_k):
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = truncated_logprobs(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    expected = [slow_truncation(row, temperature, top_p, top_k) for row in logits.tolist()]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    kept = truncated_logprobs(logits, top_p=0.75)  # exactly reached by two tokens
    torch.testing.assert_close(kept.exp(), torch.tensor([[1 / 3, 2 / 3, 0.0, 0.0]]))
    one_more = truncated_logprobs(logits, top_p=0.76)
    assert one_more.isfinite().sum() == 3
    assert truncated_logprobs(logits, top_p=1e-9).exp().tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_untruncated_sampling_has_the_logprobs_of_training():
    hidden, weight, _, targets = example()
    trained = token_logprobs(hidden, weight, targets, temperature=0.7)[0]
    sampled = truncated_logprobs(hidden @ weight.T, temperature=0.7).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(sampled, trained)


def test_ties_at_the_edge_of_top_k_leave_exactly_k_tokens():
    assert truncated_logprobs(torch.zeros(1, 6), top_k=2).exp().sort().values.tolist() == [[0, 0, 0, 0, 0.5, 0.5]]


def test_one_token_left_is_greedy_decoding():
    logprobs = truncated_logprobs(torch.tensor([[1.0, 3.0, 2.9], [5.0, 0.0, 0.0]]), top_k=1, top_p=0.5)
    assert logprobs.exp().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert sample(logprobs, torch.tensor([0.0, 1.0])).tolist() == [1, 0]


@pytest.mark.parametrize("settings_", [{}, {"top_p": 0.9}, {"top_k": 2}, {"temperature": 0.01}])
def test_extreme_and_banned_logits_give_a_distribution(settings_):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -torch.inf]])
    probs = truncated_logprobs(logits, **settings_).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))


def test_half_precision_logits_are_normalised_in_float32():
    logprobs = truncated_logprobs(torch.zeros(1, 1000, dtype=torch.bfloat16), top_p=0.999)
    assert logprobs.dtype == torch.float32
    assert logprobs.isfinite().sum() == 999


def test_sampling_is_the_inverse_of_the_cumulative_distribution():
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25])
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    assert sample(probs.log().expand(6, 4), uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("row", [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0.3, 0.7, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0]])
def test_a_token_of_zero_probability_is_never_sampled(row, uniform):
    logprobs = torch.tensor([row], dtype=torch.float32).log()
    (token,) = sample(logprobs, torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert row[token] > 0


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1.0)), min_size=1, max_size=30).filter(any),
    st.floats(0, 1, allow_nan=False),
)
def test_sampling_never_leaves_the_support(weights, uniform):
    logprobs = torch.tensor([weights], dtype=torch.float64).log().log_softmax(-1).float()
    token = sample(logprobs, torch.tensor([uniform], dtype=torch.float64))
    assert logprobs[0, token] > -torch.inf


def test_sampled_shares_are_the_probabilities():
    # on an even grid of n uniforms each token is drawn n * p times, to within rounding at its two edges
    n = 10_000
    logprobs = truncated_logprobs(torch.randn(1, 12, generator=torch.Generator().manual_seed(2)), top_p=0.9)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = sample(logprobs.expand(n, -1), uniforms).bincount(minlength=12)
    assert (counts - n * logprobs[0].double().exp()).abs().max() <= 1.001


@pytest.mark.parametrize("vocabulary", [1, 12, 511, 512, 513, 2000])
def test_drawing_block_by_block_is_drawing_from_the_whole_distribution(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(500, vocabulary, generator=generator)
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    ids, logprobs = sample_softmax(logits, uniforms)
    expected = logits.double().log_softmax(-1)
    cumulative = expected.exp().cumsum(-1)
    margin = (cumulative - uniforms[:, None]).abs().min(-1).values
    clear = margin > 1e-6  # elsewhere rounding may fall on either side of the edge between two tokens
    assert clear.float().mean() > 0.95
    assert torch.equal(ids[clear], sample(expected, uniforms)[clear])
    torch.testing.assert_close(logprobs, expected.gather(1, ids[:, None])[:, 0].float(), atol=2e-6, rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.one_of(st.just(-torch.inf), st.floats(-90, 90)), min_size=1, max_size=1100).filter(
        lambda row: max(row) > -torch.inf
    ),
    st.floats(0, 1, allow_nan=False),
)
def test_drawing_block_by_block_never_leaves_the_support(row, uniform):
    logits = torch.tensor([row], dtype=torch.float32)
    ids, logprobs = sample_softmax(logits, torch.tensor([uniform], dtype=torch.float64))
    assert logits[0, ids] > -torch.inf
    assert logprobs > -torch.inf


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_of_given_tokens_are_torchs(temperature):
    torch.manual_seed(0)
    logits, ids = torch.randn(7, 700) * 30, torch.randint(700, (7,))
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs_of(logits, ids, temperature).double(), expected, atol=1e-4, rtol=1e-6)


def test_draw_reports_the_logprobs_of_what_it_sampled_from():
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(50, 30, generator=generator), torch.rand(50, generator=generator)
    for options in ({}, {"temperature": 0.5}, {"top_k": 4}, {"top_k": 30}, {"top_p": 0.5, "temperature": 2.0}):
        ids, logprobs = draw(logits, uniforms, **options)
        expected = truncated_logprobs(logits, **options).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("device", "rounded", "allowed"), [("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, "highest")]
)
def test_tf32_is_allowed_for_products_of_the_head_on_a_gpu_alone(device, rounded, allowed):
    like = SimpleNamespace(device=torch.device(device))
    torch.set_float32_matmul_precision("medium")
    try:
        with _products(like, rounded):
            assert torch.get_float32_matmul_precision() == allowed
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("precision", "rounded"), [("bfloat16", True), ("float32", False)])
def test_a_policy_lets_its_head_round_in_bfloat16_alone(precision, rounded, monkeypatch):
    asked = []
    for name in ("token_logprobs", "exact_kl"):
        real = getattr(roles, name)
        monkeypatch.setattr(roles, name, lambda *a, real=real, **k: asked.append(k["rounded"]) or real(*a, **k))
    policy = roles.Policy(tiny.causal(), pad_id=0)
    policy.precision = precision
    trees = TokenTrees.build([response_tree([3, 4], [[5, 6]])])
    policy(trees)
    policy.kl_to(policy, trees)
    assert asked == [rounded, rounded]
