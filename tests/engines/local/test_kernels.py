"""The compiled kernels compute what torch computes, whatever the shapes, and give way where they cannot be had."""

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from tests import tiny
from trimtab.core.compiled import SWITCH, library
from trimtab.core.errors import EngineError
from trimtab.engines.local import kernels, slots
from trimtab.engines.local.form_choice import FormChoice, choose_form, forms
from trimtab.engines.local.fused import FusedForward
from trimtab.engines.local.kernels import GATED, CompiledKernels, Kernels, ProductForm, find
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.slot_cache import SlotCache
from trimtab.models.roles import Policy

WEIGHT = torch.zeros(1)


@pytest.fixture
def compiled():
    found = find(WEIGHT)
    if not found.compiled:
        pytest.skip("no C compiler with OpenMP on this machine")
    return found


@pytest.fixture
def looked_for_anew():
    library.cache_clear()
    yield
    library.cache_clear()


def product_in_float64(x, weights, biases, form, norm, eps, *, rounded=False):
    x = x.double()
    if form == "normed":
        x = rms_norm(x, (x.shape[1],), norm.double(), eps)
    if form == "gated":
        gate, up = x.chunk(2, 1)
        x = silu(gate) * up
    if rounded:
        x, weights = x.bfloat16().double(), [w.bfloat16() for w in weights]
    parts = [linear(x, w.double(), None if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("form", ["plain", "normed", "gated"])
@pytest.mark.parametrize(("ins", "outs"), [(64, (64, 32, 32)), (100, (37, 5)), (1, (1,)), (200, (6, 1, 12))])
@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 17, 24, 33, 47, 70])
def test_products_are_torchs(compiled, n, ins, outs, form):
    torch.manual_seed(n)
    weights = [torch.randn(o, ins) / ins**0.5 for o in outs]
    biases = [torch.randn(o) if i % 2 else None for i, o in enumerate(outs)]
    x = torch.randn(n, 2 * ins if form == "gated" else ins) * 3
    norm, start = torch.rand(ins), torch.randn(n, sum(outs))
    expected = product_in_float64(x, weights, biases, form, norm, 1e-6)
    matrices = compiled.matrices(weights, biases, n)
    torch.testing.assert_close(matrices(x, ProductForm(form, norm, 1e-6)).double(), expected, atol=1e-5, rtol=1e-5)
    added = start.clone()
    assert matrices(x, ProductForm(form, norm, 1e-6), add_to=added) is added
    torch.testing.assert_close(added.double(), start.double() + expected, atol=1e-5, rtol=1e-5)
    if all(b is None for b in biases):
        torch.testing.assert_close(
            Kernels().matrices(weights, biases, n)(x, ProductForm(form, norm, 1e-6)).double(),
            expected,
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("form", ["plain", "normed", "gated"])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(compiled, form):
    torch.manual_seed(0)
    x, norm = torch.randn(70, 2 * 200 if form == "gated" else 200), torch.rand(200)
    matrices = compiled.matrices([torch.randn(37, 200)], [torch.randn(37)], 70)
    whole = matrices(x, ProductForm(form, norm, 1e-6))
    for n in range(1, 70):
        assert torch.equal(matrices(x[:n], ProductForm(form, norm, 1e-6)), whole[:n]), n


@pytest.mark.parametrize("value", [-1e4, -88.0, -50.0, 0.0, 50.0, 88.0, 1e4])
def test_the_gate_saturates_as_silu_does(compiled, value):
    x = torch.tensor([[value, 1.0]])
    result = compiled.matrices([torch.ones(1, 1)], [None], 1)(x, GATED)
    torch.testing.assert_close(result[0], silu(x[0, :1]), atol=1e-30, rtol=1e-6)


def kept(kernels, keys, values):
    """A cache with these keys and values [n, KV, T, size]."""
    cache = kernels.cache(keys[:, :, 0], len(keys), keys.shape[2])
    kernels.store(cache, 0, keys, values)
    return cache


def told(cache):
    """The keys and values [n, KV, T, size] of a cache."""
    keys, values = cache
    return keys.transpose(3, 4).flatten(4).flatten(2, 3), values


def test_what_is_not_a_number_stays_so(compiled):
    rows = kept(compiled, torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8))
    query = torch.ones(2, 1, 8)
    query[1, 0, 3] = torch.nan
    seen = compiled.attend(
        query, query, torch.ones(2, 1, 8), scaling=1.0, window=None, rows=rows, places=torch.tensor([1, 1])
    )
    assert seen[0].isfinite().all()
    assert seen[1].isnan().all()
    assert compiled.matrices([torch.ones(3, 8)], [None], 2)(query[:, 0])[1].isnan().all()


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("n", "size"), [(1, 8), (5, 12), (40, 64)])
def test_rotations_are_torchs(compiled, n, size, with_norm):
    torch.manual_seed(0)
    x, norm = torch.randn(n, 7, size), torch.rand(5, size) if with_norm else None
    angles = torch.rand(n, size // 2).repeat(1, 2) * 6
    ours, theirs = x.clone(), x.clone()
    compiled.rotate(ours, 5, norm, 1e-6, angles.cos(), angles.sin())
    Kernels().rotate(theirs, 5, norm, 1e-6, angles.cos(), angles.sin())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[:, 5:], x[:, 5:]), "values are not rotated"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 70])
