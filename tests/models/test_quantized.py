"""Adapters on a base of 8 or 4 bits compute what the rounded weights say, train, and fit the base as it was."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tests.models.test_forward import some_trees
from tests.tiny import causal, scalar, write_model_directory
from trimtab.batches.trees import TreeBatch
from trimtab.core import config
from trimtab.core.errors import ConfigError, EngineError
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.adapters import LoRA, add_adapter, load_adapter
from trimtab.models.forward import token_logprobs_of
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.quantized import is_quantized, quantize
from trimtab.models.reference_cache import model_hash
from trimtab.models.roles import Policy
from trimtab.models.save import save_role
from trimtab.stages import sft

ARCHITECTURES = ["qwen3", "gpt2", "mistral_windowed", "gemma3_windowed"]


def logprobs(role):
    return token_logprobs_of(role, some_trees(), 10**9)


def quantized(name, bits):
    model = causal(name)
    quantize(model, bits)
    return model


def with_weights_rounded(name, bits):
    """The same model in float32, its weights put back from the integers by another route."""
    from bitsandbytes.functional import dequantize_4bit

    model, rounded = causal(name), quantized(name, bits)
    for path, layer in rounded.named_modules():
        if type(layer).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        if bits == 4:
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            weight = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
        target = model.get_submodule(path).weight.data
        target.copy_(weight.T if name == "gpt2" else weight)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-4), (8, 0.15)])
def test_what_is_computed_is_what_the_rounded_weights_say(name, bits, tolerance):
    """To rounding with 4 bits; with 8, inputs are rounded to 8 bits as well."""
    ours = logprobs(Policy(quantized(name, bits), pad_id=0))
    torch.testing.assert_close(
        ours, logprobs(Policy(with_weights_rounded(name, bits), pad_id=0)), atol=tolerance, rtol=tolerance
    )
    assert (ours - logprobs(Policy(causal(name), pad_id=0))).abs().max() > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_linear_layers_of_the_blocks_are_rounded(bits):
    before, after = scalar("llama"), scalar("llama")
    quantize(after, bits)
    kept = {n: p for n, p in after.named_parameters() if p.is_floating_point()}
    assert {n for n in kept if "proj" in n} == set()
    assert "score.weight" in kept
    for name, parameter in kept.items():
        assert torch.equal(parameter, before.get_parameter(name))
    assert is_quantized(after)
    assert not is_quantized(before)


def test_32_bits_change_nothing():
    model = causal("llama")
    quantize(model, 32)
    assert not is_quantized(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_takes_as_many_bytes_as_it_should(bits):
    model = quantized("llama", bits)
    layer = model.base_model.layers[0].mlp.down_proj
    assert layer.weight.numel() * layer.weight.element_size() == 32 * 48 * bits // 8


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_learns_on_it_and_nothing_else_moves(bits):
    model = quantized("qwen3", bits)
    add_adapter(model, "policy", LoRA(rank=4, alpha=8), seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    policy = Policy(model, pad_id=0, adapter="policy")
    learner = LocalLearner(policy, AdamW(learning_rate=0.02), token_budget=10**6, num_updates=20, name="policy")
    batch = TreeBatch(trees=some_trees())
    losses = [learner.update([(batch, [SFTLoss()])])["loss/train"].value for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_sampler_draws_from_the_policy(bits):
    policy = Policy(quantized("qwen3", bits), pad_id=0)
    chat = SimpleNamespace(stop_ids={1}, pad_id=0)
    g = LocalSampler(policy, chat, Sampling(max_new_tokens=9))
    assert g.method == "rows"
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    replies = g.continue_ids(prompts, group_size=3, uniforms=torch.rand(6, 9, dtype=torch.float64))
    with torch.no_grad():
        for i, (ids, drawn, _) in enumerate(replies):
            logits = policy.model(input_ids=torch.tensor([prompts[i // 3] + ids])).logits[0]
            expected = logits.log_softmax(-1)[len(prompts[i // 3]) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
            torch.testing.assert_close(torch.tensor(drawn), expected[:, 0], atol=1e-4, rtol=1e-4)


def test_it_is_asked_for_in_the_run_file(tmp_path):
    asked = {"model": "m", "data": "d", "adapter": {"rank": 2, "base_bits": 4}}
    settings = config.resolve(sft.SFTSettings, asked, where="run.toml")
    assert settings.adapter.base_bits == 4
    with pytest.raises(ConfigError, match="base_bits"):
        config.resolve(sft.SFTSettings, asked | {"adapter": {"base_bits": 5}}, where="run.toml")


def test_without_the_library_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="base_bits = 4 needs bitsandbytes") as raised:
        quantize(causal("llama"), 4)
    assert raised.value.fix.startswith("pip install 'trimtab[quantized]'")


@pytest.mark.parametrize("bits", [4, 8])
def test_bases_that_differ_in_scale_only_are_not_taken_for_each_other(bits):
    hashes = set()
    for factor in (1.0, 2.0):  # the rounded integers are the same
        model = causal("qwen3")
        with torch.no_grad():
            model.base_model.layers[0].mlp.down_proj.weight.mul_(factor)
        quantize(model, bits)
        hashes.add(model_hash(Policy(model, pad_id=0)))
        logprobs(Policy(model, pad_id=0))  # running it changes nothing of that
        hashes.add(model_hash(Policy(model, pad_id=0)))
    assert len(hashes) == 2


def test_an_adapter_made_on_it_fits_the_base_as_it_was(tmp_path):
    base = write_model_directory(tmp_path / "base")
    model = load_causal(base)
    quantize(model, 4)
    add_adapter(model, "policy", LoRA(rank=2), seed=0)
    save_role(Policy(model, pad_id=0, adapter="policy"), load_tokenizer(base), tmp_path / "adapter", base=str(base))
    whole = load_causal(base)
    load_adapter(whole, "policy", tmp_path / "adapter")
    saved = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert saved
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in saved.items())


def test_passes_without_gradients_use_the_weights_of_those_with_gradients():
    """On processors with bfloat16, bitsandbytes would repack them on the first pass without gradients."""
    layers = [m for m in quantized("llama", 4).modules() if type(m).__name__ == "Linear4bit"]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
