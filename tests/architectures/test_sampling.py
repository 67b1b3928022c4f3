"""Every family is sampled from its own distribution, whatever form of decoding that takes, or refused by name."""

from types import SimpleNamespace

import pytest
import torch

from tests.architectures.families import PAD, TOLERANCE, VOCAB, causal, every_family, plain_logprobs
from trimtab.batches.trees import response_tree
from trimtab.core.errors import EngineError
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.roles import Policy

CHAT = SimpleNamespace(stop_ids=(), pad_id=PAD)
LENGTHS = (14, 3, 8)
"""Of prompts: padding is needed, and one is longer than every window."""
NUM_NEW = 8

FAST = {
    "llama": "fused",
    "gemma3_text": "rows",
    "gemma4_text": "rows",
    "bloom": "padded",
    "diffllama": "padded",
    "lfm2": "lockstep",
    "mamba2": "lockstep",
    "qwen3_5_text": "lockstep",
    "deepseek_v4": "lockstep",
    "rwkv": "uncached",
}
"""One family of each mechanism, and the fastest form that is right for it."""


@pytest.mark.parametrize(("name", "form"), FAST.items())
def test_a_family_is_sampled_from_its_own_distribution(name, form):
    generator = LocalSampler(Policy(causal(name), pad_id=PAD), CHAT, Sampling(max_new_tokens=NUM_NEW))
    assert generator.method == form
    assert difference_of(generator, name) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in every_family() if name not in FAST])
def test_every_other_family_too_or_it_is_refused(name):
    try:
        model = causal(name)
        plain_logprobs(model, [response_tree([5, 6, 7], [[8, 9]])])
    except Exception as error:
        pytest.skip(f"transformers cannot run a tiny model of it: {type(error).__name__}: {error}")
    try:
        policy = Policy(model, pad_id=PAD)
        generator = LocalSampler(policy, CHAT, Sampling(max_new_tokens=NUM_NEW))
        assert difference_of(generator, name) <= TOLERANCE
    except EngineError as error:
        if "architecture" not in error.where:
            raise


def difference_of(generator, name):
    """Nats between what the sampler says of its tokens and plain transformers on single rows, alone and in groups."""
    draw, worst, plain = torch.Generator().manual_seed(5), 0.0, causal(name)
    for group_size in (1, 3):
        prompts = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in LENGTHS]
        uniforms = torch.rand(len(prompts) * group_size, NUM_NEW, generator=draw, dtype=torch.float64)
        drawn = generator.continue_ids(prompts, group_size=group_size, uniforms=uniforms)
        rows = [response_tree(prompts[i // group_size], [ids]) for i, (ids, _, _) in enumerate(drawn)]
        sampled = torch.tensor([x for _, logprobs, _ in drawn for x in logprobs])
        worst = max(worst, float((sampled - plain_logprobs(plain, rows).detach()).abs().max()))
    return worst


def test_the_console_says_when_a_slow_form_is_taken_and_why(capsys):
    generator = LocalSampler(Policy(causal("bloom"), pad_id=PAD), CHAT, Sampling(max_new_tokens=2))
    assert generator.sampler == "padded"
    said = capsys.readouterr().err
    assert said.startswith(
        "note: replies of BloomForCausalLM are sampled in padded rows, slower than in slots (slots: "
    )
    fast = LocalSampler(Policy(causal("llama"), pad_id=PAD), CHAT, Sampling(max_new_tokens=2))
    assert fast.sampler.startswith("fused")
    assert not capsys.readouterr().err