@pytest.mark.parametrize("with_prompts", [True, False])
@pytest.mark.parametrize(("kv_heads", "repeats", "size"), [(2, 3, 8), (1, 1, 24), (3, 2, 64), (1, 5, 128), (1, 2, 7)])
def test_attention_is_torchs(compiled, kv_heads, repeats, size, with_prompts, window, precision):
    """In bfloat16 that of rounded queries, keys and values."""
    torch.manual_seed(size)
    used = CompiledKernels(compiled.library, precision)
    n, prompt_lengths, prompt_of = 6, torch.tensor([7, 1, 83]), torch.tensor([1, 0, 0, 1, 2, 2])
    places = torch.tensor([0, 3, 8, 17, 2, 99])
    before = tuple(torch.randn(7, kv_heads, 100, size) for _ in range(2))
    of_prompts = tuple(torch.randn(3, kv_heads, 90, size) for _ in range(2))
    query, key, value = (torch.randn(n, h, size) for h in (kv_heads * repeats, kv_heads, kv_heads))
    rows = kept(used, *before)
    assert rows[0].dtype == rows[1].dtype == (torch.float32 if size % 2 else precision)
    places_of = {"prompt_of": prompt_of, "prompt_lengths": prompt_lengths}
    shared = {"prompts": kept(used, *of_prompts), **places_of} if with_prompts else {}
    output = used.attend(query, key, value, scaling=0.3, window=window, rows=rows, places=places, **shared)

    def rounded(x):
        return x.to(rows[0].dtype).float()

    for i in range(n):
        seen = []
        for stored, new, prompts in zip(before, (key, value), of_prompts, strict=True):
            stored[i, :, places[i]] = new[i]
            own = stored[i, :, : places[i] + 1]
            all_of = torch.cat([prompts[prompt_of[i], :, : prompt_lengths[prompt_of[i]]], own], 1)
            seen.append((all_of if with_prompts else own)[:, -(window or 1000) :].repeat_interleave(repeats, 0))
        expected = scaled_dot_product_attention(*map(rounded, (query[i, :, None], *seen)), scale=0.3)[:, 0]
        torch.testing.assert_close(output[i], expected, atol=1e-5, rtol=1e-5)
    for held, stored in zip(told(rows), before, strict=True):
        assert torch.equal(held[:, :, :100].float(), rounded(stored)), "stored at its place and nowhere else"


def test_attention_has_the_same_bits_wherever_the_prompt_stands_and_whatever_is_beside_it(compiled):
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 90, 64), torch.randn(1, 2, 90, 64)
    query, key, value = torch.randn(1, 6, 64), torch.randn(1, 2, 64), torch.randn(1, 2, 64)
    options = {"scaling": 0.3, "window": 80}

    def in_one_row():
        rows = kept(compiled, keys, values)
        return compiled.attend(query, key, value, rows=rows, places=torch.tensor([89]), **options)[0]

    def apart(length):
        own = [torch.cat([x[:, :, length:], torch.randn(1, 2, length, 64)], 2) for x in (keys, values)]
        prompts = kept(compiled, keys[:, :, :length], values[:, :, :length])
        places, owners = torch.full((9,), 89 - length), torch.zeros(9, dtype=torch.int64)
        rows = kept(compiled, *(x.expand(9, -1, -1, -1) for x in own))
        whose = {"places": places, "prompt_of": owners, "prompt_lengths": torch.tensor([length])}
        states = (x.expand(9, -1, -1) for x in (query, key, value))
        return compiled.attend(*states, rows=rows, prompts=prompts, **whose, **options)

    whole = in_one_row()
    for length in (1, 16, 37, 64, 70):
        for row in apart(length):
            assert torch.equal(row, whole), length


def test_what_a_row_held_before_is_not_seen_even_if_it_is_no_number(compiled):
    for precision in (torch.float32, torch.bfloat16):
        used = CompiledKernels(compiled.library, precision)
        rows = kept(used, *(torch.full((1, 1, 40, 8), torch.nan) for _ in range(2)))
        query = torch.ones(1, 1, 8)
        seen = used.attend(query, query, query, scaling=1.0, window=1, rows=rows, places=torch.tensor([20]))
        assert seen.tolist() == [[[1.0] * 8]]


def test_heads_that_are_a_view_of_something_larger(compiled):
    torch.manual_seed(0)
    states, zeros = torch.randn(4, 4, 16), torch.zeros(4, 1, 2, 16)
    rows = [kept(compiled, zeros, zeros) for _ in range(2)]
    places = torch.zeros(4, dtype=torch.int64)
    views = states.split([2, 1, 1], 1)
    options = {"scaling": 1.0, "window": None, "places": places}
    of_views = compiled.attend(*views, rows=rows[0], **options)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    assert torch.equal(of_views, compiled.attend(*apart, rows=rows[1], **options))
    assert torch.equal(rows[0][0], rows[1][0])


def test_a_row_comes_out_the_same_whatever_stands_beside_it_and_however_many_threads_there_are(compiled):
    torch.manual_seed(0)
    matrices = compiled.matrices([torch.randn(50, 130)], [None], 8)
    x = torch.randn(40, 130)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads, size in itertools.product((1, 2, 3), (1, 7, 40)):
            torch.set_num_threads(num_threads)
            results.append(
                torch.cat([matrices(part, ProductForm("normed", torch.ones(130))) for part in x.split(size)])
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_weights_are_used_where_they_are(compiled):
    weight = torch.randn(3, 8)
    matrices = compiled.matrices([weight], [None], 1)
    weight.fill_(2.0)
    assert matrices(torch.ones(1, 8)).tolist() == [[16.0] * 3]


def test_other_types_are_left_to_torch():
    assert not find(torch.zeros(1, dtype=torch.bfloat16)).compiled
    assert not find(torch.zeros(1, dtype=torch.float64)).compiled


@pytest.mark.parametrize("multiplies", [True, False])
def test_autocast_is_left_to_torch_but_on_processors_that_multiply_bfloat16(compiled, monkeypatch, multiplies):
    monkeypatch.setattr(kernels, "_library", lambda: SimpleNamespace(multiplies_pairs=lambda: int(multiplies)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = find(WEIGHT)
        assert found.compiled == multiplies
        assert not multiplies or found.dtype == torch.bfloat16
        if not multiplies:
            monkeypatch.setenv(SWITCH, "compiled")
            with pytest.raises(EngineError, match="this processor does not multiply bfloat16"):
                find(WEIGHT)
    assert find(WEIGHT).dtype == torch.float32


@pytest.mark.parametrize("form", ["plain", "normed", "gated"])
@pytest.mark.parametrize(("ins", "outs"), [(64, (64, 32, 32)), (100, (37, 5)), (2, (1,)), (200, (6, 1, 12)), (7, (9,))])
@pytest.mark.parametrize("n", [1, 9, 16, 24, 33, 47, 70])
def test_products_in_bfloat16_are_those_of_rounded_operands(compiled, n, ins, outs, form):
    torch.manual_seed(n)
    in_pairs = CompiledKernels(compiled.library, torch.bfloat16)
    weights = [torch.randn(o, ins) / ins**0.5 for o in outs]
    biases = [torch.randn(o) if i % 2 else None for i, o in enumerate(outs)]
    x = torch.randn(n, 2 * ins if form == "gated" else ins) * 3
    norm, start = torch.rand(ins), torch.randn(n, sum(outs))
    made = in_pairs.matrices(weights, biases, n)(x, ProductForm(form, norm, 1e-6), add_to=start.clone())
    exact = product_in_float64(x, weights, biases, form, norm, 1e-6)
    rounded = product_in_float64(x, weights, biases, form, norm, 1e-6, rounded=ins % 2 == 0)
    assert ins % 2 or not torch.equal(rounded, exact)
    # An entry on the edge may be rounded the other way, by a part in 256.
    torch.testing.assert_close(made.double(), start.double() + rounded, atol=2e-2, rtol=1e-5)
    assert (made.double() - start.double() - rounded).abs().mean() < 1e-4


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(SWITCH, "torch")
    assert type(find(WEIGHT)) is Kernels


def test_a_wrong_word_in_the_environment_is_answered_with_the_right_ones(monkeypatch):
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(EngineError, match=r"TRIMTAB_KERNELS = 'off'[^$]*torch or compiled"):
        find(WEIGHT)


def test_what_is_asked_for_and_cannot_be_had_is_said(monkeypatch, looked_for_anew):
    monkeypatch.setenv(SWITCH, "compiled")
    with pytest.raises(EngineError, match="only float32 weights on a CPU"):
        find(WEIGHT.double())
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(EngineError, match=r"no C compiler with OpenMP[^$]*install gcc or name"):
        find(WEIGHT)


@pytest.mark.parametrize(("asked", "answer"), [("off", "set it to torch or compiled"), ("compiled", "no C compiler")])
def test_a_mistake_in_the_environment_does_not_end_in_a_slower_form(monkeypatch, looked_for_anew, asked, answer):
    monkeypatch.setenv(SWITCH, asked)
    monkeypatch.setenv("CC", "no-such-compiler")
    chat = SimpleNamespace(stop_ids={1}, pad_id=0)
    with pytest.raises(EngineError, match=answer):
        choose_form(Policy(tiny.causal("llama"), pad_id=0), Sampling(), chat)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.usefixtures("compiled", "looked_for_anew")
def test_vectors_of_every_width_compute_the_same(monkeypatch, lanes):
    # The compiler makes the width of another processor out of what this one has.
    width = {4: "-U__AVX512F__ -U__AVX__", 8: "-U__AVX512F__ -D__AVX__", 16: "-D__AVX512F__"}[lanes]
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} {width}")
    found = find(WEIGHT)
    assert found.compiled
    for n in (1, 5, 11, 16, 23, 33, 41):
        test_products_are_torchs(found, n, 100, (37, 5), "normed")
        test_products_are_torchs(found, n, 64, (64, 32, 32), "gated")
        test_products_in_bfloat16_are_those_of_rounded_operands(found, n, 64, (64, 32, 32), "gated")
    for size, window, precision in itertools.product((24, 64, 128), (None, 70), (torch.float32, torch.bfloat16)):
        test_attention_is_torchs(found, 2, 3, size, True, window, precision)
    test_attention_has_the_same_bits_wherever_the_prompt_stands_and_whatever_is_beside_it(found)
    test_what_is_not_a_number_stays_so(found)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc --no-such-flag"])
@pytest.mark.usefixtures("looked_for_anew")
def test_without_a_compiler_that_can_do_it_torch_computes(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not find(WEIGHT).compiled
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("looked_for_anew")
def test_a_cache_that_cannot_be_written_costs_speed_and_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert not find(WEIGHT).compiled


@pytest.mark.usefixtures("compiled", "looked_for_anew")
def test_they_are_compiled_once_and_kept_where_only_their_owner_writes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(find(WEIGHT), CompiledKernels)
    (made,) = (tmp_path / "trimtab").iterdir()
    assert (tmp_path / "trimtab").stat().st_mode & 0o077 == 0
    written = made.stat().st_mtime_ns
    code = "import torch; from trimtab.engines.local.kernels import find; assert find(torch.zeros(1)).compiled"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert made.stat().st_mtime_ns == written


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1])
def test_what_is_not_a_number_stays_so_in_bfloat16(compiled, bits):
    x = torch.ones(2, 4)
    x[0, 1] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert x[0, 1].isnan()
    made = CompiledKernels(compiled.library, torch.bfloat16).matrices([torch.ones(3, 4)], [None], 2)(x)
    assert made[0].isnan().all()
    assert made[1].tolist() == [4.0] * 3


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_copy_with_other_weights_is_refused_in_both_precisions(compiled, precision):
    model = Policy(tiny.causal("llama"), pad_id=0).model
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is not None):
        fused = FusedForward(model, 4, CompiledKernels(compiled.library, precision or torch.float32))
        fused.prove_fresh(model)
        with torch.autocast("cpu", enabled=False):
            model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(-model.model.layers[0].mlp.down_proj.weight)
        with pytest.raises(EngineError, match="differs from the model"):
            fused.prove_fresh(model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_windowed", "gpt2"])
def test_replies_in_bfloat16_are_near_the_policy_in_each_form(compiled, monkeypatch, family):
    """Also where the processor does not multiply bfloat16: then the kernels compute the same more slowly."""
    pairs = CompiledKernels(compiled.library, torch.bfloat16)
    monkeypatch.setattr(
        slots, "find", lambda weight: pairs if kernels.product_dtype(weight) != weight.dtype else compiled
    )
    policy = Policy(tiny.causal(family), pad_id=0)
    chat = SimpleNamespace(stop_ids={1}, pad_id=0)
    prompts = [[3, 4, 5, 6], [7, 8], [9] * 12]
    uniforms = torch.rand(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = LocalSampler(policy, chat, Sampling(max_new_tokens=20, precision="bfloat16"))
    for form in forms(policy, sampler.sampling, chat):
        sampler._choice = FormChoice(family, form, {})
        assert isinstance(form, slots.SlotForm) == (form.name in ("fused", "rows"))
        replies = sampler.continue_ids(prompts, group_size=2, uniforms=uniforms)
        assert 0 < sampler.difference < 0.2
        assert all(ids for ids, _, _ in replies)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_windowed"])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_all_blocks_in_one_call_give_the_bits_of_one_after_the_other(compiled, family, group_size, precision):
    model = tiny.causal(family)
    fused = FusedForward(model, 8, CompiledKernels(compiled.library, precision or torch.float32))
    prompts = [[3, 5, 8, 13, 21], [2, 7], [11, 4, 9]]
    states = []
    for in_one_call in (False, True):
        slots = SlotCache(
            num_rows=9, num_prompts=9, group_size=group_size, prompt_width=5, reply_width=6, kernels=fused.kernels
        )
        with torch.no_grad():
            ids = torch.tensor([token for prompt in prompts for token in prompt])
            places = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
            fused(ids, places, slots.add([0, 1, 2], prompts))
            for step in range(6):
                attend = slots.extend()
                one_by_one = lambda *row, attend=attend: attend(*row)  # noqa: E731
                tokens = (torch.arange(len(slots.sequences)) * 7 + step) % 30
                before = slots.positions - 1
                states.append(fused(tokens, before, attend if in_one_call else one_by_one))
    assert len(states) == 12
    for first, second in zip(states[:6], states[6:], strict=True):
        assert torch.equal(first, second)
    assert states[0].std() > 0
